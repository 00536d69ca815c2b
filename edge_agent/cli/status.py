"""`edge-agent status`: asks the daemon, or reads the disk if the daemon is not running."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

import edge_agent
from edge_agent import terminal
from edge_agent.cli import status_page
from edge_agent.cli.command import NOT_RUNNING, Command, Invocation, said_by_daemon
from edge_agent.errors import DaemonNotRunning, EdgeAgentError
from edge_agent.owner import acting_as_owner_of
from edge_agent.settings import Settings, missing_settings

_EVERY_S = 1.0
_FROM_DISK = "edge-agent: the daemon is not running; this state is from the disk"


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--watch", is_flag=True, help="Repeat every second until interrupted.")
@click.pass_obj
def status(invocation: Invocation, as_json: bool, watch: bool) -> None:
    """Show state, models, queue, cache, registry and broker.

    If the daemon is not running, reads the state from the disk and exits with 3.
    --watch takes the screen until Ctrl-C, which ends it with 130 and leaves the screen as it was; into a pipe it
    prints one page, or one document, after the other.

    \b
    Examples:
      edge-agent status
      edge-agent status --json | jq .state
    """
    settings = invocation.settings()
    missing = missing_settings(invocation.config)
    from_disk = [_FROM_DISK, *([f"edge-agent: {missing}"] if missing else [])]
    if not watch:
        document, code = _status(settings)
        _print(document, from_disk if code else [], as_json=as_json)
        sys.exit(code)
    if as_json or not sys.stdout.isatty():
        while True:
            document, code = _status(settings)
            _print(document, from_disk if code else [], as_json=as_json)
            time.sleep(_EVERY_S)
    with terminal.whole_screen("… and more: `edge-agent status` prints all of it") as show:
        while True:
            show(_watched(settings, from_disk))
            time.sleep(_EVERY_S)


def _watched(settings: Settings, from_disk: Sequence[str]) -> status_page.Page:
    """A page of `--watch`, which goes on where nothing can be seen for a moment: a daemon that is being restarted.

    Args:
        from_disk: what is said of a state that the daemon did not say.
    """
    try:
        document, code = _status(settings)
    except TimeoutError:
        return ["edge-agent: timed out"]
    except EdgeAgentError as error:
        return [f"edge-agent: {error}"]
    return [*([*from_disk, ""] if code else []), *status_page.page(document, now=time.time())]


def _print(document: Mapping[str, Any], remarks: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        terminal.echo(json.dumps(document, ensure_ascii=False))
        return
    for line in remarks:
        terminal.echo(line, err=True)
    terminal.print_page(status_page.page(document, now=time.time()))


def _status(settings: Settings) -> tuple[dict[str, Any], int]:
    """The document, and the exit code that goes with it."""
    try:
        return said_by_daemon(settings, "status"), 0
    except DaemonNotRunning:
        with acting_as_owner_of(settings.state_dir):
            return _status_on_disk(settings), NOT_RUNNING


def _status_on_disk(settings: Settings) -> dict[str, Any]:
    """As much of the status document as the disk has."""
    from edge_agent.cache.store import Store
    from edge_agent.device_status import model_report
    from edge_agent.updates.choice import wanted_version
    from edge_agent.updates.heard import Heard

    store = Store(settings.state_dir)
    heard = Heard(settings.registry.uri, store, time.time)
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
                **model_report.held(name, known, wanted_version(model.ref, known), heard),
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
        "registry": {**heard.document(), "asking": False},
        "broker": {"host": settings.mqtt.host, "port": settings.mqtt.port, "connected": False},
    }
