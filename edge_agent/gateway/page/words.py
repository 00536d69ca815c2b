"""Numbers as people read them. Pure."""

from __future__ import annotations

from edge_agent.terminal import age, span


def ago(seconds: float) -> str:
    """How long ago something was, in one unit."""
    return "now" if seconds < 2 else f"{age(seconds)} ago"


def took(milliseconds: float | None) -> str:
    """What a step of a prompt took; `–` where nobody knows."""
    if milliseconds is None:
        return "–"
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s" if milliseconds < 60_000 else span(milliseconds / 1000)


def rate(tokens_per_s: float | None) -> str:
    """Tokens in a second, without its unit."""
    if tokens_per_s is None:
        return "–"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 100 else f"{tokens_per_s:,.0f}"
