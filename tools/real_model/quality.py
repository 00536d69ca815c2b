"""What a build keeps of the original: perplexity, how often it would say the same next token, and divergence.

Arithmetic over logits, wherever these come from (`logits.py`). The logits of one model are a list of windows, each
[tokens, vocabulary] float32; two models that are compared have seen the same windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = Sequence[npt.NDArray[np.float32]]
Windows = Sequence[Sequence[int]]
"""The tokens that the logits belong to."""

_ROWS = 64
"""Positions at a time: a vocabulary in float64 is large."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A build beside its original.

    Attributes:
        perplexity: of the text, for the build.
        same_next_token: share of positions at which both find the same token likeliest.
        divergence: mean Kullback-Leibler divergence of the build's next token from the original's, in nats.
    """

    perplexity: float
    same_next_token: float
    divergence: float


def compare(original: Logits, build: Logits, windows: Windows) -> Kept:
    """All three figures."""
    return Kept(
        perplexity=perplexity(build, windows),
        same_next_token=same_next_token(original, build),
        divergence=divergence(original, build),
    )


def perplexity(logits: Logits, windows: Windows) -> float:
    """exp of the mean surprise at each token that has one before it in its window."""
    surprise, count = 0.0, 0
    for window, given in zip(windows, logits, strict=True):
        said = 0
        for rows in _log_softmax(given[: len(window) - 1]):
            following = window[said + 1 : said + 1 + len(rows)]
            surprise -= float(rows[np.arange(len(rows)), following].sum())
            said += len(rows)
        count += said
    if not count:
        raise ValueError("perplexity needs a window of two tokens")
    return float(np.exp(surprise / count))


def same_next_token(original: Logits, build: Logits) -> float:
    """0 to 1."""
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(original, build, strict=True)]
    return float(np.concatenate(same).mean())


def divergence(original: Logits, build: Logits) -> float:
    """0 where both say the same, in nats."""
    found = [
        (np.exp(p) * (p - q)).sum(-1)
        for a, b in zip(original, build, strict=True)
        for p, q in zip(_log_softmax(a), _log_softmax(b), strict=True)
    ]
    return float(np.concatenate(found).mean())


def _log_softmax(logits: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float64]]:
    """A few rows at a time."""
    for start in range(0, len(logits), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        yield rows
