"""The network thread against a server on the loopback that is not what it should be."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.topics import Topics
from edge_agent.transport.connection import LAST_PUBACK_S, PUBACK_S, SUBACK_S, TURN_S, Connection
from edge_agent.transport.inbound import Handler, Inbound
from edge_agent.transport.mqtt import REST_S, MqttTransport
from edge_agent.transport.paho_client import Client
from tests.support.certificates import Authority
from tests.support.processes import wait_until

START = Moment(boot_id="boot-1", boot_s=1.0, wall_s=1.0)


@contextlib.contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[int]:
    """Tries a TLS handshake with each client: its port."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, contextlib.suppress(OSError):
                    context.wrap_socket(client, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, name="tls-server", daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def packet(first: int, body: bytes, more: int = 0) -> bytes:
    """One of MQTT, but for so many bytes at its end, which come later.

    Source: MQTT 5.0 §1.5.5 (Variable Byte Integer).
    """
    length, left = bytearray(), len(body) + more
    while left > 127:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([first, *length, left]) + body


def publish(topic: bytes, mid: int, body: bytes, *, version5: bool = True, more: int = 0) -> bytes:
    named = struct.pack("!H", len(topic)) + topic + struct.pack("!H", mid)
    return packet(0x32, named + b"\0" * version5 + body, more)


def length_of(stream: IO[bytes]) -> int:
    """Source: MQTT 5.0 §1.5.5 (Variable Byte Integer)."""
    length = shift = 0
    while (byte := stream.read(1)[0]) & 0x80:
        length |= (byte & 0x7F) << shift
        shift += 7
    return length | byte << shift


@contextlib.contextmanager
def broker_that_sends(*pieces: bytes, version5: bool = True) -> Iterator[list[int]]:
    """Accepts one client, and sends it this: its port, and then the mids that were acked."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            with client, client.makefile("rb") as stream:
                while first := stream.read(1):
                    body = stream.read(length_of(stream))
                    if first[0] == 0x10:  # CONNECT
                        client.sendall(packet(0x20, bytes(3 if version5 else 2)))
                        for piece in pieces:
                            client.sendall(piece)
                    elif first[0] == 0x40:  # PUBACK
                        acked.append(struct.unpack("!H", body[:2])[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acked = [listener.getsockname()[1]]
        thread = threading.Thread(target=serve, name="broker", daemon=True)
        thread.start()
        yield acked
        listener.close()
        thread.join(5)


def transport_to(
    port: int, journal: Journal, *, handlers: Mapping[str, Handler] | None = None, **settings: Any
) -> MqttTransport:
    return MqttTransport(
        MqttSettings(host="127.0.0.1", port=port, **settings),
        topics=Topics(prefix="edge", device_id="dev", reply_prefixes=("replies/",)),
        journal=journal,
        max_payload_bytes=1024,
        password=lambda: None,
        handlers=handlers or {},
        will=lambda: b"{}",
    )


@contextlib.contextmanager
def running(transport: MqttTransport) -> Iterator[None]:
    thread = threading.Thread(target=transport.run, name="mqtt")
    thread.start()
    try:
        yield
    finally:
        transport.close()
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db", moment=START)
    yield opened
    opened.close()


def test_a_transport_that_never_ran_leaves_no_socket_behind(journal: Journal) -> None:
    """As where the daemon ends before its threads have begun."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        transport = transport_to(1, journal)
        transport.close()
        transport.close()
        del transport
        gc.collect()
    assert [str(warning.message) for warning in caught if "unclosed <socket" in str(warning.message)] == []


def test_a_goodbye_does_not_rest_where_the_broker_says_nothing(journal: Journal) -> None:
    """A rest is longer than a goodbye may be."""
    waited: list[float] = []

    def turn(timeout_s: float, wake: object) -> bool:
        waited.append(timeout_s)
        return True

    client = SimpleNamespace(
        turn=turn, publish=lambda *_, **__: SimpleNamespace(mid=1), want_write=lambda: False, reading=False
    )
    connection = Connection(client=cast(Any, client), version5=True, started_s=0.0, connected=True)
    transport = transport_to(1, journal)
    transport.set_retained("status", b"{}")
    transport._turn(connection)
    transport._turn(connection)
    transport.close()
    transport._turn(connection)
    assert waited == [TURN_S, REST_S, TURN_S]


def test_a_broker_that_cannot_prove_who_it_is_leaves_no_socket_behind(
    tmp_path: Path, journal: Journal
) -> None:
    served = Authority(tmp_path, "theirs").server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served.certificate, served.key)
    with warnings.catch_warnings(record=True) as caught, tls_server(context) as port:
        warnings.simplefilter("always", ResourceWarning)
        transport = transport_to(port, journal, ca_file=str(Authority(tmp_path, "ours").file))
        with running(transport):
            wait_until(lambda: transport.problem, 60, "a failed connection")
        gc.collect()
    assert "CERTIFICATE_VERIFY_FAILED" in transport.problem
    assert [str(warning.message) for warning in caught if "SSLSocket" in str(warning.message)] == []


def test_messages_whose_topic_is_no_text_are_acked_and_end_nothing(journal: Journal) -> None:
    """EMQX passes them on as it is installed. Sixteen without an ack would be the last that the device hears."""
    heard: list[Inbound] = []

    def hear(message: Inbound) -> None:
        heard.append(message)

    mids = range(1, 18)
    messages = [publish(b"edge/v1/dev/req/chat/\xff", mid, b"Hello") for mid in mids]
    with broker_that_sends(*messages) as acked:
        transport = transport_to(acked.pop(), journal, handlers={"edge/v1/dev/req/chat/+": hear})
        with running(transport):
            wait_until(lambda: len(acked) == len(mids), 60, "their acks")
            assert transport.connected
    assert (acked, heard) == (list(mids), [])
    assert transport.counters["unreadable"] == len(mids)


@pytest.mark.parametrize("version5", [True, False])
def test_a_message_of_any_size_ends_nothing_and_fills_no_memory(journal: Journal, version5: bool) -> None:
    """A broker of MQTT 3.1.1 knows no limit of its clients, and delivers again what ended one."""
    heard: list[bytes] = []

    def hear(message: Inbound) -> None:
        heard.append(message.payload)

    pieces = 1000
    piece = bytes(1 << 15)
    topic = b"edge/v1/dev/req/chat"
    huge = publish(topic, 1, b"", version5=version5, more=pieces * len(piece))
    small = publish(topic, 2, b"Hello", version5=version5)
    with broker_that_sends(huge, *[piece] * pieces, small, version5=version5) as acked:
        transport = transport_to(
            acked.pop(),
            journal,
            handlers={topic.decode(): hear},
            protocol="5" if version5 else "3.1.1",
        )
        tracemalloc.start()
        try:
            with running(transport):
                wait_until(lambda: len(acked) == 2, 120, "their acks")
                assert transport.connected
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (acked, heard) == ([1, 2], [b"Hello"])
    assert transport.counters["unreadable"] == 1
    assert peak_bytes < 100 * len(piece)


def test_a_packet_of_another_kind_that_is_too_large_ends_the_connection(journal: Journal) -> None:
    """There is nothing to ack in it."""
    suback = packet(0x90, struct.pack("!H", 1), 2 << 20)
    with broker_that_sends(suback, bytes(2 << 20)) as acked:
        transport = transport_to(acked.pop(), journal, handlers={"edge/v1/dev/req/chat": lambda _: None})
        with running(transport):
            wait_until(lambda: transport.problem, 60, "its end")
    assert transport.counters["unreadable"] == 0


@pytest.mark.parametrize("answered", [True, False])
def test_a_broker_that_does_not_answer_the_subscriptions_is_left(journal: Journal, answered: bool) -> None:
    client = SimpleNamespace(
        turn=lambda *_: True, subscribe=lambda _: None, want_write=lambda: False, reading=False
    )
    connection = Connection(client=cast(Any, client), version5=True, started_s=0.0, connected=True)
    transport = transport_to(1, journal)
    connection.subscribe(["edge/v1/dev/req/chat"], retained="")
    if answered:
        connection._on_subscribe(transport, [])
    else:
        assert connection.subscribing_s is not None
        connection.subscribing_s -= SUBACK_S
    transport._turn(connection)
    transport.close()
    assert connection.ended == ("" if answered else "the broker does not acknowledge the subscriptions")


@pytest.mark.parametrize(
    ("acked", "window", "waited_s", "left"),
    [
        (True, 1, PUBACK_S, False),
        (False, 1, PUBACK_S, True),
        (False, 16, PUBACK_S, False),
        (False, 16, LAST_PUBACK_S, True),
    ],
)
def test_a_broker_that_does_not_acknowledge_what_it_is_sent_is_left(
    journal: Journal, acked: bool, window: int, waited_s: float, left: bool
) -> None:
    """Each message keeps a place of the window of sixteen: nothing would be sent any more, and pings are answered."""
    client = SimpleNamespace(
        turn=lambda *_: True,
        publish=lambda *_, **__: SimpleNamespace(mid=7),
        want_write=lambda: False,
        reading=False,
    )
    connection = Connection(client=cast(Any, client), version5=True, started_s=0.0, connected=True)
    transport = transport_to(1, journal)
    connection.publish("edge/v1/dev/status", b"{}", qos=0)
    assert connection.unacked == {}, "nobody acknowledges that"
    assert connection.publish("edge/v1/dev/status", b"{}", qos=1) == 7
    connection.max_in_flight = window
    connection.unacked[7] -= waited_s
    if acked:
        connection._on_publish(transport, 7, ReasonCode(PacketTypes.PUBACK))
    transport._turn(connection)
    transport.close()
    assert connection.ended == ("the broker does not acknowledge what it is sent" if left else "")


def test_a_message_that_takes_longer_than_the_keepalive_ends_nothing() -> None:
    """The answer to a ping stands behind it, and so does a SUBACK."""
    ours, theirs = socket.socketpair()
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv311, manual_ack=True)
    with ours, theirs:
        client._sock = ours
        ours.setblocking(False)
        connection = Connection(client=client, version5=False, started_s=0.0, connected=True)
        connection.attach(cast(Any, SimpleNamespace(on_message=None, on_unreadable=None)))
        connection.subscribing_s = time.monotonic() - 2 * SUBACK_S
        theirs.sendall(publish(b"edge/v1/dev/req/chat", 1, b"the beginning", version5=False, more=10_000))
        for _ in range(3):
            client._ping_t = time.monotonic() - 2 * client.keepalive
            theirs.sendall(b"and more")
            connection.turn(theirs, lambda _: None, timeout_s=1)
            assert connection.ended == ""
        client._ping_t = time.monotonic() - 2 * client.keepalive
        connection.turn(theirs, lambda _: None, timeout_s=0)
        assert connection.ended, "nothing more came"
