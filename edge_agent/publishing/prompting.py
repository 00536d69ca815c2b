"""What a package makes of conversations and of its end tokens: rules for its trial. Pure, but for `Count`.

What makes a chat package useless is refused. What only limits it is said, in a sentence about "it", the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_agent.errors import BadRequest, PublishError

Messages = Sequence[Mapping[str, str]]
Count = Callable[[Messages], int]
"""Tokens of a chat's prompt, at least 1; 0 if it is too long for the package's limits.

Raises:
    BadRequest: the package refuses it.
"""

_USER, _ANSWER, _NEXT = ("user", "Hi"), ("assistant", "<think>Hm</think>\n\nHello"), ("user", "Thanks")
_SYSTEM = ("system", "Be brief.")
_MORE = " And then there are some more words."

_AFTERWARDS: Mapping[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "a system message": (
        (_SYSTEM, _USER),
        "devices with models.NAME.system refuse the package, and clients cannot send one",
    ),
    "a conversation of user, assistant and user": (
        (_USER, _ANSWER, _NEXT),
        "clients can only ask single questions",
    ),
    "a conversation that ends with the assistant": (
        (_USER, _ANSWER),
        "clients cannot send a conversation that ends with an answer",
    ),
}
"""What a chat may be beside a question: the messages, and what it means if they are refused."""


def of_template(count: Count, *, chat: bool) -> list[str]:
    """What the chat template refuses or loses.

    Args:
        chat: the package has the chat signature.

    Raises:
        PublishError: a chat package does not take a question.
    """
    question = (_USER,)
    try:
        if lost := _lost(count, question):
            raise BadRequest(f"its text is lost ({lost})")
    except BadRequest as error:
        if chat:
            raise PublishError(
                f"the package takes no message of a user: {error.message}",
                remedy="correct the chat template, or publish with --signature prompt",
            ) from error
        return [f"it takes prompts only, no chats and no plain text: {error.message}"]
    found = []
    for what, (messages, consequence) in _AFTERWARDS.items():
        try:
            if lost := _lost(count, messages):
                found.append(f"its chat template drops text from {what}: {lost}")
        except BadRequest as error:
            found.append(f"it does not take {what} ({error.message}): {consequence}")
    return found


def _lost(count: Count, messages: Sequence[tuple[str, str]]) -> str:
    """Which of the messages make no difference to the prompt; empty if all do.

    Raises:
        BadRequest: they are refused.
    """
    shortest = count(_chat(messages))
    lost = []
    for number, (role, content) in enumerate(messages):
        longer = [*messages[:number], (role, content + _MORE), *messages[number + 1 :]]
        if shortest and count(_chat(longer)) == shortest:
            lost.append(f"message {number + 1}, the {role}'s")
    return "; ".join(lost)


def _chat(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def of_end_tokens(configured: object, of_tokenizer: frozenset[int]) -> list[str]:
    """Says if genai_config.json does not name the end tokens of the tokenizer.

    More than those is usual, and nothing to be said about.

    Args:
        configured: `eos_token_id` of genai_config.json, an id or a list of ids.
        of_tokenizer: what the tokenizer's own files say.
    """
    own = frozenset(configured if isinstance(configured, list) else [configured]) - {None}
    if not (missing := of_tokenizer - own):
        return []
    return [
        f"its genai_config.json ends answers at {_shown(own)}, its tokenizer at {_shown(of_tokenizer)}: "
        f"answers end at each of them; add {_shown(missing)} to eos_token_id for other programs"
    ]


def _shown(tokens: frozenset[Any]) -> str:
    return f"token {' or '.join(sorted(map(str, tokens)))}" if tokens else "no token"
