"""The `edge-agent` command, with a file for each of its commands.

Results go to stdout, with `--json` as one document and nothing else; logs, progress and errors go to stderr. Exit
codes are in `command.py`. Heavy modules are imported by the commands that need them. Contract: docs/cli.md.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

import edge_agent
from edge_agent import terminal
from edge_agent.cli.command import FAILED, Group, Invocation

COMMANDS = (
    "bench",
    "chat",
    "demo",
    "doctor",
    "fleet",
    "metrics",
    "models",
    "probe",
    "publish",
    "run",
    "serve",
    "status",
)
"""In the order of the help."""


class _Commands(Group):
    """Imports the file of a command when that command is asked for: the daemon has no use for those of a fleet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # click compares a misspelt one with all
        for name in (cmd_name,) if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.add_command(getattr(importlib.import_module(f"edge_agent.cli.{name}"), name))
        return self.commands.get(cmd_name)

    def main(self, *args: Any, **extra: Any) -> Any:
        """As click's, but output that cannot be written ends in one sentence and exit code 1, never in a traceback or
        120."""
        terminal.replace_closed()
        try:
            return self._main(*args, **extra)
        except terminal.StdoutFailed as error:
            terminal.echo(f"edge-agent: {error}", err=True)
            sys.exit(FAILED)
        finally:
            terminal.let_go()

    def _main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except OSError:  # click prints, too: help, version
            terminal.check_stdout()
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings file (TOML).")
@click.version_option(edge_agent.__version__, prog_name="edge-agent")
@click.pass_context
def main(context: click.Context, config: Path | None) -> None:
    """Keep registered MLflow language models on this device and answer prompts over MQTT.

    \b
    Without --config, the settings are those in
      ~/.config/edge-agent/config.toml (except for root), else
      /etc/edge-agent/config.toml

    \b
    Examples:
      edge-agent demo --once
      edge-agent --config /etc/edge-agent/config.toml run
      edge-agent probe "What is the capital of Nepal?"
    """
    context.obj = Invocation(config=config)
