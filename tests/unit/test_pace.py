"""The cap on bandwidth, and when a transfer has stalled: arithmetic, on a clock that nobody waits for."""

from __future__ import annotations

import pytest

from edge_agent.sync.pace import CHUNK_BYTES, MIN_BYTES_PER_TIMEOUT, Pace, RequestGap, StallLimit
from tests.support.clock import ScriptedClock


def test_the_cap_is_kept_to_the_byte() -> None:
    time = ScriptedClock()
    pace = Pace(total_bytes=10_000_000, max_bytes_per_s=500_000, clock=time.clock)
    for _ in range(160):
        pace.took(pace.chunk_bytes)
    assert time.now_s == pytest.approx(160 * 62_500 / 500_000)
    assert pace.bytes_per_s == pytest.approx(500_000)


def test_without_a_cap_nobody_waits() -> None:
    time = ScriptedClock()
    pace = Pace(total_bytes=CHUNK_BYTES, clock=time.clock)
    pace.took(pace.chunk_bytes)
    assert time.slept == []


def test_bytes_that_come_slower_than_the_cap_are_not_held_back() -> None:
    time = ScriptedClock()
    pace = Pace(total_bytes=1_000, max_bytes_per_s=100, clock=time.clock)
    for _ in range(10):
        time.pass_by(2)
        pace.took(100)
    assert time.slept == []


def test_what_an_hour_of_silence_left_unused_comes_back_as_one_second_of_it() -> None:
    time = ScriptedClock()
    pace = Pace(total_bytes=10_000, max_bytes_per_s=100, clock=time.clock)
    time.pass_by(3_600)
    for _ in range(5):
        pace.took(100)
    assert sum(time.slept) == pytest.approx(4)


@pytest.mark.parametrize(
    ("max_bytes_per_s", "chunk_bytes"),
    [(0, CHUNK_BYTES), (1, 4_096), (100_000, 12_500), (1 << 30, CHUNK_BYTES)],
)
def test_a_low_cap_takes_small_chunks(max_bytes_per_s: int, chunk_bytes: int) -> None:
    assert Pace(total_bytes=1, max_bytes_per_s=max_bytes_per_s).chunk_bytes == chunk_bytes


def test_the_time_left_counts_what_is_missing_at_the_rate_so_far() -> None:
    time = ScriptedClock()
    pace = Pace(total_bytes=1_000, clock=time.clock, resumed_bytes=400)
    assert pace.eta_s is None
    time.pass_by(10)
    pace.took(100)
    assert pace.eta_s == pytest.approx(50)
    pace.took(900)  # more than was expected
    assert pace.eta_s == 0


# --- Stalled -------------------------------------------------------------------------------------------


def came(limit: StallLimit, time: ScriptedClock, *, bytes_each: int, after_s: float, times: int) -> None:
    def read() -> bytes:
        time.pass_by(after_s)
        return bytes(bytes_each)

    for _ in range(times):
        assert len(limit.wait_for(read)) == bytes_each


@pytest.mark.parametrize(("reads", "is_over"), [(3, False), (4, True)])
def test_a_byte_now_and_then_is_a_stall_once_the_timeout_is_over(reads: int, is_over: bool) -> None:
    time = ScriptedClock()
    limit = StallLimit(30, clock=time.clock)
    came(limit, time, bytes_each=1, after_s=10, times=reads)
    assert limit.is_over == is_over
    assert (limit.came_bytes, limit.waited_s) == (reads, reads * 10)


def test_a_slow_line_that_moves_never_stalls() -> None:
    time = ScriptedClock()
    limit = StallLimit(30, clock=time.clock)
    for _ in range(100):
        came(limit, time, bytes_each=MIN_BYTES_PER_TIMEOUT // 4, after_s=7, times=4)
        assert not limit.is_over


def test_what_is_done_between_two_reads_is_no_wait_for_the_server() -> None:
    time = ScriptedClock()
    limit = StallLimit(30, clock=time.clock)
    for _ in range(10):
        came(limit, time, bytes_each=1, after_s=1, times=1)
        time.pass_by(3_600)  # a disk, or the cap
    assert not limit.is_over


# --- Requests ------------------------------------------------------------------------------------------


def test_requests_start_a_gap_apart_and_the_first_one_at_once() -> None:
    time, starts = ScriptedClock(), []
    gap = RequestGap(1.0, clock=time.clock)
    for took_s in (0.1, 0.4, 0.0, 0.0):
        gap.wait()
        starts.append(time.now_s)
        time.pass_by(took_s)
    assert starts == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_a_request_that_takes_longer_than_the_gap_is_followed_at_once_and_nothing_is_made_up_for() -> None:
    time, starts = ScriptedClock(), []
    gap = RequestGap(1.0, clock=time.clock)
    for took_s in (30.0, 0.0, 0.0):
        gap.wait()
        starts.append(time.now_s)
        time.pass_by(took_s)
    assert starts == [0.0, 30.0, 31.0]


def test_without_a_gap_no_request_waits() -> None:
    time = ScriptedClock()
    gap = RequestGap(0.0, clock=time.clock)
    for _ in range(3):
        gap.wait()
    assert time.slept == []
