"""Five hundred generated messages through the broker to the daemon: each is answered, and nothing stops.

Structure and properties come from tests/unit/test_fuzz.py, the same ones in every run. What a message is
answered with is the contract's table; which of its lines is the unit tests' business.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given

from edge_agent.chat import messages
from edge_agent.errors import PromptError, by_code
from tests.support.client import Client, Message, chat, connected
from tests.support.generated_messages import Properties, examples, payloads, properties
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, wait_until

pytestmark = pytest.mark.attack

CASES = 500
WINDOW = 20
SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."
MAX_CORRELATION_BYTES = 64
STATUSES = {str(kind.status) for kind in by_code(PromptError).values()} - {"500", "503"} | {"200"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One message. `version5` is false for one in four."""

    number: int
    payload: bytes
    properties: Properties
    version5: bool

    @property
    def topic(self) -> str | None:
        """Where its answer comes, if that is a topic of this case alone; else somewhere under `rsp`."""
        if not self.version5 or self.properties.response_topic not in ("replies/a", "replies/a/b"):
            return None
        return f"replies/fuzz/{self.number}"

    @property
    def identified(self) -> bool:
        """A repeat of an unfinished request gets nothing of its own."""
        correlation = self.properties.correlation
        return (self.version5 and correlation is not None) or b'"id"' in self.payload


LONG = b"x" * 102_401
"""One byte more than `limits.payload_bytes`."""


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Two in five are requests that the parser takes: how many are drawn changes with every constant in the code."""
    drawn: list[tuple[bytes, Properties]] = []

    @examples(4 * CASES)
    @given(payload=payloads(), given_properties=properties())
    def collect(payload: bytes, given_properties: Properties) -> None:
        drawn.append((payload, given_properties))

    collect()
    taken = [pair for pair in drawn if parses(pair[0])][: 2 * CASES // 5]
    assert len(taken) >= CASES // 5, "the generated requests are near the contract"
    too_long = [(LONG, given) for _, given in taken[:10]]  # chance may draw none
    others = [*too_long, *(pair for pair in drawn if not parses(pair[0]))][: CASES - len(taken)]
    assert len(taken) + len(others) == CASES
    mixed = sorted([*taken, *others], key=lambda pair: hashlib.sha256(pair[0]).digest())
    return [
        Case(number=number, payload=payload, properties=given, version5=number % 4 != 3)
        for number, (payload, given) in enumerate(mixed)
    ]


def parses(payload: bytes) -> bool:
    try:
        messages.parse(payload, limit_bytes=102_400)
    except PromptError:
        return False
    return True


@pytest.fixture
def listener(broker: Broker, agent: Daemon) -> Iterator[Client]:
    """Hears every answer to the generated messages."""
    with connected(broker) as client:
        client.subscribe("replies/#")
        client.subscribe(f"{client.root}/rsp/#")
        yield client


def test_five_hundred_generated_messages_are_all_answered_and_stop_nothing(
    broker: Broker, agent: Daemon, client: Client, old_client: Client, listener: Client, cases: list[Case]
) -> None:
    runners = [runner.pid for runner in agent.runners()]
    log_before = len(agent.log)
    try:
        for start in range(0, CASES, WINDOW):
            window = cases[start : start + WINDOW]
            seen = len(listener.messages)
            for case in window:
                send(case, client if case.version5 else old_client)
            wait_answered(window, listener, seen)
            # The one network thread has read all of them, and reads on:
            assert client.ask(chat(SPAIN)).text == MADRID
    finally:
        client.publish(f"{client.root}/req/chat", b"", retain=True)
    for message in answers(listener.messages):
        assert message.properties["status"] in STATUSES, message
        assert message.correlation is None or len(message.correlation) <= MAX_CORRELATION_BYTES
    log = agent.log[log_before:]
    assert "Traceback" not in log
    assert "handler failed" not in log and "callback failed" not in log and "runner failed" not in log
    assert agent.running
    assert [runner.pid for runner in agent.runners()] == runners, "no prompt cost a runner"
    assert "broker disconnected" not in log
    statuses = [message.properties["status"] for message in answers(listener.messages)]
    accepted = statuses.count("200") + statuses.count("408")  # a busy host is late for the shortest deadlines
    assert min(accepted, statuses.count("400"), 50) == 50, f"near the contract: {Counter(statuses)}"
    assert "413" in statuses


def send(case: Case, client: Client) -> None:
    given_properties = case.properties
    fields: dict[str, object] = {}
    if case.version5:
        if given_properties.response_topic is not None and "\0" not in given_properties.response_topic:
            fields["ResponseTopic"] = case.topic or given_properties.response_topic
        if given_properties.correlation is not None:
            fields["CorrelationData"] = given_properties.correlation
        if given_properties.expiry_s is not None:
            # A message that expires at the broker is dropped there, which is no business of the agent's.
            fields["MessageExpiryInterval"] = max(2, given_properties.expiry_s)
    client.publish(
        f"{client.root}/req/chat",
        case.payload,
        qos=given_properties.qos,
        retain=given_properties.retained and bool(case.payload),
        **fields,
    )


def wait_answered(window: list[Case], listener: Client, seen: int) -> None:
    """Each case with a topic of its own is answered there; the others are counted under `rsp` and the rest."""
    own = {case.topic for case in window if case.topic is not None}
    counted = sum(case.topic is None and not case.identified for case in window)

    def missing() -> set[str]:
        came = answers(listener.messages[seen:])
        return own - {message.topic for message in came}

    def elsewhere() -> int:
        return sum(message.topic not in own for message in answers(listener.messages[seen:]))

    try:
        wait_until(lambda: not missing() and elsewhere() >= counted, 60)
    except TimeoutError as error:
        lost = [case for case in window if case.topic in missing()]
        raise AssertionError(
            f"not answered: {[(case.number, case.payload[:300], case.properties) for case in lost]}; "
            f"{elsewhere()} of {counted} under other topics: "
            f"{[(case.number, case.payload[:120]) for case in window if case.topic is None]}"
        ) from error


def answers(came: list[Message]) -> list[Message]:
    """Without chunks, and without the answers to the good prompts in between."""
    return [
        message
        for message in list(came)
        if not message.topic.endswith("/stream") and not re.fullmatch(r"replies/[0-9a-f]{12}", message.topic)
    ]


@pytest.mark.parametrize("depth", [600, 987, 5000])
def test_a_schema_nested_deep_costs_its_sender_a_400_and_nobody_else(
    agent: Daemon, client: Client, depth: int
) -> None:
    schema = b'{"a":' * depth + b"1" + b"}" * depth
    payload = b'{"prompt":"x","response_format":{"type":"json_schema","json_schema":{"schema":%s}}}' % schema
    pid = agent.pid
    assert client.ask(payload).json["error"]["code"] == "bad_request"
    assert client.ask(chat(SPAIN)).text == MADRID
    assert agent.running and agent.pid == pid


@pytest.mark.parametrize("character", ["\x01", "\ufffe", "\ud800"], ids=ascii)
def test_an_answer_topic_that_no_broker_takes_is_refused_and_costs_no_connection(
    agent: Daemon, client: Client, character: str
) -> None:
    client.subscribe(f"{client.root}/rsp/#")
    request_id = uuid.uuid4().hex
    log_before = len(agent.log)
    request = {"prompt": "x", "id": request_id, "reply_to": f"replies/{character}"}
    client.publish(f"{client.root}/req/chat", json.dumps(request))
    assert client.wait_on(f"{client.root}/rsp/{request_id}", timeout_s=60).status == 400
    assert client.ask(chat(SPAIN)).text == MADRID
    log = agent.log[log_before:]
    assert "broker disconnected" not in log and "Traceback" not in log


def test_a_message_whose_properties_the_library_takes_for_malformed_costs_no_connection(
    agent: Daemon, client: Client
) -> None:
    """U+FEFF is a character like others for the specification and for mosquitto."""
    log_before = len(agent.log)
    for qos in (0, 1):
        client.publish(f"{client.root}/req/chat", SPAIN, qos=qos, UserProperty=[("mark", "\ufeff")])
    assert client.ask(chat(SPAIN)).text == MADRID
    log = agent.log[log_before:]
    assert log.count("message unreadable") == 2
    assert "broker disconnected" not in log


@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "max_tokens", "deadline_ms"])
def test_a_number_of_four_hundred_digits_is_refused_by_name(client: Client, field: str) -> None:
    answer = client.ask(b'{"prompt": "x", "%s": %s}' % (field.encode(), b"9" * 400))
    assert answer.status == 400
    assert field in answer.json["error"]["message"]


def test_an_id_that_comes_again_with_other_bodies_is_refused_and_keeps_its_answer(client: Client) -> None:
    first = client.ask(chat(SPAIN), correlation=b"kept")
    others = [json.dumps(chat(SPAIN, max_tokens=number)) for number in range(1, 11)] + ["text", "{}"]
    for body in others:
        client.send(body, correlation=b"kept")
    wait_until(lambda: len(client.answers(b"kept")) == 1 + len(others), 60, "a refusal for each")
    refusals = client.answers(b"kept")[1:]
    assert [answer.properties["status"] for answer in refusals] == ["409"] * 11 + ["400"]
    client.send(chat(SPAIN), correlation=b"kept")
    wait_until(lambda: len(client.answers(b"kept")) == 2 + len(others), 60, "the answer again")
    assert client.answers(b"kept")[-1].payload == first.payload
    assert messages.read(first.payload, limit_bytes=102_400).form is messages.Form.JSON
