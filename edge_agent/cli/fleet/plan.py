"""`edge-agent fleet plan`: how many devices can take a version and when, before anything moves."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edge_agent import terminal
from edge_agent.cli.command import Command, Invocation
from edge_agent.cli.fleet import options
from edge_agent.cli.fleet.status import names
from edge_agent.fleet import survey
from edge_agent.fleet.plan import OUTCOMES, Answer, ask
from edge_agent.terminal import Rows

_WORDS = {
    "now": "can take it now",
    "later": "can take it later",
    "cannot": "cannot take it",
    "unknown": "does not know",
    "silent": "did not answer",
    "offline": "offline",
    "no_model": "has no such model",
    "never_seen": "never seen",
}


@click.command(cls=Command)
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with all answers.")
@options.devices_option
@click.pass_obj
def plan(invocation: Invocation, name: str, version: int, as_json: bool, devices_file: Path | None) -> None:
    """Ask each device whether it can take VERSION of the model NAME, and when. Nothing moves.

    NAME is the model's name in the devices' settings. A device fetches a manifest at most.
    A device that does not answer within a minute is shown as such.

    \b
    Examples:
      edge-agent fleet plan assistant 8
      edge-agent fleet plan assistant 8 --json | jq '.devices[] | select(.outcome == "cannot")'
    """
    settings, ids = invocation.settings(), options.listed(devices_file)
    with options.console(invocation) as (broker, topics):
        fleet = survey.look(broker, topics, ids)
        if why := options.why_empty(fleet, topics):
            terminal.echo(f"edge-agent: {why}", err=True)
        with terminal.counter("devices that have answered") as report:
            answers = ask(
                broker,
                topics,
                fleet.devices(),
                model=name,
                version=version,
                now=time.time(),
                reply_prefix=next(
                    (each for each in settings.mqtt.reply_prefixes if each.endswith("/")), "replies/"
                ),
                report=report,
            )
    if as_json:
        terminal.echo(json.dumps(document(name, version, answers)))
    else:
        terminal.print_page(page(name, version, answers))


def document(name: str, version: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """`fleet plan --json`."""
    outcomes = Counter(answer.outcome for answer in answers)
    return {
        "name": name,
        "version": version,
        "devices": [answer.document() for answer in answers],
        "counts": {outcome: outcomes[outcome] for outcome in OUTCOMES},
    }


def page(name: str, version: int, answers: Sequence[Answer]) -> list[str | Rows]:
    """The plan for people: those that can, then those that cannot by their reason."""
    rows: list[tuple[object, ...]] = []
    for outcome in OUTCOMES:
        alike: dict[str | None, list[Answer]] = {}
        for answer in answers:
            if answer.outcome == outcome:
                alike.setdefault(answer.code, []).append(answer)
        for code, some in sorted(alike.items(), key=lambda item: -len(item[1])):
            which = names([answer.device_id for answer in some])
            why = next((answer.reason for answer in some if answer.reason), "")
            rows.append((_WORDS[outcome], len(some), code, _fetched(some), _when(some), which, why))
    headings = ("", "DEVICES", "CODE", "TO FETCH", "FROM", "WHICH", "WHY")
    return [f"model {name}, version {version}: {len(answers)} devices", "", Rows(headings, rows)]


def _fetched(answers: Sequence[Answer]) -> str:
    """How much all of them lack, and the most that one does."""
    missing = [answer.missing_bytes for answer in answers if answer.missing_bytes is not None]
    if not missing:
        return ""
    if not any(missing):
        return "nothing"
    most = f", {terminal.human_bytes(max(missing))} at most" if len(missing) > 1 else ""
    return f"{terminal.human_bytes(sum(missing))}{most}"


def _when(answers: Sequence[Answer]) -> str:
    """When the first and the last of them could begin."""
    moments = sorted(
        answer.would_start_at
        for answer in answers
        if answer.would_start_at is not None and answer.outcome == "later"
    )
    if not moments:
        return ""
    first, last = terminal.moment(moments[0]), terminal.moment(moments[-1])
    return first if first == last else f"{first} to {last}"
