"""The fields of a request and the rule of each. Pure.

A rule takes the field's name and its value, and gives the value to go on with: another way to write a value becomes
the usual one (`8.0` is 8, `developer` is `system`, text parts are one text). It refuses by the field's name. The rules
of tools are in `tools.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_agent.chat import tools
from edge_agent.chat.values import boolean, check_json, only_known, text
from edge_agent.errors import BadRequest
from edge_agent.topics import ID_PATTERN

Rule = Callable[[str, object], Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
"""`developer` is a newer word for `system`."""

EMPTY_IN_ANSWERS = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls"})
"""What OpenAI's clients hand back, empty, with an answer that becomes part of the next request."""

RESPONSE_FORMATS = {
    "text": {"type"},
    "json_object": {"type"},
    "json_schema": {"type", "json_schema"},
    "regex": {"type", "regex"},
}
"""The types of `response_format` and the fields of each."""

MAX_MESSAGES = 256
MAX_PARTS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOPIC_BYTES = 512
MAX_DEADLINE_MS = 7 * 86_400_000


_MORE_OF_A_MESSAGE = {"assistant": "tool_calls", "tool": "tool_call_id"}
"""By its role."""


def _messages(name: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise BadRequest(f"{name} must be a list of 1 to {MAX_MESSAGES} messages")
    messages = [_message(f"{name}[{index}]", item) for index, item in enumerate(value)]
    tools.check_results(name, messages)
    return messages


def _message(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object")
    value = {key: item for key, item in value.items() if item or key not in EMPTY_IN_ANSWERS}
    if value.get("role") not in ROLES:
        raise BadRequest(f"{name}.role must be one of {', '.join(ROLES)}")
    role = "system" if value["role"] == "developer" else value["role"]
    more = _MORE_OF_A_MESSAGE.get(role, "name")
    only_known(name, value, {"role", "content", "name", more})
    message: dict[str, Any] = {"role": role, "content": ""}
    if more == "tool_call_id":
        message[more] = text(f"{name}.{more}", value.get(more))
    elif more == "tool_calls" and value.get(more) is not None:
        message[more] = tools.calls(f"{name}.{more}", value[more])
    if value.get("content") is not None or "tool_calls" not in message:
        message["content"] = _content(f"{name}.content", value.get("content"))
    if value.get("name") is not None:
        message["name"] = text(f"{name}.name", value["name"])
    return message


def _content(name: str, value: object) -> str:
    """A text, or a list of text parts, which become lines of one text, as in other servers."""
    if not isinstance(value, list):
        return text(name, value)
    if not 1 <= len(value) <= MAX_PARTS:
        raise BadRequest(f"{name} must be a string, or a list of 1 to {MAX_PARTS} text parts")
    return "\n".join(_part(f"{name}[{index}]", part) for index, part in enumerate(value))


def _part(name: str, value: object) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise BadRequest(f'{name} must be {{"type": "text", "text": "…"}}')
    only_known(name, value, {"type", "text"})
    return text(f"{name}.text", value.get("text"))


def _prompt(name: str, value: object) -> str:
    prompt = text(name, value)
    if not prompt:
        raise BadRequest(f"{name} is empty")
    return prompt


def _stops(name: str, value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise BadRequest(f"{name} must be a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not 0 < len(text(name, stop)) <= MAX_STOP_CHARACTERS:
            raise BadRequest(f"a string in {name} must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str, object], float]:
    def check(name: str, value: object) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):  # type: ignore[operator]
            raise BadRequest(f"{name} must be a number {'above' if above else 'from'} {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    return check


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some clients' languages have no integers
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadRequest(f"{name} must be a whole number from {low} to {high}")
        return value

    return check


def _one(name: str, value: object) -> int:
    if value != 1 or isinstance(value, bool):
        raise BadRequest(f"{name} must be 1: one answer for each prompt")
    return 1


def _no_penalty(name: str, value: object) -> int:
    if value != 0 or isinstance(value, bool):
        raise BadRequest(f"{name} must be 0: use repetition_penalty instead")
    return 0


def _no_logprobs(name: str, value: object) -> bool:
    if value is not False:
        raise BadRequest(f"{name} must be false: an answer has no log probabilities")
    return False


def _stream_options(name: str, value: object) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object")
    only_known(name, value, {"include_usage", "include_obfuscation"})
    given = {key: boolean(f"{name}.{key}", item) for key, item in value.items() if item is not None}
    if given.pop("include_obfuscation", False):
        raise BadRequest(f"{name}.include_obfuscation must be false: chunks are not padded")
    return given


def check_id(name: str, value: object) -> str:
    if not isinstance(value, str) or not ID_PATTERN.fullmatch(value):
        raise BadRequest(f"{name} must be 1 to 64 letters, digits, '_', '.', '-'")
    return value


def _name(name: str, value: object) -> str:
    given = text(name, value)
    if not 0 < len(given) <= 250:
        raise BadRequest(f"{name} must have 1 to 250 characters")
    return given


def check_topic(name: str, value: object) -> str:
    topic = text(name, value)
    if not 0 < len(topic.encode()) <= MAX_TOPIC_BYTES:
        raise BadRequest(f"{name} must have 1 to {MAX_TOPIC_BYTES} bytes")
    return topic


def _response_format(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object")
    kind = value.get("type")
    keys = RESPONSE_FORMATS.get(kind if isinstance(kind, str) else "")
    if keys is None:
        raise BadRequest(f"{name}.type must be one of {', '.join(RESPONSE_FORMATS)}")
    if set(value) != keys:
        raise BadRequest(f"{name} of type {kind} has exactly the fields {', '.join(sorted(keys))}")
    if kind == "regex":
        text(f"{name}.regex", value["regex"])
    if kind == "json_schema" and not isinstance(value["json_schema"], dict):
        raise BadRequest(f"{name}.json_schema must be an object")
    check_json(name, value)
    return value


FIELDS: dict[str, Rule] = {
    "messages": _messages,
    "prompt": _prompt,
    "temperature": _number(0, 2),
    "max_tokens": _integer(1, 1 << 20),
    "max_completion_tokens": _integer(1, 1 << 20),
    "stop": _stops,
    "n": _one,
    "stream": boolean,
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(1, 1 << 20),
    "repetition_penalty": _number(0.01, 100),
    "seed": _integer(0, (1 << 31) - 1),
    "response_format": _response_format,
    "tools": tools.tools,
    "tool_choice": tools.choice,
    "parallel_tool_calls": boolean,
    "model": _name,
    "id": check_id,
    "reply_to": check_topic,
    "deadline_ms": _integer(1, MAX_DEADLINE_MS),
    "user": text,
    "stream_options": _stream_options,
    "logprobs": _no_logprobs,
    "frequency_penalty": _no_penalty,
    "presence_penalty": _no_penalty,
}
"""Every field of a request and its rule."""

WITHOUT_EFFECT = frozenset(
    {"n", "user", "stream_options", "logprobs", "frequency_penalty", "presence_penalty"}
)
"""Fields that OpenAI's clients send by habit, with the only values that ask for nothing (a completion has its usage
anyway)."""
