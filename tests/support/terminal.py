"""A command in a terminal of its own, with a person who types and reads."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.support.processes import clean_environment

_LIMIT_S = 60.0


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
