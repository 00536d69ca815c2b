"""`edge-agent doctor`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

import edge_agent
from edge_agent import settings as settings_module
from edge_agent import terminal
from edge_agent.cli.command import FAILED, Command, Invocation
from edge_agent.errors import SettingsError

if TYPE_CHECKING:
    from edge_agent.doctor import Finding


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a support bundle (tar.gz), without prompts and secrets.",
)
@click.pass_obj
def doctor(invocation: Invocation, as_json: bool, bundle: Path | None) -> None:
    """Check this device: host, settings, daemon, broker, registry, cache, models.

    Each line says ok, warn or fail, and what to do. Exit 1 when anything failed. Works with the daemon up and
    down; as root it sees most.

    \b
    Examples:
      sudo edge-agent doctor
      edge-agent doctor --json | jq '.findings[] | select(.level != "ok")'
      sudo edge-agent doctor --bundle support.tar.gz
    """
    from edge_agent import doctor as doctors

    found = []
    config = invocation.config or settings_module.find_config()
    for finding in doctors.diagnose(invocation.settings, config=config):
        found.append(finding)
        if not as_json:
            terminal.print_finding(finding.level, finding.check, finding.message, finding.remedy)
    failures = sum(finding.level is doctors.Level.FAIL for finding in found)
    if as_json:
        findings = [asdict(finding) for finding in found]
        click.echo(
            json.dumps({"ok": not failures, "agent_version": edge_agent.__version__, "findings": findings})
        )
    else:
        warnings = sum(finding.level is doctors.Level.WARN for finding in found)
        click.echo(f"\n{len(found)} checks, {warnings} to look at, {failures} failed")
    if bundle is not None:
        _write_bundle(invocation, bundle, found)
    sys.exit(FAILED if failures else 0)


def _write_bundle(invocation: Invocation, path: Path, findings: Sequence[Finding]) -> None:
    from edge_agent.doctor import support_bundle

    settings = None
    with contextlib.suppress(SettingsError):  # it is one of the findings
        settings = invocation.settings()
    members = support_bundle.write(path, findings, settings)
    click.echo(f"{path}: {', '.join(members)}; read it before you send it", err=True)
