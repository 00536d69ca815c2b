"""`response_format` with a real vocabulary.

What stops by itself is right, and what cannot be followed is refused before the first token.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.real.schemas import ENDLESS, FOLLOWED, UNSUPPORTED, WRONG, Schema
from tests.support.client import Client, chat
from tests.support.wrapper import Answer

MAX_TOKENS = 48
"""Enough for each answer that a schema of `FOLLOWED` admits."""
LIBRARY = ("%llguidance", "%json", "<state>", "Unimplemented", "panic", "\n")
"""Of the library's own texts."""

case = pytest.mark.parametrize


def json_schema(schema: Schema) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def asked(model: Any, response_format: dict[str, Any], max_tokens: int = MAX_TOKENS) -> Answer:
    """An answer to the shortest of prompts, straight from the model: so each takes a second at most."""
    params = {"response_format": json.dumps(response_format), "max_tokens": max_tokens}
    return Answer(list(model.unwrap_python_model().predict_stream(None, {"prompt": "JSON:"}, params)))


def refused(model: Any, schema: Schema) -> str:
    """The refusal, which came before any text."""
    params = {"response_format": json.dumps(json_schema(schema)), "max_tokens": MAX_TOKENS}
    items = model.unwrap_python_model().predict_stream(None, {"prompt": "JSON:"}, params)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        for item in items:
            assert item == ""
    assert not [part for part in LIBRARY if part in str(caught.value)]
    return str(caught.value)


def is_valid(text: str, schema: Schema) -> bool:
    checker = Draft202012Validator.FORMAT_CHECKER
    return bool(Draft202012Validator(schema, format_checker=checker).is_valid(json.loads(text)))


def shown(schema: Schema) -> str:
    return json.dumps(schema, ensure_ascii=False)[:60]


def test_there_are_a_hundred_schemas() -> None:
    assert len([*FOLLOWED, *ENDLESS, *UNSUPPORTED, *WRONG]) >= 100


@case("schema", FOLLOWED, ids=shown)
def test_a_finished_answer_is_valid(wrapper: Any, schema: Schema) -> None:
    answer = asked(wrapper, json_schema(schema))
    assert answer.finish_reason == "stop", answer.text
    assert is_valid(answer.text, schema), answer.text


@case("schema", ENDLESS, ids=shown)
def test_an_answer_without_end_is_cut_and_one_with_an_end_is_valid(wrapper: Any, schema: Schema) -> None:
    answer = asked(wrapper, json_schema(schema))
    if answer.finish_reason == "stop":
        assert is_valid(answer.text, schema), answer.text
    else:
        assert (answer.finish_reason, answer.usage["completion_tokens"]) == ("length", MAX_TOKENS)
        assert answer.text and "\n" not in answer.text and "  " not in answer.text


@case("schema", UNSUPPORTED, ids=shown)
def test_what_the_library_cannot_follow_is_refused_before_the_first_token(
    wrapper: Any, schema: Schema
) -> None:
    assert refused(wrapper, schema).startswith("model_failed: response_format: ")


@case("schema", WRONG, ids=shown)
def test_a_wrong_schema_is_the_clients_mistake(wrapper: Any, schema: Schema) -> None:
    assert refused(wrapper, schema).startswith("bad_request: response_format: ")


@case("character", ["😀", "€", "温", "ł"])
def test_a_regular_expression_outside_ascii(wrapper: Any, character: str) -> None:
    answer = asked(wrapper, {"type": "regex", "regex": f"{character}+"}, max_tokens=20)
    assert answer.text == character * len(answer.text) != ""
    assert asked(wrapper, {"type": "regex", "regex": f"[{character}]{{3}}"}).text == character * 3


ANY_OBJECTS = (
    "Make up a person as JSON with name and age.",
    "What is the capital of France? Answer as JSON with the key capital.",
    'Repeat this: {"a": 1}',
    "Answer with an empty JSON object: {}",
    "Is water wet? Answer as JSON with the key answer.",
)


def test_any_object(client: Client) -> None:
    """When a small model ends an object is its own choice: of several, some end, and each of these is one."""
    ended = 0
    for question in ANY_OBJECTS:
        answer = client.ask(chat(question, response_format={"type": "json_object"}, max_tokens=60))
        assert answer.status == 200
        (choice,) = answer.json["choices"]
        content = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(content), dict)
            ended += 1
        else:
            assert choice["finish_reason"] == "length" and content.lstrip().startswith("{")
    assert ended, "no answer ended by itself"


def test_an_enum_outside_ascii_over_mqtt(client: Client) -> None:
    guided = chat("Reply with €", response_format=json_schema({"enum": ["€", "other"]}), stream=True)
    answer = client.ask(guided)
    assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, '"€"')


def test_what_cannot_be_followed_is_not_the_clients_mistake_and_no_chunk_comes_before(client: Client) -> None:
    sent = client.send(chat("Hi", response_format=json_schema({"not": {"enum": ["€"]}}), stream=True))
    error = client.answer(sent).json["error"]
    assert (error["status"], error["code"]) == (500, "model_failed")
    assert error["message"] == 'response_format: "not" in a schema is not supported'
    assert client.chunks(sent) == []
