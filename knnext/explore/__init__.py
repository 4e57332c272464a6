"""A local page on which a text shows what its neighbors do to it: read, continue, search.

`Session` (knnext/explore/session.py) holds the model and the index and answers; `server.py` lets a
browser ask. The page's explorer is the report's (knnext/report/explorer.js).
"""

from __future__ import annotations

from knnext.explore.session import Session

__all__ = ["Session"]
