"""OpenAI's request schema, as the `openai` package has it, and what the agent makes of each field.

`./build.sh http-test` holds the names against the package itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Field:
    """Values that the schema allows.

    Attributes:
        accepted: the request is answered.
        refused: the request gets 400, and the error names the field.
    """

    accepted: tuple[Any, ...] = ()
    refused: tuple[Any, ...] = ()


def accepted(*values: Any) -> Field:
    return Field(accepted=values)


def refused(*values: Any) -> Field:
    return Field(refused=values)


_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
_SAID = {"role": "user", "content": "What is the capital of Spain?"}

TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
"""Whether these are taken is up to the parser of messages, and shown in its own tests."""

COMMON: dict[str, Field] = {
    "frequency_penalty": Field(accepted=(0, 0.0, None), refused=(0.5, -2)),
    "presence_penalty": Field(accepted=(0, 0.0, None), refused=(0.5, -2)),
    "logit_bias": Field(accepted=({}, None), refused=({"50256": -100},)),
    "max_tokens": Field(accepted=(4, 4.0, None), refused=(0, -1, 1.5, "4", True)),
    "model": Field(accepted=("assistant", None), refused=("", 1)),
    "n": Field(accepted=(1, None), refused=(2, 0, 128)),
    "seed": Field(accepted=(0, 7, None), refused=(-1, 1 << 31, 0.5, "7")),
    "stop": Field(accepted=("X", ["X", "Y"], None), refused=("", [1], ["X"] * 17)),
    "stream": Field(accepted=(False, True, None), refused=("yes", 1)),
    "stream_options": Field(
        accepted=(None, {}, {"include_usage": True}, {"include_obfuscation": False}),
        refused=({"include_obfuscation": True}, {"other": 1}, 1),
    ),
    "temperature": Field(accepted=(0, 1, 2.0, None), refused=(-0.1, 2.1, "1", True)),
    "top_p": Field(accepted=(0.5, 1, None), refused=(0, 1.1, "1")),
    "user": Field(accepted=("somebody", "", None), refused=(1, ["somebody"])),
}
CHAT: dict[str, Field] = {
    **COMMON,
    "audio": refused({"format": "wav", "voice": "alloy"}),
    "function_call": refused("auto", {"name": "f"}),
    "functions": refused([{"name": "f"}]),
    "logprobs": Field(accepted=(False, None), refused=(True, 1)),
    "max_completion_tokens": Field(accepted=(4, None), refused=(0, "4")),
    "messages": Field(
        accepted=(
            [_SAID],
            [{"role": "developer", "content": "Be brief."}, _SAID],
            [{"role": "system", "content": "Be brief."}, {**_SAID, "name": "somebody"}],
            [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            [_SAID, {"role": "assistant", "content": "Madrid.", "refusal": None}, _SAID],
        ),
        refused=(
            [],
            "Hello",
            [{"role": "nobody", "content": "x"}],
            [{"role": "function", "name": "f", "content": "x"}],
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://a.test/a.png"}}],
                }
            ],
            [
                {
                    "role": "user",
                    "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
                }
            ],
            [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}],
            [{"role": "user", "content": 1}],
        ),
    ),
    "metadata": Field(accepted=({}, None), refused=({"a": "b"},)),
    "modalities": Field(accepted=(["text"], None), refused=(["text", "audio"], [])),
    "moderation": refused({"enabled": True}),
    "parallel_tool_calls": refused(),
    "prediction": refused({"type": "content", "content": "x"}),
    "prompt_cache_key": Field(accepted=("k", None), refused=(1,)),
    "prompt_cache_options": refused({"a": 1}),
    "prompt_cache_retention": refused("24h"),
    "reasoning_effort": refused("low", "high"),
    "response_format": Field(
        accepted=(
            None,
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": _SCHEMA}},
        ),
        refused=({"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 1}, "json"),
    ),
    "safety_identifier": Field(accepted=("s", None), refused=(1,)),
    "service_tier": Field(accepted=("auto", "default", None), refused=("flex", "priority")),
    "store": Field(accepted=(False, None), refused=(True,)),
    "tool_choice": refused(),
    "tools": refused(),
    "top_logprobs": Field(accepted=(0, None), refused=(3,)),
    "verbosity": refused("low"),
    "web_search_options": refused({"search_context_size": "low"}),
}
COMPLETION: dict[str, Field] = {
    **COMMON,
    "best_of": Field(accepted=(1, None), refused=(2,)),
    "echo": Field(accepted=(False, None), refused=(True,)),
    "logprobs": Field(accepted=(None,), refused=(0, 5)),
    "prompt": Field(
        accepted=("Hello", ["Hello"]), refused=("", ["Hello", "Hello"], [1, 2], [[1, 2]], 1, {"a": "b"})
    ),
    "suffix": Field(accepted=("", None), refused=("x",)),
}


def cases(table: dict[str, Field], base: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """(field, body, whether it is accepted) for each value in a table."""
    found = []
    for name, field in table.items():
        found += [(name, {**base, name: value}, True) for value in field.accepted]
        found += [(name, {**base, name: value}, False) for value in field.refused]
    return found
