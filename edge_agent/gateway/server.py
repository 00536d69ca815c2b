"""uvicorn's server on several doors, each with its own TLS and its own guard, and its end when nobody comes.

Owns the bounds of all connections together: it looks at each of them once a second, and at nothing else in between.
Those of a handshake are in `handshakes.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from edge_agent.gateway.connection import KEEP_ALIVE_S, MAX_HEADER_BYTES, Connection
from edge_agent.gateway.handshakes import TlsServer

if TYPE_CHECKING:
    from edge_agent.gateway.doors import Door
    from edge_agent.gateway.guard import Guard

_BACKLOG = 128
_DRAIN_S = 20
"""At SIGTERM, for the answers that are on their way; as the daemon's `inference.drain_s`."""
_LOOK_S = 1.0


class Server(uvicorn.Server):
    """Serves until a signal, or until it is idle.

    Args:
        doors: each with the app behind its guard.
        idle_s: it ends when it had no connection for so long; None for never.
    """

    def __init__(self, doors: Sequence[tuple[Door, Guard]], *, idle_s: float | None) -> None:
        self._doors = [(door, _config(guard)) for door, guard in doors]
        self._guards = [guard for _, guard in doors]
        super().__init__(self._doors[0][1])
        self._tls: list[TlsServer] = []
        self._idle_s = idle_s
        self._busy_s = 0.0
        self._signalled = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._busy_s = loop.time()
        self.servers = []
        for door, config in self._doors:
            make = functools.partial(
                Connection, config=config, server_state=self.server_state, app_state={}, _loop=loop
            )
            if door.tls:
                self._tls.append(TlsServer(door.listener, door.tls, make))
            else:
                self.servers.append(await loop.create_server(make, sock=door.listener, backlog=_BACKLOG))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self._tls:
            server.close()
        await super().shutdown(sockets)

    async def main_loop(self) -> None:
        """As uvicorn's, which wakes the processor ten times a second to see whether a signal has come."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._signalled.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._signalled.set)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.step(asyncio.get_running_loop().time())

    def step(self, now_s: float) -> bool:
        """Looks at all connections, and says what was refused. True when there is nobody to serve any more.

        Args:
            now_s: of the loop's clock.
        """
        state = self.server_state
        for connection in list(state.connections):
            if isinstance(connection, Connection):
                connection.check(now_s)
        for guard in self._guards:
            guard.refused.step(now_s)
        if state.connections or state.tasks or any(server.handshakes for server in self._tls):
            self._busy_s = now_s
        return self._idle_s is not None and now_s - self._busy_s >= self._idle_s


def _config(guard: Guard) -> uvicorn.Config:
    """No lifespan, no web sockets, no trust in what a proxy says, and no words about the software."""
    return uvicorn.Config(
        guard,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # a client must not fill the log
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_DRAIN_S,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
