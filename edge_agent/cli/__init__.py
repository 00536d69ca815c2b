"""The `edge-agent` command, with a file for each of its commands.

Results go to stdout, with `--json` as one document and nothing else; logs, progress and errors go to stderr. Exit
codes are in `command.py`. Heavy modules are imported by the commands that need them. Contract: docs/cli.md.
"""

from __future__ import annotations

from pathlib import Path

import click

import edge_agent
from edge_agent.cli import (
    bench,
    chat,
    demo,
    doctor,
    fleet,
    metrics,
    models,
    probe,
    publish,
    run,
    serve,
    status,
)
from edge_agent.cli.command import Group, Invocation


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings file (TOML).")
@click.version_option(edge_agent.__version__, prog_name="edge-agent")
@click.pass_context
def main(context: click.Context, config: Path | None) -> None:
    """Keep registered MLflow language models on this device and answer prompts over MQTT.

    \b
    Without --config, the settings are those in
      ~/.config/edge-agent/config.toml (except for root), else
      /etc/edge-agent/config.toml

    \b
    Examples:
      edge-agent demo --once
      edge-agent --config /etc/edge-agent/config.toml run
      edge-agent probe "What is the capital of Nepal?"
    """
    context.obj = Invocation(config=config)


main.add_command(run.run)
main.add_command(serve.serve)
main.add_command(probe.probe)
main.add_command(chat.chat)
main.add_command(status.status)
main.add_command(metrics.metrics)
main.add_command(models.models)
main.add_command(publish.publish)
main.add_command(doctor.doctor)
main.add_command(fleet.fleet)
main.add_command(bench.bench)
main.add_command(demo.demo)
