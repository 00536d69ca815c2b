"""Frames between daemon and runner: what is no frame is refused, however it is cut."""

import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import RunnerError
from edge_agent.runner import process, protocol
from edge_agent.runner.protocol import (
    Cancel,
    Checked,
    Delta,
    Done,
    Frame,
    FrameReader,
    Generate,
    Load,
    Loaded,
    Refused,
    Stop,
    Tried,
    Trying,
    with_system,
)

FRAMES: list[Frame] = [
    Load(
        folder="/m", context_tokens=64, max_tokens=8, threads=0, parallel=4, kv_bytes=1 << 20, system="Sing."
    ),
    Loaded(flavor="f", signature="chat", load_ms=1.5, parallel=4, system_refused="no such role"),
    Checked(),
    Generate(id="1.1", document={"prompt": "é\n\U0001f34e"}),
    Cancel(id="1.1"),
    Stop(),
    Delta(id="1.1", text="line\nbreak"),
    Done(id="1.1", finish_reason="stop", usage={"prompt_tokens": 1}, timings={"first_token_ms": 1.5}),
    Refused(id="1.1", code="bad_request", message="no"),
    Trying(prompt=3, of=8),
    Tried(failures=["golden prompt 1: no"], asked=2, tokens_per_s=0.0, memory_bytes=(1 << 62) - 1),
]
LARGEST = Delta(id="1.1", text="\U0001f34e" * protocol.MAX_DELTA_CHARACTERS)


@pytest.mark.parametrize("frame", [*FRAMES, LARGEST], ids=lambda frame: frame.type)
def test_a_frame_survives_the_way(frame: Frame) -> None:
    assert protocol.decode(protocol.encode(frame)) == frame


def test_a_number_that_is_not_finite_never_leaves() -> None:
    """The other end would take the line for no frame, and a runner would end."""
    with pytest.raises(ValueError, match="float"):
        protocol.encode(Generate(id="1.1", document={"response_format": {"minimum": float("inf")}}))


def test_the_configured_system_prompt_is_for_chats_without_one_only() -> None:
    user = {"role": "user", "content": "Hello"}
    system = {"role": "system", "content": "Be brief."}
    assert with_system({"messages": [user]}, "Be brief.") == {"messages": [system, user]}
    for role in ("system", "developer"):
        own = {"messages": [{"role": role, "content": "Sing."}, user]}
        assert with_system(own, "Be brief.") == own
    assert with_system({"prompt": "x"}, "Be brief.") == {"prompt": "x"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"type": "explode"}',
        b'{"type": "delta", "id": "1"}',
        b'{"type": "delta", "id": "1", "text": 3}',
        b'{"type": "delta", "id": "1", "text": "x", "more": 1}',
        b'{"type": "done", "id": "1", "finish_reason": "stop", "usage": {"a": "b"}, "timings": {}}',
        b'{"type": "done", "id": "1", "finish_reason": "stop", "usage": {}, "timings": {"a": NaN}}',
        b'{"type": "done", "id": "1", "finish_reason": "stop", "usage": {}, "timings": {"a": 1e999}}',
        b'{"type": ["delta"]}',
        b"\x80\x04\x95",
    ],
)
def test_a_line_that_is_no_frame_is_refused(line: bytes) -> None:
    with pytest.raises(RunnerError):
        protocol.decode(line)


DONE = Done(id="1", finish_reason="stop", usage={}, timings={})
LOADED = Loaded(flavor="f", signature="chat", load_ms=0)
TRIED = Tried(failures=[], asked=0, tokens_per_s=0, memory_bytes=0)


@pytest.mark.parametrize(
    ("frame", "field", "value"),
    [
        (DONE, "usage", {"completion_tokens": -1}),
        (DONE, "usage", {"completion_tokens": 1 << 31}),
        (DONE, "usage", {"completion_tokens": True}),
        (DONE, "usage", {"x" * 5000: 1}),
        (DONE, "usage", {str(number): 1 for number in range(257)}),
        (DONE, "timings", {"total_ms": -1.0}),
        (DONE, "timings", {"total_ms": 10**400}),
        (DONE, "timings", {"total_ms": 1e300}),
        (DONE, "finish_reason", "x" * 5000),
        (TRIED, "tokens_per_s", -(10**400)),
        (TRIED, "tokens_per_s", False),
        (TRIED, "memory_bytes", 1 << 62),
        (TRIED, "memory_bytes", -1),
        (TRIED, "failures", ["x"] * 257),
        (TRIED, "failures", ["x" * 5000]),
        (LOADED, "parallel", 1 << 31),
        (LOADED, "load_ms", -0.5),
        (LOADED, "flavor", "x" * 5000),
        (LOADED, "missing_walls", {"files": "x" * 5000}),
        (Delta(id="1", text=""), "text", "x" * (protocol.MAX_DELTA_CHARACTERS + 1)),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(frame: Frame, field: str, value: object) -> None:
    whole = json.loads(protocol.encode(frame))
    protocol.decode(json.dumps(whole).encode())
    with pytest.raises(RunnerError, match="wrong fields"):
        protocol.decode(json.dumps({**whole, field: value}).encode())


@given(st.lists(st.integers(1, 40), max_size=60))
def test_frames_are_found_however_the_bytes_are_cut(cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = b"".join(protocol.encode(frame) for frame in FRAMES)
        reader, found = FrameReader(ours, limit_bytes=protocol.MAX_FRAME_BYTES), []
        for cut in [*cuts, len(data)]:
            theirs.sendall(data[:cut])
            data = data[cut:]
            while (frame := reader.read(0)) is not None:
                found.append(frame)
        assert found == FRAMES


def test_a_line_without_end_is_refused_at_the_bound() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x" * 2000)
        with pytest.raises(RunnerError, match="1000 bytes"):
            FrameReader(ours, limit_bytes=1000).read(1)


def test_a_frame_that_never_ends_takes_no_longer_than_one_that_never_comes() -> None:
    """Each byte of it would otherwise give it the whole time once more."""
    ours, theirs = socket.socketpair()
    stopped = threading.Event()

    def drip() -> None:
        for _ in range(600):
            if stopped.wait(0.05):
                return
            theirs.sendall(b" ")

    with ours, theirs:
        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        try:
            assert FrameReader(ours, limit_bytes=1000).read(0.2) is None
            took_s = time.monotonic() - began
        finally:
            stopped.set()
            thread.join()
    assert took_s < 25, "all of it takes 30 s"


def test_a_closed_connection_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(EOFError):
        FrameReader(ours, limit_bytes=1000).read(1)


@pytest.mark.parametrize(
    ("frame", "limit_bytes"),
    [
        (Delta(id="1", text="x" * protocol.MAX_REPLY_BYTES), protocol.MAX_REPLY_BYTES),
        (Generate(id="1", document={"prompt": "x" * protocol.MAX_FRAME_BYTES}), protocol.MAX_FRAME_BYTES),
    ],
    ids=["reply", "request"],
)
def test_a_frame_over_the_bound_is_refused_at_the_sender(frame: Frame, limit_bytes: int) -> None:
    with pytest.raises(RunnerError, match=f"at most {limit_bytes} are"):
        protocol.encode(frame)


@pytest.mark.parametrize("prompts", [[], ["a.1.1"], ["a.1.1", "b-c_d.2.1"]])
def test_whose_turn_it_is_can_be_read_from_the_shared_memory(prompts: list[str]) -> None:
    memory = protocol.encode_turn(prompts)
    assert len(memory) == protocol.TURN_BYTES
    assert protocol.decode_turn(memory) == set(prompts)


def test_whatever_stands_in_the_shared_memory_is_no_error() -> None:
    assert protocol.decode_turn(b"\xff\x00 \n" * 1000)
    assert protocol.decode_turn(b"") == set()
    assert len(protocol.encode_turn(["x" * 90] * 100)) == protocol.TURN_BYTES


@pytest.mark.parametrize(
    ("frames", "heard"),
    [
        ([TRIED], 0),
        ([Trying(prompt=1, of=2), Trying(prompt=2, of=2), TRIED], 2),
        ([Trying(prompt=2, of=2), TRIED], 0),
        ([Trying(prompt=1, of=2), Trying(prompt=1, of=2), TRIED], 1),
        ([Trying(prompt=1, of=0), TRIED], 0),
        ([Trying(prompt=1, of=protocol.MAX_GOLDEN + 2), TRIED], 0),
        ([Trying(prompt=n, of=65) for n in range(1, 100)], protocol.MAX_GOLDEN + 1),
        ([None], 0),
    ],
)
def test_a_gate_says_each_golden_prompt_once_and_in_order(frames: list[Frame | None], heard: int) -> None:
    """What comes instead is not `Tried`, and ends the runner."""
    told: list[tuple[int, int]] = []
    last = process._gone_through(iter(frames).__next__, lambda *which: told.append(which))
    assert len(told) == heard
    assert last is frames[heard]
