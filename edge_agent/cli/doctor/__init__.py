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
from edge_agent.cli.command import FAILED, Command, Invocation, paint
from edge_agent.cli.progress_line import progress_line
from edge_agent.errors import SettingsError

if TYPE_CHECKING:
    from edge_agent.doctor.finding import Finding


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--bundle",
    "archive",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a support archive (tar.gz) without prompts or secrets.",
)
@click.pass_obj
def doctor(invocation: Invocation, as_json: bool, archive: Path | None) -> None:
    """Check this device: host, settings, broker, registry, cache, models, daemon.

    Each check says ok, warn or fail, and what to do. Failures come last; the last line is the verdict. Exits
    with 1 if anything failed. Works whether the daemon is running or not, and sees most as root.

    \b
    Examples:
      sudo edge-agent doctor
      edge-agent doctor --json | jq '.findings[] | select(.level != "ok")'
      sudo edge-agent doctor --bundle support.tar.gz
    """
    from edge_agent.cli.doctor import page
    from edge_agent.doctor import diagnose
    from edge_agent.doctor.finding import Level

    config = invocation.config or settings_module.find_config()
    with progress_line(plain=False) as report:
        found = list(
            diagnose(
                invocation.settings, config=config, begin=lambda check: report(f"checking {check}", 0, 0)
            )
        )
    failed = any(finding.level is Level.FAIL for finding in found)
    if as_json:
        findings = [asdict(finding) for finding in found]
        terminal.echo(
            json.dumps({"ok": not failed, "agent_version": edge_agent.__version__, "findings": findings})
        )
    else:
        terminal.echo_painted(page.lines(found, paint(), columns=terminal.columns()))
    if archive is not None:
        _write_archive(invocation, archive, found)
    sys.exit(FAILED if failed else 0)


def _write_archive(invocation: Invocation, path: Path, findings: Sequence[Finding]) -> None:
    from edge_agent.doctor import support_archive

    settings = None
    with contextlib.suppress(SettingsError):  # already one of the findings
        settings = invocation.settings()
    members = support_archive.write(path, findings, settings)
    terminal.echo(f"{path}: {', '.join(members)}; read it before you send it", err=True)
