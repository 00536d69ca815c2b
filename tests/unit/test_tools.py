"""Tools in a request: what is taken, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.chat import messages, tools
from edge_agent.errors import BadRequest

USER = {"role": "user", "content": "Hi"}
CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "switch", "arguments": '{"on": true}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "done"}


def parse(document: dict[str, Any]) -> messages.Request:
    return messages.parse(json.dumps(document).encode(), limit_bytes=1 << 20)


def tool(name: Any = "switch", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], **fields}


def changed(what: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**what, **changes}.items() if value is not ...}


def with_call(**changes: Any) -> dict[str, Any]:
    """A chat in which the earlier call is changed."""
    call = changed(CALLED["tool_calls"][0], **changes)
    return {"messages": [USER, {**CALLED, "tool_calls": [call]}]}


def with_function(**changes: Any) -> dict[str, Any]:
    return with_call(function=changed({"name": "switch", "arguments": "{}"}, **changes))


SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}


def test_tools_reach_the_runner_as_openais_clients_send_them() -> None:
    given = [tool(description="Switches", parameters=SCHEMA, strict=True), tool("wait-1_s")]
    request = parse(chat(tools=given, tool_choice="required", parallel_tool_calls=False))
    assert request.document == {
        "messages": [USER],
        "tools": [tool(description="Switches", parameters=SCHEMA), tool("wait-1_s")],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "switch"}}], ids=str
)
def test_a_choice_is_passed_on(choice: Any) -> None:
    assert parse(chat(tools=[tool()], tool_choice=choice)).options["tool_choice"] == choice


def test_without_a_choice_of_a_tool_there_are_none() -> None:
    shape = {"type": "json_object"}
    request = parse(chat(tools=[tool()], tool_choice="none", parallel_tool_calls=True, response_format=shape))
    assert request == parse(chat(response_format=shape))


def test_calls_and_results_of_earlier_answers_are_part_of_a_chat() -> None:
    """Also after the tools are gone."""
    request = parse({"messages": [USER, CALLED, RESULT, USER]})
    assert request.document["messages"] == [USER, {**CALLED, "content": ""}, RESULT, USER]
    both = {**CALLED, "content": [{"type": "text", "text": "Wait."}], "name": "me"}
    assert parse({"messages": [both]}).document["messages"] == [{**both, "content": "Wait."}]
    assert parse(with_function(arguments="")).document == parse(with_function(arguments="{}")).document


def test_a_free_answer_and_tools_go_together() -> None:
    assert parse(chat(tools=[tool()], response_format={"type": "text"})).options["tools"]


@pytest.mark.parametrize(
    ("document", "word"),
    [
        (chat(tools=[]), "tools must be a list of 1 to 128"),
        (chat(tools=[tool(f"t{n}") for n in range(129)]), "tools must be a list of 1 to 128"),
        (chat(tools={}), "tools must be"),
        (chat(tools=[tool(), tool()]), "tools has a name twice"),
        (chat(tools=[tool(description="x" * 66_000)]), "tools has more than 65536 characters"),
        (chat(tools=["x"]), "tools[0] must be"),
        (chat(tools=[{"type": "web_search"}]), "tools[0] must be"),
        (chat(tools=[{"type": "function"}]), "tools[0].function"),
        (chat(tools=[{**tool(), "mark": 1}]), 'tools[0]."mark"'),
        (chat(tools=[tool(mark=1)]), 'tools[0].function."mark"'),
        *((chat(tools=[tool(name)]), "tools[0].function.name") for name in ("", "a b", "é", "x" * 65, "a.b", 3)),
        (chat(tools=[tool(description=3)]), "tools[0].function.description"),
        (chat(tools=[tool(description="\0")]), "tools[0].function.description has a NUL"),
        (chat(tools=[tool(strict="yes")]), "tools[0].function.strict"),
        (chat(tools=[tool(parameters=[])]), "tools[0].function.parameters"),
        (chat(tools=[tool(parameters={"type": "string"})]), "tools[0].function.parameters"),
        (chat(tools=[tool(parameters={"type": ["object"]})]), "tools[0].function.parameters"),
        (chat(tools=[tool(parameters={"title": "\ud800"})]), "tools[0].function.parameters has a lone"),
        (chat(tool_choice="auto"), "tool_choice needs tools"),
        (chat(parallel_tool_calls=True), "parallel_tool_calls needs tools"),
        (chat(tools=[tool()], parallel_tool_calls=1), "parallel_tool_calls must be true or false"),
        (chat(tools=[tool()], tool_choice="any"), "tool_choice must be"),
        (chat(tools=[tool()], tool_choice={"type": "function", "name": "switch"}), "tool_choice must be"),
        (chat(tools=[tool()], tool_choice={"type": "allowed_tools"}), "tool_choice must be"),
        (
            chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "wait"}}),
            "tool_choice.function.name",
        ),
        (
            chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "switch", "x": 1}}),
            'tool_choice.function."x"',
        ),
        (chat(tools=[tool()], response_format={"type": "json_object"}), "tools and response_format"),
        ({"prompt": "x", "tools": [tool()]}, "tools need messages"),
        ({"messages": [USER, RESULT]}, "messages[1].tool_call_id"),
        ({"messages": [RESULT, CALLED]}, "messages[0].tool_call_id"),
        ({"messages": [USER, CALLED, {**RESULT, "tool_call_id": "c2"}]}, "messages[2].tool_call_id"),
        ({"messages": [USER, CALLED, {**RESULT, "tool_call_id": 1}]}, "messages[2].tool_call_id"),
        ({"messages": [USER, CALLED, changed(RESULT, content=...)]}, "messages[2].content"),
        ({"messages": [{**USER, "tool_calls": CALLED["tool_calls"]}]}, 'messages[0]."tool_calls"'),
        ({"messages": [{**USER, "tool_call_id": "c1"}]}, 'messages[0]."tool_call_id"'),
        (with_call(id=...), "messages[1].tool_calls[0].id"),
        (with_call(type="custom"), "messages[1].tool_calls[0]"),
        (with_call(function=3), "messages[1].tool_calls[0].function"),
        (with_call(index=0), 'messages[1].tool_calls[0]."index"'),
        (with_function(name="a b"), "messages[1].tool_calls[0].function.name"),
        (with_function(mark=1), 'messages[1].tool_calls[0].function."mark"'),
        *(
            (with_function(arguments=text), "messages[1].tool_calls[0].function.arguments")
            for text in ["{", "[]", "NaN", '{"a": Infinity}', "[" * 50_000, {}, ...]
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(document: dict[str, Any], word: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(document)
    assert word in caught.value.message


@pytest.mark.parametrize(
    ("document", "param"),
    [
        (chat(parallel_tool_calls=True), "parallel_tool_calls"),
        (chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "wait"}}), "tool_choice"),
        (chat(tools=[tool()], response_format={"type": "json_object"}), "response_format"),
        ({"prompt": "x", "tools": [tool()]}, "tools"),
    ],
)
def test_fields_that_do_not_go_together_are_named_in_param(document: dict[str, Any], param: str) -> None:
    """Clients of OpenAI's read it there."""
    with pytest.raises(BadRequest) as caught:
        parse(document)
    assert caught.value.param == param


def test_ids_of_calls_are_nine_letters_and_digits_of_their_answer() -> None:
    """Some chat templates refuse every other form."""
    found = [{"name": "a", "arguments": "{}"}] * 3
    ids = [call["id"] for answer in ("r1.1", "r1.2") for call in tools.with_ids(found, answer=answer)]
    assert len(set(ids)) == 6
    assert all(len(identity) == 9 and identity.isalnum() for identity in ids)
