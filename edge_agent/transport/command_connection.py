"""A command's own connection to the broker, beside the daemon's and for as long as the command runs.

Owns one paho client, which works only while the command's thread is in `until`. The broker may map its client id to
another one's (`use_username_as_clientid`), and with that give it the daemon's session. So it asks for no clean start by
itself: it finds out whose session it has, and ends none but its own.

    connect (MQTT 5, else 3.1.1) → subscribe, publish → until(what was asked for is there) → leave

Source: MQTT 5.0 §3.1.2.4 (Clean Start), §3.1.2.11.2 (Session Expiry Interval), §3.14.2.2.2.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.environment import credential_path
from edge_agent.errors import BrokerUnreachable
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.transport.credentials import read_password, tls_context
from edge_agent.transport.paho_client import Client, disable_nagle, guarded, paho

STEP_TIMEOUT_S = 10.0

OnMessage = Callable[[str, bytes, bool], None]
"""Called with topic, body, and whether the broker had retained it."""

_TURN_S = 0.2
_MAX_PACKET_BYTES = 4 << 20
"""Well above what anybody here publishes, so that a device's document that is too long is seen, and said."""
_NO_SUBSCRIBERS = 0x10
_UNSUPPORTED_PROTOCOL = (0x84, 0x01)


class CommandConnection:
    """One thread's. Made by `connect`.

    Attributes:
        version5: it speaks MQTT 5, else 3.1.1.
        connected: the broker has accepted it.
        ended: why it is over; empty while it is not.
        refused: the broker said no, and not because of the protocol.
        had_session: the broker had a session for it, of an earlier connection or of another client.
        max_packet_bytes: what the broker takes; None if it does not say.
        receive_maximum: how many messages of QoS 1 the broker takes before it has acked the first.
        granted: mid of a subscription → what the broker said of each filter.
        published: mid → what the broker said.
    """

    def __init__(
        self,
        settings: MqttSettings,
        client: Client,
        *,
        client_id: str,
        version5: bool,
        clean: bool,
        on_message: OnMessage,
    ) -> None:
        self.version5 = version5
        self.connected = self.refused = self.had_session = False
        self.ended = ""
        self.max_packet_bytes: int | None = None
        self.receive_maximum = 65_535
        self.granted: dict[int, list[ReasonCode]] = {}
        self.published: dict[int, ReasonCode] = {}
        self._settings = settings
        self._client_id = client_id
        self._clean = clean
        self._client = client
        self._on_message = on_message
        client.on_socket_open = guarded(disable_nagle)
        client.on_connect = guarded(
            lambda _c, _u, flags, code, properties: self._accepted(flags, code, properties)
        )
        client.on_disconnect = guarded(lambda _c, _u, _flags, code, _properties: self._end(str(code)))
        client.on_subscribe = guarded(lambda _c, _u, mid, codes, _p: self.granted.__setitem__(mid, codes))
        client.on_publish = guarded(lambda _c, _u, mid, code, _p: self.published.__setitem__(mid, code))
        client.on_message = guarded(
            lambda _c, _u, message: self._on_message(
                message.topic, bytes(message.payload), bool(message.retain)
            )
        )
        client.on_unreadable = lambda error: None  # it says nothing that a command could read

    @property
    def tls_socket(self) -> ssl.SSLSocket | None:
        sock = self._client.socket()
        return sock if isinstance(sock, ssl.SSLSocket) else None

    def subscribe(self, filters: Sequence[str], *, qos: int, retained: bool) -> int:
        """Asks for a subscription. Gives the mid by which `granted` will have the answer.

        Args:
            retained: whether the broker shall send what it retains; over MQTT 3.1.1 it always does.
        """
        if self.version5:
            handling = (
                SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if retained else SubscribeOptions.RETAIN_DO_NOT_SEND
            )
            options = SubscribeOptions(qos=qos, retainHandling=handling)
            mid = self._client.subscribe([(each, options) for each in filters])[1]
        else:
            mid = self._client.subscribe([(each, qos) for each in filters])[1]
        return mid or 0

    def unsubscribe(self, filters: Sequence[str]) -> None:
        self._client.unsubscribe(list(filters))

    def publish(self, topic: str, body: bytes, *, retain: bool = False) -> int:
        """Publishes with QoS 1. Gives the mid by which `published` will have the answer."""
        return self._client.publish(topic, body, qos=1, retain=retain).mid

    @property
    def has_unread(self) -> bool:
        """Something has come that `until` has not read yet."""
        return self._client.has_unread

    def until(self, done: Callable[[], bool], limit_s: float = STEP_TIMEOUT_S) -> bool:
        """Reads and writes until `done`, the end of the connection, or the time limit. True if it is done."""
        deadline_s = time.monotonic() + limit_s
        while not (finished := done()) and not self.ended:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            try:
                if not self._client.turn(min(left_s, _TURN_S)):
                    self._end("the broker closed the connection")
            except Exception as error:  # noqa: BLE001 - paho may raise anything on a malformed packet
                self._end(f"protocol error: {error!r}")
        return finished

    def leave(self) -> None:
        """Disconnects, and ends the session unless it existed before."""
        with contextlib.suppress(OSError, ValueError, BrokerUnreachable):
            if self.version5:
                properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
                # A session that was there keeps the time that its owner gave it.
                properties.SessionExpiryInterval = self._settings.session_expiry_s if self.had_session else 0
                self._client.disconnect(properties=properties)
            else:
                self._client.disconnect()
            if not (self.version5 or self.had_session or self._clean):
                # In MQTT 3.1.1 only a new connection with Clean Session discards a session.
                last = _try(
                    self._settings,
                    client_id=self._client_id,
                    version5=False,
                    clean=True,
                    session_expiry_s=0,
                    on_message=self._on_message,
                )
                last._client.disconnect()

    def _accepted(self, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            self._end(str(code))
            self.refused = code.value not in _UNSUPPORTED_PROTOCOL
            return
        self.connected = True
        self.had_session = bool(flags.session_present)
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self.receive_maximum = getattr(properties, "ReceiveMaximum", self.receive_maximum)

    def _end(self, reason: str) -> None:
        self.ended = self.ended or reason


def connect(
    settings: MqttSettings,
    *,
    client_id: str,
    session_expiry_s: int,
    on_message: OnMessage,
    clean: bool = False,
) -> CommandConnection:
    """Connects with the configured protocol, and with MQTT 3.1.1 if `auto` needs it.

    Args:
        session_expiry_s: how long the broker keeps the session of a command that is killed. Over MQTT 3.1.1 it keeps
            it for as long as it likes, unless it is a clean one.
        clean: discards what session the broker has. Only where it is known to be nobody else's.

    Raises:
        BrokerUnreachable: the connection failed; the remedy says what to check.
        SettingsError: the password or a file of TLS cannot be read.
    """

    def attempt(*, version5: bool) -> CommandConnection:
        return _try(
            settings,
            client_id=client_id,
            version5=version5,
            clean=clean,
            session_expiry_s=session_expiry_s,
            on_message=on_message,
        )

    connection = attempt(version5=settings.protocol != "3.1.1")
    if (
        not connection.connected
        and connection.version5
        and settings.protocol == "auto"
        and not connection.refused
    ):
        connection = attempt(version5=False)
    if not connection.connected:
        reason = connection.ended or f"no answer within {STEP_TIMEOUT_S:.0f} s"
        raise BrokerUnreachable(
            f"{place(settings)} refused the connection: {reason}",
            remedy="check mqtt.username and the password, or the certificate, and the broker's log",
        )
    return connection


def is_refusal(code: ReasonCode) -> bool:
    """True for a failure; that nobody has subscribed is none."""
    return bool(code.is_failure) and code.value != _NO_SUBSCRIBERS


def place(settings: MqttSettings) -> str:
    """The broker's address, for people."""
    return f"{settings.host}:{settings.port}"


def _try(
    settings: MqttSettings,
    *,
    client_id: str,
    version5: bool,
    clean: bool,
    session_expiry_s: int,
    on_message: OnMessage,
) -> CommandConnection:
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=paho.MQTTv5 if version5 else paho.MQTTv311,
        manual_ack=True,
        clean_session=None if version5 else clean,
    )
    client.connect_timeout = STEP_TIMEOUT_S
    client.max_packet_bytes = _MAX_PACKET_BYTES
    if (context := tls_context(settings)) is not None:
        client.tls_set_context(context)
    if settings.username:
        client.username_pw_set(settings.username, read_password(settings, credential_path("mqtt-password")))
    connection = CommandConnection(
        settings, client, client_id=client_id, version5=version5, clean=clean, on_message=on_message
    )
    try:
        if version5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = session_expiry_s
            properties.MaximumPacketSize = _MAX_PACKET_BYTES
            client.connect(
                settings.host, settings.port, settings.keepalive_s, clean_start=clean, properties=properties
            )
        else:
            client.connect(settings.host, settings.port, settings.keepalive_s)
    except ssl.SSLError as error:
        raise BrokerUnreachable(
            f"TLS with {place(settings)} failed: {error}",
            remedy="check mqtt.ca_file, the certificates and the clock",
        ) from error
    except (OSError, ValueError) as error:
        raise BrokerUnreachable(
            f"{place(settings)} cannot be reached: {getattr(error, 'strerror', None) or error}",
            remedy="check mqtt.host, mqtt.port, the network and the broker",
        ) from error
    connection.until(lambda: connection.connected)
    return connection
