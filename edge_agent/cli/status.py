"""`edge-agent status`: asks the daemon, or reads the disk if the daemon is not running."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

import edge_agent
from edge_agent import terminal
from edge_agent.cli.command import NOT_RUNNING, Command, Invocation, said_by_daemon
from edge_agent.errors import DaemonNotRunning
from edge_agent.owner import acting_as_owner_of
from edge_agent.settings import Settings, missing_settings


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--watch", is_flag=True, help="Repeat every second until interrupted.")
@click.pass_obj
def status(invocation: Invocation, as_json: bool, watch: bool) -> None:
    """Show state, models, queue, cache, registry and broker.

    If the daemon is not running, reads the state from the disk and exits with 3.

    \b
    Examples:
      edge-agent status
      edge-agent status --json | jq .state
    """
    settings = invocation.settings()
    while True:
        try:
            document, code = said_by_daemon(settings, "status"), 0
        except DaemonNotRunning:
            with acting_as_owner_of(settings.state_dir):
                document, code = _status_on_disk(settings), NOT_RUNNING
        if watch and not as_json:
            click.clear()
        if as_json:
            terminal.echo(json.dumps(document, ensure_ascii=False))
        else:
            if code:
                terminal.echo("edge-agent: the daemon is not running; this state is from the disk", err=True)
                if missing := missing_settings(invocation.config):
                    terminal.echo(f"edge-agent: {missing}", err=True)
            terminal.print_status(document)
        if not watch:
            sys.exit(code)
        time.sleep(1.0)


def _status_on_disk(settings: Settings) -> dict[str, Any]:
    """As much of the status document as the disk has."""
    from edge_agent.cache.store import Store
    from edge_agent.device_status import model_report

    store = Store(settings.state_dir)
    state = store.state()
    entries = []
    for name, model in settings.models.items():
        known = state.model(name)
        record = store.record(name, known.active) if known.active else None
        entries.append(
            {
                "name": name,
                "uri": model.uri,
                "version": record.version if record else None,
                "digest": record.digest if record else None,
                "flavor": None,
                "state": "idle" if record else "absent",
                "reason": known.instead,
                "walls": None,
                "tokens_per_s": None,
                **known.others(),
                **model_report.on_disk(model.ref, known),
            }
        )
    return {
        "state": "offline",
        "time": int(time.time()),
        "boot_id": None,
        "seq": 0,
        "agent_version": edge_agent.__version__,
        "queue_depth": 0,
        "models": entries,
        "troubles": [],
        "cache": {
            "bytes": store.used_bytes(),
            "quota_bytes": settings.cache.quota_bytes,
            "free_bytes": store.free_bytes(),
        },
        "registry": {"uri": settings.registry.uri, "reachable": None, "problem": "", "last_check": None},
        "broker": {"host": settings.mqtt.host, "port": settings.mqtt.port, "connected": False},
    }
