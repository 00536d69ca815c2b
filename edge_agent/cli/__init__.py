"""The `edge-agent` command, with a file for each of its commands.

Results go to stdout, with `--json` as one document and nothing else; logs, progress and errors go to stderr. Exit
codes are in `command.py`. Heavy modules are imported by the commands that need them. Contract: docs/cli.md.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import click

import edge_agent
from edge_agent.cli.command import Group, Invocation

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
