"""The broker: connect, subscribe and publish as this device, and report what the broker's ACL refuses.

This is a second connection of the device, for a few seconds. It must not lose a prompt, so it acks nothing, resumes
whatever session the broker has for it, and discards its session only if the broker had none before. (A broker that
uses the user name as the client id gives it the daemon's own session.) While the daemon is connected, doctor does
not connect at all and reports what the daemon says.

Source: MQTT 5.0 §3.1.2.11.2 (Session Expiry Interval), §3.14.2.2.2, §3.9.3 (SUBACK), §3.4.2.1 (PUBACK).
"""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from edge_agent.doctor.finding import Finding, fail, failed, ok, warn
from edge_agent.documents import page
from edge_agent.errors import BrokerUnreachable
from edge_agent.settings import Settings
from edge_agent.topics import Topics
from edge_agent.transport.command_connection import CommandConnection, connect, is_refusal, place
from edge_agent.transport.echo import not_back, other_topic
from edge_agent.transport.namesake import DeviceIdTaken

_CERTIFICATE_DAYS = 14


def _acl_remedy() -> str:
    return f"{page('broker.md')} has the rules that a device needs; the broker's log says what it refused"


def check(settings: Settings, status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Checks the broker.

    Args:
        status: the daemon's status; None if it is not running.
    """
    if status is not None and status["broker"]["connected"]:
        yield from _reported_by_daemon(settings, status["broker"])
        return
    came: list[tuple[str, bytes]] = []
    try:
        connection = connect(
            settings.mqtt,
            client_id=f"edge-agent-{settings.device_id}-doctor",
            # A shorter expiry would shorten the daemon's, if this connection resumes the daemon's session.
            session_expiry_s=settings.mqtt.session_expiry_s,
            on_message=lambda topic, body, retained: came.append((topic, body)),
        )
    except BrokerUnreachable as error:
        yield fail("broker.connect", error.message, error.remedy)
        return
    topics = Topics(
        prefix=settings.mqtt.prefix, device_id=settings.device_id, reply_prefixes=settings.mqtt.reply_prefixes
    )
    try:
        yield from _check_connection(settings, connection)
        yield _check_subscribe(connection, topics)
        yield _check_publish(connection, topics)
        yield _check_echo(connection, topics, came)
    finally:
        connection.leave()


def _reported_by_daemon(settings: Settings, broker: Mapping[str, Any]) -> Iterator[Finding]:
    yield ok("broker.connect", f"the daemon is connected to {place(settings.mqtt)}")
    if topics := broker.get("refused_topics"):
        yield fail("broker.subscribe", f"the broker refused {', '.join(topics)}", _acl_remedy())
    else:
        yield ok("broker.subscribe", "the broker granted the daemon's subscriptions")
    if count := broker.get("answers_refused"):
        undelivered = broker.get("answers_undelivered", 0)
        yield fail(
            "broker.publish",
            f"the broker has refused an answer {count} times since the daemon started;"
            f" {undelivered} answers stay undelivered",
            _acl_remedy(),
        )
    else:
        unheard = broker.get("answers_unheard", 0)
        more = f"; {unheard} had nobody who listened within five minutes" if unheard else ""
        yield ok("broker.publish", f"the broker refused none of the daemon's answers{more}")

    for trouble in broker.get("troubles", ()):
        check = "broker.device_id" if trouble["code"] == DeviceIdTaken.code else "broker.self_test"
        yield fail(check, trouble["text"], trouble["remedy"], code=trouble["code"])


def _check_connection(settings: Settings, connection: CommandConnection) -> Iterator[Finding]:
    protocol = "MQTT 5" if connection.version5 else "MQTT 3.1.1"
    sock = connection.tls_socket
    yield ok("broker.connect", f"{place(settings.mqtt)} speaks {protocol}{' over TLS' if sock else ''}")
    if sock is None and settings.mqtt.host not in ("localhost", "127.0.0.1", "::1"):
        yield warn(
            "broker.tls",
            "prompts and answers cross the network in clear text",
            f"set mqtt.ca_file; see {page('broker.md')}",
        )
    if sock is not None:
        yield from _check_certificate(sock)
    limit = connection.max_packet_bytes
    if limit is not None and limit < settings.limits.payload_bytes:
        yield warn(
            "broker.packet_size",
            f"the broker accepts {limit} bytes a message; limits.payload_bytes is {settings.limits.payload_bytes}",
            f"raise the broker's max_packet_size; see {page('broker.md')}",
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


def _check_subscribe(connection: CommandConnection, topics: Topics) -> Finding:
    wanted = [topics.chat, topics.chat_of_clients, topics.cancel, topics.cancel_of_clients]
    wanted += [topics.sync, topics.plan, topics.desired]
    # No retained messages: only the daemon acts on a desired state.
    mid = connection.subscribe(wanted, qos=1, retained=False)
    connection.until(lambda: mid in connection.granted)
    if mid not in connection.granted:
        return fail(
            "broker.subscribe", f"no answer: {connection.ended or 'the broker is silent'}", _acl_remedy()
        )
    refused = [topic for topic, code in zip(wanted, connection.granted[mid], strict=False) if code.is_failure]
    if refused:
        return fail("broker.subscribe", f"the broker refused {', '.join(refused)}", _acl_remedy())
    return ok(
        "broker.subscribe",
        f"granted: {topics.chat} and {len(wanted) - 1} more (mosquitto also grants topics that its ACL forbids)",
    )


def _check_publish(connection: CommandConnection, topics: Topics) -> Finding:
    topic = topics.response(f"doctor-{uuid.uuid4().hex[:8]}")
    mid = connection.publish(topic, b'{"doctor": "a test of the ACL; no answer to a prompt"}')
    connection.until(lambda: mid in connection.published)
    code = connection.published.get(mid)
    if code is None:
        return fail(
            "broker.publish",
            f"no answer to a publish: {connection.ended or 'the broker is silent'}",
            _acl_remedy(),
        )
    if is_refusal(code):
        return fail("broker.publish", f"the broker refused {topic}: {code}", _acl_remedy())
    if not connection.version5:
        return ok(
            "broker.publish", "accepted; over MQTT 3.1.1 a broker does not say when its ACL refuses a message"
        )
    return ok("broker.publish", f"the broker accepted a message for {topics.root}/rsp/")


def _check_echo(connection: CommandConnection, topics: Topics, came: Sequence[tuple[str, bytes]]) -> Finding:
    """What the daemon tests after each connect: does a message of this device to itself come back?"""
    nonce = uuid.uuid4().hex.encode()
    mid = connection.publish(topics.echo, nonce)

    def came_as() -> str:
        return next((topic for topic, payload in came if payload == nonce), "")

    def is_refused() -> bool:
        return mid in connection.published and bool(connection.published[mid].is_failure)

    connection.until(lambda: bool(came_as()) or is_refused())
    if topic := came_as():
        if topic == topics.echo:
            return ok("broker.self_test", f"a message to {topic} came back")
        return failed("broker.self_test", other_topic(topics.echo, topic), "")
    if is_refused():
        return ok(
            "broker.self_test",
            f"the broker's rules forbid {topics.echo}, so nothing is known;"
            f" {page('broker.md', 'The self-test')} has the line",
        )
    return failed("broker.self_test", not_back(topics.echo, version5=connection.version5), "")
