"""What may stand in a body of OpenAI's, beside what may stand in a message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.chat import messages
from edge_agent.chat.surfaces import HABITS, Surface, fields_of
from edge_agent.errors import BadRequest
from tests.support import openai_schema
from tests.support.generated_messages import examples

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
PROMPT: dict[str, Any] = {"prompt": "Hello"}


def parse(document: dict[str, Any], surface: Surface) -> messages.Request:
    return messages.parse(json.dumps(document).encode(), limit_bytes=10_000, surface=surface)


@pytest.mark.parametrize(
    ("document", "surface", "param"),
    [
        ({**CHAT, "id": "a"}, Surface.CHAT, "id"),
        ({**CHAT, "reply_to": "a"}, Surface.CHAT, "reply_to"),
        (PROMPT, Surface.CHAT, "prompt"),
        (CHAT, Surface.COMPLETION, "messages"),
        ({}, Surface.CHAT, "messages"),
        ({}, Surface.COMPLETION, "prompt"),
        ({**PROMPT, "best_of": 1}, Surface.MESSAGE, "best_of"),
        ({**PROMPT, "max_completion_tokens": 1}, Surface.COMPLETION, "max_completion_tokens"),
        ({**CHAT, "temperature": 9}, Surface.CHAT, "temperature"),
        ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, Surface.CHAT, "max_completion_tokens"),
        ({"prompt": ["a", "b"]}, Surface.COMPLETION, "prompt"),
        ({"prompt": [1, 2]}, Surface.COMPLETION, "prompt"),
        ({**PROMPT, "echo": True}, Surface.COMPLETION, "echo"),
        ({**PROMPT, "suffix": "x"}, Surface.COMPLETION, "suffix"),
        ({**PROMPT, "best_of": True}, Surface.COMPLETION, "best_of"),
    ],
)
def test_each_surface_refuses_by_name_what_is_not_its_own(
    document: dict[str, Any], surface: Surface, param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(document, surface)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("name", "param"), [("\ud800", "?"), ("ä\udfff", "ä?"), ("x" * 5000, "x" * 40)], ids=ascii
)
def test_the_name_of_an_unknown_field_is_short_and_text(name: str, param: str) -> None:
    """It stands in the error, which is UTF-8."""
    with pytest.raises(BadRequest) as caught:
        parse({**CHAT, name: 1}, Surface.CHAT)
    assert caught.value.param == param


HABIT_VALUES: dict[str, tuple[Any, Any]] = {
    "store": (False, True),
    "metadata": ({}, {"a": "b"}),
    "service_tier": ("auto", "flex"),
    "modalities": (["text"], ["text", "audio"]),
    "logit_bias": ({}, {"50256": -100}),
    "top_logprobs": (0, 2),
    "safety_identifier": ("somebody", 1),
    "prompt_cache_key": ("something", 1),
}


@pytest.mark.parametrize("surface", [Surface.CHAT, Surface.MESSAGE])
@pytest.mark.parametrize("name", HABITS)
def test_a_habit_is_taken_without_effect_and_a_wish_is_refused(name: str, surface: Surface) -> None:
    harmless, wish = HABIT_VALUES[name]
    assert parse({**CHAT, name: harmless}, surface).document == CHAT
    with pytest.raises(BadRequest) as caught:
        parse({**CHAT, name: wish}, surface)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("surface", "table", "base"),
    [
        (Surface.CHAT, openai_schema.CHAT, CHAT),
        (Surface.COMPLETION, openai_schema.COMPLETION, PROMPT),
    ],
)
def test_every_field_of_openais_schema_is_taken_or_refused_by_name(
    surface: Surface, table: dict[str, openai_schema.Field], base: dict[str, Any]
) -> None:
    for name, document, accepted in openai_schema.cases(table, base):
        try:
            parse(document, surface)
        except BadRequest as error:
            assert (accepted, error.param) == (False, name), (document[name], error.message)
            assert name in error.message
        else:
            assert accepted, (name, document[name])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@examples(200)
@given(
    st.sampled_from([Surface.CHAT, Surface.COMPLETION]),
    st.dictionaries(
        st.sampled_from(sorted({*fields_of(Surface.MESSAGE), *fields_of(Surface.COMPLETION), "other"})),
        _json,
        max_size=5,
    ),
)
def test_whatever_a_field_holds_it_is_refused_by_its_name(surface: Surface, more: dict[str, Any]) -> None:
    base = CHAT if surface is Surface.CHAT else PROMPT
    try:
        request = parse({**base, **more}, surface)
    except BadRequest as error:
        assert error.param is None or error.param in {*base, *more, "max_completion_tokens"}
        assert (error.param or "") in error.message
    else:
        assert request.content


def test_a_completion_is_the_prompt_as_it_stands() -> None:
    habits = {"best_of": 1, "echo": False, "suffix": "", "n": 1, "user": "somebody", "logprobs": None}
    for prompt in ("Hello", ["Hello"]):
        document = {"prompt": prompt, "max_tokens": 3, "stream": True, **habits}
        request = parse(document, Surface.COMPLETION)
        assert (request.document, request.stream) == ({"prompt": "Hello", "max_tokens": 3}, True)


def test_text_that_is_no_object_is_a_prompt_in_a_message_only() -> None:
    assert messages.parse(b"Hello", limit_bytes=10).document == CHAT
    for surface in (Surface.CHAT, Surface.COMPLETION):
        with pytest.raises(BadRequest, match="not a JSON object"):
            messages.parse(b"Hello", limit_bytes=10, surface=surface)


def test_what_clients_hand_back_empty_with_an_answer_is_taken() -> None:
    said = {"role": "assistant", "content": "Hi."}
    empty: dict[str, Any] = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    document = {"messages": [*CHAT["messages"], {**said, **empty}]}
    assert parse(document, Surface.CHAT).document == {"messages": [*CHAT["messages"], said]}
    with pytest.raises(BadRequest, match=r"messages\[1\].*refusal"):
        parse({"messages": [*CHAT["messages"], {**said, "refusal": "No."}]}, Surface.CHAT)


def test_chunks_are_not_padded() -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    assert parse({**CHAT, "stream_options": options}, Surface.CHAT).document == CHAT
    with pytest.raises(BadRequest, match="include_obfuscation"):
        parse({**CHAT, "stream_options": {"include_obfuscation": True}}, Surface.CHAT)


def test_every_field_of_a_chat_but_its_own_is_one_of_a_message() -> None:
    assert fields_of(Surface.CHAT).keys() < fields_of(Surface.MESSAGE).keys()
