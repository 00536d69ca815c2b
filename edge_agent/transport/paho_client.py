"""paho's client as this project uses it: no message ends a connection or fills the memory, no slow line looks like a
dead one, and no callback ends a thread in silence.

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
import time
from collections.abc import Callable, Iterator
from typing import Any

from paho.mqtt.enums import MessageType, MQTTErrorCode

_READ_BYTES = 1 << 16
_HEAD_BYTES = 1 << 17
"""Of a message that is too large these are kept: its topic and its packet identifier are in them."""


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


class PacketTooLarge(ValueError):
    """A message that nobody here would take."""


class Client(paho.Client):
    """paho, except for a message that is too large, or whose properties or topic it cannot read: that one is acked and
    passed over.

    paho itself ends the connection over properties, and the broker delivers the message again, for ever. It takes
    U+FEFF for malformed, which MQTT 5.0 §1.5.4 allows and brokers pass on. A topic that is not UTF-8, which some
    brokers pass on as well, it lets whoever looks at it find out. And it collects a message of any size in memory: a
    broker of MQTT 5 is told what it may send, one of MQTT 3.1.1 brings 256 MB, and again after each crash over it.

    Attributes:
        on_unreadable: told the error.
        max_packet_bytes: of a message, with its topic and properties.
    """

    on_unreadable: Callable[[Exception], None]
    max_packet_bytes: int = 268_435_455

    def turn(self, timeout_s: float, wake: socket.socket | None = None) -> bool:
        """Waits for the connection, or for `wake`, and then reads and writes what there is. False if it is lost.

        Raises:
            Exception: whatever paho raises on a malformed packet; the connection is at fault.
        """
        sock = self.socket()
        if sock is None:
            return False
        pending = _is_pending(sock)
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

    @property
    def has_unread(self) -> bool:
        """Bytes, or the end of the connection, are there to be read, or a packet has come in part."""
        sock = self.socket()
        if sock is None:
            return False
        try:
            return self.reading or _is_pending(sock) or bool(select.select([sock], [], [], 0)[0])
        except (OSError, ValueError):
            return False

    @property
    def reading(self) -> bool:
        """A packet has come in part."""
        return bool(self._in_packet["command"])

    def _sock_recv(self, bufsize: int) -> bytes:
        data = super()._sock_recv(min(bufsize, _READ_BYTES))
        if data and self._ping_t:  # the answer to a ping stands behind what is being read
            self._ping_t = time.monotonic()
        if self._too_large:
            del self._in_packet["packet"][_HEAD_BYTES:]  # the rest is read only to find the next packet
        return data

    def _packet_handle(self) -> MQTTErrorCode:
        if not self._too_large:
            return super()._packet_handle()
        if self._in_packet["command"] & 0xF0 != MessageType.PUBLISH:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        size = self._in_packet["remaining_length"]
        return self._pass_over(PacketTooLarge(f"{size} bytes, at most {self.max_packet_bytes} are allowed"))

    @property
    def _too_large(self) -> bool:
        return bool(self._in_packet["remaining_length"] > self.max_packet_bytes)

    def _handle_publish(self) -> MQTTErrorCode:
        try:
            return super()._handle_publish()
        except Exception as error:  # noqa: BLE001 - only decoding is unguarded, and it raises whatever it likes
            return self._pass_over(error)

    def _pass_over(self, error: Exception) -> MQTTErrorCode:
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


def _is_pending(sock: object) -> bool:
    """TLS has bytes that no select tells of."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
