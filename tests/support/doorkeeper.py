"""TCP doors before a broker, which have manners of their own."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

from tests.support.mosquitto import Broker


class Door:
    """Listens before a broker, in a thread of its own. Closed with the block, with all of `_sockets`.

    Attributes:
        port: on the loopback address.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="door", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(60)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._came(client)

    def _came(self, client: socket.socket) -> None:
        """Takes a new connection on. Does not wait for it."""
        raise NotImplementedError


class Doorkeeper(Door):
    """Does not refuse what it does not take: ends a connection over anything about a forbidden topic.

    Args:
        forbidden: what the topic begins with.
        goodbye: sent before the end.

    Attributes:
        ended: how many connections it has ended.
    """

    def __init__(self, broker: Broker, forbidden: str, goodbye: bytes) -> None:
        super().__init__(broker)
        self.ended = 0
        self._forbidden = forbidden.encode()
        self._goodbye = goodbye

    def _came(self, client: socket.socket) -> None:
        server = socket.create_connection((self._broker.host, self._broker.port))
        self._sockets += [client, server]
        for source, target, watched in ((client, server, True), (server, client, False)):
            threading.Thread(target=self._pump, args=(source, target, watched), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, watched: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if watched and self._forbidden in data:
                    self.ended += 1
                    source.sendall(self._goodbye)
                    break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
