"""Where a request can come in, and which fields it may have there. Pure.

One parser reads every request; what differs is its surface: a message of the agent's own contract, or a body of
OpenAI's `/v1/chat/completions` or `/v1/completions`. Owns the fields that only OpenAI's clients know: those that they
send by habit are taken with the one value that asks for nothing, and any other value is refused by the field's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from edge_agent.chat import fields
from edge_agent.chat.fields import FIELDS, Rule
from edge_agent.errors import BadRequest


class Surface(StrEnum):
    """The shape in which a request is written."""

    MESSAGE = "message"
    """docs/mqtt.md."""
    CHAT = "chat"
    """POST /v1/chat/completions."""
    COMPLETION = "completion"
    """POST /v1/completions."""


def _only(*allowed: object, why: str) -> Rule:
    def check(name: str, value: object) -> Any:
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise BadRequest(f"{name} {why}")
        return value

    return check


def _one_prompt(name: str, value: object) -> Any:
    """A text, or a list of one text, as clients write it that can ask for several at once."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], str):
            raise BadRequest(
                f"{name} must be one text: there is one answer for each prompt, and tokens are not taken"
            )
        value = value[0]
    return FIELDS["prompt"](name, value)


HABITS: Mapping[str, Rule] = {
    "store": _only(False, why="must be false: nothing is stored"),
    "metadata": _only({}, why="must be empty: nothing is stored"),
    "service_tier": _only("auto", "default", why='must be "auto" or "default": there is one tier'),
    "modalities": _only(["text"], why='must be ["text"]: an answer is text'),
    "logit_bias": _only({}, why="must be empty: tokens cannot be weighted"),
    "top_logprobs": _only(0, why="must be 0: an answer has no log probabilities"),
    "safety_identifier": FIELDS["user"],
    "prompt_cache_key": FIELDS["user"],
}
"""Fields without effect, on every surface."""

_OF_COMPLETIONS: Mapping[str, Rule] = {
    "prompt": _one_prompt,
    "best_of": _only(1, why="must be 1: one answer for each prompt"),
    "echo": _only(False, why="must be false: an answer does not repeat its prompt"),
    "suffix": _only("", why="must be empty: text cannot be inserted"),
}
_NOT_OVER_HTTP = frozenset({"id", "reply_to"})
"""Where the answer goes is known, and `Idempotency-Key` is what makes a repeat recognisable."""
_FOR_COMPLETIONS = frozenset(
    {
        *("prompt", "model", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
        *("max_tokens", "response_format", "deadline_ms", "stream", "stream_options", "n", "user"),
        *("logprobs", "frequency_penalty", "presence_penalty"),
    }
)

_EVERYWHERE: Mapping[str, Rule] = {**FIELDS, **HABITS}
_FIELDS: Mapping[Surface, Mapping[str, Rule]] = {
    Surface.MESSAGE: _EVERYWHERE,
    Surface.CHAT: {
        name: rule for name, rule in _EVERYWHERE.items() if name not in _NOT_OVER_HTTP | {"prompt"}
    },
    Surface.COMPLETION: {
        **{name: rule for name, rule in _EVERYWHERE.items() if name in _FOR_COMPLETIONS | {"logit_bias"}},
        **_OF_COMPLETIONS,
    },
}

WITHOUT_EFFECT = fields.WITHOUT_EFFECT | HABITS.keys() | (_OF_COMPLETIONS.keys() - {"prompt"})


def fields_of(surface: Surface) -> Mapping[str, Callable[[str, object], Any]]:
    """Every field that a request may have there, and its rule."""
    return _FIELDS[surface]
