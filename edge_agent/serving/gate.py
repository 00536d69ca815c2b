"""The gate's rules: what a candidate must have shown before it becomes active, and what is only reported. Pure.

The candidate's own process answers the golden prompts (`runner/golden.py`); what it found is judged here.
"""

from __future__ import annotations

from edge_agent.errors import ContentError
from edge_agent.runner.protocol import Tried

TIMEOUT_S = 300.0
"""For all golden prompts together."""
_MAX_SHOWN = 3


class GateFailed(ContentError):
    """A candidate loaded, and did not answer its golden prompts as its package says it must."""

    code = "gate_failed"


def check_golden(tried: Tried) -> None:
    """Golden prompts must be right.

    Raises:
        GateFailed: one of them was not.
    """
    if tried.failures:
        raise GateFailed("; ".join(tried.failures[:_MAX_SHOWN]))


def shortfalls(tried: Tried, *, min_tokens_per_s: float, memory_limit_bytes: int) -> str:
    """What fell short of the settings without being an error: speed and memory; empty when nothing did.

    Args:
        min_tokens_per_s, memory_limit_bytes: 0 where the settings want none.
    """
    found = []
    if min_tokens_per_s and tried.tokens_per_s < min_tokens_per_s:
        found.append(f"{tried.tokens_per_s:.1f} tokens/s, {min_tokens_per_s:g} are wanted")
    if memory_limit_bytes and tried.memory_bytes > memory_limit_bytes:
        found.append(f"{tried.memory_bytes} bytes of memory, {memory_limit_bytes} are allowed")
    return "; ".join(found)
