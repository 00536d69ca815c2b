"""`edge-agent models list` and `models show`: what is in the cache, and what should run.

The daemon says it, so that whoever may ask the daemon need not be able to read the cache; without a daemon the same is
read from the disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import click

from edge_agent import printable, terminal
from edge_agent.cli.command import Command, Invocation
from edge_agent.cli.operation import through_daemon
from edge_agent.errors import DaemonNotRunning, UnknownModel
from edge_agent.owner import acting_as_owner_of
from edge_agent.settings import Settings
from edge_agent.terminal import Rows

_OF_VERSION = ("digest", "bytes", "files", "registered_name", "registry_uri", "run_id", "trust")


@click.command("list", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_list(invocation: Invocation, as_json: bool) -> None:
    """List the versions in the cache, and what keeps a model at one of them.

    \b
    Example:
      edge-agent models list --json
    """
    models = _inventory(invocation.settings())
    versions = [{"name": model["name"], **version} for model in models for version in model["versions"]]
    if as_json:
        keys = ("name", "version", "digest", "bytes", "state")
        terminal.echo(json.dumps([{key: version[key] for key in keys} for version in versions]))
        return
    rows = [
        (
            version["name"],
            version["version"],
            _role(version),
            terminal.human_bytes(version["bytes"]),
            version["digest"][:12],
        )
        for version in versions
    ]
    notes = [f"{model['name']}: {note}" for model in models for _, note in terminal.standing_of(model)]
    if rows:
        terminal.print_page([Rows(("NAME", "VERSION", "STATE", "SIZE", "DIGEST"), rows)])
    else:
        terminal.echo("the cache has no versions yet; `edge-agent models pull` fetches them")
    if notes:
        terminal.print_page(["", *notes])


@click.command("show", cls=Command)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_show(invocation: Invocation, name: str, as_json: bool) -> None:
    """Show a model's versions, where they came from and why they may run.

    \b
    Example:
      edge-agent models show assistant
    """
    models = {model["name"]: model for model in _inventory(invocation.settings())}
    if name not in models:
        raise UnknownModel(f"no model is called {name!r} here; there are: {', '.join(models) or 'none'}")
    model = models[name]
    if as_json:
        terminal.echo(json.dumps(model))
        return
    rows: list[tuple[object, ...]] = [
        ("model", name),
        ("uri", model["uri"]),
        ("active", model["active"] or "none"),
    ]
    rows += terminal.standing_of(model)
    terminal.print_page([Rows(("", ""), rows)])
    for version in model["versions"]:
        fields = [(f"  {key}", printable.line(str(version[key]))) for key in _OF_VERSION]
        terminal.print_page(["", f"version {version['version']}   {_role(version)}", Rows(("", ""), fields)])


def _role(version: Mapping[str, Any]) -> str:
    """Its state, and that an operator wants it."""
    state = str(version["state"])
    return f"{state}, pinned" if version["pinned"] and state != "pinned" else state


def _inventory(settings: Settings) -> list[dict[str, Any]]:
    """See `updates.operations.inventory`."""
    try:
        return list(through_daemon(settings, do="list"))
    except DaemonNotRunning:
        from edge_agent.cache.store import Store
        from edge_agent.updates.heard import Heard
        from edge_agent.updates.operations import inventory

        with acting_as_owner_of(settings.state_dir):
            store = Store(settings.state_dir)
            return inventory(settings, store, Heard(settings.registry.uri, store, time.time))
