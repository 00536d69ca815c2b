"""What was said so far, and what one more turn makes of it.

A conversation sends everything again with each question: neither the daemon nor a model keeps it, though the model goes
on from what it has computed for the same beginning. When it no longer fits the model's context, its oldest exchanges
are left out, as few as possible, and the person is told.

    ask(question) → the partner answers → both are kept
                  → too long: without the oldest exchange, again
                  → refused, or stopped before a word came: the question is not kept
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from edge_agent.errors import PromptTooLong

Message = dict[str, str]
OnText = Callable[[str], None]

STOPPED = "stopped"
"""The finish_reason of an answer that the person has stopped."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came.

    Attributes:
        finish_reason: `stop`, `length`, or `stopped`.
        model: who answered, as `terminal.answer_line` shows it.
        timings: first_token_ms and tokens_per_s; empty for one that was stopped.
        forgotten: exchanges that were left out for this answer and all later ones.
    """

    text: str
    finish_reason: str
    model: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    forgotten: int = 0


class Partner(Protocol):
    """Answers conversations.

    Attributes:
        name: what it is, in a few words.
    """

    @property
    def name(self) -> str: ...

    def answer(self, messages: list[Message], *, on_text: OnText) -> Answer:
        """Answers the last of the messages. Ctrl-C meanwhile gives an answer that was stopped.

        Args:
            on_text: called with each piece of the answer as it comes.

        Raises:
            PromptTooLong: the messages and an answer do not fit the model's context.
            EdgeAgentError: no answer came.
        """
        ...


@dataclass(kw_only=True)
class Conversation:
    """One person's.

    Attributes:
        system: what the model is told first; None leaves it to the partner.
        exchanges: questions and their answers, the oldest first.
    """

    system: str | None = None
    exchanges: list[tuple[Message, Message]] = field(default_factory=list)

    def ask(self, question: str, partner: Partner, *, on_text: OnText) -> Answer:
        """One turn.

        Raises:
            PromptTooLong: the question alone does not fit.
            EdgeAgentError: no answer came; the conversation is as it was.
        """
        asked = {"role": "user", "content": question}
        kept = self.exchanges
        while True:
            try:
                answer = partner.answer([*self._beginning(), *_messages(kept), asked], on_text=on_text)
                break
            except PromptTooLong:
                if not kept:
                    raise
                kept = kept[1:]
        forgotten = len(self.exchanges) - len(kept)
        said = [(asked, {"role": "assistant", "content": answer.text})] if answer.text else []
        self.exchanges = kept + said
        return replace(answer, forgotten=forgotten)

    def clear(self) -> None:
        """Forgets what was said; the system prompt stays."""
        self.exchanges = []

    def _beginning(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def _messages(exchanges: list[tuple[Message, Message]]) -> list[Message]:
    return [message for exchange in exchanges for message in exchange]
