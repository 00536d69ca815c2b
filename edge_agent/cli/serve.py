"""`edge-agent serve`."""

from __future__ import annotations

import sys

import click

from edge_agent import environment
from edge_agent.cli.command import Command, Invocation
from edge_agent.errors import EdgeAgentError


@click.command(cls=Command)
@click.pass_obj
def serve(invocation: Invocation) -> None:
    """Serve OpenAI's HTTP interface in the foreground, as systemd does.

    Programs on this device reach its models at http://127.0.0.1:8080/v1, or where http.listen in the settings says.
    The same address without /v1 is a page about this device, for a browser.
    The daemon answers: it must be running. http.md, among the documents that are installed with it, says how to open
    it to a network.

    \b
    Examples:
      edge-agent serve
      curl http://127.0.0.1:8080/v1/models
    """
    from edge_agent import logs

    settings = invocation.settings()
    logs.configure(settings.log_format, journal=environment.logs_to_journal())
    try:
        from edge_agent import gateway
    except ImportError as error:
        raise EdgeAgentError(
            f"the OpenAI interface needs a library that is not installed: {error.name}",
            remedy="pip install 'edge-agent[http]'",
        ) from error
    sys.exit(gateway.serve(settings))
