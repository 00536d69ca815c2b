"""`edge-agent metrics`: the daemon's metrics as text for Prometheus, in a file for node_exporter, or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from edge_agent import terminal
from edge_agent.cli.command import NOT_RUNNING, Command, Invocation, said_by_daemon, tell
from edge_agent.errors import DaemonNotRunning, EdgeAgentError
from edge_agent.metrics import exposition


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="The document of {root}/metrics.")
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Replace FILE in one step instead, for node_exporter's textfile collector.",
)
@click.pass_obj
def metrics(invocation: Invocation, as_json: bool, textfile: Path | None) -> None:
    """Print what the daemon measures, as text for Prometheus.

    If the daemon is not running, edge_agent_up is 0, and the exit code is 3.

    \b
    Examples:
      edge-agent metrics
      edge-agent metrics --json | jq .models
      edge-agent metrics --textfile /var/lib/prometheus/node-exporter/edge-agent.prom
    """
    if as_json and textfile:
        raise click.UsageError("--json and --textfile do not go together")
    code = 0
    try:
        document = said_by_daemon(invocation.settings(), "metrics")
    except DaemonNotRunning as error:
        if as_json:
            raise
        tell(error)
        document, code = {}, NOT_RUNNING
    if as_json:
        terminal.echo(json.dumps(document, ensure_ascii=False))
    elif textfile is None:
        terminal.echo(exposition.text(document).rstrip("\n"))
    else:
        _write(textfile, exposition.text(document))
    sys.exit(code)


def _write(file: Path, content: str) -> None:
    try:
        exposition.write(file, content)
    except OSError as error:
        raise EdgeAgentError(
            f"{file} cannot be written: {error.strerror}",
            remedy="create its folder, and run this as a user who may write there",
        ) from error
