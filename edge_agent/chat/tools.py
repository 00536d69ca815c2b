"""Tools in a request: what may be called, how, and the calls and results of earlier answers. Pure.

Owns the rules of `tools`, `tool_choice`, `parallel_tool_calls`, and of a message's `tool_calls` and `tool_call_id`; the
other fields are in `fields.py`. It refuses by name what no answer could follow. What a model's library can follow of a
schema only the model knows: the wrapper refuses the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edge_agent.chat.values import boolean, check_json, only_known, text
from edge_agent.errors import BadRequest

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 65_536
"""Of all tools together, as JSON."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CHOICES = ("auto", "none", "required")
FIELDS_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")


def tools(name: str, value: object) -> list[dict[str, Any]]:
    """The rule of `tools`. `strict` asks for nothing here: each call fits its schema."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOOLS:
        raise BadRequest(f"{name} must be a list of 1 to {MAX_TOOLS} functions")
    given = [_tool(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if len({tool["function"]["name"] for tool in given}) < len(given):
        raise BadRequest(f"{name} has a name twice")
    if len(json.dumps(given)) > MAX_TOOLS_CHARACTERS:
        raise BadRequest(f"{name} has more than {MAX_TOOLS_CHARACTERS} characters")
    return given


def choice(name: str, value: object) -> str | dict[str, Any]:
    """The rule of `tool_choice`."""
    if isinstance(value, str) and value in CHOICES:
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        words = ", ".join(f'"{word}"' for word in CHOICES)
        raise BadRequest(f'{name} must be {words} or {{"type": "function", "function": {{"name": "…"}}}}')
    only_known(name, value, {"type", "function"})
    only_known(f"{name}.function", function, {"name"})
    return {"type": "function", "function": {"name": _name(f"{name}.function.name", function.get("name"))}}


def check(given: dict[str, Any]) -> None:
    """What the fields say together. `none` means that the tools are not there.

    Raises:
        BadRequest: it does not fit.
    """
    wanted = given.get("tool_choice", "auto")
    if "tools" not in given:
        if alone := next((name for name in FIELDS_OF_TOOLS if name in given), ""):
            raise BadRequest(f"{alone} needs tools", param=alone)
        return
    names = [tool["function"]["name"] for tool in given["tools"]]
    if isinstance(wanted, dict) and wanted["function"]["name"] not in names:
        raise BadRequest("tool_choice.function.name is the name of none of the tools", param="tool_choice")
    if "prompt" in given:
        raise BadRequest("tools need messages, not a prompt", param="tools")
    if wanted == "none":
        for name in FIELDS_OF_TOOLS:
            given.pop(name, None)
    elif given.get("response_format", {"type": "text"})["type"] != "text":
        raise BadRequest(
            "tools and response_format exclude each other: a call has the form of its tool",
            param="response_format",
        )


def calls(name: str, value: object) -> list[dict[str, Any]]:
    """The calls of an earlier answer."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOOLS:
        raise BadRequest(f"{name} must be a list of 1 to {MAX_TOOLS} calls")
    return [_call(f"{name}[{index}]", item) for index, item in enumerate(value)]


def check_results(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Each result must answer a call before it.

    Raises:
        BadRequest: one does not.
    """
    called: set[str] = set()
    for index, message in enumerate(messages):
        called |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in called:
            raise BadRequest(f"{name}[{index}].tool_call_id is the id of no call before it")


def with_ids(found: Sequence[Mapping[str, str]], *, answer: str) -> list[dict[str, Any]]:
    """The calls of an answer as a completion has them.

    Nine letters and digits: some chat templates take no other id.

    Args:
        found: name and arguments, as text, of each.
        answer: what no other answer has; the same one gets the same ids.
    """
    return [
        {
            "id": hashlib.sha256(f"{answer}.{index}".encode()).hexdigest()[:9],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for index, call in enumerate(found)
    ]


def _tool(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise BadRequest(f'{name} must be {{"type": "function", "function": {{…}}}}')
    only_known(name, value, {"type", "function"})
    function = value.get("function")
    if not isinstance(function, dict):
        raise BadRequest(f"{name}.function must be an object")
    name = f"{name}.function"
    only_known(name, function, {"name", "description", "parameters", "strict"})
    given: dict[str, Any] = {"name": _name(f"{name}.name", function.get("name"))}
    if function.get("description") is not None:
        given["description"] = text(f"{name}.description", function["description"])
    if function.get("strict") is not None:
        boolean(f"{name}.strict", function["strict"])
    if function.get("parameters") is not None:
        given["parameters"] = _parameters(f"{name}.parameters", function["parameters"])
    return {"type": "function", "function": given}


def _parameters(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise BadRequest(f"{name} must be the schema of an object")
    check_json(name, value)
    return value


def _call(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise BadRequest(f'{name} must be {{"id": "…", "type": "function", "function": {{…}}}}')
    only_known(name, value, {"id", "type", "function"})
    function = value.get("function")
    if not isinstance(function, dict):
        raise BadRequest(f"{name}.function must be an object")
    only_known(f"{name}.function", function, {"name", "arguments"})
    arguments = text(f"{name}.function.arguments", function.get("arguments"))
    return {
        "id": text(f"{name}.id", value.get("id")),
        "type": "function",
        "function": {
            "name": _name(f"{name}.function.name", function.get("name")),
            "arguments": _object(f"{name}.function.arguments", arguments),
        },
    }


def _object(name: str, value: str) -> str:
    """The text of a JSON object; some clients write none at all for no arguments."""

    def no_constant(_: str) -> None:
        raise ValueError

    try:
        read = json.loads(value or "{}", parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} is not JSON") from error
    if not isinstance(read, dict):
        raise BadRequest(f"{name} is not the JSON of an object")
    return value or "{}"


def _name(name: str, value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise BadRequest(f"{name} must be 1 to 64 letters, digits, '_', '-'")
    return value
