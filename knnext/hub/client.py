"""The client of the Hub, and its many errors in one sentence each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from knnext.errors import DatastoreError, missing_package

#: Whose errors mean that there is no way to the server.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class HubError(DatastoreError):
    """The Hub refused, could not be reached, or holds something else than a datastore."""


def open_api(token: str | bool | None) -> Any:
    """`HfApi` of HF_ENDPOINT, or of the Hub; MissingPackageError that says what to install."""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise missing_package("the Hub needs", "huggingface_hub", "hub") from error
    found = token if token not in (None, True) else get_token()
    if isinstance(found, str) and not (
        found.isascii() and found.isprintable() and " " not in found
    ):
        raise HubError("token: holds signs that no token of the Hub has; it is not shown here")
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def is_offline() -> bool:
    """HF_HUB_OFFLINE, as the client has read it."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def asking(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Within, whatever the client raises is a HubError that says what it means."""
    from huggingface_hub import errors

    at = "" if revision is None else f" at {revision!r}"
    try:
        yield
    except DatastoreError:
        raise
    except errors.HFValidationError:
        raise HubError(f"repo_id: got {repo_id!r}, want the form 'org/name'") from None
    except errors.LocalTokenNotFoundError as error:
        raise HubError(
            f"{repo_id}: this needs a token: log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: has no branch, tag or commit{at or ' of that name'}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{repo_id}: the Hub is switched off here (HF_HUB_OFFLINE=1)") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{repo_id}{at}: {_reason(error)}") from error
    except Exception as error:
        reason = _cause(error)
        if reason is None:
            raise
        raise HubError(f"{repo_id}{at}: {reason}") from error


def _cause(error: BaseException) -> str | None:
    """What stands behind an error of the client; None for one that is not of the network."""
    from huggingface_hub import errors

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, errors.HfHubHTTPError):
            return _reason(seen)
        if type(seen).__module__.partition(".")[0] in _TRANSPORTS:
            return f"no answer from the server ({_line(seen)}); run it again, it goes on from here"
        if isinstance(seen, OSError) and "Consistency check failed" in str(seen):
            return "a file came shorter or longer than was announced; run it again"
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError):
        return f"the server does not answer as the Hub does ({_line(error)})"
    return None


def _reason(error: Any) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "is open to those only who were granted access on its page; the token has none"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such branch, tag or commit"
    if isinstance(error, errors.EntryNotFoundError):
        return "a file is not there any more: the repository changed meanwhile; run it again"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such dataset repository, or it is private and the token cannot see it"
    known = {
        401: "the token is not valid: `hf auth login`, or set HF_TOKEN",
        403: "the token has not the right to do this there",
        409: "the repository changed meanwhile; run it again",
        412: "the repository changed meanwhile; run it again",
        429: "the server asks to come again later: too many requests",
    }
    if status in known:
        return known[status]
    if status is not None and status >= 500:
        return f"the server failed (status {status}); run it again, it goes on from here"
    return _line(error)


#: A token, whatever stands before it, and the password in an address.
_SECRET = re.compile(r"\bhf_\w{16,}|(?<=earer )[^\s'\"]+|(?<=//)[^/@\s]+@")


def without_secrets(text: str) -> str:
    """What may be shown and logged."""
    return _SECRET.sub("…", text)


def _line(error: BaseException) -> str:
    text = without_secrets(" ".join(str(error).split()))
    return text[:200] or type(error).__name__
