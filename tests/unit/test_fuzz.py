"""Ten thousand generated messages against everything that reads one. The same ones in every run.

A message is refused by the table of the contract, or it is good all the way: into the journal, out of it, and
into the frame that the runner gets. Nothing else may happen, whatever the bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import settings as settings_module
from edge_agent.chat import clock, messages
from edge_agent.chat.intake import identity
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form, Request
from edge_agent.chat.prompt import Answer, Arrival, Delivery, Source
from edge_agent.daemon import Daemon
from edge_agent.errors import BadRequest, ModelFailed, PromptError, PromptTooLong
from edge_agent.runner import protocol
from edge_agent.sd_notify import Notifier
from edge_agent.settings.model import ModelSettings
from edge_agent.topics import ID_PATTERN, Topics
from edge_agent.transport.inbound import Inbound
from tests.support.generated_messages import (
    LIMIT_BYTES,
    Properties,
    examples,
    payloads,
    properties,
    reply_topics,
)
from tests.support.processes import short_folder

pytestmark = pytest.mark.attack

TOPICS = Topics(prefix="edge", device_id="dev", reply_prefixes=("replies/",))


# --- What is generated ---------------------------------------------------------------------------------

VARIANTS = 4
_seeds = st.integers(0, (1 << 32) - 1)


def variants(whole: bytes, seed: int) -> Iterator[bytes]:
    """The bytes as they were generated, then `VARIANTS - 1` with a wound: generating is dear, this is not."""
    yield whole
    chance = random.Random(seed)
    for _ in range(VARIANTS - 1):
        place, length = chance.randrange(len(whole) + 1), chance.randrange(6)
        inside = chance.choice([b"", b'"', b"{", b"]", b",", b":", b"9" * 400, b"\\u0000", b"\xff", b"null"])
        yield whole[:place] + inside + whole[place + length :]


# --- What must hold ------------------------------------------------------------------------------------


def read(payload: bytes) -> Request | PromptError:
    """The request, or its refusal; both must be fit for the way back to the client."""
    body = messages.read(payload, limit_bytes=LIMIT_BYTES)
    try:
        request = body.request()
    except PromptError as error:
        assert isinstance(error, BadRequest | PromptTooLong)
        document = messages.error_document("x", error)
        assert document == json.loads(messages.encode(document))
        assert messages.encode_answer(document, Form.TEXT).startswith(b"error 4")
        return error
    assert request.form is body.form
    return request


@examples(5600 // VARIANTS)
@given(whole=payloads(), seed=_seeds)
def test_every_payload_is_read_or_refused(whole: bytes, seed: int) -> None:
    for payload in variants(whole, seed):
        request = read(payload)
        if isinstance(request, Request):
            frame = protocol.Generate(id="1.1", document=json.loads(json.dumps(request.document)))
            assert protocol.decode(protocol.encode(frame).rstrip(b"\n")) == frame


@examples(1200 // VARIANTS)
@given(whole=payloads(), seed=_seeds)
def test_every_cancel_is_read_or_refused(whole: bytes, seed: int) -> None:
    for payload in variants(whole, seed):
        try:
            request_id, reply_to = messages.parse_cancel(payload)
        except BadRequest:
            continue
        assert request_id is None or ID_PATTERN.fullmatch(request_id)
        assert reply_to is None or reply_to


@examples(1200)
@given(
    topic=st.one_of(
        reply_topics,
        st.text(max_size=20),
        st.builds(
            lambda parts: "/".join(parts),
            st.lists(
                st.sampled_from(
                    [
                        "edge",
                        "v1",
                        "dev",
                        "req",
                        "chat",
                        "ctl",
                        "rsp",
                        "status",
                        "model",
                        "replies",
                        "",
                        "+",
                        "#",
                    ]
                ),
                max_size=9,
            ),
        ),
    )
)
def test_an_answer_goes_to_an_answer_topic_or_nowhere(topic: str) -> None:
    try:
        allowed = TOPICS.check_answer_topic(topic)
    except BadRequest:
        return
    assert allowed == topic
    assert topic.startswith(("replies/", "edge/v1/dev/rsp/"))
    assert not set("+#\0$") & set(topic[:1]) and not set("+#\0") & set(topic)
    assert len(TOPICS.stream(topic).encode()) <= 256
    assert TOPICS.stream(topic).count("/") <= 7


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """The daemon's parts, built and never run: the way from a message to its refusal, without a network."""
    with short_folder() as folder:
        built = Daemon(
            settings_module.Settings(
                device_id="dev",
                state_dir=folder / "state",
                control_socket=folder / "c.sock",
                models={"assistant": ModelSettings(uri="models:/sample@prod")},
            ),
            Notifier(None, None),
        )
        yield built
        built._shut_down()


@examples(1600 // VARIANTS)
@given(whole=payloads(), seed=_seeds, given_properties=properties())
def test_the_daemon_reads_every_message(
    daemon: Daemon, whole: bytes, seed: int, given_properties: Properties
) -> None:
    for payload in variants(whole, seed):
        before = judged(daemon)
        daemon._requests.on_chat(inbound(payload, given_properties))
        assert judged(daemon) == before + 1, "refused or dropped, and counted"
    daemon._requests.on_cancel(inbound(whole, given_properties))


def judged(daemon: Daemon) -> int:
    """Nothing is sent here, so that refusals that had to go are counted as well."""
    counters = daemon._mqtt.counters
    return sum(counters.values()) - counters["refusals_dropped"]


def inbound(payload: bytes, given_properties: Properties, mid: int = 1) -> Inbound:
    expiry_s = given_properties.expiry_s
    return Inbound(
        topic=TOPICS.chat,
        payload=payload,
        retained=given_properties.retained,
        response_topic=given_properties.response_topic,
        correlation=given_properties.correlation,
        expiry_s=None if expiry_s is None else float(expiry_s),
        delivery=Delivery(session="s", mid=mid, redelivered=False) if given_properties.qos else None,
    )


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    path: Path = tmp_path_factory.mktemp("fuzz") / "journal.db"
    opened = Journal(path, moment=clock.now())
    yield opened
    opened.close()


@examples(400)
@given(payload=payloads(), given_properties=properties())
def test_what_is_accepted_reaches_the_runner_as_it_was_read(
    journal: Journal, payload: bytes, given_properties: Properties
) -> None:
    request = read(payload)
    if isinstance(request, PromptError):
        return
    arrival = Arrival(
        id=request.id or "made",
        identity=identity("replies/a", given_properties.correlation, request.id),
        body_sha256=hashlib.sha256(payload).digest(),
        source=Source.MQTT,
        model="assistant",
        document=request.document,
        form=request.form,
        stream=request.stream,
        answer_topic="replies/a",
        correlation=given_properties.correlation,
        deadline_s=10,
        delivery=inbound(payload, given_properties).delivery,
    )
    try:
        acceptance = journal.accept(arrival, moment=clock.now(), queue_depth=20, retry_after_ms=100)
    except PromptError as error:
        assert error.status == 409
        return
    if acceptance.new:
        prompt = journal.claim("assistant")
        assert prompt is not None and prompt.document == request.document
        protocol.encode(protocol.Generate(id="1.1", document=prompt.document))
        answer = Answer.of_error(prompt.id, prompt.form, ModelFailed("no model here"))
        assert journal.answer(prompt.row, answer, moment=clock.now())
        journal.deliveries.delivered(prompt.row)


# --- Found once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("digits", [309, 400, 4000])
def test_a_number_too_large_for_a_float_is_refused_by_name(field: str, digits: int) -> None:
    payload = b'{"prompt": "x", "%s": %s}' % (field.encode(), b"9" * digits)
    with pytest.raises(BadRequest, match=field):
        messages.parse(payload, limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize("objects_inside", [False, True], ids=["lists", "objects"])
@pytest.mark.parametrize("depth", [*range(150, 1050, 50), 980, 985, 986, 987, 988, 989, 990])
def test_a_schema_is_as_deep_as_every_reader_of_it_can_follow_or_refused(
    depth: int, objects_inside: bool
) -> None:
    """The runner's frame and the journal's row need more stack for one level than the parser does."""
    inside = (b'{"a":' * depth + b"1" + b"}" * depth) if objects_inside else (b"[" * depth + b"]" * depth)
    payload = b'{"prompt":"x","response_format":{"type":"json_schema","json_schema":{"schema":%s}}}' % inside
    outcome: list[BaseException | None] = []

    def run() -> None:
        """In a thread of its own: the depth of the test's own stack is no part of the question."""
        try:
            request = read(payload)
            if isinstance(request, Request):
                json.loads(json.dumps(request.document))
                protocol.encode(protocol.Generate(id="1.1", document=request.document))
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert outcome == []
