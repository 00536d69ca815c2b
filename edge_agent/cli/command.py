"""Shared by all commands: the options before the command, exit codes, and how errors are printed.

Exit codes: 0 done, 1 failed, 2 usage, 3 daemon not running, 4 no model ready, 5 timed out, 78 settings invalid.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from edge_agent import environment, terminal
from edge_agent import settings as settings_module
from edge_agent.errors import (
    BrokerUnreachable,
    DaemonNotRunning,
    DeadlineExceeded,
    EdgeAgentError,
    NoModel,
    PromptError,
    SettingsError,
    UnknownModel,
)
from edge_agent.settings import Settings
from edge_agent.transport import control

FAILED, NOT_RUNNING, NO_MODEL, TIMED_OUT, INVALID_SETTINGS = 1, 3, 4, 5, 78

_EXIT_CODES: dict[str, int] = {
    SettingsError.code: INVALID_SETTINGS,
    DaemonNotRunning.code: NOT_RUNNING,
    NoModel.code: NO_MODEL,
    UnknownModel.code: NO_MODEL,
    DeadlineExceeded.code: TIMED_OUT,
}


_NEED_SETTINGS = (DaemonNotRunning.code, BrokerUnreachable.code, NoModel.code)
"""What comes of it where somebody has forgotten to name the settings."""


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """The options before the command. Settings are read when a command asks for them."""

    config: Path | None

    def settings(self) -> Settings:
        return settings_module.load(self.config)


def reported_error(event: Mapping[str, Any]) -> EdgeAgentError:
    """The error that the daemon reported over the control socket.

    Never `DaemonNotRunning`: a command that meets that one does the work by itself.
    """
    return control.reported(event, among=(PromptError, SettingsError))


def said_by_daemon(settings: Settings, op: str) -> dict[str, Any]:
    """What the daemon says in one event, which has it under the operation's name: `status`, `metrics`.

    Raises:
        DaemonNotRunning: nothing answers.
        EdgeAgentError: it refuses, or says nothing.
        TimeoutError: nothing comes within 30 s.
    """
    for event in control.call(settings_module.find_control_socket(settings), op, timeout_s=30.0):
        if event.get("event") == "done":
            return dict(event[op])
        if event.get("event") == "error":
            raise reported_error(event)
    raise unanswered()


def unanswered() -> EdgeAgentError:
    """The daemon hung up before its last event."""
    return EdgeAgentError(
        "the daemon closed the connection without an answer",
        remedy="it was stopped, or has died: see `edge-agent status` and `journalctl -u edge-agent`",
    )


def end_in_order() -> None:
    """Makes SIGTERM and SIGHUP end this process like `sys.exit`, so that it stops its child processes first.

    One that is ignored stays so: `nohup` is for that. Call it in the main thread.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


class FiniteRange(click.FloatRange):
    """As click's, which takes `nan` for a number in any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def paint() -> terminal.Paint:
    """Colours on a terminal only, and never against NO_COLOR (https://no-color.org)."""
    return terminal.Paint(colours=sys.stdout.isatty() and not environment.wants_no_colour())


class Command(click.Command):
    """Turns this project's errors into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeAgentError as error:
            _fail(error, _without_settings(ctx) if error.code in _NEED_SETTINGS else "")
        except TimeoutError:
            terminal.echo("edge-agent: timed out", err=True)
            sys.exit(TIMED_OUT)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            terminal.discard(sys.stdout)
            sys.exit(FAILED)


ELSEWHERE = {
    "pull": "models pull",
    "list": "models list",
    "ls": "models list",
    "rm": "models rm",
    "show": "models show",
    "verify": "models verify",
    "import": "models import",
    "export": "models export",
    "ps": "status",
    "ask": "probe",
    "logs": "status` and `journalctl -u edge-agent",
    "push": "publish",
}
"""What the commands are called that people know from other programs."""


class Group(click.Group):
    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, and says what a command is called here that another program has."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if ctx.parent is None and (here := ELSEWHERE.get(args[0])):
                raise click.UsageError(f"{error.message} It is `edge-agent {here}` here.", ctx) from error
            raise


def _without_settings(ctx: click.Context) -> str:
    invocation = ctx.find_object(Invocation)
    return settings_module.missing_settings(invocation.config) if invocation else ""


def tell(error: EdgeAgentError, note: str = "") -> None:
    """Prints an error on stderr, with what to do.

    Further lines of a message are indented: no quoted text looks like a line of ours. In the journal the code is
    one of them, for rules that match it.

    Args:
        note: what else may be the reason; empty for nothing.
    """
    code = f"code={error.code}" if environment.logs_to_journal() else ""
    more = " " * 12
    for text, begin in ((error.message, "edge-agent: "), (error.remedy, more), (note, more), (code, more)):
        if text:
            terminal.echo(begin + text.replace("\n", "\n" + " " * 12), err=True)


def _fail(error: EdgeAgentError, note: str) -> NoReturn:
    tell(error, note)
    sys.exit(_EXIT_CODES.get(error.code, FAILED))
