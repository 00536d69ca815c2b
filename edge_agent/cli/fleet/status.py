"""`edge-agent fleet status`: how many devices there are of each kind, and which of them somebody should look at."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

from edge_agent import terminal
from edge_agent.cli.command import Command, Invocation
from edge_agent.cli.fleet import options
from edge_agent.fleet import overview, survey
from edge_agent.fleet.broker import FleetBroker
from edge_agent.fleet.devices import Device, Fleet, ModelReport
from edge_agent.fleet.overview import Finding
from edge_agent.terminal import Rows
from edge_agent.topics import FleetTopics

MAX_LISTED = 40
"""A larger fleet is shown by its counts and findings only."""
_MAX_FINDINGS = 40
_NAMED = 4
"""How many devices of a finding have their names shown."""


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with all devices.")
@click.option("--watch", is_flag=True, help="Repeat at each change until interrupted.")
@options.devices_option
@click.pass_obj
def status(invocation: Invocation, as_json: bool, watch: bool, devices_file: Path | None) -> None:
    """Show how many devices there are of each kind, and those that somebody should look at.

    Takes what the broker retains: it asks no device, and an offline one is shown as it was.
    A fleet of up to 40 devices is listed as a whole; --json always lists all.
    --devices names the devices, also those that have never been seen, and is needed where the
    broker sends nothing retained for a wildcard (RabbitMQ).

    \b
    Examples:
      edge-agent fleet status
      edge-agent fleet status --watch
      edge-agent fleet status --devices line-4.txt
      edge-agent fleet status --json | jq -r '.devices[] | select(.state == "offline").device'
    """
    ids = options.listed(devices_file)
    with options.console(invocation) as (broker, topics):
        if watch:
            keep_showing(broker, topics, ids, as_json=as_json)
        fleet = survey.look(broker, topics, ids)
    if why := options.why_empty(fleet, topics):
        terminal.echo(f"edge-agent: {why}", err=True)
    if as_json:
        terminal.echo(json.dumps(overview.document(fleet.devices()), ensure_ascii=False))
    else:
        terminal.print_page(page(fleet.devices(), now=time.time()))


def keep_showing(
    broker: FleetBroker, topics: FleetTopics, ids: tuple[str, ...] | None, *, as_json: bool
) -> None:
    """Shows the fleet and its changes until somebody interrupts it: on a terminal in place, in a pipe the fleet once
    and then a line for each device that changed; as JSON the whole document whenever a device has spoken.
    """
    fleet = Fleet(topics, ids or ())
    changes = survey.follow(broker, fleet, survey.filters(topics, ids))
    if as_json:
        for number, heard in enumerate(changes):
            if heard or number == 0:
                terminal.echo(json.dumps(overview.document(fleet.devices()), ensure_ascii=False))
    elif sys.stdout.isatty():
        with terminal.live_page() as show:
            for _ in changes:
                show(page(fleet.devices(), now=time.time()))
    else:
        next(changes)
        terminal.print_page(page(fleet.devices(), now=time.time()))
        shown = {device.device_id: _lasting(device) for device in fleet.devices()}
        for heard in changes:
            for device in (fleet.device(device_id) for device_id in sorted(heard)):
                if shown.get(device.device_id) != (lasting := _lasting(device)):
                    shown[device.device_id] = lasting
                    terminal.echo(line(device, now=time.time()))


def page(devices: Sequence[Device], *, now: float) -> list[str | Rows]:
    """The fleet for people: counts, then whom to look at, then all devices of a small one.

    Args:
        now: seconds since 1970.
    """
    found = overview.findings(devices, now=now)
    parts: list[str | Rows] = [_counts(devices)]
    if found:
        rows = [_finding(each) for each in found[:_MAX_FINDINGS]]
        parts += ["", Rows(("LOOK AT", "DEVICES", "CODE", "MODEL", "WHICH", "WHY"), rows)]
        if len(found) > _MAX_FINDINGS:
            parts.append(f"and {len(found) - _MAX_FINDINGS} more kinds; --json has all")
    if 0 < len(devices) <= MAX_LISTED:
        rows = [row for device in devices for row in _rows(device, now)]
        parts += [
            "",
            Rows(("DEVICE", "STATE", "SEEN", "AGENT", "MODEL", "VERSION", "STATE", "TOK/S", "NEXT"), rows),
        ]
    return parts


def _counts(devices: Sequence[Device]) -> Rows:
    counts = overview.count(devices)
    rows: list[tuple[object, ...]] = [("devices", f"{len(devices)}", _tally(counts.by_state))]
    for name, versions in counts.by_model.items():
        rows.append(("model", name, _tally(versions, "version ")))
    if counts.by_agent_version:
        rows.append(("agent", "", _tally(counts.by_agent_version)))
    if counts.by_code:
        rows.append(("codes", "", _tally(counts.by_code)))
    return Rows(("", "", ""), rows)


def _tally(counts: Mapping[str, int], what: str = "") -> str:
    return ", ".join(
        f"{number} {'no version' if key == 'none' else what + key}" for key, number in counts.items()
    )


def _finding(finding: Finding) -> tuple[object, ...]:
    trait = finding.trait
    about = trait.model if trait.version is None else f"{trait.model} {trait.version}"
    return trait.kind, len(finding.devices), trait.code, about, names(finding.devices), finding.text


def names(devices: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(devices) - _NAMED
    return ", ".join(devices[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _rows(device: Device, now: float) -> list[tuple[object, ...]]:
    seen = "" if device.seen_at is None else terminal.age(now - device.seen_at)
    first = (device.device_id, device.state, seen, device.agent_version)
    if not device.models:
        return [(*first, "", "", "", "", "")]
    return [
        (
            *(first if number == 0 else ("", "", "", "")),
            *(model.name, model.version, model.state),
            None if model.tokens_per_s is None else f"{model.tokens_per_s:.1f}",
            _next(model),
        )
        for number, model in enumerate(device.models)
    ]


def _lasting(device: Device) -> Device:
    """The device without what changes each time that it speaks."""
    models = tuple(replace(model, tokens_per_s=None) for model in device.models)
    return replace(device, seen_at=None, models=models)


def line(device: Device, *, now: float) -> str:
    """A device that has changed, for a pipe."""
    models = (
        f"{model.name} {model.version or '-'} {model.state} {_next(model)}".rstrip()
        for model in device.models
    )
    return "  ".join((terminal.moment(now), device.device_id, device.state, *models))


def _next(model: ModelReport) -> str:
    """What another version is at."""
    attempt = model.attempt
    if (awaited := model.awaits()) is not None:
        return f"{awaited} wanted"
    if attempt is None or attempt.step == "active" or (attempt.version == model.version and not attempt.code):
        return ""
    until = model.link.held_until if model.link is not None else None
    when = "" if until is None else f" until {terminal.moment(until)}"
    return " ".join(filter(None, (str(attempt.version or ""), attempt.step, attempt.code or ""))) + when
