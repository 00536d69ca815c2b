"""`edge-agent bench`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_agent import terminal
from edge_agent.cli.command import Command, Invocation, end_in_order
from edge_agent.cli.progress_line import progress_line
from edge_agent.owner import acting_as_owner_of


@click.command(cls=Command)
@click.option("--model", metavar="NAME", help="A [models.NAME] from the settings; default: the first one.")
@click.option(
    "--launches",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="How often each side is started.",
)
@click.option(
    "--tokens", type=click.IntRange(2, 1024), default=64, show_default=True, help="New tokens in each answer."
)
@click.option(
    "--against",
    type=(click.Choice(["llama.cpp"]), click.Path(path_type=Path)),
    metavar="llama.cpp GGUF",
    help="Also measure llama.cpp's server over HTTP with this file, with the same threads and prompts. Needs the "
    "package xllamacpp.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def bench(
    invocation: Invocation,
    model: str | None,
    launches: int,
    tokens: int,
    against: tuple[str, Path] | None,
    as_json: bool,
) -> None:
    """Measure the active version: first token, decode, several prompts at once, memory.

    The first line says how fast this device answers, and how much that is of what its memory allows. Measures
    the bare library, MLflow, the agent's runner and the whole agent over MQTT one after the other, to show what
    each layer costs; the last one needs mosquitto. With a large model this takes minutes.

    \b
    Examples:
      edge-agent bench
      edge-agent bench --model assistant --launches 5 --json
      edge-agent bench --against llama.cpp ./model.Q4_K_M.gguf
    """
    from edge_agent.bench import page
    from edge_agent.bench.run import run_bench

    end_in_order()

    settings = invocation.settings()
    with progress_line() as report, acting_as_owner_of(settings.state_dir):
        result = run_bench(
            settings,
            model=model,
            launches=launches,
            tokens=tokens,
            say=lambda step: report(f"bench: {step}", 0, 0),
            peer=against[1].absolute() if against else None,
        )
    if as_json:
        terminal.echo(json.dumps(result))
    else:
        page.print_report(result)
