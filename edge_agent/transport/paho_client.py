"""paho's client as this project uses it: no message ends a connection, and no callback ends a thread in silence."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode

log = logging.getLogger(__name__)


class Client(paho.Client):
    """paho, except for a message whose properties it cannot read: that one is acked and passed over.

    paho itself ends the connection over it, and the broker delivers the message again, for ever. It takes U+FEFF
    for malformed, which MQTT 5.0 §1.5.4 allows and brokers pass on.

    Attributes:
        on_unreadable: told the error.
    """

    on_unreadable: Callable[[Exception], None]

    def _handle_publish(self) -> MQTTErrorCode:
        try:
            return super()._handle_publish()
        except Exception as error:  # noqa: BLE001 - only decoding is unguarded, and it raises whatever it likes
            packet = self._in_packet["packet"]
            topic_end = 2 + int.from_bytes(packet[:2], "big")
            mid = int.from_bytes(packet[topic_end : topic_end + 2], "big")
            self.on_unreadable(error)
            return self.ack(mid, (self._in_packet["command"] & 0x06) >> 1)


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
            log.exception("mqtt callback failed")

    return call
