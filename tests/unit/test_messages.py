"""The wire shapes of the MQTT contract: what is accepted, what is refused, and how it is said."""

import codecs
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.chat import messages
from edge_agent.chat.fields import FIELDS
from edge_agent.chat.messages import Form
from edge_agent.errors import BadRequest, PromptError, PromptTooLong, QueueFull
from edge_agent.runner.protocol import with_system
from tests.support.generated_messages import examples

LIMIT = 102_400


def parse(value: object) -> messages.Request:
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    return messages.parse(payload, limit_bytes=LIMIT)


def chat(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hello"}], **fields}


def test_the_seeds_chat_shape_is_accepted() -> None:
    request = parse(chat(temperature=0.2, max_tokens=30, stop=["."], n=1, stream=True))
    assert request.form is Form.JSON
    assert request.stream
    assert request.document == {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.2,
        "max_tokens": 30,
        "stop": ["."],
    }


def test_the_seeds_prompt_shape_is_passed_as_it_stands() -> None:
    prompt = (
        "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
    )
    assert parse({"prompt": prompt}).document == {"prompt": prompt}


@pytest.mark.parametrize(
    "payload", [b"What is the capital of Spain?\n", b"  [1, 2]", b"\xf0\x9f\x8d\x8e", b'"text"']
)
def test_anything_that_does_not_begin_with_a_brace_is_a_plain_text_prompt(payload: bytes) -> None:
    request = parse(payload)
    assert request.form is Form.TEXT
    assert request.document == {"messages": [{"role": "user", "content": payload.decode().strip()}]}


@pytest.mark.parametrize(
    "payload", [b'{"prompt": "a"}', b' \n{"prompt": "a"}', b"What is 2 plus 3?", b"{", b"\xff", b" "]
)
def test_a_byte_order_mark_in_front_changes_nothing(payload: bytes) -> None:
    def result(body: bytes) -> messages.Request | str:
        try:
            return parse(body)
        except BadRequest as error:
            return error.message.partition("byte")[
                0
            ]  # which byte is wrong is counted from the very first one

    assert result(codecs.BOM_UTF8 + payload) == result(payload)
    marked, plain = (messages.read(body, limit_bytes=LIMIT) for body in (codecs.BOM_UTF8 + payload, payload))
    assert (marked.form, marked.id, marked.reply_to) == (plain.form, plain.id, plain.reply_to)


def test_a_mark_that_is_not_in_front_is_text() -> None:
    assert parse("a\ufeffb".encode()).content == {"messages": [{"role": "user", "content": "a\ufeffb"}]}
    assert parse({"prompt": "\ufeffa"}).content == {"prompt": "\ufeffa"}


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"max_tokens": 8.0, "n": 1.0}, {"max_tokens": 8}),
        ({"top_k": 40.0, "seed": 7.0}, {"top_k": 40, "seed": 7}),
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"max_completion_tokens": 9.0, "max_tokens": 9}, {"max_tokens": 9}),
        ({"max_completion_tokens": None, "max_tokens": 9}, {"max_tokens": 9}),
        ({"user": "someone", "stream_options": {"include_usage": True}, "stream": True}, {"stream": True}),
        ({"logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0}, {}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 1.0}),
    ],
    ids=str,
)
def test_what_clients_send_by_habit_is_taken(sent: dict[str, Any], meant: dict[str, Any]) -> None:
    request = parse(chat(**sent))
    assert replace(request, include_usage=False) == parse(chat(**meant))
    assert all(isinstance(request.options[name], int) for name in {"max_tokens", "top_k"} & set(meant))


def test_a_deadline_may_be_written_as_a_float_too() -> None:
    assert parse(chat(deadline_ms=500.0)).deadline_ms == 500


def test_text_parts_are_lines_of_one_text_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    request = parse(
        {"messages": [{"role": "developer", "content": parts[:1]}, {"role": "user", "content": parts}]}
    )
    system, user = {"role": "system", "content": "Hello"}, {"role": "user", "content": "Hello\nthere"}
    assert request.document == {"messages": [system, user]}
    assert with_system(request.document, "Be brief.") == request.document


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (b"", "empty"),
        (b" \r\n\t", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        ("\u00a0".encode(), "empty"),
        ("\u2003\u3000\u2028 \u00a0\n".encode(), "empty"),
        (b'{"messages": ', "not JSON"),
        (b'{"prompt": "a"} trailing', "not JSON"),
        (b'{"prompt": NaN}', "NaN"),
        (
            b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"minimum": -1e400}}}',
            "response_format has a number that is too large",
        ),
        (
            b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"title": "\\ud800"}}}',
            "response_format has a lone surrogate",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function":'
            b' {"name": "f", "parameters": {"properties": {"a": {"maximum": 1e400}}}}}]}',
            "tools[0].function.parameters has a number that is too large",
        ),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b"\xff\xfe", "UTF-8"),
        (b"a\x00b", "NUL"),
        (b'{"prompt": "a\\u0000b"}', "NUL"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "' + b"[" * 50 + b'"', "not JSON"),
        (b'{"prompt": ' + b"[" * 50_000, "not JSON"),
        (chat(surprise=1), '"surprise"'),
        (chat(prompt="x"), "either"),
        ({}, "either"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool": 1}]}, 'messages[0]."tool"'),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ""}, "prompt"),
        (chat(temperature="hot"), "temperature"),
        (b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (chat(temperature=-0.1), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_tokens=1 << 60), "max_tokens"),
        (chat(max_tokens="8"), "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 1e999}', "max_tokens"),
        (chat(max_completion_tokens=0), "max_completion_tokens"),
        (chat(max_completion_tokens=8, max_tokens=9), "max_tokens and max_completion_tokens differ"),
        (chat(n=1.5), "n"),
        (chat(user=3), "user"),
        (chat(logprobs=True), "logprobs"),
        (chat(logprobs=0), "logprobs"),
        (chat(frequency_penalty=0.5), "frequency_penalty must be 0: use repetition_penalty"),
        (chat(presence_penalty=False), "presence_penalty"),
        (chat(stream_options=[]), "stream_options"),
        (chat(stream_options={"include_usage": 1}), "stream_options.include_usage"),
        (chat(stream_options={"surprise": 1}), 'stream_options."surprise"'),
        (chat(repetition_penalty=0), "repetition_penalty"),
        (chat(repetition_penalty=101), "repetition_penalty"),
        (chat(functions=[]), '"functions"'),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mark": 1}]}]},
            'messages[0].content[0]."mark"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a\0b"}]}]},
            "messages[0].content[0].text",
        ),
        (chat(stop=[""]), "stop"),
        (chat(stop=[3]), "stop"),
        (chat(stop=["x"] * 17), "stop"),
        (chat(n=2), "n"),
        (chat(n=True), "n"),
        (chat(stream="yes"), "stream"),
        (chat(top_p=0), "top_p"),
        (chat(seed=-1), "seed"),
        (chat(id="a b"), "id"),
        (chat(id="x" * 65), "id"),
        (chat(reply_to=3), "reply_to"),
        (chat(deadline_ms=0), "deadline_ms"),
        (chat(model=7), "model"),
        (chat(response_format={"type": "xml"}), "response_format"),
        (chat(response_format={"type": "regex"}), "response_format"),
        (chat(response_format={"type": "json_object", "schema": {}}), "response_format"),
        (chat(response_format={"type": "json_schema", "json_schema": "x"}), "response_format"),
    ],
)
def test_bad_input_is_refused_and_what_is_wrong_is_named(payload: object, word: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(payload)
    assert word in caught.value.message


def test_a_field_that_is_null_is_a_field_that_is_absent() -> None:
    assert parse(chat(temperature=None, stop=None, model=None)) == parse(chat())


def test_a_request_over_the_limit_is_told_both_numbers() -> None:
    with pytest.raises(PromptTooLong, match=r"102401 bytes, at most 102400"):
        parse(b"x" * (LIMIT + 1))


@examples(100)
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_the_contracts_errors(payload: bytes) -> None:
    try:
        request = parse(payload)
    except PromptError as error:
        assert error.status in (400, 413)
    else:
        json.dumps(request.document).encode()
    assert messages.read(payload, limit_bytes=LIMIT).form in Form


@pytest.mark.parametrize(
    "rest",
    [
        '"surprise": 1',
        '"prompt": NaN',
        '"prompt": 5',
        '"stop": 1, "stop": 2',
        '"stop": ' + "[" * 70 + "]" * 70,
    ],
    ids=["unknown", "constant", "wrong", "twice", "deep"],
)
def test_a_refused_body_still_says_who_asks_and_where_the_answer_goes(rest: str) -> None:
    payload = f'{{"id": "r-1", "reply_to": "replies/a", {rest}}}'.encode()
    body = messages.read(payload, limit_bytes=LIMIT)
    with pytest.raises(BadRequest):
        body.request()
    assert (body.form, body.id, body.reply_to) == (Form.JSON, "r-1", "replies/a")


@pytest.mark.parametrize(
    "payload",
    [b'{"id": "r-1"', b'{"id": "r 1"}', b'{"id": 1, "reply_to": 2}', b'{"id": "r-1", "x": "\xff"}', b"text"],
)
def test_what_cannot_be_read_of_a_body_is_not_guessed(payload: bytes) -> None:
    body = messages.read(payload, limit_bytes=LIMIT)
    assert (body.id, body.reply_to) == (None, None)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@examples(100)
@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), _json, max_size=6))
def test_no_json_object_raises_anything_but_the_contracts_errors(document: dict[str, object]) -> None:
    try:
        request = parse(json.dumps(document).encode())
    except PromptError as error:
        assert error.status == 400
    else:
        assert ("messages" in request.content) != ("prompt" in request.content)


def test_an_error_document_says_status_code_message_and_when_to_try_again() -> None:
    document = messages.error_document("a", QueueFull("32 prompts wait already", retry_after_ms=1500))
    assert document == {
        "id": "a",
        "error": {
            "status": 429,
            "code": "queue_full",
            "message": "32 prompts wait already",
            "retry_after_ms": 1500,
        },
    }


def test_a_plain_text_prompt_is_answered_in_plain_text_also_when_it_fails() -> None:
    error = messages.error_document("a", BadRequest("the request is empty"))
    assert messages.encode_answer(error, Form.TEXT) == b"error 400 bad_request: the request is empty"
    answer = messages.completion(
        request_id="a", created_s=0, model="m", text="Olá", finish_reason="stop", usage={}, timings={}
    )
    assert messages.encode_answer(answer, Form.TEXT) == "Olá".encode()


@pytest.mark.parametrize(
    ("finish_reason", "tokens", "end"),
    [
        ("stop", 256, ""),
        ("length", 256, "\n\n[cut at 256 tokens]"),
        ("length", 0, "\n\n[cut at its limit of tokens]"),
    ],
)
def test_a_plain_text_answer_that_was_cut_says_so_and_a_json_answer_keeps_its_text(
    finish_reason: str, tokens: int, end: str
) -> None:
    answer = messages.completion(
        request_id="a",
        created_s=0,
        model="m",
        text="The capital of",
        finish_reason=finish_reason,
        usage={"completion_tokens": tokens},
        timings={},
    )
    assert messages.encode_answer(answer, Form.TEXT).decode() == f"The capital of{end}"
    assert json.loads(messages.encode_answer(answer, Form.JSON)) == answer


def test_probe_and_demo_print_the_same_of_an_answer() -> None:
    answer = messages.completion(
        request_id="a",
        created_s=0,
        model="m",
        text="Olá",
        finish_reason="stop",
        usage={"completion_tokens": 2},
        timings={"queue_ms": 1.0, "first_token_ms": 2.0, "total_ms": 3.0, "tokens_per_s": 4.0},
    )
    assert messages.result("Olá?", answer, version=3, flavor="onnxruntime-genai 0.18.0") == {
        "question": "Olá?",
        "answer": "Olá",
        "model": "m",
        "version": 3,
        "flavor": "onnxruntime-genai 0.18.0",
        "finish_reason": "stop",
        "usage": {"completion_tokens": 2},
        "queue_ms": 1.0,
        "first_token_ms": 2.0,
        "tokens_per_s": 4.0,
    }


def test_timings_leave_the_first_token_out_of_the_rate() -> None:
    moments = {"queued_s": 1.0, "started_s": 1.5, "first_s": 2.0, "ended_s": 3.0}
    timings = messages.timings(**moments, tokens=11, measured={})
    assert timings == {"queue_ms": 500.0, "first_token_ms": 1000.0, "total_ms": 2000.0, "tokens_per_s": 10.0}


def test_the_models_own_times_give_the_rate() -> None:
    timings = messages.timings(
        queued_s=0,
        started_s=0,
        first_s=1,
        ended_s=1,
        tokens=11,
        measured={"total_ms": 600, "first_token_ms": 100},
    )
    assert timings["tokens_per_s"] == 20.0


@pytest.mark.parametrize("total_ms", [1e-310, 1e-4, -1.0, math.nan, math.inf])
def test_times_that_nobody_can_have_measured_give_no_rate(total_ms: float) -> None:
    timings = messages.timings(
        queued_s=0,
        started_s=0,
        first_s=1,
        ended_s=1,
        tokens=2,
        measured={"total_ms": total_ms, "first_token_ms": 0},
    )
    assert timings["tokens_per_s"] == 0.0


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"id": "a"}', ("a", None)),
        (b'{"id": "a", "reply_to": "replies/x"}', ("a", "replies/x")),
        (b'\xef\xbb\xbf{"id": "a"}', ("a", None)),
        (b"{}", (None, None)),
    ],
)
def test_a_cancel_names_an_id_and_an_answer_topic(
    payload: bytes, expected: tuple[str | None, str | None]
) -> None:
    assert messages.parse_cancel(payload) == expected


@pytest.mark.parametrize("payload", [b"a", b"[1]", b'{"id": 3}', b'{"identity": "a"}', b"\xff", b"1"])
def test_a_cancel_that_is_not_understood_is_refused(payload: bytes) -> None:
    with pytest.raises(BadRequest):
        messages.parse_cancel(payload)
