"""The person's side: lines from a terminal or a pipe, answers as they come, and the few words that are commands.

At a terminal, prompt_toolkit edits the line and keeps a history of what was typed, bounded, for this user only. From
a pipe each line is a message. Answers go to stdout and everything else to stderr: what a pipe gets is the answers.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import platformdirs

from edge_agent import terminal
from edge_agent.chat import messages
from edge_agent.cli.chat.conversation import STOPPED, Answer, Conversation, Partner
from edge_agent.errors import EdgeAgentError, RunnerError

COMMANDS = {
    "/clear": "forget what was said",
    "/system TEXT": "tell the model something else first, and forget what was said; without TEXT: the usual",
    "/help": "this list",
    "/bye": "end the conversation (or Ctrl-D)",
}
MAX_HISTORY_BYTES = 256 << 10
MAX_LINE_CHARACTERS = 1 << 20
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


class Screen(Protocol):
    """Where lines come from.

    Attributes:
        interactive: a person sits there: an error ends a turn, not the conversation.
    """

    interactive: bool

    def read(self) -> str | None:
        """The next line without its newline; None at the end.

        Raises:
            KeyboardInterrupt: the person gave up this line.
        """
        ...


def converse(conversation: Conversation, partner: Partner, screen: Screen) -> None:
    """Asks line by line until there are none.

    Raises:
        EdgeAgentError: an answer did not come, and nobody sits there who could ask again; or the runner died.
    """
    if screen.interactive:
        _say(f"talking to {partner.name}; /help lists the commands")
    while (line := _next(screen)) is not None:
        text = line.strip()
        if not text:
            continue
        if command := _COMMAND.fullmatch(text):
            if not _obey(command[1], command[2], conversation):
                return
            continue
        try:
            _turn(conversation, partner, text)
        except RunnerError:
            raise
        except EdgeAgentError as error:
            if not screen.interactive:
                raise
            _say(error.message)
            if error.remedy:
                _say(error.remedy)


def _next(screen: Screen) -> str | None:
    while True:
        try:
            return screen.read()
        except KeyboardInterrupt:
            _say("Ctrl-D or /bye ends the conversation")


def _turn(conversation: Conversation, partner: Partner, question: str) -> None:
    shown = False

    def show(text: str) -> None:
        nonlocal shown
        shown = True
        terminal.echo_answer(text)

    try:
        answer = conversation.ask(question, partner, on_text=show)
    finally:
        if shown:  # whatever comes next begins on a line of its own
            terminal.echo()
    for note in _notes(answer):
        _say(note)


def _notes(answer: Answer) -> Iterator[str]:
    """What the person should know beside the text."""
    if answer.forgotten:
        first = "exchange is" if answer.forgotten == 1 else f"{answer.forgotten} exchanges are"
        yield f"the conversation no longer fits the model's context: the first {first} forgotten"
    if answer.finish_reason == STOPPED:
        yield "stopped"
    elif not answer.text:
        yield "the model gave an empty answer"
    elif note := messages.cut_note(answer.finish_reason, answer.usage):
        yield f"the answer was {note}"


def _obey(word: str, text: str | None, conversation: Conversation) -> bool:
    """Does what a command says; False ends the conversation."""
    if word in ("bye", "exit", "quit"):
        return False
    if word == "clear":
        conversation.clear()
        _say("forgotten")
    elif word == "system":
        conversation.system = text
        conversation.clear()
        _say("the model is told that first from now on" if text else "the model is told the usual first")
    elif word == "help":
        for name, meaning in COMMANDS.items():
            _say(f"{name:<14}{meaning}")
    else:
        _say(f"there is no command /{word}; /help lists them")
    return True


def _say(text: str) -> None:
    terminal.echo(f"edge-agent: {text}", err=True)


def open_screen() -> Screen:
    """A terminal where stdin and stdout are one, otherwise a pipe."""
    return _Terminal() if sys.stdin.isatty() and sys.stdout.isatty() else _Pipe()


class _Pipe:
    """Each line is a message."""

    interactive = False

    def read(self) -> str | None:
        line = sys.stdin.buffer.readline(MAX_LINE_CHARACTERS + 1)
        if len(line) > MAX_LINE_CHARACTERS:
            raise EdgeAgentError(f"a line of standard input has more than {MAX_LINE_CHARACTERS} bytes")
        try:
            return line.decode("utf-8-sig").rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            raise EdgeAgentError("standard input is not UTF-8") from error


class _Terminal:
    """A line editor with a history."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory

        file = history_file()
        history: History = FileHistory(str(file)) if file else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(">>> ", history=history)

    def read(self) -> str | None:
        try:
            return self._session.prompt()
        except EOFError:
            return None


def history_file() -> Path | None:
    """The user's history, cut to its last `MAX_HISTORY_BYTES`; None where there is no place for one."""
    file = platformdirs.user_state_path("edge-agent") / "chat-history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+b") as stream:
            _cut(stream.fileno())
        return file
    except OSError:
        return None


def _cut(descriptor: int) -> None:
    """Keeps the newest entries. Each begins with a comment line, as prompt_toolkit writes it."""
    size = os.fstat(descriptor).st_size
    if size <= MAX_HISTORY_BYTES:
        return
    newest = os.pread(descriptor, MAX_HISTORY_BYTES // 2, size - MAX_HISTORY_BYTES // 2)
    start = newest.find(b"\n# ")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, newest[start:] if start >= 0 else b"", 0)
