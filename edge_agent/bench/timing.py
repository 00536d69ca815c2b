"""How long one answer took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The timings of one answer, measured by whoever asked.

    Attributes:
        cached_tokens: prompt tokens that were not computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    first_token_ms: float
    total_ms: float
    cached_tokens: int = 0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Timing:
        return cls(
            prompt_tokens=int(fields["prompt_tokens"]),
            completion_tokens=int(fields["completion_tokens"]),
            first_token_ms=float(fields["first_token_ms"]),
            total_ms=float(fields["total_ms"]),
            cached_tokens=int(fields.get("cached_tokens", 0)),
        )

    @property
    def prefill_tokens_per_s(self) -> float:
        computed = max(1, self.prompt_tokens - self.cached_tokens)
        return computed / max(self.first_token_ms, 0.001) * 1000

    @property
    def decode_tokens_per_s(self) -> float | None:
        """The rate after the first token; None if there is only one token."""
        if self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / max(self.total_ms - self.first_token_ms, 0.001) * 1000


def summary(timings: Iterable[Timing]) -> dict[str, float | None]:
    """Medians of several answers."""
    known = list(timings)
    rates = [rate for timing in known if (rate := timing.decode_tokens_per_s) is not None]
    return {
        "prompt_tokens": median(timing.prompt_tokens for timing in known),
        "first_token_ms": round(median(timing.first_token_ms for timing in known), 2),
        "total_ms": round(median(timing.total_ms for timing in known), 2),
        "prefill_tokens_per_s": round(median(timing.prefill_tokens_per_s for timing in known), 1),
        "decode_tokens_per_s": round(median(rates), 2) if rates else None,
    }
