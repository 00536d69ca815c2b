"""What the environment of a runner does to the process that gets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.host import memory
from edge_agent.runner.process import child_environment

ROOT = Path(__file__).parents[2]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FLAGS_OF_A_LARGE_ALLOCATION = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
address = libc.malloc(ctypes.c_size_t(64 << 20))
inside = False
for line in open("/proc/self/smaps"):
    first, *_ = line.split()
    if not first.endswith(":"):
        start, end = (int(part, 16) for part in first.split("-"))
        inside = start <= address < end
    elif inside and first == "VmFlags:":
        print(line)
"""


END = """
from pathlib import Path
from edge_agent.host import memory
memory.end_huge_pages()
print([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("THP_enabled")])
"""


def flags_of_a_large_allocation(environment: dict[str, str]) -> set[str]:
    """What /proc/self/smaps says of 64 MiB in a process with that environment."""
    command = [sys.executable, "-c", FLAGS_OF_A_LARGE_ALLOCATION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    _, *flags = done.stdout.split()
    return set(flags)


def test_a_runner_asks_for_huge_pages_where_the_kernel_gives_them_on_request(tmp_path: Path) -> None:
    on_request = HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text()
    flags = flags_of_a_large_allocation(child_environment(tmp_path))
    assert {"rd", "wr"} <= flags
    assert "hg" in flags or not on_request
    assert "hg" not in flags_of_a_large_allocation({"PATH": os.environ["PATH"]}), (
        "it is this variable's doing"
    )


@pytest.mark.parametrize(
    "huge_page, asks", [("2097152\n", True), ("33554432\n", True), ("536870912\n", False)]
)
def test_a_runner_asks_for_no_page_that_is_as_large_as_a_model(
    huge_page: str, asks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "hpage_pmd_size"
    file.write_text(huge_page)
    size_bytes = memory.huge_page_bytes(file)
    assert size_bytes == int(huge_page) and memory.huge_page_bytes(tmp_path / "absent") == 0
    monkeypatch.setattr(memory, "huge_page_bytes", lambda: size_bytes)
    assert ("GLIBC_TUNABLES" in child_environment(tmp_path)) is asks


def test_a_process_gets_no_more_huge_pages_once_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", END], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == r"['THP_enabled:\t0']"
