"""What another process reports by a code becomes the same error again, and never one of another family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edge_agent import errors
from edge_agent.cli.command import reported_error
from edge_agent.errors import (
    CannotRun,
    ContentError,
    DaemonNotRunning,
    EdgeAgentError,
    LoadFailed,
    ModelFailed,
    NoModel,
    PromptError,
    Quarantined,
    StoreError,
    TransportError,
    by_code,
    error_of,
)
from edge_agent.gateway import answers


@pytest.mark.parametrize("kind", by_code(EdgeAgentError).values(), ids=lambda kind: kind.code)
def test_every_error_of_the_tree_is_found_by_its_code(kind: type[EdgeAgentError]) -> None:
    found = error_of(kind.code, "why", remedy="what to do", among=(EdgeAgentError,), otherwise=ContentError)
    assert (type(found), found.message, found.remedy) == (kind, "why", "what to do")


def test_no_two_errors_have_one_code() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, EdgeAgentError) and "code" in vars(kind)
    ]
    assert len(kinds) == len({kind.code for kind in kinds}) > 25


@pytest.mark.parametrize("code", ["daemon_not_running", "no_such_code", "", None, 7, ["cancelled"]])
def test_a_code_outside_the_allowed_families_becomes_the_safe_default(code: object) -> None:
    assert DaemonNotRunning.code == "daemon_not_running"
    assert type(error_of(code, "x", among=(PromptError,), otherwise=ModelFailed)) is ModelFailed


def test_a_family_ends_at_its_own_root() -> None:
    """CannotRun is a RunnerError; who allows it has not allowed its parent or its siblings."""
    for code in ("runner_failed", "load_failed"):
        assert type(error_of(code, "x", among=(CannotRun, StoreError), otherwise=EdgeAgentError)) is (
            EdgeAgentError
        )
    assert type(error_of("cannot_run", "x", among=(CannotRun, LoadFailed), otherwise=LoadFailed)) is CannotRun
    assert type(error_of("quarantined", "x", among=(ContentError,), otherwise=ContentError)) is Quarantined


def test_a_class_that_inherits_its_code_is_not_taken_for_the_one_that_has_it() -> None:
    class Refined(TransportError):
        """As the registry's own refinements are."""

    assert type(error_of(Refined.code, "x", among=(TransportError,), otherwise=TransportError)) is (
        TransportError
    )


def test_a_daemon_that_answers_is_never_taken_for_one_that_is_not_running() -> None:
    """A command that meets `DaemonNotRunning` does the work by itself: it would be done twice."""
    assert type(reported_error({"code": DaemonNotRunning.code, "message": "x"})) is EdgeAgentError
    error = reported_error({"code": NoModel.code, "message": "none is here", "remedy": None})
    assert (type(error), str(error)) == (NoModel, "none is here")


@pytest.mark.parametrize("read", [reported_error, answers.reported])
@pytest.mark.parametrize("operation", ["'list'", "'recent'"])
def test_a_daemon_of_another_release_is_to_be_restarted(
    read: Callable[[dict[str, Any]], EdgeAgentError], operation: str
) -> None:
    """As the first release said it, which had no code of its own for that, and no remedy."""
    error = read({"event": "error", "code": "internal", "message": f"unknown operation {operation}"})
    assert error.message == f"the daemon that runs is of another release and does not know {operation}"
    assert "systemctl restart edge-agent" in error.remedy
    assert str(read({"code": "bad_request", "message": "unknown operation 'x'"})) == "unknown operation 'x'"
