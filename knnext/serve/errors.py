"""Answers other than what was asked for, in the shape that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knnext.errors import KnnextError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class Gone(KnnextError):
    """Whoever asked has closed the connection."""


class Refused(KnnextError):
    """An answer other than what was asked for.

    Args:
        status: of HTTP.
        words: for people.
        param: the field that is wrong.
        code: a word for programs.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        words: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_whole(words))
        self.status, self.code = status, code
        self.param = None if param is None else _whole(param)
        self.headers = dict(headers or {})

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON: {"error": {"message", "type", "param", "code"}}."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def _whole(text: str) -> str:
    """Half a surrogate pair, which an answer cannot hold, as it is written in JSON."""
    return text.encode("utf-8", "backslashreplace").decode()


def bad(words: str, param: str | None = None) -> Refused:
    """400: the asker's doing."""
    return Refused(400, words, param=param)


def busy(words: str, seconds: int) -> Refused:
    """429: too much at once; when to come again is told."""
    return Refused(429, words, code="queue_full", headers={"Retry-After": str(seconds)})


def late(seconds: float) -> Refused:
    """504: given up. Asking again would only take as long again, which clients are told."""
    return Refused(
        504,
        f"this took longer than {seconds:g} seconds, and was given up",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def unready(words: str) -> Refused:
    """503: not yet, or not any more."""
    return Refused(503, words, code="unavailable", headers={"Retry-After": "5"})
