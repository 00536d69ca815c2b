"""What serving needs of a runner: a process that loads one version and answers prompts with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from edge_agent.runner.protocol import Called, Delta, Done, Load, Loaded, OnPrompt, Refused, Tried


class Runner(Protocol):
    """One process. `kill` may come from any thread; the rest from one at a time.

    Serving loads, tries and stops it. Whoever leases it starts prompts and receives their answers; those methods
    are described at `runner.process.RunnerProcess`.

    Attributes:
        suspects: after its death, the prompts that may have been the cause.
    """

    suspects: frozenset[str]

    @property
    def pid(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    def load(self, request: Load, *, timeout_s: float, check: Callable[[], None] = ...) -> Loaded:
        """Loads a version.

        Args:
            check: of its files; the process reads none of them before it has returned.

        Raises:
            RunnerError: it failed, died, or took longer than `timeout_s`; the process is dead then.
        """
        ...

    def try_out(self, *, timeout_s: float, on_prompt: OnPrompt = ...) -> Tried:
        """Asks the golden prompts.

        Args:
            on_prompt: told before each one which it is, from 1, and of how many.

        Raises:
            RunnerError: it died, or took longer than `timeout_s`; the process is dead then.
        """
        ...

    def fileno(self) -> int: ...

    def start(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float, owner: str = ""
    ) -> None: ...

    def receive(self, timeout_s: float) -> Delta | Called | Done | Refused | None: ...

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]: ...

    def cancel(self, prompt_id: str) -> None: ...

    def stop(self) -> None:
        """Ends the process in order, or kills it after a grace time."""
        ...

    def kill(self) -> None:
        """Ends the process at once. May be called again."""
        ...

    def resident_bytes(self) -> int:
        """What it has in memory now; 0 when it is gone."""
        ...

    def peak_bytes(self) -> int:
        """The most that it has had in memory at once; 0 when it is gone."""
        ...

    def exit_text(self) -> str:
        """How it ended, in a few words of ours."""
        ...

    def last_output(self) -> str:
        """The end of what it printed."""
        ...


StartRunner = Callable[[], Runner]
"""Makes a runner that has not loaded anything yet.

Raises:
    RunnerError: the host cannot start another process.
"""
