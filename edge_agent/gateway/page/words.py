"""Numbers as people read them. Pure."""

from __future__ import annotations

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def span(seconds: float) -> str:
    """How long something lasts, in its two largest units: `3 d 4 h`."""
    whole = max(0, int(seconds))
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"
    return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"


def ago(seconds: float) -> str:
    return "now" if seconds < 2 else f"{span(seconds).split(' ', 2)[0]} {span(seconds).split(' ')[1]} ago"


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
