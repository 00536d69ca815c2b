"""The benchmark's document for people: one sentence, what was measured, and the project's goals beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edge_agent import terminal
from edge_agent.bench.report import SIDE_NAMES

_COLUMNS = {
    "first_token_ms": "FIRST MS",
    "total_ms": "TOTAL MS",
    "prefill_tokens_per_s": "PREFILL/S",
    "decode_tokens_per_s": "DECODE/S",
}


def print_report(result: Mapping[str, Any]) -> None:
    """Prints the sentence, and tables below it, on stdout."""
    terminal.print_page(list(page(result)))


def sentence(result: Mapping[str, Any]) -> str:
    """Such as: 12.1 tokens/s, 93 % of what this memory allows; first token 0.4 s at 256 tokens."""
    return _said_of(result["headline"])


def page(result: Mapping[str, Any]) -> Iterator[str | terminal.Rows]:
    """What `terminal.print_page` takes."""
    yield sentence(result)
    if against := result["against"]:
        yield f"{against['peer']} with {against['file']}: {_said_of(against)}"
    yield ""
    yield f"model     {result['model']} version {result['version']}, {result['threads']} threads"
    yield f"host      {result['host']}"
    yield f"medians of {result['launches']} launches of each side, in turn; {result['tokens']} new tokens"
    yield ""
    yield _sides(result)
    if "at_once" in result:
        yield ""
        yield _at_once(result)
    if against:
        yield ""
        yield from _peer_at_once(against)
    yield ""
    yield _memory(result)
    yield ""
    yield from _roofline(result["roofline"])
    yield ""
    yield _goals(result)
    for note in result["notes"]:
        yield f"note      {note}"


def _said_of(found: Mapping[str, Any]) -> str:
    first = f"first token {_duration(found['first_token_ms'])} at {found['prompt_tokens']} tokens"
    rate, share = found["tokens_per_s"], found.get("memory_share")
    if rate is None:
        return f"{first}; answers were too short for a rate"
    allowed = f", {share * 100:.0f} % of what this memory allows" if share else ""
    beyond = " (some of it stays in the caches)" if share and share > 1 else ""
    return f"{rate:.1f} tokens/s{allowed}{beyond}; {first}"


def _duration(ms: float) -> str:
    """Two digits are known of it at most."""
    seconds = ms / 1000
    return f"{ms:.0f} ms" if ms < 100 else f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"


def _sides(result: Mapping[str, Any]) -> terminal.Rows:
    rows = [
        (SIDE_NAMES[name], length, *(_number(values[key]) for key in _COLUMNS))
        for name, lengths in result["sides"].items()
        for length, values in lengths.items()
    ]
    return terminal.Rows(("SIDE", "PROMPT", *_COLUMNS.values()), rows)


def _at_once(result: Mapping[str, Any]) -> terminal.Rows:
    rows = [(count, *(_number(value) for value in row.values())) for count, row in result["at_once"].items()]
    return terminal.Rows(("AT ONCE", "TOKENS/S", "FIRST TOKEN P50 MS", "P95 MS"), rows)


def _peer_at_once(against: Mapping[str, Any]) -> Iterator[str]:
    equal = against["equal_answers"]
    for count, row in against["at_once"].items():
        yield f"{against['peer']}, {count} at once: {row['tokens_per_s']:.1f} tokens/s"
    yield f"equal answers: {equal['equal']} of {equal['of']}, at once and one after the other"


def _memory(result: Mapping[str, Any]) -> terminal.Rows:
    rows = [
        (
            SIDE_NAMES.get(name, name),
            terminal.human_bytes(row["resident_bytes"]),
            terminal.human_bytes(row["peak_bytes"]) if "peak_bytes" in row else "",
        )
        for name, row in result["memory"].items()
    ]
    return terminal.Rows(("MEMORY", "RESIDENT", "PEAK"), rows)


def _roofline(roofline: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"this memory gives {terminal.human_bytes(roofline['bandwidth_bytes_per_s'])}/s, and a token reads "
        f"{terminal.human_bytes(roofline['model_bytes'])} of weights:"
    )
    share = roofline["decode_share"]
    reached = f"; the bare library reaches {share * 100:.0f} % of that" if share else ""
    yield f"it allows {roofline['limit_tokens_per_s']:.1f} tokens/s{reached}"


def _goals(result: Mapping[str, Any]) -> terminal.Rows:
    verdicts = {True: "reached", False: "missed", None: "no goal"}
    rows = [
        (
            _number(ratio["value"]),
            ratio["goal"],
            verdicts[ratio["reached"]],
            f"{ratio['name']} ({_number(ratio['left'])} and {_number(ratio['right'])} {ratio['unit']})",
        )
        for ratio in result["ratios"]
    ]
    return terminal.Rows(("MEASURED", "GOAL", "", "OF WHAT"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
