"""A door with TLS: whoever connects shakes hands first, and is a connection only then.

Owns the bound of those who have not got so far. asyncio's server has none for them: each has a socket and buffers until
its time limit, and one client that opens them and says nothing could have any number. Here the one that has taken
longest gives way to a new one, as a connection without a request does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

MAX_HANDSHAKES = 64
HANDSHAKE_S = 10.0
_AGAIN_S = 1.0
"""After a connection could not be taken, for lack of descriptors or memory."""


class TlsServer:
    """Takes the connections of one listening socket, as `asyncio.Server` does without TLS. Used by one event loop.

    Args:
        listener: does not block.
        make: the protocol that gets what is sent after the handshake.
    """

    def __init__(
        self, listener: socket.socket, tls: ssl.SSLContext, make: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._make = make
        self._handshakes: dict[asyncio.Task[None], None] = {}
        """The oldest first."""
        self._accepting = asyncio.create_task(self._accept())

    @property
    def handshakes(self) -> int:
        """How many clients shake hands now."""
        return len(self._handshakes)

    def close(self) -> None:
        """Takes nobody any more. Those who have shaken hands stay."""
        for task in (self._accepting, *self._handshakes):
            task.cancel()

    async def _accept(self) -> None:
        with self._listener:
            while True:
                client = await self._taken()
                if len(self._handshakes) >= MAX_HANDSHAKES:
                    oldest = next(iter(self._handshakes))
                    self._ended(oldest)
                    oldest.cancel()
                task = asyncio.create_task(self._shake(client))
                self._handshakes[task] = None
                task.add_done_callback(self._ended)
                await asyncio.sleep(0)  # it begins, and others go on, however many wait to be taken

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    async def _taken(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return (await loop.sock_accept(self._listener))[0]
            except ConnectionError:
                pass  # it has left already
            except OSError as error:
                loop.call_exception_handler({"message": "no connection can be taken", "exception": error})
                await asyncio.sleep(_AGAIN_S)

    async def _shake(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has left, was too slow, or speaks no TLS
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make,
                client,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=HANDSHAKE_S,
            )
