"""`edge-agent probe`."""

from __future__ import annotations

import contextlib
import json
import re
import sys

import click

from edge_agent import terminal
from edge_agent.chat import messages
from edge_agent.chat.fields import MAX_DEADLINE_MS
from edge_agent.cli.command import Command, FiniteRange, Invocation
from edge_agent.errors import EdgeAgentError
from edge_agent.owner import acting_as_owner_of


@click.command(cls=Command)
@click.argument("words", nargs=-1, metavar="TEXT")
@click.option("--model", metavar="NAME", help="A [models.NAME] from the settings; default: the first one.")
@click.option(
    "--timeout",
    "timeout_s",
    type=FiniteRange(0.001, MAX_DEADLINE_MS / 1000),
    metavar="S",
    help="Seconds to wait.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--direct", is_flag=True, help="Load the model here, without a daemon.")
@click.pass_obj
def probe(
    invocation: Invocation,
    words: tuple[str, ...],
    model: str | None,
    timeout_s: float | None,
    as_json: bool,
    direct: bool,
) -> None:
    """Send one prompt through the running daemon and stream the answer.

    TEXT may be several words without quotes. If it is -, the prompt is read from standard input, without the
    newline that a shell puts at its end.
    An answer that ends at its limit of tokens is reported on standard error, and as finish_reason "length" with --json.

    \b
    Examples:
      edge-agent probe What is the capital of Japan
      echo "What is 2 plus 3?" | edge-agent probe - --json
      edge-agent probe --direct "Hello"
    """
    settings = invocation.settings()
    question = _question(" ".join(words), settings.limits.payload_bytes)

    from edge_agent.cli import asking

    ask = asking.ask_direct if direct else asking.ask_daemon
    user = acting_as_owner_of(settings.state_dir) if direct else contextlib.nullcontext()
    shown = False

    def show(delta: str) -> None:
        nonlocal shown
        if not as_json:
            shown = True
            terminal.echo_answer(delta)

    try:
        with user:
            result = ask(settings, question, model=model, timeout_s=timeout_s, on_text=show)
    except EdgeAgentError:
        if shown:  # the message begins on a line of its own
            terminal.echo()
        raise
    if as_json:
        terminal.echo(json.dumps(result, ensure_ascii=False))
    else:
        terminal.echo(f"\n\n{terminal.answer_line(result)}")
        if note := messages.cut_note(result["finish_reason"], result["usage"]):
            terminal.echo(f"edge-agent: the answer was {note}", err=True)


def _question(text: str, limit_bytes: int) -> str:
    if text == "-":
        data = sys.stdin.buffer.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise click.UsageError(f"standard input has more than {limit_bytes} bytes (limits.payload_bytes)")
        try:
            text = re.sub(r"\r?\n\Z", "", data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise click.UsageError("standard input is not UTF-8") from error
    if not text.strip():
        raise click.UsageError("give TEXT, or - to read it from standard input")
    return text
