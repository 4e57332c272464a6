"""What a request must be before it is looked at: from here, from who may ask, and small.

A server on the loopback address can be reached by every program of the machine, and by every web
site that its user visits: the site's script can send requests (it is told by its Origin), or have
its own name lead to 127.0.0.1 (it is told by the Host). So both are looked at, and a secret: the
token that only the address printed on the terminal holds, or a key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

from knnext.serve.errors import Refused

MAX_BODY = 512 << 10
_BODY_SECONDS = 10.0
#: Bytes of a body that is too large which are read all the same: who still sends reads no answer.
_READ_IN_VAIN = 64 << 20


class Guard:
    """Knows the names under which a server may be asked for, and perhaps a token.

    Args:
        host: the address that the server is bound to.
        token: what the address of a page must hold.
    """

    def __init__(self, host: str, token: str = "") -> None:
        self._token = token.encode()
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._open = not is_loopback(host)
        if self._open:
            self._names.add(socket.gethostname().lower())

    def check(self, request: Request, token: str | None) -> None:
        """Refused: 400 for a foreign host, 403 for a foreign origin or a wrong token."""
        self.check_origin(request)
        if not same(token, self._token):
            raise Refused(403, "the token is missing or wrong: open the address on the terminal")

    def check_origin(self, request: Request) -> None:
        """Refused: 400 for a foreign host, 403 for a foreign origin."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refused(400, "this server is not known under that name")
        for origin in request.headers.getlist("origin"):
            if _place(origin) != hosts[0].lower():
                raise Refused(403, "requests from other sites are refused")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refused(403, "requests from other sites are refused")

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        # A site that has its name lead here comes with a name, and never with a number.
        return name in self._names or (self._open and _is_number(name))


def _place(origin: str) -> str | None:
    """Host and port, or None where it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def same(given: str | None, secret: bytes) -> bool:
    """Compared in a time that tells nothing."""
    return hmac.compare_digest((given or "").encode("utf-8", "replace"), secret)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


async def body_of(request: Request, most: int = MAX_BODY) -> dict[str, Any]:
    """The request's JSON object.

    Refused: 415 for another kind of body, 413 past ``most`` bytes, 408 where it does not come, 400
    for what is no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must be application/json")
    size = request.headers.get("content-length", "0")
    large = not size.isdecimal() or int(size) > most
    raw = None
    # Who expects to be told to go on has sent nothing yet.
    if not large or "expect" not in request.headers:
        try:
            raw = await asyncio.wait_for(_read(request, most), _BODY_SECONDS)
        except asyncio.TimeoutError:
            if not large:
                raise Refused(408, "the body did not come in time") from None
    if large or raw is None:
        raise Refused(413, f"the body must be at most {most} bytes")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object")
    return found


async def _read(request: Request, most: int) -> bytes | None:
    """The body; None where it is larger."""
    raw, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            raw += part
        elif size > _READ_IN_VAIN:
            break
    return bytes(raw) if size <= most else None


async def disconnected(request: Request) -> None:
    """Returns when whoever asked, and has sent the body, closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def text_in(body: dict[str, Any]) -> str:
    """The field "text". Refused where it is missing, empty, or holds half a surrogate pair."""
    text = body.get("text")
    if not isinstance(text, str) or not text:
        raise Refused(400, "text must be a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, "text holds half a surrogate pair, which is no character") from None
    return text


def number_in(
    body: dict[str, Any], name: str, least: float, most: float, *, whole: bool = False
) -> Any:
    """A number of the body from `least` to `most`. Refused otherwise."""
    value = body.get(name)
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
    if not good:
        kind = "a whole number" if whole else "a number"
        raise Refused(400, f"{name} must be {kind} from {least:g} to {most:g}, got {value!r:.80}")
    return value
