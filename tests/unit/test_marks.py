"""High-water marks: what they refuse, how they rise, and what is left of them when their file is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.cache import marks
from edge_agent.cache.marks import Mark, mark_of, note_active
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError
from edge_agent.package import trust
from edge_agent.package.trust import TrustDecision
from tests.support.committed import commit

KEY, OTHER = "5e" * 32, "07" * 32
SIGNED = TrustDecision(rule=trust.Rule.SHIPPED_WRAPPER, signed_by=KEY, unsigned_code=False, reason="a test")
NUMBERS = st.integers(1, 1_000)
TIMES = st.floats(0, 2e9)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state")
    store.create()
    return store


def add(
    store: Store, version: int, at_s: float | None, *, key: str = KEY, served: bool = True
) -> VersionRecord:
    record = replace(
        commit(store, version, decision=replace(SIGNED, signed_by=key)), packaged_at=at_s, served=served
    )
    with store.lock():
        store.rewrite(record)
    return record


def mark(store: Store, key: str = KEY) -> tuple[int, float]:
    found = mark_of(store, key=key, name="phi")
    return found.version, found.packaged_at


@given(NUMBERS, TIMES, NUMBERS, TIMES)
def test_only_an_older_package_under_a_higher_number_is_refused(
    known: int, known_at: float, version: int, at: float
) -> None:
    known_mark = Mark(key=KEY, name="phi", version=known, packaged_at=known_at)
    assert known_mark.refuses(version, at) == (version > known and at < known_at)
    assert not known_mark.refuses(known, at), "what was active is never refused"


@given(st.lists(st.tuples(NUMBERS, TIMES), max_size=8))
def test_what_became_active_is_never_refused_afterwards_and_the_number_never_falls(
    adopted: list[tuple[int, float]],
) -> None:
    found = Mark(key=KEY, name="phi")
    for version, at in adopted:
        before, allowed = found, found.refuses(version, at)
        found = found.raised(version, at)
        rises = allowed or at > before.packaged_at or not before.version
        assert found.version == (max(before.version, version) if rises else before.version)
        assert not found.refuses(version, at)
        assert found.packaged_at == (at if allowed else max(at, before.packaged_at))


def test_a_mark_rises_with_the_active_version_and_stays_when_an_older_one_comes_back(store: Store) -> None:
    assert mark(store) == (0, 0.0)
    for record in (add(store, 7, 700.0), add(store, 9, 900.0), add(store, 8, 800.0)):
        note_active(store, record)
    assert mark(store) == (9, 900.0)


def test_a_version_that_an_operator_allowed_lowers_the_time_that_counts(store: Store) -> None:
    note_active(store, add(store, 7, 700.0))
    note_active(store, add(store, 8, 300.0))
    assert mark(store) == (8, 300.0)


def test_the_active_package_under_a_higher_number_opens_no_way_for_the_numbers_between(store: Store) -> None:
    note_active(store, add(store, 7, 700.0))
    note_active(store, add(store, 9, 700.0))
    found = mark_of(store, key=KEY, name="phi")
    assert found.refuses(8, 300.0) and not found.refuses(9, 700.0)
    store.marks_file.unlink()
    assert mark_of(store, key=KEY, name="phi") == found, "made again from the cache"


def test_each_key_and_each_name_has_its_own(store: Store) -> None:
    note_active(store, add(store, 7, 700.0))
    note_active(store, add(store, 2, 200.0, key=OTHER))
    assert (mark(store), mark(store, OTHER)) == ((7, 700.0), (2, 200.0))
    assert mark_of(store, key=KEY, name="another").version == 0


def test_an_unsigned_version_leaves_no_mark(store: Store) -> None:
    note_active(store, add(store, 7, 700.0, key=""))
    assert not store.marks_file.exists()


def test_nothing_is_written_when_nothing_changes(store: Store) -> None:
    record = add(store, 7, 700.0)
    note_active(store, record)
    written = store.marks_file.stat().st_ino
    note_active(store, record)
    assert store.marks_file.stat().st_ino == written


def test_what_a_sync_found_out_meanwhile_counts(store: Store) -> None:
    """The daemon has read the record of an earlier release, and then a sync has looked into its MLmodel."""
    before = add(store, 7, None)
    with store.lock():
        store.rewrite(replace(before, packaged_at=700.0))
    note_active(store, before)
    assert mark(store) == (7, 700.0)


DAMAGE = [
    *(
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"format": 2, "marks": []}',
        b'{"format": 1, "marks": [{}]}',
        b"[" * 100_000,
    ),
    *(
        b'{"format": 1, "marks": [{"key": "%s", "name": "phi", "version": %s, "packaged_at": %s}]}'
        % (key, version, at)
        for key, version, at in (
            (b"x", b"1", b"1"),
            (KEY.encode(), b"Infinity", b"1"),
            (KEY.encode(), b"-1", b"1"),
            (KEY.encode(), b"1", b"NaN"),
            (KEY.encode(), b"1", b"1e999"),
        )
    ),
]


@pytest.mark.parametrize("damage", [None, *DAMAGE])
def test_a_lost_or_damaged_file_is_made_again_from_what_has_served(
    store: Store, damage: bytes | None
) -> None:
    add(store, 7, 700.0)
    add(store, 8, 650.0)
    add(store, 9, 900.0, served=False)
    note_active(store, add(store, 6, 600.0))
    if damage is None:
        store.marks_file.unlink()
    else:
        store.marks_file.write_bytes(damage)
        with pytest.raises(StoreError, match="damaged"):
            marks.parse(damage)
    assert mark(store) == (8, 700.0)
    note_active(store, add(store, 10, 1000.0))
    assert len(marks.parse(store.marks_file.read_bytes())) == 1
    assert mark(store) == (10, 1000.0)


def test_the_file_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "MAX_MARKS", 3)
    for number in range(5):
        note_active(store, add(store, number + 1, 1.0, key=f"{number:064x}"))
    found = marks.parse(store.marks_file.read_bytes())
    assert [one.version for one in found] == [3, 4, 5]
