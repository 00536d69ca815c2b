"""`edge-agent demo`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_agent import terminal
from edge_agent.cli.command import Command, end_in_order


@click.command(cls=Command)
@click.option("--once", is_flag=True, help="Ask one question, print the answer and stop everything.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; implies --once.")
@click.option("--question", default="What is the capital of Spain?", show_default=True, help="What to ask.")
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    help="A folder made by the onnxruntime-genai model builder, or a GGUF file, instead of the sample model.",
)
def demo(once: bool, as_json: bool, question: str, model: Path | None) -> None:
    """Run everything on this machine without any configuration.

    Starts an embedded registry, a private mosquitto on a free port and the agent. Publishes the sample model;
    the agent pulls it and answers over MQTT.

    \b
    Examples:
      edge-agent demo
      edge-agent demo --once --json
      edge-agent demo --model ./phi3-mini-int4 --question "What is a gateway?"
    """
    from edge_agent.demo import SAMPLE_MODEL, run_demo

    end_in_order()
    result = run_demo(question, stay=not (once or as_json), quiet=as_json, model=model or SAMPLE_MODEL)
    if as_json:
        terminal.echo(json.dumps(result, ensure_ascii=False))
