"""`edge-agent publish`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_agent import terminal
from edge_agent.cli import library_output
from edge_agent.cli.command import Command, Invocation
from edge_agent.cli.progress_line import progress_line
from edge_agent.documents import page

if TYPE_CHECKING:
    from edge_agent.publishing.register import Published
    from edge_agent.publishing.version_file import Written


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR|FILE.gguf")
@click.option("--name", required=True, help="The registered model's name; created if it does not exist.")
@click.option(
    "--registry", metavar="URI", help="http(s)://… or sqlite:///…; default: registry.uri from the settings."
)
@click.option("--alias", help="Alias to move to the new version, as the last step.")
@click.option(
    "--flavor",
    type=click.Choice(["onnx", "transformers"]),
    default="onnx",
    show_default=True,
    help="onnx: DIR is from the model builder; transformers: a Hugging Face folder with safetensors weights.",
)
@click.option("--signature", type=click.Choice(["chat", "prompt"]), default="chat", show_default=True)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="K=V",
    help="Generation default, for requests and settings that say nothing else; may be repeated.",
)
@click.option(
    "--golden",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON list of prompts that a device tries before it uses the version, as described above.",
)
@click.option(
    "--sign-key", type=click.Path(path_type=Path), metavar="PEM", help="Private key that signs the package."
)
@click.option(
    "--to",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a version file for `models import` instead; no registry is asked.",
)
@click.option(
    "--blobs",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also copy the files to DIR/sha256/DIGEST, from where devices fetch them (cache.mirrors).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def publish(
    invocation: Invocation,
    folder: Path,
    name: str,
    registry: str | None,
    alias: str | None,
    flavor: Any,
    signature: Any,
    options: tuple[str, ...],
    golden: Path | None,
    sign_key: Path | None,
    file: Path | None,
    blobs: Path | None,
    as_json: bool,
) -> None:
    """Package a folder made by the onnxruntime-genai model builder, or a Hugging Face folder, and register it.

    A GGUF file is made into such a folder first, with its own weights: nothing is rounded again.
    The alias moves last, and only if a device could fetch what was uploaded.

    \b
    Examples:
      edge-agent publish ./phi3-int4 --name phi3-mini --alias prod --registry http://localhost:5000
      edge-agent publish ./phi3-int4 --name phi3-mini --registry sqlite:////srv/registry.db \\
          --signature prompt --option max_length=300 --option temperature=0.2
      edge-agent publish ./phi3-hf --name phi3-hf --alias prod --flavor transformers --golden golden.json
      edge-agent publish ./smollm2.Q4_1.gguf --name smollm2 --alias prod
    Without a registry, for `edge-agent models import` on each device:
      edge-agent publish ./phi3-int4 --name phi3-mini --to /media/stick/phi3-mini.tar
    With a folder that a web server, or a stick, gives to the devices:
      edge-agent publish ./phi3-int4 --name phi3-mini --alias prod --blobs /srv/www/blobs

    \b
    Golden prompts, a JSON list of 1 to 32 objects, each with
      prompt or messages   what to ask: unchanged text, or a chat
      expect               a regular expression that must be found in the answer
      max_tokens           of the answer, 1 to 1024; 64 if it is left out
    For example, golden.json:
      [{"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "expect": "5|five"}]
    They are asked at temperature 0, here and on each device.
    """
    from edge_agent import publishing
    from edge_agent.cli.read_back import read_back
    from edge_agent.publishing import build, build_advice

    made: Published | Written
    if file is not None and (registry or alias):
        raise click.UsageError("--to asks no registry: leave out --registry and --alias")
    with progress_line() as report, library_output.hidden():
        making = publishing.Making(
            flavor=flavor,
            signature=signature,
            options=dict(_key_value(option) for option in options),
            golden=golden,
            sign_key=sign_key,
            progress=report,
        )
        if file is not None:
            made = publishing.write_folder(folder, name=name, file=file, blobs=blobs, **making)
        else:
            made = publishing.publish_folder(
                folder,
                name=name,
                registry_uri=_registry(invocation, registry),
                alias=alias,
                blobs=blobs,
                read_back=read_back,
                **making,
            )
    if as_json:
        terminal.echo(json.dumps(_document(made) | {"build": build.document(made.graph)}))
    else:
        _say(made)
        if made.graph:
            terminal.echo(f"build: {build.text(made.graph)}")
    for line in (*made.limits, *(build_advice.advice(made.graph) if made.graph else ())):
        terminal.echo(f"edge-agent: {folder.name}: {line} ({page('models.md')})", err=True)


def _registry(invocation: Invocation, given: str | None) -> str:
    uri = given or invocation.settings().registry.uri
    if not uri:
        raise click.UsageError(
            "give --registry URI, or set registry.uri in the settings, or write a file with --to"
        )
    return uri


def _document(made: Published | Written) -> dict[str, Any]:
    from edge_agent.publishing.version_file import Written

    document: dict[str, Any] = {"name": made.name, "version": made.version, "digest": made.digest}
    if isinstance(made, Written):
        document |= {"file": str(made.file), "bytes": made.bytes}
    else:
        document |= {"run_id": made.run_id, "alias": made.alias}
    return document | ({"blobs": asdict(made.blobs)} if made.blobs else {})


def _say(made: Published | Written) -> None:
    from edge_agent.publishing.version_file import Written

    if isinstance(made, Written):
        terminal.echo(
            f"{made.name} version {made.version}: {terminal.human_bytes(made.bytes)} in {made.file}; "
            f"on a device: edge-agent models import {made.file.name}"
        )
    else:
        alias = f", alias {made.alias}" if made.alias else ""
        terminal.echo(f"{made.name} version {made.version} registered{alias}")
    terminal.echo(f"digest {made.digest}")
    if made.blobs:
        terminal.echo(f"blobs: {made.blobs.written} written, {made.blobs.kept} already there")


def _key_value(option: str) -> tuple[str, str]:
    key, separator, value = option.partition("=")
    if not separator or not key:
        raise click.UsageError(f"--option {option!r} is not K=V")
    return key, value
