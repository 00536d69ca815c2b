"""`response_format` as the wrapper's grammar, and what the library says of a grammar in the request's own terms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.wrapper.genai_pyfunc import (
    MAX_ITEMS,
    GuidanceError,
    RequestError,
    _Guidance,
    _refusal,
)

NO_FORCING = '%llguidance {"no_forcing": true}\nstart: '
GUIDED = _Guidance(grammar="", is_json=True)


def grammar(response_format: dict[str, Any]) -> str:
    """What follows the head that every grammar has."""
    guidance = _Guidance.parse({"response_format": response_format})
    assert guidance is not None
    assert guidance.is_json == (response_format["type"] != "regex")
    head, found, rest = guidance.grammar.partition(NO_FORCING)
    assert (head, found) == ("", NO_FORCING)
    return rest


def schema_of(response_format: dict[str, Any]) -> Any:
    kind, _, schema = grammar(response_format).partition(" ")
    assert kind == "%json"
    return json.loads(schema)


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize(
    ("regex", "literal"),
    [
        ("(yes|no)", "/(yes|no)/"),
        ("a/b", r"/a\/b/"),
        (r"a\/b", r"/a\/b/"),
        (r"a\\/b", r"/a\\\/b/"),
        ("a\nb\r", r"/a\nb\r/"),
        ("a\\\nb", r"/a\nb/"),
        ("/", r"/\//"),
        (r"\d\.€", r"/\d\.€/"),
    ],
)
def test_a_regular_expression_is_one_literal_of_the_grammar(regex: str, literal: str) -> None:
    assert grammar({"type": "regex", "regex": regex}) == literal


def test_a_schema_goes_to_the_library_as_it_is_but_for_white_space() -> None:
    schema = {"properties": {"größe/a": {"enum": ["€", '"\\', None, 1.5]}}, "required": ["größe/a"]}
    assert schema_of(json_schema(schema)) == {**schema, "x-guidance": {"whitespace_flexible": False}}
    assert "größe" in grammar(json_schema(schema)), (
        "as characters, which an error of the library does not shift"
    )


def test_a_schema_may_choose_its_own_white_space() -> None:
    own = {"whitespace_flexible": True, "item_separator": ", "}
    assert schema_of(json_schema({"x-guidance": own}))["x-guidance"] == own
    assert (
        schema_of(json_schema({"x-guidance": {"lenient": True}}))["x-guidance"]["whitespace_flexible"]
        is False
    )


def test_json_object_is_any_object() -> None:
    assert schema_of({"type": "json_object"}) == schema_of(json_schema({"type": "object"}))


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"enum": ["\ud800"]},
        {"\udfff": 1},
        {"minimum": float("nan")},
        {"maximum": float("inf")},
        {"maxItems": MAX_ITEMS + 1},
        {"minItems": -MAX_ITEMS, "items": {"maxItems": MAX_ITEMS + 1}},
        {"anyOf": [{"maxItems": MAX_ITEMS / 2}, {"items": [{"minItems": MAX_ITEMS / 2, "maxItems": 1}]}]},
        {"maxItems": float("inf")},
        {"maxItems": 10**400},
    ],
    ids=repr,
)
def test_a_schema_that_cannot_go_to_the_library_is_the_clients_mistake(schema: Any) -> None:
    with pytest.raises(RequestError, match="response_format") as caught:
        _Guidance.parse({"response_format": json_schema(schema)})
    assert caught.value.code == "bad_request"


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    schema = {"properties": {"maxItems": {"type": "integer"}, "minItems": True}, "maxItems": MAX_ITEMS - 1}
    assert schema_of(json_schema(schema))["properties"] == schema["properties"]


@pytest.mark.parametrize("text", ["", '{"a":', "{}{}", "nul"])
def test_an_answer_that_ended_before_it_was_json_is_a_failure_of_the_model(text: str) -> None:
    with pytest.raises(GuidanceError, match="model_failed: "):
        _Guidance(grammar="", is_json=True).check(text)
    _Guidance(grammar="", is_json=False).check(text)


FRAME = '\n   1 | %llguidance {"no_forcing": true}\n   2 | start: %json {"not": "Unsatisfiable"}\n              ^\n'
"""How the library shows where in the grammar an error is."""
IN_A_SCHEMA = "Error creating grammar: at 2(8): failed to compile JSON schema: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{IN_A_SCHEMA}Unimplemented keys: ["if", "then"]', '"if", "then" in a schema is not supported'),
        (f"{IN_A_SCHEMA}Unknown format: idn-email", "the string format idn-email is not supported"),
        (
            f"{IN_A_SCHEMA}regex parse error:\n    a(?=b)\n     ^^^\n"
            "error: look-around, including look-ahead and look-behind, is not supported",
            "look-around and word boundaries in a regular expression are not supported",
        ),
        (
            'Error creating grammar: at 2(8): invalid regex "\\\\bfoo" (in regex): lookarounds not supported yet',
            "look-around and word boundaries in a regular expression are not supported",
        ),
        (
            'Error creating grammar: failed to parse "%json": recursion limit exceeded at line 1 column 3431',
            "the schema is nested too deeply",
        ),
        (
            "Error creating grammar: panic: assertion failed: x\n<backtrace>\n   0: llguidance",
            "this schema or regular expression is not supported",
        ),
    ],
)
def test_what_the_library_cannot_do_is_a_failure_of_the_model(text: str, message: str) -> None:
    refusal = _refusal(RuntimeError(text + FRAME), GUIDED)
    assert isinstance(refusal, GuidanceError)
    assert str(refusal) == f"model_failed: response_format: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{IN_A_SCHEMA}Unsatisfiable schema: anyOf is empty", "no answer can satisfy the schema"),
        (f"{IN_A_SCHEMA}Pointer '/$defs/none' does not exist", "a $ref points to nothing"),
        (f"{IN_A_SCHEMA}Invalid type: nope", "the schema is invalid"),
        (f"{IN_A_SCHEMA}properties must be an object", "the schema is invalid"),
        (f"{IN_A_SCHEMA}Expected string for 'required' item, got [\"a\"]", "the schema is invalid"),
        (f"{IN_A_SCHEMA}Expected f64 for 'minimum', got \"x\"", "the schema is invalid"),
        (f"{IN_A_SCHEMA}invalid multiple of", "the schema is invalid"),
        (
            f"{IN_A_SCHEMA}regex parse error:\n    [\n    ^\nerror: unclosed character class",
            "a regular expression is invalid",
        ),
        ("Error creating grammar: 3(1): lexer error", "a regular expression is invalid"),
    ],
)
def test_a_wrong_schema_is_the_clients_mistake(text: str, message: str) -> None:
    refusal = _refusal(RuntimeError(text + FRAME), GUIDED)
    assert isinstance(refusal, RequestError)
    assert str(refusal) == f"bad_request: response_format: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "Error committing tokens: Parser Error: Current row has 2500 items\n<state>\nTokens: ⟦a⟧",
        "Error computing mask: lexer error: too many expressions\n<grammar>\nUnsatisfiable schema\n</grammar>",
        "Error creating llg_tokenizer: can't determine decoder type",
    ],
)
def test_nothing_of_a_late_error_is_shown_and_it_is_a_failure_of_the_model(text: str) -> None:
    refusal = _refusal(RuntimeError(text), GUIDED)
    assert isinstance(refusal, GuidanceError)
    assert set("<⟦:").isdisjoint(str(refusal).removeprefix("model_failed: "))


def test_an_error_that_is_not_about_guidance_stays_what_it_is() -> None:
    error = RuntimeError("Error committing tokens: x")
    assert _refusal(error, None) is None
    assert _refusal(RuntimeError("out of memory"), GUIDED) is None
