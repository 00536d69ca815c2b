"""`edge-agent run`."""

from __future__ import annotations

import sys

import click

from edge_agent import environment, terminal
from edge_agent import settings as settings_module
from edge_agent.cli.command import Command, Invocation


@click.command(cls=Command)
@click.pass_obj
def run(invocation: Invocation) -> None:
    """Run the daemon in the foreground, as systemd does.

    \b
    Example:
      edge-agent --config ./config.toml run
    """
    from edge_agent import daemon, logs

    settings = settings_module.load_for_daemon(invocation.config)
    logs.configure(settings.log_format, journal=environment.logs_to_journal())
    if not settings.models:
        terminal.echo(
            "edge-agent: no model is configured: add a [models.NAME] table with its uri to the settings",
            err=True,
        )
    sys.exit(daemon.run(settings))
