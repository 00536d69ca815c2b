"""The page at `/`: what this device is and does, for whoever looks at it in a browser, and a box to chat with it.

Owns the page's paths and headers, and how often the daemon is asked for it: once a second, however many look. It knows
of the device what the control socket says, and its chat is the interface's own. Jinja and everything that makes the
page are imported when it is asked for the first time: programs that use the interface do not pay for it.

    GET /            whole, or, at a door with a token, the empty page that asks for it
    GET /page/state  the parts that change, for the page's script
    GET /page/…      its script, its style, its icon

Nothing of it comes from elsewhere, nothing is written into it by a string of HTML, and no other page can frame it:
`HEADERS` has what browsers are told. Source: W3C, CSP 3 and Trusted Types; docs/adr/0021-a-page-that-looks-again.md.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_agent.errors import DaemonNotRunning, EdgeAgentError

_FILES = {
    "/page/script.js": ("script.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
SHELL = frozenset({"/", *_FILES})
"""What a browser gets without a token, for it sends none before the page has asked for it. Nothing of the device is in
it."""
STRANGER = "edge_agent.stranger"
"""A scope that has it is of a request for the shell, without the token that its door asks for."""
HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
FRESH_S = 1.0
"""What the daemon said is told to everybody for so long."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known of the device at one moment.

    Attributes:
        status: of `edge-agent status`; empty where the daemon does not answer.
        recent: what its last prompts took, and since when it runs.
        problem: why the daemon does not answer, for people; empty if it does.
    """

    status: Mapping[str, Any] = field(default_factory=dict)
    recent: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


class Page:
    """
    Args:
        ask: the daemon, for the document of that operation. It raises EdgeAgentError or TimeoutError.
    """

    def __init__(self, ask: Callable[[str], Awaitable[Mapping[str, Any]]]) -> None:
        self._ask = ask
        self._looking = asyncio.Lock()
        self._look: Look | None = None
        self._looked_s = 0.0

    def routes(self) -> list[Route]:
        files = [
            Route(path, functools.partial(_file, Path(__file__).with_name("files") / name, media_type))
            for path, (name, media_type) in _FILES.items()
        ]
        return [Route("/", self._page), Route("/page/state", self._state), *files]

    async def _page(self, request: Request) -> Response:
        look = None if STRANGER in request.scope else await self._fresh_look()
        return self._rendered("page.html", look)

    async def _state(self, request: Request) -> Response:
        return self._rendered("state.html", await self._fresh_look())

    def _rendered(self, template: str, look: Look | None) -> Response:
        from edge_agent.gateway.page import rendering

        return Response(rendering.render(template, look), media_type="text/html", headers=HEADERS)

    async def _fresh_look(self) -> Look:
        async with self._looking:
            now_s = asyncio.get_running_loop().time()
            if self._look is None or now_s - self._looked_s >= FRESH_S:
                self._look = await self._ask_daemon()
                self._looked_s = asyncio.get_running_loop().time()
            return self._look

    async def _ask_daemon(self) -> Look:
        try:
            return Look(status=await self._ask("status"), recent=await self._ask("recent"))
        except TimeoutError:
            return Look(problem="it takes too long to say how it is; see its log")
        except DaemonNotRunning as error:
            return Look(problem=str(error))
        except EdgeAgentError as error:
            return Look(problem=f"{error} ({error.code})")


async def _file(path: Path, media_type: str, request: Request) -> Response:
    return Response(_content(path), media_type=media_type, headers=HEADERS)


@functools.cache
def _content(path: Path) -> bytes:
    return path.read_bytes()
