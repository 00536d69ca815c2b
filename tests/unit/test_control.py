"""The control socket: requests with a file, and what a client makes of a daemon that closes early."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.errors import DaemonNotRunning
from edge_agent.transport import control
from edge_agent.transport.control import Call, ClientGone, ControlServer
from tests.support.processes import wait_until


def say(call: Call) -> None:
    """Answers with what is in the file that came along."""
    call.send("done", text="" if call.file is None else os.pread(call.file, 100, 0).decode())


@contextmanager
def serving(path: Path) -> Iterator[ControlServer]:
    server = ControlServer(path, {"say": say})
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(60)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_file_goes_along_with_a_request_and_is_closed_after_it(short_dir: Path) -> None:
    file = short_dir / "file"
    file.write_text("hello")
    with serving(short_dir / "c.sock"), file.open("rb") as stream:
        before = open_files()
        for _ in range(3):
            answers = control.call(short_dir / "c.sock", "say", file=stream.fileno(), timeout_s=60)
            assert [event["text"] for event in answers] == ["hello"]
        assert [event["text"] for event in control.call(short_dir / "c.sock", "say", timeout_s=60)] == [""]
        wait_until(lambda: open_files() <= before, 60, "the files to be closed")


def test_a_client_that_sends_files_without_end_is_dropped(short_dir: Path) -> None:
    with serving(short_dir / "c.sock"), (short_dir / "file").open("wb") as stream:
        before = open_files()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(short_dir / "c.sock"))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(10_000):
                    socket.send_fds(client, [b" "], [stream.fileno()])
        wait_until(lambda: open_files() <= before, 60, "the files to be closed")


def test_no_listener_is_a_daemon_that_is_not_running(short_dir: Path) -> None:
    with pytest.raises(DaemonNotRunning):
        next(control.call(short_dir / "c.sock", "say"))


def test_a_daemon_that_closes_early_is_not_one_that_is_not_running(short_dir: Path) -> None:
    """A command that took it for one did the work a second time, by itself."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "c.sock"))
        listener.listen(1)
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        much = "x" * (4 << 20)  # more than fits between the two
        assert list(control.call(short_dir / "c.sock", "say", timeout_s=60, text=much)) == []
        thread.join(60)


def test_looking_for_a_client_that_left_does_not_wait_for_one_that_is_silent() -> None:
    """A prompt whose first text took a moment had its answer held back for as long as a send may take: 30 s."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(600)
        call = Call(ours, {})
        look = threading.Thread(target=call.check, daemon=True)
        look.start()
        look.join(60)
        assert not look.is_alive()
        theirs.close()
        with pytest.raises(ClientGone):
            call.check()
