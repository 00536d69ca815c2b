"""Memory of other processes: what is read, what they say themselves, and nothing once they have ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.host.memory import ProcessMemory, ReportedMemory


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that runs until its stdin ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def test_what_a_process_reports_is_forgotten_with_its_end(process: subprocess.Popen[bytes]) -> None:
    memory = ReportedMemory()
    assert memory.resident_bytes() is None
    memory.note(process.pid, 5_000_000)
    memory.note(process.pid, 6_000_000)
    assert memory.resident_bytes() == 6_000_000
    process.kill()
    process.wait()
    assert memory.resident_bytes() is None
    memory.note(process.pid, 7_000_000)  # a late word of a process that is gone
    assert memory.resident_bytes() is None


def test_the_next_process_takes_the_place_of_the_one_before(process: subprocess.Popen[bytes]) -> None:
    memory = ReportedMemory()
    memory.note(process.pid, 5_000_000)
    memory.note(os.getpid(), 6_000_000)
    process.kill()
    process.wait()
    assert memory.resident_bytes() == 6_000_000
    before = open_files()
    for _ in range(3):
        memory.note(os.getpid(), 7_000_000)
    assert memory.resident_bytes() == 7_000_000
    assert open_files() <= before  # one of another test may be closed meanwhile


@pytest.mark.parametrize("said", [0, -1, True, 1 << 80, 1e9, "5000000", [5], None])
def test_what_is_no_number_of_bytes_is_not_believed(said: object) -> None:
    memory = ReportedMemory()
    memory.note(os.getpid(), said)
    assert memory.resident_bytes() is None


@pytest.mark.parametrize("pid", [0, -1])
def test_a_process_without_a_number_here_is_not_known(pid: int) -> None:
    memory = ReportedMemory()
    memory.note(pid, 5_000_000)
    assert memory.resident_bytes() is None


def test_the_memory_of_a_child_is_read_until_it_ends(process: subprocess.Popen[bytes]) -> None:
    memory = ProcessMemory(process.pid)
    assert memory.resident_bytes() > 0
    process.kill()
    process.wait()
    assert memory.resident_bytes() == 0
    memory.close()


@pytest.mark.parametrize(("before", "heaps"), [("", 4), ("share_one_heap()", 1)])
def test_the_threads_of_a_process_can_share_one_heap(before: str, heaps: int) -> None:
    program = f"""
import ctypes, threading
from edge_agent.host.memory import share_one_heap
{before}
libc = ctypes.CDLL(None)
all_there, written = threading.Barrier(4), threading.Event()

def allocate():
    libc.malloc(100)
    all_there.wait()
    written.wait()

threads = [threading.Thread(target=allocate) for _ in range(3)]
for thread in threads:
    thread.start()
all_there.wait()
libc.malloc_stats()
written.set()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stderr.count("Arena ") == heaps
