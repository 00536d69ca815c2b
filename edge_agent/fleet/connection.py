"""A console's connection to a real broker: `FleetBroker` over one connection of a command, made again when it is lost.

Owns the client id, which no device can have; the subscriptions, and who wants what comes on them. Refuses another
client's session: a broker that maps client ids to identities gives it to a console with a device's identity.

    connected → collect | publish | watch, each with reading and writing meanwhile → … → leave

Sources: MQTT 5.0 §3.1.3.1 (Client Identifier), §4.7 (Topic Filters).
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from paho.mqtt.client import topic_matches_sub

from edge_agent.documents import page
from edge_agent.errors import BrokerRefused, BrokerUnreachable, SettingsError, settings_error
from edge_agent.fleet.broker import LIMIT_S, QUIET_S, FleetBroker, Message, Outgoing, Watch
from edge_agent.fleet.devices import MAX_DEVICES
from edge_agent.fleet.fields import MAX_DOCUMENT_BYTES
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.topics import can_be_published
from edge_agent.transport import command_connection
from edge_agent.transport.command_connection import CommandConnection, is_refusal, place

log = logging.getLogger(__name__)

MAX_TOPICS = 3 * MAX_DEVICES
"""What is kept of one collection or one watch."""

_PROBE_EXPIRY_S = 5
"""Of the connection that finds out whose session the broker gives; not 0, or another client's would end with it. All
others end with their connection: a console that is killed leaves nothing behind."""
_WINDOW = 16
_FILTERS_AT_ONCE = 100
_RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0)
_GIVES_WAY_S = 5.0
"""A connection that was lost may have been ended for another console with the same identity, which a broker does not
always say. A short command is done by then, and two that go on take turns.
"""
_MAX_CERTIFICATE_BYTES = 1 << 20


def _acl_remedy() -> str:
    rules = page("broker.md", "Identities")
    return f"{rules} has the rules for an operator's; the broker's log says what it refused"


class ConsoleConnection:
    """Implements `FleetBroker`. One thread's. Made by `connected`."""

    def __init__(self, settings: MqttSettings) -> None:
        self.name = name_of(settings)
        self._settings = settings
        self._client_id = f"edge-fleet-{uuid.uuid4().hex[:12]}"  # a device's begins with edge-agent-
        self._connection: CommandConnection | None = None
        self._readers: list[_Reader] = []
        self._failures = 0
        self._retry_at_s = 0.0
        self._problem = "the broker does not answer"

    def open(self) -> None:
        """Makes the first connection.

        Raises:
            BrokerUnreachable, SettingsError: as `command_connection.connect`.
            BrokerRefused: the broker took this console for another client.
        """
        probe = self._dial(clean=False)
        probe.leave()
        if probe.had_session:
            raise BrokerRefused(
                f"{place(self._settings)} takes this console for another client, whose identity it has",
                remedy=f"give the console an identity of its own, and not a device's; see {page('broker.md')}",
            )
        version = "5" if probe.version5 else "3.1.1"
        self._settings = self._settings.model_copy(update={"protocol": version})
        self._connection = self._dial(clean=True)

    def close(self) -> None:
        if self._connection is not None and not self._connection.ended:
            self._connection.leave()

    def collect(
        self, filters: Sequence[str], *, quiet_s: float = QUIET_S, limit_s: float = LIMIT_S
    ) -> Mapping[str, bytes]:
        with self._reading(filters) as reader:
            began_s = reader.heard_s = time.monotonic()

            connection = self._need()

            def is_over() -> bool:
                """What lies unread has come, however long this process could not look."""
                now_s = time.monotonic()
                is_quiet = now_s >= reader.heard_s + quiet_s and not connection.has_unread
                return is_quiet or now_s >= began_s + limit_s

            while not is_over():
                connection.until(is_over, limit_s)
                if connection.ended:
                    raise self._lost(connection)
            return {topic: message.body for topic, message in reader.waiting.items()}

    def publish(self, topic: str, body: bytes, *, retain: bool = False) -> None:
        self.publish_all([Outgoing(topic=topic, body=body, retain=retain)])

    def publish_all(self, messages: Sequence[Outgoing], *, limit_s: float = LIMIT_S) -> None:
        connection = self._need(limit_s)
        window = max(1, min(_WINDOW, connection.receive_maximum))
        left, in_flight = collections.deque(messages), dict[int, str]()
        refused: list[str] = []
        while left or in_flight:
            while left and len(in_flight) < window:
                message = left.popleft()
                in_flight[connection.publish(message.topic, message.body, retain=message.retain)] = (
                    message.topic
                )
            connection.until(lambda: any(mid in connection.published for mid in in_flight), limit_s)
            answered = [mid for mid in in_flight if mid in connection.published]
            for mid in answered:
                topic, code = in_flight.pop(mid), connection.published.pop(mid)
                if is_refusal(code):
                    refused.append(f"{topic}: {code}")
            if not answered or (connection.ended and (left or in_flight)):
                raise self._lost(connection)
        if refused:
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            raise BrokerRefused(f"the broker refuses a message for {refused[0]}{more}", remedy=_acl_remedy())

    @contextlib.contextmanager
    def watch(self, filters: Sequence[str]) -> Iterator[Watch]:
        with self._reading(filters) as reader:
            yield _Watch(self, reader)

    def wait_for(self, done: Callable[[], bool], limit_s: float) -> None:
        """Reads and writes until `done` or the limit, over lost connections."""
        deadline_s = time.monotonic() + limit_s
        while not done() and (left_s := deadline_s - time.monotonic()) > 0:
            connection = self._connection
            if connection is not None:
                connection.until(done, left_s)
                if connection.ended:
                    self._connection, self._problem = None, connection.ended
                    self._retry_at_s = time.monotonic() + _GIVES_WAY_S
                    log.warning(
                        "broker connection lost code=broker_unreachable reason=%r retry_s=%.0f",
                        connection.ended,
                        _GIVES_WAY_S,
                    )
            elif (pause_s := self._retry_at_s - time.monotonic()) > 0:
                time.sleep(min(pause_s, left_s))
            else:
                self._connect_again()

    @contextlib.contextmanager
    def _reading(self, filters: Sequence[str]) -> Iterator[_Reader]:
        """
        Raises:
            BrokerUnreachable, BrokerRefused: the subscription failed.
        """
        connection = self._need()
        reader = _Reader(filters)
        self._readers.append(reader)
        try:
            self._subscribe(connection, filters)
            yield reader
        finally:
            self._readers.remove(reader)
            others = {each for other in self._readers for each in other.filters}
            unused = [each for each in filters if each not in others]
            if self._connection is not None and not self._connection.ended:
                for some in _batches(unused):
                    self._connection.unsubscribe(some)

    def _subscribe(self, connection: CommandConnection, filters: Sequence[str]) -> None:
        for some in _batches(filters):
            mid = connection.subscribe(some, qos=0, retained=True)
            connection.until(lambda mid=mid: mid in connection.granted)  # type: ignore[misc]
            if mid not in connection.granted:
                raise self._lost(connection)
            for each, code in zip(some, connection.granted.pop(mid), strict=False):
                if code.is_failure:
                    raise BrokerRefused(
                        f"the broker refuses to be read on {each}: {code}", remedy=_acl_remedy()
                    )

    def _need(self, limit_s: float = LIMIT_S) -> CommandConnection:
        """The connection, made again if it was lost.

        Raises:
            BrokerUnreachable: it is not there within `limit_s`.
        """

        def there() -> bool:
            return self._connection is not None and not self._connection.ended

        self.wait_for(there, limit_s)
        if self._connection is None or not there():
            raise self._lost(self._connection)
        return self._connection

    def _connect_again(self) -> None:
        """One try. What was subscribed is subscribed again, so what is retained comes again."""
        connection = None
        try:
            connection = self._dial(clean=True)
            for reader in self._readers:
                self._subscribe(connection, reader.filters)
        except (BrokerUnreachable, BrokerRefused, SettingsError) as error:
            if connection is not None:
                connection.leave()
            pause_s = _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
            self._failures += 1
            self._problem = error.message
            self._retry_at_s = time.monotonic() + pause_s
            log.warning(
                "broker not reached again code=%s reason=%r retry_s=%.0f", error.code, error.message, pause_s
            )
            return
        log.info("broker connected again")
        for reader in self._readers:
            reader.renewed = True
        self._failures, self._connection = 0, connection

    def _dial(self, *, clean: bool) -> CommandConnection:
        return command_connection.connect(
            self._settings,
            client_id=self._client_id,
            session_expiry_s=0 if clean else _PROBE_EXPIRY_S,
            on_message=self._take,
            clean=clean,
        )

    def _take(self, topic: str, body: bytes, retained: bool) -> None:
        message = Message(topic=topic, body=body[: MAX_DOCUMENT_BYTES + 1], retained=retained)
        for reader in self._readers:
            reader.take(message)

    def _lost(self, connection: CommandConnection | None) -> BrokerUnreachable:
        reason = (connection.ended if connection is not None else "") or self._problem
        return BrokerUnreachable(
            f"the connection to {place(self._settings)} was lost: {reason}",
            remedy="check the network and the broker",
        )


class _Reader:
    """Who wants what comes on some filters: of each topic the newest message."""

    def __init__(self, filters: Sequence[str]) -> None:
        self.filters = tuple(filters)
        self.waiting: dict[str, Message] = {}
        self.heard_s = 0.0
        self.renewed = False
        self._plain = frozenset(each for each in filters if "+" not in each and "#" not in each)
        self._wild = [each for each in filters if each not in self._plain]

    def take(self, message: Message) -> None:
        topic = message.topic
        if topic not in self._plain and not any(topic_matches_sub(each, topic) for each in self._wild):
            return
        if topic in self.waiting:
            del self.waiting[topic]  # the newest is the last
        elif len(self.waiting) >= MAX_TOPICS:
            return
        self.waiting[topic] = message
        if message.retained:
            self.heard_s = time.monotonic()


class _Watch:
    def __init__(self, connection: ConsoleConnection, reader: _Reader) -> None:
        self._connection = connection
        self._reader = reader

    @property
    def renewed(self) -> bool:
        return self._reader.renewed

    def next(self, timeout_s: float) -> Message | None:
        waiting = self._reader.waiting
        self._connection.wait_for(lambda: bool(waiting), timeout_s)
        return waiting.pop(next(iter(waiting))) if waiting else None


@contextlib.contextmanager
def connected(settings: MqttSettings) -> Iterator[FleetBroker]:
    """A console's connection to the broker, until the block ends.

    Raises:
        BrokerUnreachable, BrokerRefused, SettingsError: see `ConsoleConnection.open`.
    """
    console = ConsoleConnection(settings)
    console.open()
    try:
        yield console
    finally:
        console.close()


def name_of(settings: MqttSettings) -> str:
    """The name by which the broker's rules know this console: its user name, or its certificate's common name."""
    name = settings.username or (_common_name(settings.cert_file) if settings.cert_file else "")
    return name if name and "/" not in name and can_be_published(name) else f"fleet-{uuid.uuid4().hex[:12]}"


def _common_name(file: str) -> str:
    """Of the first certificate in a file; empty if it has none."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        with Path(file).open("rb") as opened:
            certificate = x509.load_pem_x509_certificate(opened.read(_MAX_CERTIFICATE_BYTES))
    except OSError as error:
        raise settings_error(f"mqtt.cert_file: {file} cannot be read: {error.strerror}", error) from error
    except ValueError as error:
        raise SettingsError(f"mqtt.cert_file: {file} has no certificate in PEM") from error
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _batches(filters: Sequence[str]) -> Iterator[list[str]]:
    each = iter(filters)
    while batch := list(itertools.islice(each, _FILTERS_AT_ONCE)):
        yield batch
