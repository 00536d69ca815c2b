"""`edge-agent fleet sync`: every device asks the registry, at once or in the course of some time."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_agent import terminal
from edge_agent.cli.command import Command, FiniteRange, Invocation
from edge_agent.cli.fleet import options
from edge_agent.fleet import survey
from edge_agent.fleet.broker import Outgoing
from edge_agent.updates.choice import MAX_WITHIN_S


@click.command(cls=Command)
@click.option(
    "--within",
    "within_s",
    type=FiniteRange(0, MAX_WITHIN_S),
    metavar="S",
    help="In the course of so many seconds; by default at once.",
)
@options.devices_option
@click.pass_obj
def sync(invocation: Invocation, within_s: float | None, devices_file: Path | None) -> None:
    """Let every device ask the registry.

    Returns once the broker has all requests. A device that is offline does it when it is back, as long
    as the broker keeps its session.

    \b
    Examples:
      edge-agent fleet sync --within 300
      edge-agent fleet sync --devices line-4.txt
    """
    ids = options.listed(devices_file)
    body = b"" if not within_s else json.dumps({"within_s": within_s}).encode()
    with options.console(invocation) as (broker, topics):
        if ids is None:
            fleet = survey.look(broker, topics)
            ids = tuple(fleet.ids())
            if why := options.why_empty(fleet, topics):
                terminal.echo(f"edge-agent: {why}", err=True)
        broker.publish_all([Outgoing(topic=topics.of(each).sync, body=body) for each in ids])
    when = f"within {within_s:g} s" if within_s else "now"
    terminal.echo(f"{len(ids)} device{'' if len(ids) == 1 else 's'} asked to check the registry {when}")
