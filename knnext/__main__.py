"""``python -m knnext``: the same as the command ``knnext``."""

from __future__ import annotations

import sys

from knnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
