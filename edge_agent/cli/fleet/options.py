"""What the commands of a fleet have in common: the connection to the broker, and which devices are meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edge_agent.cli.command import Invocation
from edge_agent.documents import page
from edge_agent.fleet import survey
from edge_agent.fleet.broker import FleetBroker
from edge_agent.fleet.devices import Fleet
from edge_agent.topics import FleetTopics

devices_option: Callable[[Any], Any] = click.option(
    "--devices",
    "devices_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Only these devices, one id a line.",
)


@contextmanager
def console(invocation: Invocation) -> Iterator[tuple[FleetBroker, FleetTopics]]:
    """A connection to the broker of the settings, until the block ends.

    Raises:
        EdgeAgentError: there is none.
    """
    from edge_agent.fleet.connection import connected

    mqtt = invocation.settings().mqtt
    with connected(mqtt) as broker:
        yield broker, FleetTopics(prefix=mqtt.prefix)


def listed(devices_file: Path | None) -> tuple[str, ...] | None:
    """The ids of `--devices`; None for all devices."""
    return None if devices_file is None else survey.read_list(devices_file)


def why_empty(fleet: Fleet, topics: FleetTopics) -> str:
    """What may be the reason that nothing is known; empty if something is."""
    if fleet.heard:
        return ""
    return (
        f"the broker has nothing on {topics.statuses}: no device has connected, mqtt.prefix is another, this identity"
        f" may not read it ({page('broker.md')}), or the broker sends nothing retained for a wildcard (--devices)"
    )
