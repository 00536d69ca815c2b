"""`edge-agent chat`: a conversation in a terminal, with the daemon or straight from a model's folder.

conversation.py   what was said, and what a turn makes of it; no input, no output
partners.py       who answers: the daemon over its control socket, or a runner of this command's own
screen.py         lines from a person (or a pipe), and the words that are commands
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from edge_agent.cli.command import Command, Invocation


@click.command(cls=Command)
@click.option("--model", metavar="NAME", help="A [models.NAME] from the settings; default: the first one.")
@click.option(
    "--system", metavar="TEXT", help="What the model is told first; default: the settings' system prompt."
)
@click.option(
    "--direct",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE.gguf",
    help="Talk to the model in this folder or file, without daemon, registry and settings.",
)
@click.pass_obj
def chat(invocation: Invocation, model: str | None, system: str | None, folder: Path | None) -> None:
    """Hold a conversation with a model; it remembers what was said.

    Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands. From a pipe, each line is a
    message, and an error ends the command.

    DIR is what the onnxruntime-genai model builder made, or a Hugging Face folder (which needs
    edge-agent[transformers]); a GGUF file is converted first. The model runs behind the same walls as on a
    device; nothing is kept of it.

    \b
    Examples:
      edge-agent chat
      edge-agent chat --model assistant --system "Answer in one sentence."
      edge-agent chat --direct ./my-model
      printf 'My name is Ada.\\nWhat is my name?\\n' | edge-agent chat
    """
    from edge_agent.cli.chat import partners, screen
    from edge_agent.cli.chat.conversation import Conversation, Partner

    if folder is not None and model is not None:
        raise click.UsageError("--model is for the daemon's models, and --direct has none of them")
    with contextlib.ExitStack() as stack:
        lines = screen.open_screen()
        partner: Partner
        if folder is None:
            partner = partners.of_daemon(invocation.settings(), model)
        else:
            partner = stack.enter_context(partners.of_folder(folder))
        screen.converse(Conversation(system=system), partner, lines)
