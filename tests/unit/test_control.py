"""The control socket: requests with a file, and what a client makes of a daemon that closes early."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import BadRequest, DaemonNotRunning, EdgeAgentError, PromptError
from edge_agent.transport import control
from edge_agent.transport.control import Call, ClientGone, ControlServer
from tests.support.processes import wait_until


def say(call: Call) -> None:
    """Answers with what is in the file that came along."""
    call.send("done", text="" if call.file is None else os.pread(call.file, 100, 0).decode())


def stumble(call: Call) -> None:
    raise ValueError("a text that may be a prompt")


def refuse(call: Call) -> None:
    raise BadRequest("'a text that may be a prompt' is no field")


@contextmanager
def serving(path: Path, **bounds: int) -> Iterator[ControlServer]:
    server = ControlServer(path, {"say": say, "stumble": stumble, "refuse": refuse}, **bounds)
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


def test_a_refusal_is_in_the_log_with_its_code_and_without_its_words(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=control.__name__)
    with serving(short_dir / "c.sock"):
        (refused,) = control.call(short_dir / "c.sock", "refuse", timeout_s=60)
        (unknown,) = control.call(short_dir / "c.sock", "a text that may be a prompt", timeout_s=60)
    assert [refused["code"], unknown["code"]] == ["bad_request", "internal"]
    assert [record.getMessage() for record in caplog.records] == [
        "control request refused code=bad_request op=refuse",
        "control request refused code=internal op=",
    ]


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


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        yield client


def answer_of(client: socket.socket) -> list[dict[str, Any]]:
    """Everything until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(1 << 16):
            data += chunk
    return [json.loads(line) for line in data.splitlines()]


MALFORMED = {
    "no JSON": b"x\n",
    "no object": b"[]\n",
    "no UTF-8": b"\x80\x04\x95\n",
    "a deadline that is no number": b'{"op": "say", "deadline_ms": NaN}\n',
    "a deadline without an end": b'{"op": "say", "deadline_ms": Infinity}\n',
    "a deadline beyond all numbers": b'{"op": "say", "deadline_ms": 1e999}\n',
    "nested too deep": b'{"a":' * 100_000 + b"\n",
    "no operation": b"{}\n",
    "an unknown operation": b'{"op": "explode"}\n',
    "an operation that is no text": b'{"op": {"say": 1}}\n',
    "half a line": b'{"op": "say"',
    "an operation that stumbles": b'{"op": "stumble"}\n',
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED.keys())
def test_every_malformed_call_gets_one_error_event(short_dir: Path, line: bytes) -> None:
    with serving(short_dir / "c.sock"), connected(short_dir / "c.sock") as client:
        client.sendall(line)
        client.shutdown(socket.SHUT_WR)
        (event,) = answer_of(client)
    assert event["event"] == "error"
    assert event["message"]
    assert "prompt" not in event["message"], "what nobody foresaw may quote one"


def test_an_unknown_operation_is_told_from_other_errors(short_dir: Path) -> None:
    """So do daemons to come: the command that asks may be the newer one."""
    with serving(short_dir / "c.sock"):
        (event,) = control.call(short_dir / "c.sock", "explode", timeout_s=60)
        assert "does not know 'explode'" in str(control.reported(event, among=(PromptError,)))


def test_a_request_over_the_bound_is_refused_while_it_comes(short_dir: Path) -> None:
    """Each connection may hold as much in memory, and a user has many."""
    with (
        serving(short_dir / "c.sock", max_request_bytes=1000),
        connected(short_dir / "c.sock") as client,
        contextlib.suppress(BrokenPipeError),
    ):
        client.sendall(b" " * 1001)  # no end of a line
        (event,) = answer_of(client)
    assert "more than 1000 bytes" in event["message"]


@pytest.mark.parametrize("payload_bytes", [256, 102_400, 1 << 20])
@pytest.mark.parametrize("text", ["x", "\n", '"', "é", "语", "😀"])
def test_the_bound_holds_each_prompt_that_the_settings_allow(payload_bytes: int, text: str) -> None:
    prompt = text * (payload_bytes // len(text.encode()))
    line = control.encode({"op": "chat", "body": prompt, "surface": "completion", "key": "\U0010ffff" * 255})
    assert len(line) <= control.request_bytes(payload_bytes)


def test_a_file_that_is_no_open_file_gets_an_error_event(short_dir: Path) -> None:
    (short_dir / "file").touch()
    with serving(short_dir / "c.sock"):
        name = os.open(short_dir / "file", os.O_PATH)
        try:
            (event,) = control.call(short_dir / "c.sock", "say", file=name, timeout_s=60)
        finally:
            os.close(name)
    assert event["event"] == "error"


@pytest.mark.parametrize("keeps_sending", [False, True], ids=["silent", "a byte now and then"])
def test_a_request_has_one_time_limit_for_the_whole_of_it(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, keeps_sending: bool
) -> None:
    monkeypatch.setattr(control, "_REQUEST_TIMEOUT_S", 0.5)
    with serving(short_dir / "c.sock"), connected(short_dir / "c.sock") as client:
        ended = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while keeps_sending and not ended.wait(0.05):
                    client.send(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            (event,) = answer_of(client)
        finally:
            ended.set()
            dripping.join(60)
    assert "no whole request came" in event["message"]


def test_one_user_cannot_take_all_seats_and_root_has_its_own() -> None:
    seats = control._Seats()
    assert [seats.take(1000) for _ in range(control.MAX_OF_ONE_USER + 1)].count(
        True
    ) == control.MAX_OF_ONE_USER
    assert seats.take(1001)
    others = iter(range(2000, 3000))
    while seats.take(next(others)):
        pass  # every seat but root's is taken now
    assert seats.take(0)
    seats.leave(1001)
    assert seats.take(1002)
    assert not seats.take(1003)


def test_idle_connections_of_a_user_lock_out_nobody_else(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = {"user": 1000}
    monkeypatch.setattr(control, "_REQUEST_TIMEOUT_S", 600.0)
    monkeypatch.setattr(control, "_peer_of", lambda connection: (1, caller["user"]))
    with serving(short_dir / "c.sock"), contextlib.ExitStack() as idle:
        for _ in range(control.MAX_OF_ONE_USER):
            idle.enter_context(connected(short_dir / "c.sock"))
        (event,) = control.call(short_dir / "c.sock", "say", timeout_s=60)
        assert "too many" in event["message"]
        for caller["user"] in (0, 1001):
            (event,) = control.call(short_dir / "c.sock", "say", timeout_s=60)
            assert event["event"] == "done"
        idle.close()
        caller["user"] = 1000
        wait_until(
            lambda: (
                [event["event"] for event in control.call(short_dir / "c.sock", "say", timeout_s=60)]
                == ["done"]
            ),
            60,
            "the seats to be free again",
        )


def test_a_host_without_another_thread_refuses_a_client_and_ends_nothing(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if thread.name == "control-connection":
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving(short_dir / "c.sock"):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", failing)
            for _ in range(control.MAX_OF_ONE_USER + 1):
                assert [event["code"] for event in control.call(short_dir / "c.sock", "say")] == [
                    "queue_full"
                ]
        assert [event["event"] for event in control.call(short_dir / "c.sock", "say")] == ["done"]


def test_a_host_without_another_descriptor_takes_a_client_later(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_TAKE_AGAIN_S", 0.01)
    refusals = iter([OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 3)
    accept = socket.socket.accept

    def failing(listener: socket.socket) -> Any:
        for refusal in refusals:
            raise refusal
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    with serving(short_dir / "c.sock"):
        assert [event["event"] for event in control.call(short_dir / "c.sock", "say")] == ["done"]
    assert list(refusals) == []


def test_the_kernel_says_who_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert control._peer_of(ours) == (os.getpid(), os.geteuid())
        assert control.Call(ours, {}).process == os.getpid()


def test_a_daemon_whose_queue_is_full_is_waited_for_and_is_not_one_that_is_not_running(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(short_dir / "c.sock"))
        listener.listen(1)
        with pytest.raises(BlockingIOError):  # the next ones wait in the queue until it is full
            while True:
                waiting.enter_context(connected(short_dir / "c.sock"))
        monkeypatch.setattr(control, "_CONNECT_S", 0.2)
        with pytest.raises(EdgeAgentError, match="too busy") as refused:
            next(control.call(short_dir / "c.sock", "say"))
        assert type(refused.value) is EdgeAgentError, (
            "a command that took it for stopped would do the work itself"
        )
        monkeypatch.setattr(control, "_CONNECT_S", 60.0)
        answered: list[dict[str, Any]] = []
        client = threading.Thread(
            target=lambda: answered.extend(control.call(short_dir / "c.sock", "say", timeout_s=60))
        )
        client.start()
        waiting.close()
        listener.settimeout(60)
        while b"say" not in (accepted := listener.accept()[0]).recv(100):
            accepted.close()
        with accepted:
            accepted.sendall(b'{"event": "done"}\n')
        client.join(60)
        assert answered == [{"event": "done"}]


def test_no_listener_is_a_daemon_that_is_not_running(short_dir: Path) -> None:
    with pytest.raises(DaemonNotRunning) as caught:
        next(control.call(short_dir / "c.sock", "say"))
    assert "--config FILE" in caught.value.remedy  # a daemon with other settings may well be running


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
