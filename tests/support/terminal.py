"""A command in a terminal of its own, with a person who types and reads.

`Terminal` is a pseudo-terminal: all that a command has printed, in its order. `Screen` is what somebody sees: a real
terminal (tmux) of some width and height, which obeys what is printed. `on_a_terminal` is for code of this process.

    with Screen([*EDGE_AGENT, "status", "--watch"], columns=80) as screen:
        screen.wait_for("assistant")
        screen.press("C-c")
        assert screen.wait() == 130
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.support.processes import clean_environment, wait_until

EDGE_AGENT = (sys.executable, "-m", "edge_agent")
_LIMIT_S = 60.0
_SHELL = ("sh", "-c", 'trap : INT; file=$1; shift; "$@"; echo $? >"$file.new"; mv "$file.new" "$file"', "sh")
"""Runs the command, and writes its exit code: tmux itself loses one now and then."""
_OPTIONS = (
    *("set -g status off", "set -g history-limit 5000", "set -g escape-time 0"),
    *(
        "set -g default-terminal xterm-256color",
        "set -g remain-on-exit on",
        "set -g remain-on-exit-format ''",
    ),
)


class Terminal:
    """`edge-agent ARGUMENTS` on a pseudo-terminal.

    Attributes:
        seen: all that it has printed.
    """

    def __init__(self, arguments: Sequence[str], *, home: Path) -> None:
        self.seen = ""
        self._read = 0
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_agent", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**clean_environment(), "HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(_LIMIT_S)
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str) -> None:
        """Returns when it has printed the text since the last one that was expected."""
        until_s = time.monotonic() + _LIMIT_S
        while (at := self.seen.find(text, self._read)) < 0:
            ended = self._process.poll() is not None
            self._look()
            assert time.monotonic() < until_s and not (ended and text not in self.seen), (text, self.seen)
        self._read = at + len(text)

    def wait(self) -> int:
        """Its exit code."""
        until_s = time.monotonic() + _LIMIT_S
        while self._process.poll() is None:
            assert time.monotonic() < until_s, self.seen
            self._look()
        return self._process.returncode

    def _look(self) -> None:
        if select.select([self._master], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # EIO: nobody writes any more
                self.seen += os.read(self._master, 1 << 16).decode(errors="replace")


class Screen:
    """A command in a terminal of this size.

    Args:
        environment: more variables for the command; an empty value takes one away.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 24,
        environment: Mapping[str, str] = {},
    ) -> None:
        tmux = shutil.which("tmux")
        assert tmux is not None, "tmux is not on PATH (.ci/programs.sh fetches it)"
        self._folder = Path(tempfile.mkdtemp(prefix="screen-"))
        self._code = self._folder / "code"
        self._tmux = (tmux, "-u", "-S", str(self._folder / "socket"))
        options = self._folder / "tmux.conf"
        options.write_text("".join(f"{option}\n" for option in _OPTIONS))
        variables = {**clean_environment(), "LANG": "C.UTF-8", "COLORTERM": "", "NO_COLOR": "", **environment}
        # A terminal tells its size by itself; the variables, if this process has them, are of another one.
        variables |= dict.fromkeys(("LINES", "COLUMNS"), "")
        variables = {name: value for name, value in variables.items() if value}
        self._server = subprocess.Popen(
            [*self._tmux, "-D", "-f", str(options)], env={**variables, "TERM": "xterm-256color"}
        )
        try:
            wait_until(lambda: (self._folder / "socket").exists(), _LIMIT_S, "the terminal")
            size = ("-x", str(columns), "-y", str(rows))
            self._do("new-session", "-d", *size, "--", *_SHELL, str(self._code), *command)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the terminal, and the command in it as if its window were closed."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=_LIMIT_S, check=False)
        try:
            self._server.wait(_LIMIT_S)
        finally:
            self._server.kill()
            shutil.rmtree(self._folder)

    def lines(self) -> list[str]:
        """What stands on the screen, without blanks at the ends of lines and empty lines at the end."""
        return _lines(self._do("capture-pane", "-p"))

    def scrolled(self) -> list[str]:
        """As `lines`, with those that have left the screen at its top."""
        return _lines(self._do("capture-pane", "-p", "-S", "-"))

    def coloured(self) -> str:
        """The same text with its escape sequences: `\\x1b[32m` begins green, `\\x1b[39m` ends it."""
        return self._do("capture-pane", "-p", "-e", "-S", "-")

    def wait_for(self, text: str, timeout_s: float = _LIMIT_S) -> list[str]:
        """Returns the lines as soon as one of them has the text.

        Raises:
            AssertionError: none has it in time; the message is the screen.
        """
        lines: list[str] = []

        def is_there() -> bool:
            lines[:] = self.lines()
            return any(text in line for line in lines)

        try:
            wait_until(is_there, timeout_s)
        except TimeoutError as error:
            raise AssertionError("\n".join([f"waited for {text!r}:", *lines])) from error
        return lines

    def type(self, text: str) -> None:
        self._do("send-keys", "-l", text)

    def press(self, key: str) -> None:
        """
        Args:
            key: as tmux names it: `C-c`, `Enter`, `Up`.
        """
        self._do("send-keys", key)

    def wait(self) -> int:
        """The command's exit code, when it has ended; that of a signal is 128 more, as a shell says it. What it left on
        the screen stays."""

        def ended() -> bool:
            return self._code.exists() and self._ask("pane_dead") == "1"

        try:
            wait_until(ended, _LIMIT_S)
        except TimeoutError as error:
            raise AssertionError("\n".join(["waited for the end:", *self.lines()])) from error
        return int(self._code.read_text())

    @property
    def is_as_found(self) -> bool:
        """The cursor can be seen, and the lines are those from before a program that takes the whole screen. Asked
        while a command runs, a shell for instance: a screen whose command has ended has no cursor."""
        return self._ask("cursor_flag") == "1" and self._ask("alternate_on") == "0"

    def _ask(self, variable: str) -> str:
        return self._do("display-message", "-p", f"#{{{variable}}}").strip()

    def _do(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout


_END = "the end of what is shown"


@contextlib.contextmanager
def on_a_terminal() -> Iterator[list[str]]:
    """stdout and stderr of this process are one in the block; gives what was shown on it, after its end."""
    shown: list[str] = []
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as screen:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            yield shown
        screen.write(_END)
        screen.flush()
        said = ""
        while not said.endswith(_END):  # a terminal hands on what it has so far
            said += os.read(ours, 100_000).decode()
        shown.append(said.removesuffix(_END))  # before the other end closes, which would discard it
    os.close(ours)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
