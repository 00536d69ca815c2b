"""`edge-agent models …`: shows and changes the cache."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edge_agent import terminal
from edge_agent.cache import durable
from edge_agent.cli import inventory
from edge_agent.cli.command import FAILED, Group, Invocation
from edge_agent.cli.operation import operate
from edge_agent.errors import EdgeAgentError, UnknownModel


@click.group(cls=Group)
def models() -> None:
    """Show and change the versions in the cache.

    \b
    Examples:
      edge-agent models list
      edge-agent models pull assistant
    """


models.add_command(inventory.models_list)
models.add_command(inventory.models_show)


_ALLOW_OLDER = click.option(
    "--allow-older",
    is_flag=True,
    help="Take a signed package that is older than one that was active, under a higher number.",
)


@models.command("pull")
@click.argument("name", required=False)
@_ALLOW_OLDER
@click.option("--now", is_flag=True, help="Whatever [link] says, but for its inhibit_file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_pull(
    invocation: Invocation, name: str | None, allow_older: bool, now: bool, as_json: bool
) -> None:
    """Ask the registry now and update NAME, or every model.

    The running daemon does the work, or this command if there is none.
    What must wait for the times of [link], or is rolled out to others first,
    is held; that is no failure.
    --allow-older needs NAME: an old package that was registered anew may be an attack.

    \b
    Examples:
      edge-agent models pull
      edge-agent models pull assistant --json
      edge-agent models pull assistant --now
    """
    settings = invocation.settings()
    if name is not None and name not in settings.models:
        raise UnknownModel(
            f"no model is called {name!r} here", remedy="add a [models.NAME] table to the settings"
        )
    if allow_older and name is None:
        raise click.UsageError("--allow-older needs NAME")
    results = operate(settings, "pull", name=name, allow_older=allow_older, now=now)
    if as_json:
        terminal.echo(json.dumps(results[0] if len(results) == 1 else results))
        return
    for result in results:
        if result["state"] == "held":
            terminal.echo(f"{result['name']}: {result['reason']}")
            continue
        terminal.echo(
            f"{result['name']} version {result['version']}: {terminal.human_bytes(result['bytes_fetched'])} fetched"
            f"{_from_mirrors(result)}, {terminal.human_bytes(result['bytes_reused'])} already here"
        )
        if result["instead"]:
            terminal.echo(f"  {result['instead']}")


def _from_mirrors(result: Mapping[str, Any]) -> str:
    mirrored = result["bytes_mirrored"]
    return f" ({terminal.human_bytes(mirrored)} of it from mirrors)" if mirrored else ""


def _version_command(do: str, summary: str, example: str) -> None:
    """Adds a command that takes NAME and VERSION and changes what runs."""

    @models.command(do, help=f"{summary}\n\n\b\nExample:\n  {example}")
    @click.argument("name")
    @click.argument("version", type=click.IntRange(min=1))
    @click.option("--json", "as_json", is_flag=True, help="One JSON document.")
    @click.pass_obj
    def command(invocation: Invocation, name: str, version: int, as_json: bool) -> None:
        _show_operation(operate(invocation.settings(), do, name=name, version=version), as_json)


def _name_command(do: str, summary: str, example: str) -> None:
    """Adds a command that takes NAME and changes what runs."""

    @models.command(do, help=f"{summary}\n\n\b\nExample:\n  {example}")
    @click.argument("name")
    @click.option("--json", "as_json", is_flag=True, help="One JSON document.")
    @click.pass_obj
    def command(invocation: Invocation, name: str, as_json: bool) -> None:
        _show_operation(operate(invocation.settings(), do, name=name), as_json)


_version_command(
    "activate",
    "Make a cached VERSION active and pin it. It must pass the gate, but may be in quarantine.",
    "edge-agent models activate assistant 6",
)
_version_command(
    "pin", "Keep a model at VERSION, whatever the registry says.", "edge-agent models pin assistant 6"
)
_version_command(
    "rm",
    "Remove a cached VERSION that is not in use, or release one that was removed already from quarantine.",
    "edge-agent models rm assistant 5",
)
_name_command(
    "rollback", "Make the previous version active again, and pin it.", "edge-agent models rollback assistant"
)
_name_command("unpin", "Let a model follow its reference again.", "edge-agent models unpin assistant")


@models.command("prune")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_prune(invocation: Invocation, as_json: bool) -> None:
    """Remove versions that nothing needs, interrupted downloads, and what crashes left behind.

    \b
    Example:
      edge-agent models prune
    """
    document = operate(invocation.settings(), "prune")
    if as_json:
        terminal.echo(json.dumps(document))
    else:
        terminal.echo(
            f"{len(document['removed'])} versions removed, {terminal.human_bytes(document['bytes_freed'])} freed"
        )


@models.command("export")
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_export(invocation: Invocation, name: str, version: int, file: Path, as_json: bool) -> None:
    """Write a cached VERSION to a version file, for a device without a network.

    Every byte is verified while it is written. FILE appears only when it is complete, and replaces an existing
    file. Any tar program can list it.

    \b
    Example:
      edge-agent models export assistant 6 /media/stick/phi3-mini-6.tar
    """
    settings = invocation.settings()
    if file.is_dir():
        raise EdgeAgentError(f"{file} is a folder", remedy="name a file in it")
    with _file_errors("write", file), durable.replacing(file) as descriptor:
        document = operate(settings, "export", name=name, version=version, file=descriptor, doing="exporting")
    if as_json:
        terminal.echo(json.dumps(document))
    else:
        terminal.echo(f"{name} version {version}: {terminal.human_bytes(document['bytes'])} in {file}")


@models.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", "name", metavar="NAME", help="The [models.NAME] that takes it, if several could.")
@_ALLOW_OLDER
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_import(
    invocation: Invocation, file: Path, name: str | None, allow_older: bool, as_json: bool
) -> None:
    """Import a version file, written by `models export` or `publish --to`, into the cache.

    The version passes the same checks and the same gate as one from the registry, and becomes active unless
    another version is pinned or configured by its number. It belongs to the model whose uri has the same
    registered name. No registry is needed; if there is one, the next check follows the registry again.

    \b
    Example:
      edge-agent models import /media/stick/phi3-mini-6.tar
    """
    settings = invocation.settings()
    with _file_errors("read", file):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise EdgeAgentError(f"{file} is not a regular file", remedy="name a version file")
        document = operate(
            settings, "import", name=name, file=descriptor, allow_older=allow_older, doing="importing"
        )
    finally:
        os.close(descriptor)
    if as_json:
        terminal.echo(json.dumps(document))
        return
    if document["state"] == "held":
        terminal.echo(f"{document['name']}: {document['reason']}")
        return
    pinned = f"; the model is pinned to {document['pinned']}" if document["pinned"] else ""
    terminal.echo(
        f"{document['name']} version {document['version']}: {terminal.human_bytes(document['bytes_fetched'])} "
        f"imported, {terminal.human_bytes(document['bytes_reused'])} already here; {document['state']}{pinned}"
    )


@models.command("verify")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def models_verify(invocation: Invocation, as_json: bool) -> None:
    """Read every file in the cache again and check its sha256.

    Damaged files, and only those, are set aside and fetched again. Exits with 1 if damage remains.

    \b
    Example:
      edge-agent models verify
    """
    document = operate(invocation.settings(), "verify")
    if as_json:
        terminal.echo(json.dumps(document))
    else:
        for kind in ("damaged", "repaired"):
            for entry in document[kind]:
                terminal.echo(
                    f"{kind:<9}{entry['name']} {entry['version']}  {entry['path']}  {entry['reason']}"
                )
        for name, problem in document.get("problems", {}).items():
            terminal.echo(f"{name} was not fetched again: {problem}", err=True)
        repaired, damaged = len(document["repaired"]), len(document["damaged"])
        terminal.echo(f"{document['checked']} files checked, {repaired} repaired, {damaged} damaged")
    sys.exit(FAILED if document["damaged"] else 0)


def _show_operation(document: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        terminal.echo(json.dumps(document))
    elif document.get("forgotten"):
        terminal.echo(f"version {document['version']} is not in the cache; it is no longer in quarantine")
    elif "bytes_freed" in document:
        terminal.echo(f"{terminal.human_bytes(document['bytes_freed'])} freed")
    else:
        pinned = f", pinned to {document['pinned']}" if document.get("pinned") else ""
        version = "no version" if document["version"] is None else f"version {document['version']}"
        terminal.echo(f"{document['name']}: {version} is active{pinned}")


@contextmanager
def _file_errors(action: str, file: Path) -> Iterator[None]:
    """Reports the operating system's errors about a file from the command line."""
    try:
        yield
    except OSError as error:
        raise EdgeAgentError(f"cannot {action} {file}: {error.strerror or error}") from error
