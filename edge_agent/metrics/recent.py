"""The last prompts that were answered, each with what it took. Not a word of them, and nobody's name.

Owns at most `MOST` of them, in memory: they end with the daemon, as the counts do. Any thread may use it under the lock
of `Measurements`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

MOST = 100


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a prompt took that got its whole answer.

    Attributes:
        queue_s: from its acceptance until it was taken up.
        first_token_s: from its acceptance to the first text.
        request_s: from its acceptance to the end of the answer.
        per_token_s: for each token after the first one; None where that could not be measured.
        input_tokens, output_tokens: 0 where the model does not count.
        cached_tokens: those of the input that the model still had.
    """

    queue_s: float
    first_token_s: float
    request_s: float
    per_token_s: float | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int

    def document(self) -> dict[str, Any]:
        """In the units and by the names of an answer's `timings` and `usage`."""
        return {
            "queue_ms": round(self.queue_s * 1000, 1),
            "first_token_ms": round(self.first_token_s * 1000, 1),
            "total_ms": round(self.request_s * 1000, 1),
            "tokens_per_s": round(1 / self.per_token_s, 1) if self.per_token_s else None,
            "prompt_tokens": self.input_tokens,
            "completion_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One prompt.

    Attributes:
        at: when, in seconds since 1970.
        code: `ok`, or that of the error.
        took: None for an error.
    """

    at: float
    model: str
    code: str
    took: Took | None

    def document(self) -> dict[str, Any]:
        head = {"at": int(self.at), "model": self.model, "code": self.code}
        return {**head, **(self.took.document() if self.took else {})}


class Recent:
    """The last prompts."""

    def __init__(self) -> None:
        self._last: deque[Answered] = deque(maxlen=MOST)

    def add(self, answered: Answered) -> None:
        """The newest one. The oldest is forgotten where there are too many."""
        self._last.append(answered)

    def document(self) -> list[dict[str, Any]]:
        """The oldest first."""
        return [each.document() for each in self._last]
