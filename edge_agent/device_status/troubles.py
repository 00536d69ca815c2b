"""What somebody should look at though prompts are answered: each with a code, and in words for people.

docs/operating.md says what to do about each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_agent import printable
from edge_agent.errors import EdgeAgentError
from edge_agent.serving.lifecycle import ModelLifecycle


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One of them."""

    code: str
    text: str

    def document(self) -> dict[str, str]:
        """For status."""
        return {"code": self.code, "text": printable.text(self.text)}


def of_journal(trouble: str) -> Iterator[Trouble]:
    """
    Args:
        trouble: what is wrong with it; empty for nothing.
    """
    if trouble:
        yield Trouble(code="journal_unavailable", text=f"journal: {trouble}")


def of_cache(rebuilt: str) -> Iterator[Trouble]:
    """
    Args:
        rebuilt: why `state.json` had to be rebuilt; empty when it had not.
    """
    if rebuilt:
        yield Trouble(code="state_rebuilt", text=f"cache: state.json was rebuilt ({rebuilt})")


def of_broker(error: EdgeAgentError) -> Trouble:
    """What the transport noticed."""
    return Trouble(code=error.code, text=f"broker: {error} ({error.code})")


def of_trust(*, allow_unsigned_code: bool) -> Iterator[Trouble]:
    """`[trust]` of the settings."""
    if allow_unsigned_code:
        yield Trouble(code="unsigned_code_allowed", text="trust.allow_unsigned_code is on")


def of_desired(problem: str) -> Iterator[Trouble]:
    """
    Args:
        problem: why the desired state is not obeyed; empty when it is.
    """
    if problem:
        yield Trouble(code="desired_invalid", text=f"model/desired: {problem}")


def of_model(name: str, lifecycle: ModelLifecycle) -> Iterator[Trouble]:
    """What is wrong with what a model runs."""
    if lifecycle.instead:
        yield Trouble(code="fallback_in_use", text=f"model {name}: {lifecycle.instead}")
    if lifecycle.system_refused:
        text = f"model {name}: {lifecycle.system_refused} (models.{name}.system)"
        yield Trouble(code="system_refused", text=text)
    if lifecycle.unconfined:
        text = f"model {name}: {lifecycle.unconfined} (trust.unconfined_code)"
        yield Trouble(code="unconfined", text=text)


def of_quarantine(name: str, lifecycle: ModelLifecycle) -> Iterator[Trouble]:
    """The versions of a model that are not tried again."""
    for key, reason in lifecycle.state.reasons.items():
        yield Trouble(code="quarantined", text=f"model {name}: version {key} is in quarantine: {reason}")
