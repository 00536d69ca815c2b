"""Frames between daemon and runner: what is no frame is refused, however it is cut."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import RunnerError
from edge_agent.runner import protocol
from edge_agent.runner.protocol import (
    Cancel,
    Delta,
    Done,
    Frame,
    FrameReader,
    Generate,
    Load,
    Loaded,
    Refused,
    Stop,
    with_system,
)

FRAMES: list[Frame] = [
    Load(
        folder="/m", context_tokens=64, max_tokens=8, threads=0, parallel=4, kv_bytes=1 << 20, system="Sing."
    ),
    Loaded(flavor="f", signature="chat", load_ms=1.5, parallel=4, system_refused="no such role"),
    Generate(id="1.1", document={"prompt": "é\n\U0001f34e"}),
    Cancel(id="1.1"),
    Stop(),
    Delta(id="1.1", text="line\nbreak"),
    Done(id="1.1", finish_reason="stop", usage={"prompt_tokens": 1}, timings={"first_token_ms": 1.5}),
    Refused(id="1.1", code="bad_request", message="no"),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame.type)
def test_a_frame_survives_the_way(frame: Frame) -> None:
    assert protocol.decode(protocol.encode(frame)) == frame


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


@given(st.lists(st.integers(1, 40), max_size=60))
def test_frames_are_found_however_the_bytes_are_cut(cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = b"".join(protocol.encode(frame) for frame in FRAMES)
        reader, found = FrameReader(ours), []
        for cut in [*cuts, len(data)]:
            theirs.sendall(data[:cut])
            data = data[cut:]
            while (frame := reader.read(0)) is not None:
                found.append(frame)
        assert found == FRAMES


def test_a_line_without_end_is_refused_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x" * 2000)
        with pytest.raises(RunnerError, match="1000 bytes"):
            FrameReader(ours).read(1)


def test_a_closed_connection_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(EOFError):
        FrameReader(ours).read(1)


def test_an_unencodable_frame_is_refused_at_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 100)
    with pytest.raises(RunnerError):
        protocol.encode(Delta(id="1", text=json.dumps("x" * 200)))


@pytest.mark.parametrize("prompts", [[], ["a.1.1"], ["a.1.1", "b-c_d.2.1"]])
def test_whose_turn_it_is_can_be_read_from_the_shared_memory(prompts: list[str]) -> None:
    memory = protocol.encode_turn(prompts)
    assert len(memory) == protocol.TURN_BYTES
    assert protocol.decode_turn(memory) == set(prompts)


def test_whatever_stands_in_the_shared_memory_is_no_error() -> None:
    assert protocol.decode_turn(b"\xff\x00 \n" * 1000)
    assert protocol.decode_turn(b"") == set()
    assert len(protocol.encode_turn(["x" * 90] * 100)) == protocol.TURN_BYTES
