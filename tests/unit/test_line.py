"""What a sync may take of the line, and the count of what came: on disk, whatever ends the process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from edge_agent.cache import line_use
from edge_agent.cache.line_use import MAX_QUARTERS, QUARTER_S
from edge_agent.cache.staging import Staging, staging
from edge_agent.cache.store import Store
from edge_agent.errors import LinkHeld, StoreError, TransportError
from edge_agent.package.manifest import ManifestFile
from edge_agent.sync.fetch import fetch
from edge_agent.sync.line import Line, within_bounds
from edge_agent.sync.mirrors import Mirrors
from edge_agent.sync.mirrors.left_alone import LeftAlone
from edge_agent.sync.mirrors.places import FolderMirror
from edge_agent.sync.pace import Pace
from edge_agent.sync.protocol import LinkJob
from tests.support.clock import ScriptedClock
from tests.support.flaky_package import FlakyPackage, Give

CONTENT = random.Random(5).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NOON = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    made.create()
    return made


@pytest.fixture
def place(store: Store) -> Iterator[Staging]:
    with staging(store, "assistant", 1) as taken:
        yield taken


def used(store: Store) -> int:
    return line_use.used_bytes(store, lambda at_s: True)


def line_of(store: Store, link: LinkJob, clock: ScriptedClock | None = None) -> Line:
    time = clock or ScriptedClock()
    return Line(link, book=partial(line_use.add, store), clock=lambda: NOON + time.now_s)


def run(place: Staging, package: FlakyPackage, line: Line, *, sha256: str | None = SHA256) -> ManifestFile:
    pace = Pace(total_bytes=len(CONTENT), clock=ScriptedClock().clock, line=line)
    return fetch(package, place, path="file", size_bytes=len(CONTENT), sha256=sha256, pace=pace)


# --- Bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["promised", "unknown"])
def test_a_fetch_that_reaches_its_bound_stops_and_is_gone_on_with(
    store: Store, place: Staging, sha256: str | None
) -> None:
    package = FlakyPackage(CONTENT, [Give(etag='"1"')])
    with pytest.raises(LinkHeld):
        run(place, package, line_of(store, LinkJob(allowed_bytes=25_000)), sha256=sha256)
    part = place.part(path="file", sha256=sha256)
    assert part.read_bytes() == CONTENT[:30_000], "a piece that came is kept"
    run(place, package, line_of(store, LinkJob(allowed_bytes=100_000)), sha256=sha256)
    assert package.offsets == [0, 30_000]
    assert place.verified(SHA256).read_bytes() == CONTENT


def test_a_bound_that_is_reached_with_the_last_byte_holds_nothing(store: Store, place: Staging) -> None:
    run(place, FlakyPackage(CONTENT, [Give()]), line_of(store, LinkJob(allowed_bytes=100_000)))
    assert place.verified(SHA256).exists()


def test_nothing_is_asked_for_where_nothing_is_allowed(store: Store, place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give()])
    with pytest.raises(LinkHeld):
        run(place, package, line_of(store, LinkJob(allowed_bytes=0)))
    assert package.offsets == []


@pytest.mark.parametrize("moved_s", [100.0, -400.0], ids=["the window ends", "the clock is set back"])
def test_a_window_holds_for_the_clock_as_it_is_then(store: Store, place: Staging, moved_s: float) -> None:
    time = ScriptedClock()
    link = LinkJob(since_s=NOON - 300, until_s=NOON + 60)
    package = FlakyPackage(CONTENT, [Give(count=50_000, breaks=True), Give()])
    line = line_of(store, link, time)
    pace = Pace(total_bytes=len(CONTENT), clock=ScriptedClock(lambda: time.pass_by(moved_s)).clock, line=line)
    with pytest.raises(LinkHeld):
        fetch(package, place, path="file", size_bytes=len(CONTENT), sha256=SHA256, pace=pace)
    assert package.offsets == [0], "it was not asked for again after the wait"
    assert place.bytes_of(place.part(path="file", sha256=SHA256)) == 50_000


def test_a_file_that_comes_whole_only_is_not_begun_where_the_rest_of_the_day_is_too_small(
    store: Store, place: Staging
) -> None:
    package = FlakyPackage(CONTENT, [Give()], whole_files=True)
    with pytest.raises(LinkHeld, match="100000 bytes"):
        run(place, package, line_of(store, LinkJob(allowed_bytes=99_999, ahead_bytes=1)))
    assert package.offsets == []
    run(place, package, line_of(store, LinkJob(allowed_bytes=100_000, ahead_bytes=1)))


def test_a_held_fetch_says_what_is_missing_and_a_whole_version_asks_nobody(store: Store) -> None:
    told: list[int] = []
    closed = line_of(store, LinkJob(allowed_bytes=0))
    with (
        pytest.raises(LinkHeld),
        within_bounds(closed, ask=True, left=lambda: {"a": 70, "b": 0}, tell=told.append),
    ):
        pytest.fail("nothing may be changed for it")
    assert told == [70]
    with within_bounds(closed, ask=True, left=dict, tell=told.append):
        pass
    assert told == [70]


def test_a_mirror_gives_at_any_time_and_uses_no_line(store: Store, place: Staging, tmp_path: Path) -> None:
    package = FlakyPackage(CONTENT, [Give()])
    line = line_of(store, LinkJob(allowed_bytes=0, ahead_bytes=1))
    stick = tmp_path / "stick" / "sha256"
    stick.mkdir(parents=True)
    mirror = FolderMirror(f"{stick.parent.as_uri()}/")
    clock = ScriptedClock().clock
    mirrors = Mirrors([mirror], left_alone=LeftAlone(tmp_path / "left", (mirror.url,)), clock=clock)
    assert mirrors.has_usable

    def fetch_once() -> None:
        pace = Pace(total_bytes=len(CONTENT), clock=clock, line=line)
        size = len(CONTENT)
        fetch(package, place, path="file", size_bytes=size, sha256=SHA256, pace=pace, mirrors=mirrors)

    with pytest.raises(LinkHeld):
        fetch_once()
    assert package.offsets == [], "the registry was not asked"
    (stick / SHA256).write_bytes(CONTENT)
    fetch_once()
    assert place.verified(SHA256).read_bytes() == CONTENT
    line.settle()
    assert used(store) == 0


def test_where_mirrors_may_give_the_files_the_line_is_not_asked_before(store: Store) -> None:
    closed = line_of(store, LinkJob(allowed_bytes=0))
    with within_bounds(closed, ask=False, left=lambda: {"a": 70}, tell=lambda missing: None):
        pass


# --- The count -----------------------------------------------------------------------------------------


def test_every_byte_counts_whatever_becomes_of_it(store: Store, place: Staging) -> None:
    line = line_of(store, LinkJob(allowed_bytes=10**6, ahead_bytes=1))
    answers: list[Give | Exception] = [
        Give(count=40_000, breaks=True),
        Give(restart=True, count=40_000, breaks=True),
        TransportError("down"),
    ]
    with pytest.raises(TransportError):
        run(place, FlakyPackage(CONTENT, answers), line)
    line.settle()
    assert used(store) == 80_000


def test_bytes_are_on_disk_before_they_come(store: Store) -> None:
    line = line_of(store, LinkJob(allowed_bytes=10**6, ahead_bytes=5_000))
    line.check()
    for come in range(0, 50_000, 700):
        assert used(store) >= come, "a power cut now counts too much, not too little"
        assert used(store) <= come + 5_000 + 700
        line.took(700)
    line.settle()
    line.settle()
    assert used(store) == 700 * len(range(0, 50_000, 700))


def test_a_file_that_comes_whole_is_counted_before_it_is_begun(store: Store) -> None:
    line = line_of(store, LinkJob(allowed_bytes=10**6, ahead_bytes=10))
    line.check(at_once_bytes=60_000)
    assert used(store) >= 60_000
    line.took(20_000)
    line.settle()
    assert used(store) == 20_000


def test_where_nobody_counts_nothing_is_written(store: Store) -> None:
    line = line_of(store, LinkJob())
    line.check()
    line.took(10**9)
    line.settle()
    assert not store.line_file.exists()


def test_what_is_taken_back_is_taken_from_the_time_it_was_counted_for(store: Store) -> None:
    time = ScriptedClock()
    line = line_of(store, LinkJob(allowed_bytes=10**6, ahead_bytes=1_000), time)
    line.took(1)
    time.pass_by(QUARTER_S)
    line.settle()
    assert line_use.used_bytes(store, lambda at_s: at_s <= NOON) == 1
    assert used(store) == 1


def test_the_count_survives_clocks_that_are_wrong_for_a_while_and_stays_small(store: Store) -> None:
    line_use.add(store, NOON, 500)
    for wrong in (0.0, NOON + 10**10):
        for number in range(30):
            line_use.add(store, wrong + number * QUARTER_S, 1)
    line_use.add(store, NOON, 500)
    assert line_use.used_bytes(store, lambda at_s: at_s == NOON) == 1_000
    for number in range(MAX_QUARTERS + 50):
        line_use.add(store, NOON + number * QUARTER_S, 10**12)
    assert used(store) == MAX_QUARTERS * 10**12, "the oldest ones are dropped"
    assert store.line_file.stat().st_size < 20_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"format": 1}',
        b'{"format":1,"quarters":{"1":-5}}',
        b'{"format":1,"quarters":{"x":5}}',
        b"9" * 99_999,
    ],
)
def test_a_damaged_count_is_begun_anew(store: Store, data: bytes) -> None:
    store.line_file.write_bytes(data)
    assert used(store) == 0
    line_use.add(store, NOON, 7)
    assert used(store) == 7


def test_a_count_that_cannot_be_written_ends_the_fetch(store: Store, place: Staging) -> None:
    store.line_file.mkdir()
    with pytest.raises(StoreError):
        run(
            place,
            FlakyPackage(CONTENT, [Give()]),
            line_of(store, LinkJob(allowed_bytes=10**6, ahead_bytes=1)),
        )
