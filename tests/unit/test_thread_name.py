"""The names of threads, as the kernel shows them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from edge_agent.host.thread_name import name_this_thread


@pytest.mark.parametrize(
    ("name", "shown"), [("updates", "updates"), ("dispatcher-assistant", "dispatcher-assi"), ("", "")]
)
def test_a_thread_has_the_first_fifteen_bytes_of_its_name_and_the_others_keep_theirs(
    name: str, shown: str
) -> None:
    seen = []

    def look() -> None:
        name_this_thread(name)
        seen.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())

    before = Path("/proc/self/comm").read_text()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [f"{shown}\n"]
    assert Path("/proc/self/comm").read_text() == before
