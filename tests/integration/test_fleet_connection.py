"""A console's connection on a real broker: what is retained, published and refused, and a broker that dies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import BrokerRefused, BrokerUnreachable
from edge_agent.fleet.broker import FleetBroker, Message, Outgoing, Watch
from edge_agent.fleet.connection import connected
from edge_agent.settings.mqtt import MqttSettings
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.client import connected as client_of
from tests.support.documented_broker import DEVICE, Application, documented_broker, tls_settings
from tests.support.mosquitto import Broker, running_broker
from tests.support.processes import Child, accepts, free_port, to_toml, wait_until
from tests.support.scripted_fleet import TOPICS, device

FILTERS = [TOPICS.statuses, TOPICS.reports]
PRESS = TOPICS.of(DEVICE)
TAKEN = ("Success", "No matching subscribers")


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of this file's own, with some devices' documents retained."""
    with running_broker(tmp_path_factory.mktemp("broker")) as broker, client_of(broker) as client:
        for device_id in ("a", "b"):
            retain(client, device_id)
        yield broker


def retain(client: Client, device_id: str) -> None:
    for topic, body in device(device_id).items():
        client.publish(topic, body, retain=True)


def settings(broker: Broker, protocol: str = "auto") -> MqttSettings:
    return MqttSettings.model_validate({"host": broker.host, "port": broker.port, "protocol": protocol})


def next_of(watch: Watch, topic: str, seen: list[str] | None = None) -> Message:
    """The next message of a topic; those of others, which a broker may bring late, go into `seen`."""
    while message := watch.next(60):
        if message.topic == topic:
            return message
        if seen is not None:
            seen.append(message.topic)
    raise AssertionError(f"nothing came for {topic}")


def test_what_is_retained_is_collected_by_wildcard_and_by_name(own: Broker, protocol: str) -> None:
    with connected(settings(own, protocol)) as console:
        assert console.collect(FILTERS, quiet_s=0.2) == {**device("a"), **device("b")}
        by_name = [TOPICS.of(f"d{number}").status for number in range(250)]
        b = TOPICS.of("b").status
        assert console.collect([*by_name, b], quiet_s=0.2) == {b: device("b")[b]}


def test_a_collection_ends_though_it_never_gets_quiet(own: Broker) -> None:
    with connected(settings(own)) as console:
        assert len(console.collect(FILTERS, quiet_s=3_600, limit_s=3)) == 4


def test_what_is_published_has_arrived(own: Broker, protocol: str) -> None:
    messages = [Outgoing(topic=f"t/{number}", body=b"x", retain=True) for number in range(300)]
    with connected(settings(own, protocol)) as console:
        console.publish_all(messages)
        assert len(console.collect(["t/+"], quiet_s=0.2)) == 300
        console.publish_all([Outgoing(topic=each.topic, body=b"", retain=True) for each in messages])
        assert console.collect(["t/+"], quiet_s=0.2) == {}


def test_a_watch_has_each_topics_newest_message(own: Broker) -> None:
    with connected(settings(own)) as console, client_of(own) as client, console.watch(FILTERS) as watch:
        came = [watch.next(30) for _ in range(4)]
        assert {each.topic: each.body for each in came if each} == {**device("a"), **device("b")}
        assert all(each.retained for each in came if each)
        assert watch.next(0) is None
        for number in range(50):
            client.publish(TOPICS.of("a").status, f"{number}")
        client.publish(TOPICS.of("b").status, "last")
        console.publish("t/behind", b"x")  # its PUBACK comes behind all of these, and is waited for
        newest = [watch.next(0), watch.next(0)]
        assert [each.body for each in newest if each] == [b"49", b"last"]
        assert watch.next(0) is None, "older ones of a are gone"


def test_a_watch_and_a_collection_share_a_filter(own: Broker) -> None:
    with connected(settings(own)) as console, client_of(own) as client, console.watch(FILTERS) as watch:
        console.collect(FILTERS, quiet_s=0.2)
        client.publish(TOPICS.of("c").status, "now")
        message = next_of(watch, TOPICS.of("c").status)
        assert (message.body, message.retained) == (b"now", False)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_watch_outlives_the_broker(tmp_path: Path, protocol: str) -> None:
    with (
        running_broker(tmp_path) as broker,
        connected(settings(broker, protocol)) as console,
        console.watch(FILTERS) as watch,
    ):
        broker.kill()
        assert watch.next(0.5) is None
        with pytest.raises(BrokerUnreachable):
            console.publish_all([Outgoing(topic="t", body=b"x")], limit_s=0.1)
        broker.start()
        with client_of(broker) as client:
            retain(client, "a")
            came = [watch.next(30), watch.next(30)]
            assert {each.topic for each in came if each} == set(device("a"))
            assert watch.renewed
            console.publish("t", b"x", retain=True)
            assert console.collect(["t"], quiet_s=0.2) == {"t": b"x"}


def test_a_message_that_paho_cannot_read_ends_no_console(own: Broker) -> None:
    with connected(settings(own)) as console, client_of(own) as client, console.watch(FILTERS) as watch:
        client.publish(TOPICS.of("c").status, "odd", UserProperty=("\N{ZERO WIDTH NO-BREAK SPACE}", "x"))
        client.publish(TOPICS.of("d").status, "even")
        seen: list[str] = []
        assert next_of(watch, TOPICS.of("d").status, seen).body == b"even"
        assert TOPICS.of("c").status not in seen


def test_a_broker_that_is_not_there_is_named() -> None:
    port = free_port()
    assert not accepts(port)
    with (
        pytest.raises(BrokerUnreachable, match=f"127.0.0.1:{port} cannot be reached"),
        connected(MqttSettings(host="127.0.0.1", port=port)),
    ):
        pass


# --- The rules of docs/broker.md -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented() -> Iterator[tuple[Broker, Authority]]:
    with documented_broker() as made:
        yield made


def identity(documented: tuple[Broker, Authority], name: str, protocol: str = "auto") -> MqttSettings:
    broker, authority = documented
    values = {"host": broker.host, "port": broker.port, "protocol": protocol}
    return MqttSettings.model_validate({**values, **tls_settings(authority, authority.client(name))})


@pytest.fixture
def console(documented: tuple[Broker, Authority]) -> Iterator[FleetBroker]:
    with connected(identity(documented, "console")) as made:
        yield made


def test_an_operator_may_do_what_a_console_does(
    documented: tuple[Broker, Authority], console: FleetBroker
) -> None:
    assert console.name == "console"
    with Application(*documented, DEVICE) as press:
        for topic, body in device(DEVICE).items():
            assert press.publish(topic, body, retain=True) in TAKEN
        assert console.collect(FILTERS, quiet_s=0.2) == device(DEVICE)
        for topic in (PRESS.sync, PRESS.plan, PRESS.desired):
            press.subscribe(topic)
        console.publish(PRESS.sync, b'{"within_s": 5}')
        console.publish(PRESS.desired, b'{"models": {"assistant": {"version": 7}}}', retain=True)
        console.publish(TOPICS.rollout("assistant"), b'{"state": "planned"}', retain=True)
        assert list(console.collect([TOPICS.rollout("+")], quiet_s=0.2)) == [TOPICS.rollout("assistant")]
        with console.watch(["replies/console/+/plan-1"]) as replies:
            console.publish(PRESS.plan, json.dumps({"reply_to": f"replies/console/{DEVICE}/plan-1"}).encode())
            wait_until(lambda: len(press.came) == 3, 30, "three messages")
            press.publish(f"replies/console/{DEVICE}/plan-1", b"{}")
            assert replies.next(30) is not None


def test_a_device_may_not_do_what_an_operator_does(documented: tuple[Broker, Authority]) -> None:
    other = TOPICS.of("press-4")
    forbidden = [
        other.desired,
        other.sync,
        other.plan,
        PRESS.desired,
        PRESS.sync,
        TOPICS.rollout("assistant"),
    ]
    with Application(*documented, DEVICE) as press:
        assert {press.publish(topic, b"{}", retain=True) for topic in forbidden} == {"Not authorized"}
        press.subscribe(f"{TOPICS.operators}/#")
        press.subscribe(TOPICS.statuses)
        with connected(identity(documented, "console")) as console:
            console.publish(TOPICS.rollout("other"), b"{}", retain=True)
        assert press.publish(PRESS.status, b"{}", retain=True) in TAKEN
        assert press.came == []


def test_a_refusal_names_the_topic_and_the_page(console: FleetBroker) -> None:
    messages = [Outgoing(topic=topic, body=b"x") for topic in (PRESS.sync, PRESS.chat, PRESS.status)]
    with pytest.raises(BrokerRefused) as caught:
        console.publish_all(messages)
    assert f"{PRESS.chat}: Not authorized, and 1 more" in caught.value.message
    assert "docs/broker.md" in caught.value.remedy


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_short_command_beside_a_watch_of_the_same_identity_harms_neither(
    documented: tuple[Broker, Authority], protocol: str
) -> None:
    """This broker ends the watch's connection for the command's."""
    topic, body = TOPICS.rollout(f"beside-{protocol[0]}"), protocol.encode()
    with connected(identity(documented, "console", protocol)) as watching, watching.watch([topic]) as watch:
        with connected(identity(documented, "console", protocol)) as short:
            short.publish(topic, body, retain=True)
            assert short.collect([topic], quiet_s=0.2) == {topic: body}
        message = watch.next(60)
        assert message is not None and message.body == body


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_console_that_is_killed_leaves_nothing_in_the_way_of_the_next(
    documented: tuple[Broker, Authority], tmp_path: Path, protocol: str
) -> None:
    mqtt = identity(documented, "console", protocol).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "operator.toml").write_text(to_toml({"mqtt": mqtt}))
    command = [sys.executable, "-m", "edge_agent", "--config", str(tmp_path / "operator.toml")]
    child = Child([*command, "fleet", "status", "--watch"], tmp_path / "log")
    try:
        wait_until(lambda: "devices" in child.log_text(), 60, "its page")
    finally:
        child.kill()
    with connected(identity(documented, "console", protocol)) as console:
        console.publish(TOPICS.rollout("after"), b"x")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_with_a_devices_identity_a_console_leaves_its_prompts_alone(
    documented: tuple[Broker, Authority], protocol: str
) -> None:
    """This broker gives it the device's session, and the prompts that wait in it."""
    broker, authority = documented
    with Application(broker, authority, DEVICE, session_expiry_s=600) as press:
        press.subscribe(PRESS.chat_of_clients)
    with Application(broker, authority, "shop") as shop:
        assert shop.publish(f"{PRESS.chat}/shop", b"first") == "Success"
        with (
            pytest.raises(BrokerRefused, match="another client, whose identity it has"),
            connected(identity(documented, DEVICE, protocol)),
        ):
            pass
        with Application(broker, authority, DEVICE, session_expiry_s=600) as press:
            wait_until(lambda: press.came, 30, "the prompt that waited")
            assert press.came[0].payload == b"first"
