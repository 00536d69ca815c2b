"""What is known of the versions that were tried: how far the last attempt got, and what its gate measured.

Pure values, as `state.json` keeps them, so that a restart forgets no failure. Reading is lenient: what an earlier
release did not write, or what is no such value, is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self, TypeGuard

from edge_agent.errors import EdgeAgentError, Quarantined

MAX_FAULT = 200
"""Characters of the reason for which a version is in quarantine."""
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{0,64}")
_MOST = 1 << 62


class Step(StrEnum):
    """From a reference to the version that answers, in this order."""

    HELD = "held"
    FETCH = "fetch"
    VERIFY = "verify"
    GATE = "gate"
    ACTIVATE = "activate"
    ACTIVE = "active"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One version on its way.

    Attributes:
        digest: of its manifest; empty where it is not known yet.
        step: that it is at, or has failed at.
        at_s: when that began, in seconds since 1970.
        code: of the error with which it ended; None while it goes on, or went well.
        took_s: of the steps that are over, in their order: how long each took. A restart forgets it.
        golden: (the golden prompt that is asked now, from 1; how many there are), None while none is. A restart forgets
            it, too.
    """

    version: int
    digest: str
    step: Step
    at_s: float
    code: str | None = None
    took_s: Mapping[Step, float] = field(default_factory=dict, compare=False)
    golden: tuple[int, int] | None = field(default=None, compare=False)

    def then(self, step: Step, at_s: float) -> Self:
        """The same version at its next step, which begins now."""
        took_s = self.after(at_s).took_s
        return replace(self, step=step, at_s=at_s, code=None, took_s=took_s, golden=None)

    def after(self, at_s: float) -> Self:
        """The same with its step over."""
        return replace(self, took_s={**self.took_s, self.step: max(0.0, at_s - self.at_s)})

    @property
    def is_open(self) -> bool:
        """Something is still to come of it."""
        return self.code is None and self.step is not Step.ACTIVE

    def is_of(self, key: str | None) -> bool:
        """
        Args:
            key: of a version, as `state.json` has it.
        """
        return key is not None and key == f"{self.version}-{self.digest[:12]}"

    def is_as(self, other: Attempt | None) -> bool:
        """The same, whenever it began."""
        return other is not None and (self.version, self.digest, self.step, self.code) == (
            other.version,
            other.digest,
            other.step,
            other.code,
        )

    def document(self) -> dict[str, Any]:
        """For status and `model/reported`."""
        golden = {"asking": self.golden[0], "of": self.golden[1]} if self.golden else None
        took_s = {str(step): round(seconds, 1) for step, seconds in self.took_s.items()}
        return {**self.fields(), "took_s": took_s, "golden": golden}

    def fields(self) -> dict[str, Any]:
        """For `state.json`."""
        return {
            "version": self.version,
            "digest": self.digest,
            "step": str(self.step),
            "code": self.code,
            "at": int(self.at_s),
        }

    @classmethod
    def parse(cls, fields: Any) -> Self | None:
        """Reads what `fields` gave; None for anything else."""
        if not isinstance(fields, dict):
            return None
        version, digest, at_s, code = (fields.get(key) for key in ("version", "digest", "at", "code"))
        step = fields.get("step")
        if not (is_number(version) and is_number(at_s) and step in list(Step)):
            return None
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest) and (code is None or is_code(code))):
            return None
        return cls(version=version, digest=digest, step=Step(step), at_s=at_s, code=code)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a version is not tried again.

    Attributes:
        code: of the error; `quarantined` where an earlier release noted none.
        reason: for people.
    """

    code: str
    reason: str

    @classmethod
    def of(cls, error: EdgeAgentError) -> Self:
        return cls(code=error.code, reason=str(error))

    @classmethod
    def parse(cls, code: Any, reason: Any) -> Self:
        return cls(code=code if is_code(code) else Quarantined.code, reason=str(reason)[:MAX_FAULT])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a version showed in its gate, on this host.

    Attributes:
        load_ms: until its runner had loaded it.
        passed, of: golden prompts.
    """

    load_ms: int
    tokens_per_s: float
    passed: int
    of: int

    def document(self) -> dict[str, Any]:
        """For status and `model/reported`."""
        return {
            "load_ms": self.load_ms,
            "tokens_per_s": self.tokens_per_s,
            "golden": {"passed": self.passed, "of": self.of},
        }

    def fields(self) -> dict[str, Any]:
        """For `state.json`."""
        return asdict(self)

    @classmethod
    def parse(cls, fields: Any) -> Self | None:
        """Reads what `fields` gave; None for anything else."""
        if not isinstance(fields, Mapping) or set(fields) != set(cls.__dataclass_fields__):
            return None
        if not all(is_number(value) for value in fields.values()):
            return None
        return cls(
            load_ms=int(fields["load_ms"]),
            tokens_per_s=float(fields["tokens_per_s"]),
            passed=int(fields["passed"]),
            of=int(fields["of"]),
        )


def is_number(value: object) -> TypeGuard[int]:
    """Whether it is a number from 0 on, and no more than anything here has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST


def is_code(value: object) -> TypeGuard[str]:
    """Whether it may be the code of an error."""
    return isinstance(value, str) and _CODE.fullmatch(value) is not None
