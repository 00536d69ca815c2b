"""What brokers and other clients do to the agent: take its name, stall, refuse, hang up, flood it, go away."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer
from edge_agent.transport import outbox
from edge_agent.transport.inbound import Inbound
from tests.support.client import Client, Message, chat, connected
from tests.support.doorkeeper import Door
from tests.support.mosquitto import Broker, running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import Daemon, short_folder, standing_still, wait_until
from tests.support.sample_device import running_device, settings_for, wait_for_state

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."
DEVICE = "edges"
QUEUE_DEPTH = 8
PARALLEL = 4  # the default of inference.parallel


# --- The parts under test ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_broker() -> Iterator[Broker]:
    """A broker that these tests may stop for a while."""
    with short_folder() as folder, running_broker(folder) as running:
        yield running


@pytest.fixture(scope="module")
def device(own_broker: Broker, agent: Daemon) -> Iterator[Daemon]:
    """A device with a short queue; a test that ends it starts it again."""
    config = settings_for(
        own_broker, "", device=DEVICE, limits={"queue_depth": QUEUE_DEPTH}, inference={"drain_s": 1}
    )
    with running_device(agent, config) as daemon:
        yield daemon


@pytest.fixture
def caller(own_broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(own_broker, device=DEVICE) as client:
        yield client


def long(characters: int = 900, **fields: Any) -> dict[str, Any]:
    """A request whose answer has exactly so many characters, one token each."""
    return chat(
        "Count",
        max_tokens=characters + 20,
        response_format={"type": "regex", "regex": f"(0|1){{{characters}}}"},
        **fields,
    )


def settings_of(broker: Broker) -> dict[str, Any]:
    return {"host": broker.host, "port": broker.port}


class Front(Door):
    """Has the manners of other brokers.

    Args:
        speaks_5: False: an MQTT 5 CONNECT gets CONNACK 0x01 of MQTT 3.1.1, as its section 3.2.2.3 says.
        hang_ups: so many of the first connections are closed without a word.
        refuses_subscriptions: each SUBACK says "Not authorized".
    """

    def __init__(
        self,
        broker: Broker,
        *,
        speaks_5: bool = True,
        hang_ups: int = 0,
        refuses_subscriptions: bool = False,
    ) -> None:
        super().__init__(broker)
        self.versions: list[int] = []
        self._speaks_5 = speaks_5
        self._hang_ups = hang_ups
        self._refuses = refuses_subscriptions

    def say_taken_over(self) -> None:
        """What a broker sends to a session whose name another client has taken: DISCONNECT 0x8E."""
        with contextlib.suppress(OSError):
            self._sockets[0].sendall(b"\xe0\x02\x8e\x00")

    def _came(self, client: socket.socket) -> None:
        self._sockets.append(client)
        threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            first = client.recv(65_536)
            level = first[first.index(b"MQTT") + 4] if b"MQTT" in first else 0
            self.versions.append(level)
            if len(self.versions) <= self._hang_ups:
                client.close()
                return
            if level == 5 and not self._speaks_5:
                client.sendall(b"\x20\x02\x00\x01")
                client.close()
                return
            server = socket.create_connection((self._broker.host, self._broker.port))
            self._sockets.append(server)
            server.sendall(first)
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            _pump(server, client, _refuse_subscriptions if self._refuses else None)


def _pump(
    source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes] | None = None
) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(change(data) if change else data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _refuse_subscriptions(data: bytes) -> bytes:
    """Short packets only: what a broker says while nothing is published."""
    changed = b""
    while len(data) > 1:
        packet, data = data[: 2 + data[1]], data[2 + data[1] :]
        if packet[0] == 0x90:  # SUBACK: packet id, property length 0, then a code for each topic
            packet = packet[:5] + b"\x87" * (len(packet) - 5)
        changed += packet
    return changed + data


# --- A handler that fails, a message that poisons ------------------------------------------------------


def test_a_handler_that_fails_stops_nothing_and_its_message_is_acked(
    own_broker: Broker, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Recorder()
    with (
        Agent(short_dir, {"req/chat": handler}, device="wounded", **settings_of(own_broker)) as agent,
        connected(own_broker, device="wounded") as client,
    ):
        agent.wait_connected()
        for payload in (b"good 1", b"poison", b"poison", b"good 2"):
            client.publish(agent.topics.chat, payload)
        wait_until(lambda: b"good 2" in handler.seen, 60, "the message after the poison")
        assert handler.seen == [b"good 1", b"poison", b"poison", b"good 2"]
        assert agent.transport.counters["handler_errors"] == 2
        assert agent.transport.connected
        wait_until(
            lambda: own_broker.log_text().count("Received PUBACK from edge-agent-wounded") == 4, 60, "acks"
        )
    assert own_broker.log_text().count("as edge-agent-wounded ") == 1, "one connection all along"
    assert "poison" not in "".join(record.getMessage() for record in caplog.records if record.levelno > 20), (
        "the payload is in no log"
    )


def test_poison_that_was_not_acked_comes_again_after_a_restart_and_stops_nothing(
    own_broker: Broker, short_dir: Path
) -> None:
    first, second = Recorder(), Recorder()
    with connected(own_broker, device="again") as client:
        with Agent(short_dir, {"req/chat": first}, device="again", **settings_of(own_broker)) as agent:
            agent.wait_connected()
            client.publish(agent.topics.chat, b"poison")
            wait_until(lambda: first.seen == [b"poison"], 60, "the poison")
            agent.transport.stop_accepting()
            client.publish(agent.topics.chat, b"poison 2")
            wait_until(
                lambda: own_broker.log_text().count("Sending PUBLISH to edge-agent-again") == 2,
                60,
                "the second one on its way",
            )
        with Agent(short_dir, {"req/chat": second}, device="again", **settings_of(own_broker)) as agent:
            agent.wait_connected()
            client.publish(agent.topics.chat, b"good")
            wait_until(lambda: b"good" in second.seen, 60, "the message after the poison")
            assert second.seen == [b"poison 2", b"good"], "only what was not acked came again"
            assert agent.transport.connected


def test_a_full_disk_costs_a_503_and_nothing_else(device: Daemon, caller: Client) -> None:
    process = psutil.Process(device.pid)
    unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
    assert unlimited[1] == resource.RLIM_INFINITY
    running = caller.send(long(stream=True))
    caller.wait(lambda message: message.topic.endswith("/stream") and message.correlation == running)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        refused = caller.ask(chat(SPAIN), correlation=b"no-space")
        assert (refused.status, refused.json["error"]["code"]) == (503, "journal_unavailable")
        caller.publish(
            f"{caller.root}/ctl/cancel", b"", ResponseTopic=caller.replies, CorrelationData=b"nobody"
        )
        assert caller.ask(chat(SPAIN)).status == 503
        caller.subscribe(f"{caller.root}/status")
        degraded = caller.wait(lambda message: "degraded" in states(message), timeout_s=60)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
    assert caller.answer(running).status == 200, "what was accepted is answered when there is space again"
    assert caller.ask(chat(SPAIN)).text == MADRID
    caller.send(chat(SPAIN), correlation=b"no-space")
    wait_until(lambda: len(caller.answers(b"no-space")) == 2, 60, "the answer to the second try")
    assert caller.answers(b"no-space")[1].text == MADRID, "a refusal is not remembered"
    caller.wait(lambda m: "ready" in states(m) and m.at_s > degraded.at_s, timeout_s=60)
    assert process.is_running()
    assert device.pid == process.pid


def states(message: Message) -> list[str]:
    """The state that a status message says; nothing for another message."""
    return [message.json["state"]] if message.topic.endswith("/status") else []


@pytest.mark.parametrize("qos", [0, 1])
def test_a_burst_of_refusals_leaves_no_message_without_its_ack(
    own_broker: Broker, short_dir: Path, monkeypatch: pytest.MonkeyPatch, qos: int
) -> None:
    """16 un-acked messages are the Receive Maximum: after them the broker delivers nothing of QoS 1 any more."""
    monkeypatch.setattr(outbox, "MAX_REFUSALS", 4)
    device, come, started = f"burst{qos}", threading.Event(), threading.Event()
    waiting, burst = 20, 8  # the first of QoS 0 fill the window of what may be in flight
    log = own_broker.log_text

    def refuse(message: Inbound) -> None:
        started.set()
        come.wait(60)
        answer = Answer(payload=b"refused", properties={"status": "503"})
        agent.transport.refuse(
            topic="replies/nobody", correlation=None, form=Form.JSON, answer=answer, delivery=message.delivery
        )

    with (
        Agent(short_dir, {"req/chat": refuse}, device=device, **settings_of(own_broker)) as agent,
        connected(own_broker, device=device) as client,
    ):
        wait_until(lambda: f"Sending SUBACK to edge-agent-{device}" in log(), 60, "the subscription")
        client.publish(agent.topics.chat, b"first", qos=0)
        assert started.wait(60)
        for _ in range(waiting):
            client.publish(agent.topics.chat, b"q0", qos=0)
        for _ in range(burst):
            client.publish(agent.topics.chat, b"q1", qos=1)
            client.publish(agent.topics.chat, b"q", qos=qos)
        sent = 1 + waiting + 2 * burst
        wait_until(lambda: log().count(f"Sending PUBLISH to edge-agent-{device}") == sent, 60, "the burst")
        come.set()
        acks = burst * (1 + qos)
        wait_until(lambda: log().count(f"Received PUBACK from edge-agent-{device}") == acks, 60, "every ack")
        assert agent.transport.counters["refusals_dropped"] > 0
        assert agent.transport.connected


# --- Other clients -------------------------------------------------------------------------------------


def test_a_session_that_was_taken_over_is_left_alone_for_long(
    own_broker: Broker, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Front(own_broker) as front,
        Agent(
            short_dir, {"req/chat": Recorder()}, device="taken", host="127.0.0.1", port=front.port
        ) as agent,
    ):
        agent.wait_connected()
        front.say_taken_over()
        wait_until(lambda: not agent.transport.connected, 60, "the end of the session")
        with pytest.raises(TimeoutError):
            wait_until(lambda: len(front.versions) > 1, 4, "a second connect")
    assert re.search(r"(?i)taken over", caplog.text)


def test_two_agents_with_one_name_say_so_within_a_minute_and_do_not_fight(
    own_broker: Broker, short_dir: Path
) -> None:
    """This broker just hangs up on the one that was there first, and does not say why."""

    def connects() -> int:
        return own_broker.log_text().count("as edge-agent-twin ")

    with (
        short_folder() as folder,
        Agent(short_dir, {"req/chat": Recorder()}, device="twin", **settings_of(own_broker)) as first,
    ):
        first.wait_connected()
        with Agent(folder, {"req/chat": Recorder()}, device="twin", **settings_of(own_broker)) as second:

            def codes(agent: Agent) -> list[str]:
                return [trouble["code"] for trouble in agent.transport.status()["troubles"]]

            wait_until(lambda: codes(first) == codes(second) == ["device_id_taken"], 60, "both to say so")
            before = connects()
            assert before <= 12
            with pytest.raises(TimeoutError):
                wait_until(lambda: connects() > before + 2, 6, "a fight")


def test_a_hundred_prompts_at_once_are_all_answered_in_the_end(device: Daemon, caller: Client) -> None:
    (runner,) = device.runners()
    first = [caller.send(long(stream=True)) for _ in range(PARALLEL)]
    wait_until(lambda: all(caller.chunks(correlation) for correlation in first), 60, "a part of each answer")
    waiting = {f"flood-{number}".encode() for number in range(100)}
    with standing_still(runner):  # no place in the queue becomes free while the hundred come
        for correlation in sorted(waiting):
            caller.send(chat(SPAIN, max_tokens=8), correlation=correlation)
        wait_until(lambda: refusals(caller) >= 100 - QUEUE_DEPTH, 60, "a refusal for all but the queue")
    seen = 0
    due_s: dict[bytes, float] = {}

    def take() -> bool:
        """Reads answers; sends a refused prompt again when it may be."""
        nonlocal seen
        new, seen = caller.messages[seen:], len(caller.messages)
        for message in new:
            if message.topic != caller.replies or message.correlation not in waiting:
                continue
            if message.status == 429:
                due_s[message.correlation] = message.at_s + _retry_after_s(message)
            else:
                assert message.text == MADRID
                waiting.discard(message.correlation)
        for correlation in [key for key, at_s in due_s.items() if at_s <= time.monotonic()]:
            del due_s[correlation]
            caller.send(chat(SPAIN, max_tokens=8), correlation=correlation)
        return not waiting

    wait_until(take, 300, "all answers")
    assert {caller.answer(correlation).status for correlation in first} == {200}


def refusals(caller: Client) -> int:
    return sum(message.topic == caller.replies and message.status == 429 for message in list(caller.messages))


def _retry_after_s(message: Message) -> float:
    error = message.json["error"]
    assert error["code"] == "queue_full"
    assert 100 <= error["retry_after_ms"] <= 60_000
    return float(error["retry_after_ms"]) / 1000


# --- Restarts ------------------------------------------------------------------------------------------


def test_what_waits_at_sigterm_or_comes_meanwhile_is_answered_after_the_start(
    device: Daemon, caller: Client
) -> None:
    before = device.log.count("prompt accepted")
    running = caller.send(long(stream=True))
    caller.wait(lambda message: message.topic.endswith("/stream") and message.correlation == running)
    for runner in device.runners():  # on no machine is it so fast that something is answered before the stop
        runner.suspend()
    queued = [caller.send(chat(SPAIN)) for _ in range(3)]
    late = caller.send(chat(SPAIN, deadline_ms=2500))
    wait_until(lambda: device.log.count("prompt accepted") == before + 5, 60, "all in the journal")
    assert device.stop() == 0
    assert all(not caller.answers(correlation) for correlation in queued)
    meanwhile = caller.send(chat(SPAIN))
    expired = caller.send(chat(SPAIN), MessageExpiryInterval=1)
    time.sleep(3)  # the deadline and the expiry, of which mosquitto counts whole seconds
    device.start()
    for correlation in (*queued, meanwhile):
        assert caller.answer(correlation).text == MADRID
    assert caller.answer(running).status == 200
    assert caller.answer(late).json["error"]["code"] == "deadline_exceeded"
    assert caller.answers(expired) == [], "the broker drops what expires while it waits there"
    for correlation in (running, *queued, late, meanwhile):
        assert len(caller.answers(correlation)) == 1
    wait_for_state(device, "ready")


# --- Brokers with limits -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(agent: Daemon) -> Iterator[tuple[Broker, Daemon]]:
    """A broker that takes packets of at most 1,600 bytes and announces it, and a device."""
    with (
        short_folder() as folder,
        running_broker(folder, extra_config="max_packet_size 1600") as broker,
        running_device(agent, settings_for(broker, "", device="narrow")) as daemon,
    ):
        yield broker, daemon


def test_an_answer_over_the_brokers_packet_size_is_413(narrow: tuple[Broker, Daemon]) -> None:
    broker, daemon = narrow
    with connected(broker, device="narrow") as client:
        refused = client.ask(long(1800))
        assert (refused.status, refused.json["error"]["code"]) == (413, "answer_too_large")
        assert refused.properties["status"] == "413"
        assert client.ask(chat(SPAIN)).text == MADRID
    assert broker.log_text().count("as edge-agent-narrow ") == 1, "no packet too large was tried"
    assert daemon.running


def test_a_chunk_over_the_brokers_packet_size_is_left_out(own_broker: Broker, short_dir: Path) -> None:
    with (
        short_folder() as folder,
        running_broker(folder, extra_config="max_packet_size 600") as broker,
        Agent(short_dir, {"req/chat": Recorder()}, **settings_of(broker)) as agent,
        connected(broker, device="bare") as client,
    ):
        agent.wait_connected()
        prompt = agent.accept(client.replies)
        agent.transport.chunk(prompt, {"text": "x" * 1000})
        agent.transport.chunk(prompt, {"text": "small"})
        agent.answer(prompt, b'{"whole": true}')
        assert client.wait_on(client.replies, timeout_s=60).json == {"whole": True}
        assert broker.log_text().count("as edge-agent-bare ") == 1, "the connection was kept"


@pytest.mark.parametrize("kind", ["refusal", "status", "metrics"])
def test_nothing_over_the_brokers_packet_size_costs_the_connection(short_dir: Path, kind: str) -> None:
    large = json.dumps({"text": "x" * 1000}).encode()
    with (
        short_folder() as folder,
        running_broker(folder, extra_config="max_packet_size 600") as broker,
        Agent(short_dir, {"req/chat": Recorder()}, **settings_of(broker)) as agent,
        connected(broker, device="bare") as client,
    ):
        agent.wait_connected()
        if kind == "refusal":
            answer = Answer(payload=large, properties={"status": "400"})
            agent.transport.refuse(
                topic=client.replies, correlation=b"c", form=Form.JSON, answer=answer, delivery=None
            )
        elif kind == "status":
            agent.transport.set_retained(agent.topics.status, large)
        else:
            agent.transport.set_metrics(large)
        prompt = agent.accept(client.replies)
        agent.answer(prompt, b'{"whole": true}')
        client.wait(lambda message: message.payload == b'{"whole": true}', timeout_s=60)
        assert broker.log_text().count("as edge-agent-bare ") == 1, "the connection was kept"


@pytest.mark.parametrize("topic", ["replies/#", "replies/\x01"], ids=ascii)
def test_an_answer_topic_that_was_damaged_in_the_journal_costs_no_connection(
    own_broker: Broker, short_dir: Path, topic: str
) -> None:
    device = f"topic{len(topic.encode('unicode_escape'))}"
    with (
        Agent(short_dir, {"req/chat": Recorder()}, device=device, **settings_of(own_broker)) as agent,
        connected(own_broker, device=device) as client,
    ):
        agent.wait_connected()
        damaged, good = agent.accept(client.replies), agent.accept(client.replies)
        with agent.journal._file.transaction() as db:
            db.execute("UPDATE prompts SET answer_topic=? WHERE row=?", (topic, damaged.row))
        agent.answer(damaged, b"damaged")
        agent.answer(good, b"good")
        client.wait(lambda message: message.payload == b"good", timeout_s=60)
        wait_until(lambda: agent.journal.deliveries.pending() == 0, 60, "the ack")
        assert agent.transport.counters["answers_undelivered"] == 1
        assert own_broker.log_text().count(f"as edge-agent-{device} ") == 1, "one connection all along"


def test_a_broker_that_takes_two_at_a_time_gets_all_answers(short_dir: Path) -> None:
    with (
        short_folder() as folder,
        running_broker(folder, extra_config="max_inflight_messages 2") as broker,
        Agent(short_dir, {"req/chat": Recorder()}, **settings_of(broker)) as agent,
        connected(broker, device="bare") as client,
    ):
        agent.wait_connected()
        topics = [f"{client.replies}/{number}" for number in range(40)]
        for topic in topics:
            agent.answer(agent.accept(topic), b"{}")
        for topic in topics:
            client.wait_on(topic, timeout_s=60)
        wait_until(lambda: agent.journal.deliveries.pending() == 0, 60, "every PUBACK")


def test_a_broker_of_mqtt_3_only_is_served(agent: Daemon, own_broker: Broker) -> None:
    with Front(own_broker, speaks_5=False) as front:
        config = settings_for(own_broker, "", device="elder", mqtt={"port": front.port})
        with running_device(agent, config), connected(own_broker, device="elder", version5=False) as client:
            request = chat(SPAIN, id="old-1", reply_to=client.replies)
            client.publish(f"{client.root}/req/chat", json.dumps(request))
            assert client.wait_on(client.replies).text == MADRID
            assert front.versions[:2] == [5, 4]


def test_a_broker_that_hung_up_while_it_started_is_spoken_to_in_mqtt_5(
    own_broker: Broker, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without properties no client of MQTT 5 would get its answer, until the next lost connection."""
    caplog.set_level(logging.INFO)
    with (
        Front(own_broker, hang_ups=1) as front,
        Agent(short_dir, {"req/chat": Recorder()}, device="hung", host="127.0.0.1", port=front.port) as agent,
    ):
        agent.wait_connected()
        assert front.versions[0] == 5
        assert "protocol=5" in caplog.text


def test_a_refused_subscription_is_an_error_line_with_a_remedy(
    own_broker: Broker, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Front(own_broker, refuses_subscriptions=True) as front,
        Agent(
            short_dir, {"req/chat": Recorder()}, device="barred", host="127.0.0.1", port=front.port
        ) as agent,
    ):
        wait_until(lambda: "subscription refused" in caplog.text, 60, "the refusal")
        assert agent.transport.counters["subscribe_refused"] == 1
        assert agent.transport.connected
    (line,) = [record for record in caplog.records if "subscription refused" in record.getMessage()]
    assert line.levelno == logging.ERROR
    assert "topic=edge/v1/barred/req/chat" in line.getMessage()
    assert "ACL" in line.getMessage()


# --- A broker that stands still ------------------------------------------------------------------------


def test_a_broker_that_stands_still_slows_no_generation_and_gets_every_answer(
    device: Daemon, own_broker: Broker, caller: Client
) -> None:
    usual = [caller.send(long(stream=True)) for _ in range(4)]
    usual_ms = max(float(caller.answer(each).json["timings"]["total_ms"]) for each in usual)
    answered = device.log.count("prompt answered")
    accepted = device.log.count("prompt accepted")
    (runner,) = device.runners()
    with standing_still(
        runner
    ):  # on no machine is it so fast that something is answered before the broker stands
        sent = [caller.send(long(stream=True)) for _ in range(4)]
        wait_until(lambda: device.log.count("prompt accepted") == accepted + 4, 60, "all in the journal")
        before_bytes = psutil.Process(device.pid).memory_info().rss
        own_broker.freeze()
    try:
        wait_until(lambda: device.log.count("prompt answered") == answered + 4, 60, "all generated")
        after_bytes = psutil.Process(device.pid).memory_info().rss
        assert not any(caller.answers(correlation) for correlation in sent[1:])
    finally:
        own_broker.thaw()
    answers = [caller.answer(correlation) for correlation in sent]
    assert [len(answer.text) for answer in answers] == [900] * 4
    assert after_bytes - before_bytes < 10 << 20
    for answer in answers:
        timings = answer.json["timings"]
        assert timings["total_ms"] - timings["queue_ms"] < 5 * usual_ms + 5000, "as with a broker that reads"


def test_parts_for_a_broker_that_stands_still_are_dropped_and_the_answer_is_not(short_dir: Path) -> None:
    document = {"text": "x" * 50_000}
    with (
        short_folder() as folder,
        running_broker(folder) as broker,
        Agent(short_dir, {"req/chat": Recorder()}, **settings_of(broker)) as agent,
        connected(broker, device="bare") as client,
    ):
        agent.wait_connected()
        prompt = agent.accept(client.replies)
        broker.freeze()
        try:
            before_bytes = psutil.Process().memory_info().rss
            for _ in range(4000):  # 200 MB
                agent.transport.chunk(prompt, document)
            agent.answer(prompt, b'{"whole": true}')
            assert psutil.Process().memory_info().rss - before_bytes < 60 << 20
            assert agent.transport.counters["chunks_dropped"] > 1000
        finally:
            broker.thaw()
        assert client.wait_on(client.replies, timeout_s=60).json == {"whole": True}
