"""What a check found: one line for a person, one object for a script. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from edge_agent.errors import EdgeAgentError


class Level(StrEnum):
    """How serious a finding is. `fail`: prompts go unanswered, or the delivery promise does not hold."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of doctor's output.

    Attributes:
        check: what was looked at, a stable name for scripts: `cache.hard_links`.
        message: what was seen.
        remedy: what to do; never empty unless the level is ok.
        code: of the error that was met, as docs/operating.md lists them; empty where the check itself found it.
    """

    check: str
    level: Level
    message: str
    remedy: str = ""
    code: str = ""

    def __post_init__(self) -> None:
        if self.level is not Level.OK and not self.remedy:
            raise ValueError(f"{self.check} names no remedy")


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, level=Level.OK, message=message)


def warn(check: str, message: str, remedy: str, *, code: str = "") -> Finding:
    return Finding(check=check, level=Level.WARN, message=message, remedy=remedy, code=code)


def fail(check: str, message: str, remedy: str, *, code: str = "") -> Finding:
    return Finding(check=check, level=Level.FAIL, message=message, remedy=remedy, code=code)


def failed(check: str, error: EdgeAgentError, remedy: str) -> Finding:
    """An error of this project as a finding; its own remedy goes first."""
    return fail(check, error.message, error.remedy or remedy, code=error.code)


def unfinished(check: str, limit_s: float) -> Finding:
    """A check that was given up. It says nothing of what was looked at: a device may be slow, or have much to do."""
    return warn(
        check,
        f"not seen within {limit_s:.0f} s: this device is slow, or busy",
        "run doctor again when it has less to do",
    )
