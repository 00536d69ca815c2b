"""Tools in the wrapper: how a schema comes to an end, what the grammar says, and what is told from text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.wrapper.genai_pyfunc import (
    MAX_CALLS,
    GuidanceError,
    RequestError,
    _CallFilter,
    _CallForm,
    _ending,
    _refusal,
    _Request,
    _Tools,
)

NUMBER = {"minimum": -(10**12), "maximum": 10**12, "multipleOf": 0.000001}
WHOLE = {"minimum": -(10**12), "maximum": 10**12}
ANY = {"type": ["string", "number", "boolean", "null"], "maxLength": 256, **NUMBER}
CLOSED = {"additionalProperties": False}
NAMES = "^[A-Za-z0-9_. -]{1,64}$"
TAGS = _CallForm()
BARE = _CallForm(own=True, opening="", between="", closing="", arguments="parameters")
TOKEN = _CallForm(
    own=True, opening="[CALLS] [", between=", ", closing="]", control={"[CALLS]": 7, "<s>": 1, "[C": 8}
)
USER = {"role": "user", "content": "Hi"}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def tools(*names: str, **fields: Any) -> _Tools:
    found = _Tools.parse({"tools": [tool(name) for name in names], **fields})
    assert found
    return found


# --- Schemas come to an end -----------------------------------------------------------------------------


BOOLEAN, SHORT = {"type": "boolean"}, {"type": "string", "maxLength": 256}


@pytest.mark.parametrize(
    ("schema", "added"),
    [
        ({"type": "string"}, {"maxLength": 256}),
        ({"type": "string", "minLength": 300}, {"maxLength": 300}),
        ({"type": "string", "maxLength": 9}, {}),
        ({"type": ["string", "null"]}, {"maxLength": 256}),
        ({"pattern": "^a+$"}, {"type": "string", "maxLength": 256}),
        ({"enum": ["a", 1]}, {}),
        ({"type": "string", "const": "a"}, {}),
        ({"type": "integer"}, WHOLE),
        ({"type": "number"}, NUMBER),
        ({"type": "integer", "minimum": 5}, {"maximum": 10**12 + 5}),
        ({"type": "integer", "exclusiveMaximum": 5}, {"minimum": 5 - 10**12}),
        ({"type": "number", "minimum": 0, "maximum": 1}, {"multipleOf": 0.000001}),
        ({"type": "number", "minimum": 0, "maximum": 0.1}, {}),
        ({"type": "number", "multipleOf": 0.5}, WHOLE),
        ({"type": "number", "minimum": 1e300}, {}),
        ({"type": "integer", "minimum": "many"}, {}),
        (BOOLEAN, {}),
        ({"description": "anything"}, ANY),
        ({"type": "array"}, {"items": ANY, "maxItems": 16}),
        ({"items": BOOLEAN, "minItems": 20}, {"type": "array", "maxItems": 20}),
        ({"type": "array", "prefixItems": [BOOLEAN]}, {"items": ANY, "maxItems": 1}),
        ({"type": "object", "additionalProperties": False}, {}),
        ({"type": "object"}, {"patternProperties": {NAMES: ANY}, **CLOSED, "maxProperties": 8}),
        (
            {"type": "object", "additionalProperties": BOOLEAN, "minProperties": 9},
            {"patternProperties": {NAMES: BOOLEAN}, **CLOSED, "maxProperties": 9},
        ),
        (
            {"properties": {"a": BOOLEAN}, "required": ["b"]},
            {"type": "object", "properties": {"a": BOOLEAN, "b": ANY}, **CLOSED},
        ),
        ({"type": "object", "required": ["b"]}, {"properties": {"b": ANY}, **CLOSED}),
        ({"properties": {"a": BOOLEAN}, "additionalProperties": {"type": "null"}}, {"type": "object"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [SHORT, {"type": "null"}]}),
        ({"not": {"type": "string"}}, {}),
        ({"$ref": "#/$defs/a"}, {}),
    ],
    ids=repr,
)
def test_a_schema_that_leaves_open_how_much_comes_gets_an_end(
    schema: dict[str, Any], added: dict[str, Any]
) -> None:
    found = _ending({"type": "object", "properties": {"x": schema}})
    assert found == {"type": "object", "properties": {"x": {**schema, **added}}, **CLOSED}


def test_a_schema_may_be_true_or_false() -> None:
    assert _ending({"properties": {"x": True, "y": False}})["properties"] == {"x": ANY, "y": False}


def test_definitions_come_to_an_end_too() -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/w"}}, "$defs": {"w": {"type": "string"}}}
    assert _ending(schema)["$defs"] == {"w": {"type": "string", "maxLength": 256}}


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"properties": {}}, {"title": "no arguments"}])
def test_parameters_that_name_none_are_no_parameters(schema: dict[str, Any]) -> None:
    assert _ending(schema) == {**schema, "additionalProperties": False}


def test_parameters_that_are_open_on_purpose_stay_open() -> None:
    open_ones: list[dict[str, Any]] = [
        {"additionalProperties": True},
        {"required": ["a"]},
        {"minProperties": 1},
        {"type": "object", "enum": [{"a": 1}]},
    ]
    for schema in open_ones:
        found = _ending(schema)
        assert "enum" in found or found.get("patternProperties") or found["properties"] == {"a": ANY}


@pytest.mark.parametrize(
    "wrong",
    [
        {"required": [["a"]]},
        {"required": [{"a": 1}], "properties": {}},
        {"required": ["a", None]},
        {"required": ["a"], "properties": None},
        {"required": ["a"], "properties": 7},
    ],
    ids=str,
)
def test_what_is_no_schema_is_left_for_the_library_to_refuse(wrong: dict[str, Any]) -> None:
    found = _ending({"properties": {"x": {"type": "object", **wrong}}})["properties"]["x"]
    assert {key: found[key] for key in wrong} == wrong


@pytest.mark.parametrize(
    "part",
    [
        {"oneOf": [{"type": "string"}, {"type": "null"}]},
        {"allOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "string"}}}]},
        {"properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}]},
        {"$ref": "#/$defs/a", "properties": {"b": {"type": "string"}}},
    ],
    ids=lambda part: next(iter(part)),
)
def test_schemas_that_combine_others_stay_as_they_are(part: dict[str, Any]) -> None:
    """A narrow part may make the whole wider: of `oneOf`, exactly one may fit."""
    schema = {"properties": {"x": part, "y": {"type": "string"}}}
    assert _ending(schema) == schema


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    schema = {"properties": {"oneOf": {"type": "string"}, "allOf": {"type": "boolean"}}}
    assert _ending(schema)["properties"]["oneOf"] == {"type": "string", "maxLength": 256}


# --- The grammar ----------------------------------------------------------------------------------------


def grammar(form: _CallForm, wanted: _Tools) -> dict[str, str]:
    """Name of a rule → the rule."""
    head, *lines = form.guidance(wanted).grammar.split("\n")
    assert head == '%llguidance {"no_forcing": true}'
    return dict(line.split(": ", 1) for line in lines)


def test_a_call_is_the_name_of_a_tool_and_arguments_of_its_schema() -> None:
    rules = grammar(TAGS, tools("a", "b", tool_choice="required"))
    assert rules["start"] == "calls"
    assert rules["calls"] == '"<tool_call>\\n" rest'
    assert rules["call"] == "call_0 | call_1"
    assert rules["call_1"] == r'"{\"name\": \"b\", \"arguments\": " arguments_1 "}"'
    kind, _, schema = rules["arguments_1"].partition(" ")
    assert kind == "%json"
    assert json.loads(schema) == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    }


@pytest.mark.parametrize(
    ("fields", "start", "call", "several"),
    [
        ({}, 'TEXT? | marked "\\n" rest', "call_0 | call_1", True),
        ({"tool_choice": "required"}, "calls", "call_0 | call_1", True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "calls", "call_0 | call_1", False),
        ({"parallel_tool_calls": False}, 'TEXT? | marked "\\n" rest', "call_0 | call_1", False),
        ({"tool_choice": {"type": "function", "function": {"name": "b"}}}, "calls", "call_1", False),
    ],
    ids=str,
)
def test_what_may_be_called_and_how_often_is_as_the_request_says(
    fields: dict[str, Any], start: str, call: str, several: bool
) -> None:
    rules = grammar(TAGS, tools("a", "b", **fields))
    assert (rules["start"], rules["call"]) == (start, call)
    assert (f"{{0,{MAX_CALLS - 1}}}" in rules["rest"]) == several


def test_a_form_that_writes_one_call_at_most_gets_one() -> None:
    assert grammar(BARE, tools("a"))["rest"].split() == ["call"]


def test_special_tokens_are_tokens_and_no_text() -> None:
    rules = grammar(TOKEN, tools("a"))
    assert rules["start"] == "TEXT? calls?"
    assert rules["calls"] == '<[7]> " [" rest'
    assert rules["TEXT"] == r"/(?s:.+)/ & ~/(?s:.*)\[CALLS\](?s:.*)/"


def test_a_schema_that_is_nested_without_end_is_refused() -> None:
    """Where no device has bounded it."""
    schema: dict[str, Any] = {}
    for _ in range(600):
        schema = {"items": schema}
    found = _Tools(functions=({"name": "a", "parameters": {"properties": {"a": schema}}},))
    with pytest.raises(RequestError, match="bad_request: "):
        TAGS.guidance(found)


def test_an_error_names_the_tool_whose_schema_it_is_about() -> None:
    guidance = TAGS.guidance(tools("a", "b"))
    line = guidance.grammar.split("\n").index(
        next(x for x in guidance.grammar.split("\n") if "arguments_1: " in x)
    )
    text = f"Error creating grammar: at {line + 1}(14): failed to compile JSON schema: {{}}\n   1 | %llguidance\n"
    refusal = _refusal(RuntimeError(text.format('Unimplemented keys: ["not"]')), guidance)
    assert isinstance(refusal, GuidanceError)
    assert str(refusal) == 'model_failed: tools[1].function.parameters: "not" in a schema is not supported'
    refusal = _refusal(RuntimeError(text.format("Unsatisfiable schema: x")), guidance)
    assert isinstance(refusal, RequestError)
    assert "tools[1].function.parameters: no answer can satisfy the schema" in str(refusal)
    late = _refusal(RuntimeError("Error computing mask: x"), guidance)
    assert str(late) == "model_failed: tools is too complex for this model's library"


# --- Text and calls -------------------------------------------------------------------------------------

ONE = '<tool_call>\n{"name": "a", "arguments": {"x": "</tool_call>"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>'
CALLED_A, CALLED_B = {"name": "a", "arguments": '{"x": "</tool_call>"}'}, {"name": "b", "arguments": "{}"}


def told(form: _CallForm, text: str) -> tuple[str, str, list[dict[str, str]]]:
    """What was shown at once, what in the end, and the calls."""
    found = _CallFilter(form)
    shown = "".join(found.push(-1, character) for character in text)
    return shown, found.flush(), found.whole()


@pytest.mark.parametrize(
    ("form", "text", "shown", "rest", "calls"),
    [
        (TAGS, "Hello. ", "Hello.", " ", []),
        (TAGS, "a < b <tool_call", "a < b", " <tool_call", []),
        (TAGS, ONE, "", "", [CALLED_A]),
        (TAGS, TWO, "", "", [CALLED_A, CALLED_B]),
        (TAGS, f"<think>x</think>\n\n{ONE}", "<think>x</think>", "", [CALLED_A]),
        (TAGS, f" \n{ONE}", "", "", [CALLED_A]),
        *((TAGS, TWO[:end], "", "", []) for end in (11, 20, len(ONE) - 1, len(ONE) + 1, len(TWO) - 1)),
        (BARE, '{"name": "a", "parameters": {}}', "", "", [{"name": "a", "arguments": "{}"}]),
        (BARE, '{"name": "a", "para', "", "", []),
        (BARE, '{"nam', "", '{"nam', []),
        (BARE, '{"names": 1}', '{"names": 1}', "", []),
        (BARE, 'So: {"name": "a", "parameters": {}}', 'So: {"name": "a", "parameters": {}}', "", []),
    ],
)
def test_calls_are_told_from_text_and_count_only_when_they_are_whole(
    form: _CallForm, text: str, shown: str, rest: str, calls: list[dict[str, str]]
) -> None:
    assert told(form, text) == (shown, rest, calls)


def test_a_special_token_opens_a_call_and_its_characters_do_not() -> None:
    found = _CallFilter(TOKEN)
    assert found.push(-1, "Say [CALLS]") == "Say [CALLS]"
    assert found.push(7, "") == ""
    assert found.began
    for part in (' [{"name": "a", ', '"arguments": {}}', "]"):
        assert found.push(-1, part) == ""
    assert found.whole() == [{"name": "a", "arguments": "{}"}]


# --- A template without tools ---------------------------------------------------------------------------


def test_tools_stand_in_the_system_message_and_results_are_the_users() -> None:
    read = _Request.parse(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": name, "type": "function", "function": {"name": name, "arguments": '{"ä": 1}'}}
                        for name in ("a", "b")
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "one"},
                {"role": "tool", "tool_call_id": "b", "content": "two"},
                USER,
            ],
            "tools": [tool("a"), tool("b")],
        },
        None,
    )
    assert read.tools
    system, question, answer, result = TAGS.as_text(read.messages, read.tools.functions)
    assert system["content"].startswith("Be brief.\n\nYou can call functions.")
    assert all(json.dumps(function) in system["content"] for function in read.tools.functions)
    assert question == USER
    call = '<tool_call>\n{{"name": "{}", "arguments": {{"ä": 1}}}}\n</tool_call>'
    assert answer == {"role": "assistant", "content": f"{call.format('a')}\n{call.format('b')}"}
    responses = [f"<tool_response>\n{text}\n</tool_response>" for text in ("one", "two")]
    assert result == {"role": "user", "content": "\n".join([*responses, "Hi"])}, "templates insist on turns"


@pytest.mark.parametrize(("takes_system", "roles"), [(True, ["system", "user"]), (False, ["user"])])
def test_where_no_system_message_is_taken_tools_stand_before_the_first_question(
    takes_system: bool, roles: list[str]
) -> None:
    chat = _CallForm(takes_system=takes_system).as_text([USER], tools("a").functions)
    assert [message["role"] for message in chat] == roles
    assert chat[0]["content"].startswith("You can call functions.")
    assert chat[-1]["content"].endswith("Hi")
    assert TAGS.as_text([USER], ()) == [USER]


# --- What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]"),
        ({"tools": [tool("a b")]}, r"tools\[0\].function"),
        ({"tools": [tool("a", [])]}, r"parameters of tools\[0\]"),
        ({"tools": [tool("a", {"maximum": float("nan")})]}, r"parameters of tools\[0\]"),
        ({"tools": [tool("a"), tool("a")]}, "tools has a name twice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "unknown field x"),
        (
            {"tools": [tool(name, {"properties": {"x": {"maxItems": 5001}}}) for name in "ab"]},
            "maxItems in tools",
        ),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": "b"}, "tool_choice"),
        (
            {"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "tool_choice",
        ),
        ({"tools": [tool("a")], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [tool("a")], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "content"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "tool_calls"),
        ({"messages": [{**USER, "tool_call_id": "c"}]}, "tool_call_id"),
    ],
    ids=str,
)
def test_what_is_wrong_with_tools_is_refused_by_name(row: dict[str, Any], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        _Request.parse({"messages": [USER], **row}, None)


def test_tools_that_may_not_be_called_are_not_there() -> None:
    row = {"messages": [USER], "tools": [tool("a")], "tool_choice": "none"}
    assert _Request.parse(row, None) == _Request.parse({"messages": [USER]}, None)
