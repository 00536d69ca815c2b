"""paho's client as this project uses it: no message ends a connection, and no callback ends a thread in silence.

Owns the import of `paho.mqtt.client`. Where somebody else has installed dnspython (the signatures' libraries do), paho
imports that, too, for SRV records, which nobody asks for here: 3 MB of the daemon, and a quarter of a second.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from typing import Any

from paho.mqtt.enums import MQTTErrorCode


@contextlib.contextmanager
def _as_if_missing(package: str) -> Iterator[None]:
    """In the block, who imports this package finds that it is not installed, unless it is there already.

    Source: Python's reference, 5.3.1, on None in `sys.modules`.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with _as_if_missing("dns"):
    from paho.mqtt import client as paho

__all__ = ["Client", "disable_nagle", "guarded", "paho"]

log = logging.getLogger(__name__)


class Client(paho.Client):
    """paho, except for a message whose properties or whose topic it cannot read: that one is acked and passed over.

    paho itself ends the connection over properties, and the broker delivers the message again, for ever. It takes
    U+FEFF for malformed, which MQTT 5.0 §1.5.4 allows and brokers pass on. A topic that is not UTF-8, which some
    brokers pass on as well, it lets whoever looks at it find out.

    Attributes:
        on_unreadable: told the error.
    """

    on_unreadable: Callable[[Exception], None]

    def turn(self, timeout_s: float, wake: socket.socket | None = None) -> bool:
        """Waits for the connection, or for `wake`, and then reads and writes what there is. False if it is lost.

        Raises:
            Exception: whatever paho raises on a malformed packet; the connection is at fault.
        """
        sock = self.socket()
        if sock is None:
            return False
        pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        reading = [sock] if wake is None else [sock, wake]
        writing = [sock] if self.want_write() else []
        try:
            readable, writable, _ = select.select(reading, writing, [], 0 if pending else timeout_s)
        except (OSError, ValueError):
            return False
        if wake in readable:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
        if sock in readable or pending:
            self.loop_read()
        if sock in writable:
            self.loop_write()
        self.loop_misc()
        return True

    def _handle_publish(self) -> MQTTErrorCode:
        try:
            return super()._handle_publish()
        except Exception as error:  # noqa: BLE001 - only decoding is unguarded, and it raises whatever it likes
            packet = self._in_packet["packet"]
            topic_end = 2 + int.from_bytes(packet[:2], "big")
            mid = int.from_bytes(packet[topic_end : topic_end + 2], "big")
            self.on_unreadable(error)
            return self.ack(mid, (self._in_packet["command"] & 0x06) >> 1)

    def _handle_on_message(self, message: paho.MQTTMessage) -> None:
        try:
            message.topic  # noqa: B018 - it is decoded here
        except UnicodeDecodeError as error:
            self.on_unreadable(error)
            self.ack(message.mid, message.qos)
        else:
            super()._handle_on_message(message)


def disable_nagle(_client: paho.Client, _userdata: object, sock: socket.socket) -> None:
    """Small messages one after the other would wait 40 to 86 ms for an acknowledgement of the first."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def guarded(callback: Callable[..., None]) -> Callable[..., None]:
    """The callback, with its exceptions in the log: in paho's hands one would end the reading without a sign."""

    def call(*arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("mqtt callback failed code=internal")

    return call
