"""`learned.json`: remembered, bounded, and never trusted to be whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from edge_agent.serving.learned import MAX_ENTRIES, MAX_PEAKS, Learned


@pytest.fixture
def learned(tmp_path: Path) -> Learned:
    return Learned(tmp_path / "models" / "learned.json")


def test_what_was_noted_is_there_in_the_next_process(learned: Learned, tmp_path: Path) -> None:
    learned.note_threads("d1", "host", threads=2, tokens_per_s={1: 10.004, 2: 18.0})
    learned.note_peak("d1", "host", context_tokens=2048, peak_bytes=500)
    entry = Learned(tmp_path / "models" / "learned.json").of("d1", "host")
    assert (entry.threads, entry.tokens_per_s, entry.peaks) == (2, {1: 10.0, 2: 18.0}, {2048: 500})


def test_another_host_knows_nothing(learned: Learned) -> None:
    learned.note_threads("d1", "host", threads=2, tokens_per_s={2: 1.0})
    assert learned.of("d1", "other host").threads == 0


def test_a_peak_only_grows(learned: Learned) -> None:
    for peak in (500, 400, 600):
        learned.note_peak("d1", "host", context_tokens=256, peak_bytes=peak)
    assert learned.of("d1", "host").peaks == {256: 600}


def test_the_entries_noted_longest_ago_go_first(learned: Learned) -> None:
    for number in range(MAX_ENTRIES + 3):
        learned.note_peak(f"d{number}", "host", context_tokens=1, peak_bytes=1)
    learned.note_peak("d3", "host", context_tokens=1, peak_bytes=2)
    learned.note_peak("new", "host", context_tokens=1, peak_bytes=1)
    digests = [entry.digest for entry in learned.entries()]
    assert len(digests) == MAX_ENTRIES
    assert digests[-2:] == ["d3", "new"]
    assert "d4" not in digests


def test_the_contexts_of_one_version_are_bounded(learned: Learned) -> None:
    for tokens in range(1, MAX_PEAKS + 5):
        learned.note_peak("d1", "host", context_tokens=tokens, peak_bytes=1)
    assert set(learned.of("d1", "host").peaks) == set(range(5, MAX_PEAKS + 5))


def test_several_that_write_at_once_lose_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in a daemon: each model has one, the memory budget another."""
    monkeypatch.setattr("edge_agent.serving.learned._LOCK_WAIT_S", 600.0)
    file = tmp_path / "models" / "learned.json"
    begin = threading.Barrier(3)

    def write(number: int) -> None:
        own = Learned(file)
        begin.wait(60)
        for count in range(1, 11):
            own.note_peak(f"d{number}-{count}", "host", context_tokens=1, peak_bytes=count)
            own.note_peak("shared", "host", context_tokens=number + 1, peak_bytes=count)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Learned(file).entries()) == 31
    assert Learned(file).of("shared", "host").peaks == {1: 10, 2: 10, 3: 10}
    assert caplog.messages == []


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"format": 2, "entries": []}',
        b'{"format": 1, "entries": [{"digest": "d"}]}',
        b'{"format": 1, "entries": [{"digest": "d", "host": "h", "threads": -1, "tokens_per_s": {}, "peaks": {},'
        b' "noted_at": 1}]}',
        b'{"format": 1, "entries": [{"digest": "d", "host": "h", "threads": true, "tokens_per_s": {}, "peaks": {},'
        b' "noted_at": 1}]}',
        b"[" * 100_000,
        b" " * (1 << 19),
    ],
)
def test_a_damaged_file_is_an_empty_one_and_is_replaced(
    learned: Learned, tmp_path: Path, damage: bytes
) -> None:
    file = tmp_path / "models" / "learned.json"
    file.parent.mkdir()
    file.write_bytes(damage)
    assert learned.entries() == []
    learned.note_peak("d1", "host", context_tokens=1, peak_bytes=7)
    assert learned.of("d1", "host").peaks == {1: 7}


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    place = tmp_path / "models"
    place.write_text("a file where the folder should be")
    Learned(place / "learned.json").note_peak("d1", "host", context_tokens=1, peak_bytes=1)
