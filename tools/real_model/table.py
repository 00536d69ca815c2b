"""The figures of all builds as Markdown, for docs/models.md as it stands: quality beside speed, always.

A table, and below it how its speed was measured. Nothing else goes to standard output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.real_model.speed import PROMPT_TOKENS

UNKNOWN = "–"


def table(report: Mapping[str, Any]) -> str:
    """A line for the original and for each build; where speed was measured, an empty line and a paragraph.

    Args:
        report: `tokens`; `original`, with `perplexity` and `bytes`; `builds`, name → `perplexity`, `same_next_token`,
            `divergence`, `bytes` and, where it was measured, `speed` (`speed.Figures`). Of the latter also `threads`,
            and `machine`, a phrase.
    """
    original = report["original"]
    lengths = " / ".join(f"{length:,}" for length in PROMPT_TOKENS)
    lines = [
        _line(
            "build",
            f"perplexity ({report['tokens']:,} tokens)",
            *("× original", "same next token", "KL (nats)", "MB"),
            *(f"first token {lengths} (ms)", f"decode after {lengths} (tokens/s)", "peak MB"),
        ),
        _line(*["---"] * 9),
        _line(
            "original, float32", f"{original['perplexity']:.1f}", "1", "1", "0", _mb(original), *[UNKNOWN] * 3
        ),
    ]
    lines += [
        _line(
            name,
            f"{each['perplexity']:.1f}",
            f"{each['perplexity'] / original['perplexity']:.3f}",
            f"{each['same_next_token']:.2f}",
            f"{each['divergence']:.3f}",
            _mb(each),
            *_speed(each.get("speed")),
        )
        for name, each in report["builds"].items()
    ]
    return "\n".join([*lines, *_how(report)])


def _how(report: Mapping[str, Any]) -> Sequence[str]:
    launches = sorted(
        {int(each["speed"]["launches"]) for each in report["builds"].values() if "speed" in each}
    )
    if not launches:
        return ()
    counts = f"{launches[0]}" if len(launches) == 1 else f"{launches[0]} to {launches[-1]}"
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    return (
        "",
        f"Speed and memory: the bare libraries with {threads} each, a process for each launch, all builds in turns;",
        f"medians of {counts} launches. {report['machine']}.",
    )


def _line(*cells: str) -> str:
    return "|---" * len(cells) + "|" if cells[0] == "---" else f"| {' | '.join(cells)} |"


def _mb(entry: Mapping[str, Any]) -> str:
    return f"{entry['bytes'] / 1e6:.0f}"


def _speed(figures: Mapping[str, float] | None) -> Sequence[str]:
    if not figures:
        return [UNKNOWN] * 3
    return (
        " / ".join(f"{figures[f'first_token_ms_{length}']:,.0f}" for length in PROMPT_TOKENS),
        " / ".join(f"{figures[f'decode_tokens_per_s_{length}']:.0f}" for length in PROMPT_TOKENS),
        f"{figures['peak_mb']:.0f}",
    )
