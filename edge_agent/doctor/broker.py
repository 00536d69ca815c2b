"""The broker: connect, subscribe and publish as this device, and report what the broker's ACL refuses.

This is a second connection of the device, for a few seconds. It must not lose a prompt, so it acks nothing, resumes
whatever session the broker has for it, and discards its session only if the broker had none before. (A broker that
uses the user name as the client id gives it the daemon's own session.) While the daemon is connected, doctor does
not connect at all and reports what the daemon says.

Source: MQTT 5.0 §3.1.2.11.2 (Session Expiry Interval), §3.14.2.2.2, §3.9.3 (SUBACK), §3.4.2.1 (PUBACK).
"""

from __future__ import annotations

import contextlib
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.doctor.finding import Finding, fail, failed, ok, warn
from edge_agent.environment import credential_path
from edge_agent.errors import EdgeAgentError
from edge_agent.settings import MqttSettings, Settings
from edge_agent.topics import Topics
from edge_agent.transport.credentials import read_password, tls_context
from edge_agent.transport.echo import not_back, other_topic
from edge_agent.transport.namesake import DeviceIdTaken

_STEP_TIMEOUT_S = 10.0
_NO_SUBSCRIBERS = 0x10
_CERTIFICATE_DAYS = 14
_ACL_REMEDY = "docs/broker.md has the rules that a device needs; the broker's log says what it refused"


class BrokerUnreachable(EdgeAgentError):
    """The connection failed, or the broker refused it."""

    code = "broker_unreachable"


@dataclass(kw_only=True)
class _Session:
    """One connection and what the broker answered on it. Used by one thread."""

    client: paho.Client
    version5: bool
    connected: bool = False
    ended: str = ""
    refused: bool = False
    had_session: bool = False
    max_packet_bytes: int | None = None
    granted: list[ReasonCode] | None = None
    published: dict[int, ReasonCode] = field(default_factory=dict)
    came: list[tuple[str, bytes]] = field(default_factory=list)


def check(settings: Settings, status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Checks the broker.

    Args:
        status: the daemon's status; None if it is not running.
    """
    if status is not None and status["broker"]["connected"]:
        yield from _reported_by_daemon(settings, status["broker"])
        return
    try:
        session = _connect(settings)
    except BrokerUnreachable as error:
        yield fail("broker.connect", error.message, error.remedy)
        return
    topics = Topics(
        prefix=settings.mqtt.prefix, device_id=settings.device_id, reply_prefixes=settings.mqtt.reply_prefixes
    )
    try:
        yield from _check_connection(settings, session)
        yield _check_subscribe(session, topics)
        yield _check_publish(session, topics)
        yield _check_echo(session, topics)
    finally:
        _leave(settings, session)


def _reported_by_daemon(settings: Settings, broker: Mapping[str, Any]) -> Iterator[Finding]:
    yield ok("broker.connect", f"the daemon is connected to {_place(settings.mqtt)}")
    if topics := broker.get("refused_topics"):
        yield fail("broker.subscribe", f"the broker refused {', '.join(topics)}", _ACL_REMEDY)
    else:
        yield ok("broker.subscribe", "the broker granted the daemon's subscriptions")
    if count := broker.get("answers_refused"):
        undelivered = broker.get("answers_undelivered", 0)
        yield fail(
            "broker.publish",
            f"the broker has refused an answer {count} times since the daemon started;"
            f" {undelivered} answers stay undelivered",
            _ACL_REMEDY,
        )
    else:
        unheard = broker.get("answers_unheard", 0)
        more = f"; {unheard} had nobody who listened within five minutes" if unheard else ""
        yield ok("broker.publish", f"the broker refused none of the daemon's answers{more}")

    for trouble in broker.get("troubles", ()):
        check = "broker.device_id" if trouble["code"] == DeviceIdTaken.code else "broker.self_test"
        yield fail(check, trouble["text"], trouble["remedy"], code=trouble["code"])


def _connect(settings: Settings) -> _Session:
    """Connects with the configured protocol, and with MQTT 3.1.1 if `auto` needs it.

    Raises:
        BrokerUnreachable: the connection failed; the remedy says what to check.
    """
    mqtt = settings.mqtt
    session = _try_connect(settings, version5=mqtt.protocol != "3.1.1")
    if not session.connected and session.version5 and mqtt.protocol == "auto" and not session.refused:
        session = _try_connect(settings, version5=False)
    if not session.connected:
        reason = session.ended or f"no answer within {_STEP_TIMEOUT_S:.0f} s"
        raise BrokerUnreachable(
            f"{_place(mqtt)} refused the connection: {reason}",
            remedy="check mqtt.username and the password, or the certificate, and the broker's log",
        )
    return session


def _try_connect(settings: Settings, *, version5: bool, clean: bool = False) -> _Session:
    mqtt = settings.mqtt
    client = _client(settings, version5=version5, clean=clean)
    session = _Session(client=client, version5=version5)
    client.on_connect = lambda _c, _u, flags, code, properties: _on_connect(session, flags, code, properties)
    client.on_disconnect = lambda _c, _u, _flags, code, _properties: _on_end(session, str(code))
    client.on_subscribe = lambda _c, _u, _mid, codes, _properties: setattr(session, "granted", codes)
    client.on_message = lambda _c, _u, message: session.came.append((message.topic, bytes(message.payload)))
    client.on_publish = lambda _c, _u, mid, code, _properties: session.published.__setitem__(mid, code)
    try:
        if version5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            # A shorter expiry would shorten the daemon's, if this connection resumes the daemon's session.
            properties.SessionExpiryInterval = mqtt.session_expiry_s
            client.connect(mqtt.host, mqtt.port, mqtt.keepalive_s, clean_start=False, properties=properties)
        else:
            client.connect(mqtt.host, mqtt.port, mqtt.keepalive_s)
    except ssl.SSLError as error:
        raise BrokerUnreachable(
            f"TLS with {_place(mqtt)} failed: {error}",
            remedy="check mqtt.ca_file, the certificates and the clock",
        ) from error
    except (OSError, ValueError) as error:
        raise BrokerUnreachable(
            f"{_place(mqtt)} cannot be reached: {error}",
            remedy="check mqtt.host, mqtt.port, the network and the broker",
        ) from error
    _until(session, lambda: session.connected)
    return session


def _client(settings: Settings, *, version5: bool, clean: bool) -> paho.Client:
    mqtt = settings.mqtt
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=f"edge-agent-{settings.device_id}-doctor",
        protocol=paho.MQTTv5 if version5 else paho.MQTTv311,
        manual_ack=True,
        clean_session=None if version5 else clean,
    )
    client.connect_timeout = _STEP_TIMEOUT_S
    if (context := tls_context(mqtt)) is not None:
        client.tls_set_context(context)
    if mqtt.username:
        client.username_pw_set(mqtt.username, read_password(mqtt, credential_path("mqtt-password")))
    return client


def _check_connection(settings: Settings, session: _Session) -> Iterator[Finding]:
    protocol = "MQTT 5" if session.version5 else "MQTT 3.1.1"
    sock = session.client.socket()
    secure = isinstance(sock, ssl.SSLSocket)
    yield ok("broker.connect", f"{_place(settings.mqtt)} speaks {protocol}{' over TLS' if secure else ''}")
    if not secure and settings.mqtt.host not in ("localhost", "127.0.0.1", "::1"):
        yield warn(
            "broker.tls",
            "prompts and answers cross the network in clear text",
            "set mqtt.ca_file; see docs/broker.md",
        )
    if isinstance(sock, ssl.SSLSocket):
        yield from _check_certificate(sock)
    limit = session.max_packet_bytes
    if limit is not None and limit < settings.limits.payload_bytes:
        yield warn(
            "broker.packet_size",
            f"the broker accepts {limit} bytes a message; limits.payload_bytes is {settings.limits.payload_bytes}",
            "raise the broker's max_packet_size; see docs/broker.md",
        )


def _check_certificate(sock: ssl.SSLSocket) -> Iterator[Finding]:
    ends = (sock.getpeercert() or {}).get("notAfter")
    if not isinstance(ends, str):
        return
    ends_s = ssl.cert_time_to_seconds(ends)
    day = datetime.fromtimestamp(ends_s, UTC).date()
    if ends_s - time.time() < _CERTIFICATE_DAYS * 86_400:
        yield warn(
            "broker.tls", f"the broker's certificate expires on {day}", "renew the broker's certificate"
        )
    else:
        yield ok("broker.tls", f"the broker's certificate is valid until {day}")


def _check_subscribe(session: _Session, topics: Topics) -> Finding:
    wanted = [topics.chat, topics.chat_of_clients, topics.cancel, topics.cancel_of_clients]
    wanted += [topics.sync, topics.plan, topics.desired]
    if session.version5:  # ask for no retained messages: only the daemon acts on a desired state
        never = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        session.client.subscribe([(topic, never) for topic in wanted])
    else:
        session.client.subscribe([(topic, 1) for topic in wanted])
    _until(session, lambda: session.granted is not None)
    if session.granted is None:
        return fail("broker.subscribe", f"no answer: {session.ended or 'the broker is silent'}", _ACL_REMEDY)
    refused = [topic for topic, code in zip(wanted, session.granted, strict=False) if code.is_failure]
    if refused:
        return fail("broker.subscribe", f"the broker refused {', '.join(refused)}", _ACL_REMEDY)
    return ok(
        "broker.subscribe",
        f"granted: {topics.chat} and {len(wanted) - 1} more (mosquitto also grants topics that its ACL forbids)",
    )


def _check_publish(session: _Session, topics: Topics) -> Finding:
    topic = topics.response(f"doctor-{uuid.uuid4().hex[:8]}")
    info = session.client.publish(topic, b'{"doctor": "a test of the ACL; no answer to a prompt"}', qos=1)
    _until(session, lambda: info.mid in session.published)
    code = session.published.get(info.mid)
    if code is None:
        return fail(
            "broker.publish",
            f"no answer to a publish: {session.ended or 'the broker is silent'}",
            _ACL_REMEDY,
        )
    if code.is_failure and code.value != _NO_SUBSCRIBERS:
        return fail("broker.publish", f"the broker refused {topic}: {code}", _ACL_REMEDY)
    if not session.version5:
        return ok(
            "broker.publish", "accepted; over MQTT 3.1.1 a broker does not say when its ACL refuses a message"
        )
    return ok("broker.publish", f"the broker accepted a message for {topics.root}/rsp/")


def _check_echo(session: _Session, topics: Topics) -> Finding:
    """What the daemon tests after each connect: does a message of this device to itself come back?"""
    nonce = uuid.uuid4().hex.encode()
    info = session.client.publish(topics.echo, nonce, qos=1)

    def came_as() -> str:
        return next((topic for topic, payload in session.came if payload == nonce), "")

    _until(session, lambda: bool(came_as()) or _is_refused(session.published.get(info.mid)))
    if topic := came_as():
        if topic == topics.echo:
            return ok("broker.self_test", f"a message to {topic} came back")
        return failed("broker.self_test", other_topic(topics.echo, topic), "")
    if _is_refused(session.published.get(info.mid)):
        return ok(
            "broker.self_test",
            f"the broker's rules forbid {topics.echo}, so nothing is known; docs/broker.md has the line",
        )
    return failed("broker.self_test", not_back(topics.echo, version5=session.version5), "")


def _is_refused(code: ReasonCode | None) -> bool:
    return code is not None and bool(code.is_failure)


def _leave(settings: Settings, session: _Session) -> None:
    """Disconnects, and ends the session unless it existed before."""
    with contextlib.suppress(OSError, ValueError):
        if session.version5 and not session.had_session:
            properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0
            session.client.disconnect(properties=properties)
        else:
            session.client.disconnect()
        if not session.version5 and not session.had_session:
            # In MQTT 3.1.1 only a new connection with Clean Session discards a session.
            last = _try_connect(settings, version5=False, clean=True)
            last.client.disconnect()


def _until(session: _Session, done: Callable[[], bool]) -> None:
    """Runs the network loop until `done`, the end of the connection, or the time limit."""
    limit_s = time.monotonic() + _STEP_TIMEOUT_S
    while not done() and not session.ended and time.monotonic() < limit_s:
        try:
            if session.client.loop(0.2) != paho.MQTT_ERR_SUCCESS and not session.ended:
                session.ended = "the broker closed the connection"
        except Exception as error:  # noqa: BLE001 - paho may raise anything on a malformed packet
            session.ended = f"protocol error: {error!r}"


def _on_connect(session: _Session, flags: Any, code: ReasonCode, properties: Any) -> None:
    if code.is_failure:
        session.ended = str(code)
        session.refused = code.value not in (0x84, 0x01)
        return
    session.connected = True
    session.had_session = bool(flags.session_present)
    session.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)


def _on_end(session: _Session, reason: str) -> None:
    session.ended = session.ended or reason


def _place(mqtt: MqttSettings) -> str:
    return f"{mqtt.host}:{mqtt.port}"
