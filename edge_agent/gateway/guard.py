"""Who may ask: the checks that come before everything else about a request.

A web page must not reach the interface through its reader's browser. Under a name that the page's author controls (DNS
rebinding) the `Host` is wrong: 421. From another page the browser says its `Origin`: 403. A door with a token asks for
it: 401, but for the empty page that asks people for the token. Nothing of the body has been read by then. Each refusal
is in the log (`refused.py`).

Source: RFC 9110, 15.5.20 (421); RFC 6454, 7 (Origin); RFC 6750, 2.1 and 3 (bearer tokens).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from edge_agent.gateway import answers
from edge_agent.gateway.page import SHELL, STRANGER
from edge_agent.gateway.refusals import HostRefused, HttpRefusal, OriginRefused, Unauthorized
from edge_agent.gateway.refused import RefusedRequests

_READS = ("GET", "HEAD")


class Guard:
    """Lets requests through to the app, or refuses them.

    Args:
        hosts: names, in lower case and without port.
        token: empty where none is asked for.

    Attributes:
        refused: what it let not through.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str = "") -> None:
        self.refused = RefusedRequests()
        self._app = app
        self._hosts = hosts
        self._digest = _digest(token.encode()) if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope["headers"])
        if isinstance(refusal, Unauthorized) and scope["path"] in SHELL and scope["method"] in _READS:
            scope, refusal = {**scope, STRANGER: True}, None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        peer = scope.get("client")
        self.refused.add(refusal, peer[0] if peer else None, asyncio.get_running_loop().time())
        await answers.error(refusal)(scope, receive, send)

    def refusal(self, headers: Collection[tuple[bytes, bytes]]) -> HttpRefusal | None:
        """Why a request goes no further; None where it may.

        Args:
            headers: name in lower case, value; a name may come twice.
        """
        given = [(name, value.decode("latin-1")) for name, value in headers]
        hosts = [value for name, value in given if name == b"host"]
        if len(hosts) != 1 or _host_of(f"//{hosts[0]}") not in self._hosts:
            return HostRefused(
                "the Host of the request is not one of this device's names",
                remedy="add it to http.allowed_hosts",
            )
        if any(_host_of(value) not in self._hosts for name, value in given if name == b"origin"):
            return OriginRefused(
                "the request comes from another web page", remedy="add its host to http.allowed_hosts"
            )
        if self._digest and not self._has_token(given):
            return Unauthorized("the request brings no valid token: Authorization: Bearer TOKEN")
        return None

    def _has_token(self, headers: Collection[tuple[bytes, str]]) -> bool:
        values = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = (values[0] if len(values) == 1 else "").partition(" ")
        right = hmac.compare_digest(_digest(token.strip().encode("latin-1")), self._digest)
        return right and scheme.lower() == "bearer"


def _digest(token: bytes) -> bytes:
    """What is compared: of one length, whatever was sent."""
    return hashlib.sha256(token).digest()


def _host_of(url: str) -> str | None:
    """The host in `//HOST:PORT` or `SCHEME://HOST:PORT`; None where there is none, or more than that."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for what is no port
    except ValueError:
        return None
    plain = parts.netloc and url.endswith(f"//{parts.netloc}") and "@" not in parts.netloc
    return (parts.hostname or "").removesuffix(".") if plain else None
