"""Commands over a machine's serial line: `Console` sends one and waits for its end, `Replies` reads what came.

The other end is `root/usr/local/lib/machine-shell`, which has the protocol. A line that is none of it (the kernel may
write anything at any moment, and a cut ends a line anywhere) is left out.
"""

from __future__ import annotations

import base64
import binascii
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path

_MARK = b"@machine "
_MOST_BYTES = 64 << 20


class MachineError(Exception):
    """Something that should have happened in the machine did not."""


@dataclass(frozen=True)
class Ready:
    """The shell has started. `boot_id` is another one after each boot."""

    boot_id: str


@dataclass(frozen=True)
class Reply:
    """A command has ended."""

    number: int
    code: int
    text: str


class Replies:
    """Finds what the shell says in the bytes of a serial line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, content: bytes) -> list[Ready | Reply]:
        """Gives what is complete with these bytes."""
        *lines, self._rest = (self._rest + content).replace(b"\r", b"").split(b"\n")
        if len(self._rest) > _MOST_BYTES:
            raise MachineError("the serial line brings a line without an end")
        return [found for line in lines if (found := _parse(line)) is not None]


def command_line(number: int, command: str) -> bytes:
    """A command as the shell reads it."""
    return f"machine: {number} {base64.b64encode(command.encode()).decode()}\n".encode()


def _parse(line: bytes) -> Ready | Reply | None:
    _, mark, said = line.rpartition(_MARK)
    words = said.decode("ascii", "replace").split(" ")
    if not mark:
        return None
    if words[0] == "ready" and len(words) == 2:
        return Ready(words[1])
    try:
        number, code = int(words[0]), int(words[1])
        text = base64.b64decode(words[2] if len(words) > 2 else "", validate=True).decode(errors="replace")
    except (ValueError, IndexError, binascii.Error):
        return None
    return Reply(number, code, text)


class Console:
    """One machine's, from one boot to the next. One thread.

    Args:
        path: the socket that qemu made for the serial line.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._replies = Replies()
        self._waiting: list[Ready | Reply] = []
        self._number = 0
        self.boot_id = ""

    def close(self) -> None:
        self._socket.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Waits for a shell of another boot than the last one.

        Raises:
            MachineError: there is none in this time, or the machine has ended.
        """
        before, deadline_s = self.boot_id, time.monotonic() + timeout_s
        while self.boot_id == before:
            found = self._next(deadline_s, "the machine's shell")
            if isinstance(found, Ready):
                self.boot_id = found.boot_id

    def run(self, *command: str, check: bool = True, timeout_s: float = 300.0) -> Reply:
        """Runs a command as root. What it says on both outputs is the reply's text.

        Args:
            command: words, or one line for a shell.

        Raises:
            MachineError: it failed, and `check` is set; it did not end in time; or the machine has ended.
        """
        line = shlex.join(command) if len(command) > 1 else command[0]
        self._number += 1
        deadline_s = time.monotonic() + timeout_s
        try:
            self._socket.sendall(command_line(self._number, line))
        except OSError as error:
            raise MachineError(f"the machine has ended: {error}") from error
        while True:
            found = self._next(deadline_s, line)
            if isinstance(found, Reply) and found.number == self._number:
                break
        if check and found.code:
            raise MachineError(f"{line} ended with {found.code}:\n{found.text}")
        return found

    def _next(self, deadline_s: float, what: str) -> Ready | Reply:
        while not self._waiting:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise MachineError(f"waited too long for: {what}")
            self._socket.settimeout(left_s)
            try:
                content = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                raise MachineError(f"the machine has ended during: {what}: {error}") from error
            if not content:
                raise MachineError(f"the machine has ended during: {what}")
            self._waiting += self._replies.feed(content)
        return self._waiting.pop(0)
