"""Memory of this host and of processes, as the kernel counts it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
from pathlib import Path

from edge_agent.host import cgroup
from edge_agent.host.process_option import set_process_option

_NOT_KNOWN = 1 << 62
_STATUS_BYTES = 1 << 14
_M_ARENA_MAX = -8
_PR_SET_THP_DISABLE = 41
_HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def available_bytes() -> int:
    """Bytes that can be used without swapping, within this process's control groups.

    Source: proc(5) MemAvailable.
    """
    in_groups = cgroup.memory_left_bytes()
    host = _field(Path("/proc/meminfo"), "MemAvailable")
    limits = [limit for limit in (host, in_groups) if limit is not None]
    return min(limits, default=_NOT_KNOWN)


def total_bytes() -> int:
    """Bytes that this process could use if nothing else were running. Source: proc(5) MemTotal."""
    host, in_groups = _field(Path("/proc/meminfo"), "MemTotal"), cgroup.memory_limit_bytes()
    return min((limit for limit in (host, in_groups) if limit is not None), default=_NOT_KNOWN)


def resident_bytes(pid: int) -> int:
    """Bytes that a process has in memory now; 0 if it has ended. Source: proc(5) VmRSS."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS") or 0


def peak_bytes(pid: int) -> int:
    """The most bytes that a process has had in memory; 0 if it has ended. Source: proc(5) VmHWM."""
    return _field(Path(f"/proc/{pid}/status"), "VmHWM") or 0


def share_one_heap() -> None:
    """Keeps one heap of the C library for all threads of this process. Call it before there are any.

    By itself glibc gives each thread a heap, so that they need not wait for each other, and a heap keeps what its
    thread has needed once. Python's threads take turns as it is. Another C library has no such heaps.

    Source: mallopt(3), M_ARENA_MAX.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def huge_page_bytes(file: Path = _HUGE_PAGE) -> int:
    """Size of a huge page; 0 where the kernel has none.

    It has 2 MiB where a page has 4 KiB; 32 MiB with pages of 16 KiB, and 512 MiB with 64 KiB, as some kernels for
    aarch64 have them. Source: Documentation/admin-guide/mm/transhuge.rst.
    """
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def end_huge_pages() -> None:
    """Gives this process no more huge pages; those that it has stay.

    Where memory is in pieces, the kernel moves others' pages to make a huge one, while whoever touches it waits: worth
    it for weights, not for the keys and values of a prompt. A kernel that does not know this gives them as before.
    Source: prctl(2) PR_SET_THP_DISABLE.
    """
    with contextlib.suppress(OSError):
        set_process_option(_PR_SET_THP_DISABLE, 1)


class ProcessMemory:
    """Memory of a process of this user, even after that one has become unreadable to others, or confined.

    Where /proc hides the processes of others (`ProtectProc=invisible`, `hidepid`), it hides those as well that are
    not dumpable. What was opened before stays readable. Any thread.

    Args:
        pid: of a process that is dumpable now.
    """

    def __init__(self, pid: int) -> None:
        self._lock = threading.Lock()  # a number that was closed may be another file by now
        try:
            self._status: int | None = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # it has ended already
            self._status = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a process that reads its own memory must keep open."""
        return () if self._status is None else (self._status,)

    def resident_bytes(self) -> int:
        """Bytes that it has in memory now; 0 if it has ended."""
        return self._bytes("VmRSS")

    def peak_bytes(self) -> int:
        """The most bytes that it has had in memory; 0 if it has ended."""
        return self._bytes("VmHWM")

    def close(self) -> None:
        """May be called again."""
        with self._lock:
            if self._status is not None:
                os.close(self._status)
            self._status = None

    def _bytes(self, name: str) -> int:
        with self._lock:
            if self._status is None:
                return 0
            try:
                text = os.pread(self._status, _STATUS_BYTES, 0)
            except ProcessLookupError:
                return 0
        return _field_in(text.decode("ascii", "replace"), name) or 0


def _field(file: Path, name: str) -> int | None:
    try:
        return _field_in(file.read_text(encoding="ascii", errors="replace"), name)
    except OSError:
        return None


def _field_in(text: str, name: str) -> int | None:
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def children(pid: int) -> list[int]:
    """The running child processes of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may contain anything, spaces and parentheses included.
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)


class ReportedMemory:
    """Memory of a process of another user, which says it itself; nothing once that process has ended. Any thread.

    What comes from outside is bounded, and belongs to the process that the kernel names: another one that gets its
    process id later has said nothing. Source: pidfd_open(2).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid, self._process = 0, -1
        self._bytes = 0

    def note(self, pid: int, resident_bytes: object) -> None:
        """
        Args:
            pid: who says it; it runs.
            resident_bytes: as it came.
        """
        if not isinstance(resident_bytes, int) or not 1 < resident_bytes < _NOT_KNOWN:
            return
        with self._lock:
            if pid != self._pid or not self._runs():
                self._forget()
                try:
                    self._pid, self._process = pid, os.pidfd_open(pid)
                except OSError:  # it has ended, or lives where its number means nothing here
                    return
            self._bytes = resident_bytes

    def resident_bytes(self) -> int | None:
        """What it said last; None where no such process runs."""
        with self._lock:
            if not self._runs():
                self._forget()
                return None
            return self._bytes

    def _runs(self) -> bool:
        if self._process < 0:
            return False
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return not poll.poll(0)

    def _forget(self) -> None:
        if self._process >= 0:
            os.close(self._process)
        self._pid, self._process = 0, -1
