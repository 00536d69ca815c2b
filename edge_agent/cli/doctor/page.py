"""What `edge-agent doctor` shows: a check once, in its group; what failed last, above the prompt. Pure.

    This machine … Service     checks in which all is well
    Warnings                   what can wait, with what to do
    Failures                   what cannot, with what to do
    ready; 2 warnings: …       the verdict, and what to do next

A check may have found several things, one for each model, file or host. Its level is that of the worst of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_agent import terminal
from edge_agent.doctor.finding import Finding, Level

GROUPS: tuple[tuple[str, frozenset[str]], ...] = (
    ("This machine", frozenset(("host", "libraries", "dns"))),
    ("Settings", frozenset(("settings",))),
    ("Broker", frozenset(("broker",))),
    ("Registry", frozenset(("registry", "mirrors"))),
    ("Models", frozenset(("cache", "models"))),
    ("Service", frozenset(("unit", "daemon"))),
)
"""Headings, and what the names of their checks begin with."""
_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
_NAME_COLUMNS = 18
_INDENT = " " * (len("fail") + _NAME_COLUMNS + 3)
_ARROW = "→ "


@dataclass(frozen=True, kw_only=True)
class Check:
    """All that one check found, the worst first."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        return self.findings[0].level


def checks(findings: Sequence[Finding]) -> list[Check]:
    """The findings by check, in the order in which the checks came."""
    names = dict.fromkeys(finding.check for finding in findings)
    return [
        Check(
            name=name,
            findings=tuple(
                finding
                for level in reversed(Level)
                for finding in findings
                if (finding.check, finding.level) == (name, level)
            ),
        )
        for name in names
    ]


def lines(findings: Sequence[Finding], paint: terminal.Paint, *, columns: int | None) -> Iterator[str]:
    """The page.

    Args:
        columns: what a line may have; None for any number.
    """
    found = checks(findings)
    for heading, chosen in _sections(found):
        if chosen:
            yield paint(heading, "bold")
            for check in chosen:
                yield from _lines_of(check, paint, columns)
            yield ""
    verdict, next_step = _verdict(found)
    worst = max((check.level for check in found), key=list(Level).index, default=Level.OK)
    first, *more = terminal.wrapped(f"{verdict}. {next_step}", columns)
    yield paint(first[: len(verdict)], "bold", _COLOURS[worst]) + first[len(verdict) :]
    yield from (f"  {line}" for line in more)


def _sections(found: Sequence[Check]) -> Iterator[tuple[str, list[Check]]]:
    well = [check for check in found if check.level is Level.OK]
    for heading, prefixes in GROUPS:
        yield heading, [check for check in well if check.name.partition(".")[0] in prefixes]
    for heading, level in (("Warnings", Level.WARN), ("Failures", Level.FAIL)):
        yield heading, [check for check in found if check.level is level]


def _lines_of(check: Check, paint: terminal.Paint, columns: int | None) -> Iterator[str]:
    level = check.level
    begin = f"{paint(f'{level:<4}', _COLOURS[level])}  {check.name:<{_NAME_COLUMNS}} "
    room = None if columns is None else max(columns - len(_INDENT), 20)
    for finding in check.findings:
        aside = "" if finding.level is level else f"({finding.level}) "
        for line in terminal.wrapped(aside + finding.message, room):
            yield f"{begin}{line}".rstrip()
            begin = _INDENT
        if finding.remedy:
            remedy = terminal.wrapped(finding.remedy, None if room is None else room - len(_ARROW))
            yield f"{_INDENT}{paint(_ARROW.strip(), 'bold')} {remedy[0]}"
            yield from (f"{_INDENT}{' ' * len(_ARROW)}{line}" for line in remedy[1:])


def _verdict(found: Sequence[Check]) -> tuple[str, str]:
    """What it comes to, and what to do next."""
    failures = sum(check.level is Level.FAIL for check in found)
    warnings = sum(check.level is Level.WARN for check in found)
    counted = [_number(failures, "failure")] * bool(failures) + [_number(warnings, "warning")] * bool(
        warnings
    )
    if failures:
        return f"will not work: {', '.join(counted)}", "Do what each → says, then check again."
    if warnings:
        return f"ready; {counted[0]}", "Each → says what to do."
    return "ready", "Ask the model something: edge-agent probe"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
