"""One operation on the cache, carried out by the running daemon, or by this process if there is none.

Bytes come as its events. What the daemon does with a version after them it says in its status, where this looks while
nothing else comes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from edge_agent import settings as settings_module
from edge_agent import terminal
from edge_agent.cli import status_page, waiting
from edge_agent.cli.command import end_in_order, reported_error, said_by_daemon, unanswered
from edge_agent.errors import DaemonNotRunning
from edge_agent.owner import acting_as_owner_of
from edge_agent.settings import Settings
from edge_agent.transport import control

_BRINGS_A_VERSION = frozenset({"pull", "import", "activate", "rollback", "pin", "unpin"})
_AFTER_ITS_BYTES = frozenset({"verify", "gate", "activate"})


def operate(
    settings: Settings,
    do: str,
    *,
    name: str | None = None,
    version: int | None = None,
    file: int | None = None,
    allow_older: bool = False,
    now: bool = False,
    doing: str = "fetching",
) -> Any:
    """Runs an operation by its name, shows its progress, and returns the document for `--json`.

    Args:
        file: descriptor of an open file, for operations that need one.
        allow_older, now: for operations that bring a version; see `Updates.check`.
        doing: a word for the progress, such as `importing`.

    Raises:
        EdgeAgentError: the operation failed, here or in the daemon.
    """
    heard_s = -math.inf

    def is_silent() -> bool:
        return time.monotonic() - heard_s >= waiting.SILENT_S

    with terminal.progress_bar() as report:

        def on_event(event: Mapping[str, Any]) -> None:
            nonlocal heard_s
            heard_s = time.monotonic()
            if event.get("event") == "progress":
                report(doing, event["bytes"], event["total_bytes"])
            elif event.get("event") == "waiting":
                terminal.echo(f"waiting for {event['for']} to end", err=True)
            elif event.get("event") == "awaiting":
                terminal.echo(f"waiting for {event['what']}, {event['seconds']} s at most", err=True)

        fields: dict[str, Any] = {
            "name": name,
            "version": version,
            "file": file,
            "allow_older": allow_older,
            "now": now,
        }
        try:
            with _steps_told(settings, name, is_silent) if do in _BRINGS_A_VERSION else nullcontext():
                return through_daemon(settings, on_event, do=do, **fields)
        except DaemonNotRunning:
            from edge_agent.updates import operations

            end_in_order()  # a version that is tried here is not one whose agent died
            with acting_as_owner_of(settings.state_dir):
                local, lifecycles = operations.without_daemon(settings)
                try:
                    return operations.run_operation(local, do, **fields, on_event=on_event)
                finally:
                    for lifecycle in lifecycles.values():
                        lifecycle.close()


@contextmanager
def _steps_told(settings: Settings, name: str | None, is_silent: Callable[[], bool]) -> Iterator[None]:
    """Says on stderr what the daemon does with a model's version, each step once.

    Args:
        name: of the model; None for all.
        is_silent: nothing has come for a moment; the daemon is not asked before.
    """

    def look() -> str:
        return steps_in(said_by_daemon(settings, "status"), name) if is_silent() else ""

    def tell(steps: str) -> None:
        terminal.echo(steps, err=True)

    with waiting.told_while_silent(look, tell, again_s=0):
        yield


def steps_in(status: Mapping[str, Any], name: str | None) -> str:
    """What is done with versions whose bytes are here, in one line; empty for nothing.

    Args:
        status: as `status --json` prints it.
        name: of one model; None for all.
    """
    doing = [
        f"{model['name']} version {attempt['version']}: {status_page.step_of(attempt)}"
        for model in status["models"]
        if name in (None, model["name"])
        and (attempt := model.get("attempt") or {}).get("step") in _AFTER_ITS_BYTES
        and attempt["code"] is None
    ]
    return "; ".join(doing)


def through_daemon(
    settings: Settings, on_event: Callable[[Mapping[str, Any]], None] = lambda event: None, **fields: Any
) -> Any:
    """The daemon's part of `operate`.

    Raises:
        DaemonNotRunning: nothing answers.
        EdgeAgentError: it refuses, or the operation failed.
    """
    for event in control.call(settings_module.find_control_socket(settings), "models", **fields):
        if event.get("event") == "progress":
            on_event(event["progress"])
        elif event.get("event") == "done":
            return event["result"]
        elif event.get("event") == "error":
            raise reported_error(event)
    raise unanswered()
