"""Ten thousand generated messages against everything that reads one. The same ones in every run.

A message is refused by the table of the contract, or it is good all the way: into the journal, out of it, and
into the frame that the runner gets. Nothing else may happen, whatever the bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edge_agent import settings as settings_module
from edge_agent.chat import clock, messages
from edge_agent.chat.fields import ID_PATTERN
from edge_agent.chat.intake import identity
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form, Request
from edge_agent.chat.prompt import Answer, Arrival, Delivery, Source
from edge_agent.daemon import Daemon
from edge_agent.errors import BadRequest, ModelFailed, PromptError, PromptTooLong
from edge_agent.runner import protocol
from edge_agent.sd_notify import Notifier
from edge_agent.topics import Topics
from edge_agent.transport.inbound import Inbound
from tests.support.processes import short_folder

LIMIT_BYTES = 102_400
TOPICS = Topics(prefix="edge", device_id="dev", reply_prefixes=("replies/",))


def examples(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same `number` examples each time, however slow the host is."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# --- What is generated ---------------------------------------------------------------------------------

_characters = st.characters(codec="utf-8", exclude_characters="\0")
_words = st.sampled_from(
    ["", " ", "Hello", "What is the capital of Spain?", "\u00e9\U0001f34e", "<|end|>", "a\0b"]
)
_texts = st.one_of(_words, st.text(_characters, max_size=12), st.text(max_size=3))
_numbers = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5, -0.0, 1e308, 1 << 31, 1 << 63, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=False, allow_infinity=False),
)
_odd = st.one_of(st.none(), st.booleans(), _numbers, _texts, st.just([]), st.just({}), st.just([None]))
_message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": _texts}),
    st.fixed_dictionaries(
        {"role": st.one_of(st.just("user"), _odd), "content": st.one_of(_texts, _odd)},
        optional={"name": st.one_of(_texts, _odd), "tool": _odd},
    ),
    _odd,
)
_messages = st.one_of(
    st.lists(_message, min_size=1, max_size=3),
    st.just([{"role": "user", "content": "Hello"}]),
    st.builds(lambda count: [{"role": "user", "content": "x"}] * count, st.sampled_from([0, 256, 257])),
    _odd,
)


def nested(depth: int, *, objects: bool) -> Any:
    """A value inside `depth` lists or objects."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if objects else [value]
    return value


_deep = st.builds(nested, st.sampled_from([1, 5, 40, 200, 600]), objects=st.booleans())
_formats = st.one_of(
    st.sampled_from(
        [
            {"type": "text"},
            {"type": "regex", "regex": "(yes|no)"},
            {"type": "regex", "regex": "(("},
            {"type": "regex", "regex": "a\0"},
            {"type": "regex"},
            {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}},
            {"type": "json_schema", "json_schema": {"schema": {"type": 3}}},
            {"type": "json_schema", "json_schema": []},
            {"type": "xml"},
            {"type": []},
        ]
    ),
    st.builds(lambda value: {"type": "json_schema", "json_schema": {"schema": {"enum": value}}}, _deep),
    _odd,
)
_ids = st.one_of(st.sampled_from(["r-1", "r-2", "A.b_c"]), _odd)
_reply_topics = st.sampled_from(
    [
        *("replies/a", "replies/a/b", "edge/v1/dev/rsp/x", "replies/", "replies"),
        *("replies/+/x", "replies/#", "$SYS/x", "$share/g/replies/a", "elsewhere", "", "/", "replies/\u00e9"),
        *("edge/v1/dev/req/chat", "edge/v1/dev/ctl/cancel", "edge/v1/dev/status", "edge/v1/other/req/chat"),
        *("edge/v1/dev/rsp/a/b/c/d/e", "replies/" + "/" * 9, "replies/" + "x" * 300, "replies/a\0b"),
    ]
)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": _numbers,
    "top_p": _numbers,
    "top_k": _numbers,
    "seed": _numbers,
    "stop": st.one_of(_texts, st.lists(st.one_of(_texts, _odd), max_size=3), st.just(["x"] * 17), _odd),
    "n": st.one_of(st.just(1), _odd),
    "stream": st.one_of(st.booleans(), _odd),
    "response_format": _formats,
    "model": st.one_of(st.sampled_from(["assistant", "missing"]), _odd),
    "id": _ids,
    "reply_to": st.one_of(_reply_topics, _odd),
    "deadline_ms": st.one_of(st.sampled_from([1, 500, 5000, 0, -1, 10**12]), _odd),
    "colour": _odd,
    "\udc80": _odd,
}
_short = st.one_of(st.integers(1, 4), st.just(1 << 21), st.just(1 << 20), _odd)


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    """Near the contract: the content is mostly good, and each field may be wrong in many ways."""
    document: dict[str, Any] = {}
    if draw(st.integers(0, 9)) < 8:
        document["messages"] = draw(_messages)
    else:
        document["prompt"] = draw(st.one_of(_texts, _odd))
        if draw(st.integers(0, 9)) == 0:
            document["messages"] = draw(_messages)
    for name in draw(st.lists(st.sampled_from(sorted(_fields)), max_size=3, unique=True)):
        document[name] = draw(_fields[name])
    document["max_tokens"] = draw(st.integers(1, 4)) if draw(st.integers(0, 9)) < 9 else draw(_short)
    return document


_broken = st.sampled_from(
    [
        *(
            b"",
            b" \r\n",
            b"{",
            b"{}",
            b"{}{}",
            b'{"prompt":',
            b'{"prompt":NaN}',
            b'{"prompt":"a","prompt":"b"}',
        ),
        *(
            b"\xff\xfe",
            b'{"prompt":"\xff"}',
            b"\xef\xbb\xbf{}",
            b"a\0b",
            b"[1]",
            b"null",
            b'"x"',
            b"\xed\xa0\x80",
        ),
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"x","temperature":1e999}',
        b'{"prompt":"x","temperature":' + b"9" * 400 + b"}",
        b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"x" * LIMIT_BYTES,
        b"x" * (LIMIT_BYTES + 1),
        b'{"prompt":"' + b"x" * LIMIT_BYTES + b'"}',
    ]
)


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Mostly JSON objects near the contract; also damaged ones, broken ones, texts and raw bytes."""
    kind = draw(st.integers(0, 19))
    if kind < 14:
        return json.dumps(draw(objects()), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind < 16:
        whole = json.dumps(draw(objects())).encode()
        place = draw(st.integers(0, len(whole)))
        return whole[:place] + draw(st.binary(max_size=3)) + whole[place + draw(st.integers(0, 3)) :]
    if kind < 17:
        return draw(_broken)
    return draw(st.one_of(_texts.map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=40)))


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


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What a message carries beside its body."""

    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None
    qos: int
    retained: bool


@st.composite
def properties(draw: st.DrawFn) -> Properties:
    return Properties(
        response_topic=draw(st.one_of(st.none(), _reply_topics)),
        correlation=draw(
            st.one_of(st.none(), st.sampled_from([b"", b"r-1", b"\xff\0"]), st.binary(max_size=100))
        ),
        expiry_s=draw(st.one_of(st.none(), st.integers(0, 5), st.just(0xFFFF_FFFF))),
        qos=draw(st.integers(0, 1)),
        retained=draw(st.integers(0, 9)) == 0,
    )


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
        _reply_topics,
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
                models={"assistant": settings_module.ModelSettings(uri="models:/sample@prod")},
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
        journal.delivered(prompt.row)


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
