"""Datastores on the Hugging Face Hub: sent whole in one commit, fetched whole or in parts.

What comes from there is untrusted: nothing of it is run or unpickled, only files that the
datastore's ``meta.json`` lists under its own fixed names are fetched, and none is used before its
length and checksum agree. docs/hub.md is the guide.
"""

from knnext.hub.client import HubError
from knnext.hub.fetch import open_partial
from knnext.hub.layout import EXTRAS, GROUPS
from knnext.hub.pull import pull
from knnext.hub.push import Pushed, push

__all__ = ["EXTRAS", "GROUPS", "HubError", "Pushed", "open_partial", "pull", "push"]
