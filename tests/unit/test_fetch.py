"""Fetching one file from a server that fails in turn: what is asked for again, when, and how often."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.cache.staging import Staging, staging
from edge_agent.cache.store import Store
from edge_agent.errors import ManifestError, TransportError, VerificationError
from edge_agent.package.manifest import ManifestFile
from edge_agent.sync.fetch import MAX_ATTEMPTS, fetch
from edge_agent.sync.files import Changed, PastTheEnd, ReadOnce, RequestRefused
from edge_agent.sync.pace import Pace
from tests.support.clock import ScriptedClock
from tests.support.flaky_package import FlakyPackage, Give

CONTENT = random.Random(5).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Staging]:
    store = Store(tmp_path)
    store.create()
    with staging(store, "assistant", 1) as taken:
        yield taken


def run(
    place: Staging, package: FlakyPackage | ReadOnce, time: ScriptedClock, *, sha256: str | None = SHA256
) -> ManifestFile:
    pace = Pace(total_bytes=len(CONTENT), clock=time.clock)
    return fetch(package, place, path="file", size_bytes=len(CONTENT), sha256=sha256, pace=pace)


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["promised", "unknown"])
def test_a_file_comes_whole_and_verified_in_one_answer(place: Staging, sha256: str | None) -> None:
    package, time = FlakyPackage(CONTENT, [Give()]), ScriptedClock()
    file = run(place, package, time, sha256=sha256)
    assert file == ManifestFile(path="file", size_bytes=len(CONTENT), sha256=SHA256)
    assert place.verified(SHA256).read_bytes() == CONTENT
    assert (package.offsets, time.slept) == ([0], [])


def test_a_connection_that_breaks_is_taken_up_where_it_broke(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give(count=30_000, breaks=True), Give(count=30_000), Give()])
    run(place, package, ScriptedClock())
    assert package.offsets == [0, 30_000, 60_000]
    assert place.verified(SHA256).read_bytes() == CONTENT


def test_the_waits_between_attempts_double_and_are_never_all_the_same(place: Staging) -> None:
    package, time = FlakyPackage(CONTENT, [TransportError("down")]), ScriptedClock()
    with pytest.raises(TransportError, match="down"):
        run(place, package, time)
    assert len(package.offsets) == MAX_ATTEMPTS
    assert len(time.slept) == MAX_ATTEMPTS - 1
    for attempt, wait_s in enumerate(time.slept, start=1):
        assert 0.5 * 2**attempt / 2 <= wait_s <= 0.5 * 2**attempt


def test_progress_starts_the_count_of_attempts_again(place: Staging) -> None:
    down = TransportError("down")
    failures = [down] * (MAX_ATTEMPTS - 1)
    package = FlakyPackage(CONTENT, [*failures, Give(count=10_000), *failures, Give()])
    run(place, package, ScriptedClock())
    assert place.verified(SHA256).read_bytes() == CONTENT


def test_next_to_nothing_is_no_progress(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give(count=10, breaks=True)])
    with pytest.raises(TransportError, match="broke"):
        run(place, package, ScriptedClock())
    assert len(package.offsets) == MAX_ATTEMPTS


def test_a_refusal_is_not_asked_again(place: Staging) -> None:
    package, time = FlakyPackage(CONTENT, [RequestRefused("gone")]), ScriptedClock()
    with pytest.raises(RequestRefused, match="gone"):
        run(place, package, time)
    assert (package.offsets, time.slept) == ([0], [])


def test_a_server_that_starts_over_is_followed(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give(count=50_000), Give(restart=True)])
    run(place, package, ScriptedClock())
    assert place.verified(SHA256).read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_from_its_first_byte(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give(count=50_000), Changed("another file"), Give(etag="v2")])
    run(place, package, ScriptedClock())
    assert package.offsets == [0, 50_000, 0]


def test_a_file_that_ends_early_is_refused_with_its_length(place: Staging) -> None:
    package = FlakyPackage(CONTENT[:60_000], [Give(), PastTheEnd("no more")])
    with pytest.raises(VerificationError, match="ends after 60000 of the promised 100000 bytes"):
        run(place, package, ScriptedClock())
    assert list(place.parts.iterdir()) == []


def test_more_bytes_than_promised_are_refused(place: Staging) -> None:
    with pytest.raises(VerificationError, match="more than the promised 100000 bytes"):
        run(place, FlakyPackage(CONTENT + b"x", [Give()]), ScriptedClock())


def test_other_bytes_are_refused_without_another_try_when_nothing_was_joined(place: Staging) -> None:
    package = FlakyPackage(bytes(len(CONTENT)), [Give()])
    with pytest.raises(VerificationError, match="sha256"):
        run(place, package, ScriptedClock())
    assert package.offsets == [0]
    assert list(place.parts.iterdir()) == []


def test_joined_parts_of_two_files_are_dropped_and_it_is_tried_once_more(place: Staging) -> None:
    place.part(path="file", sha256=SHA256).write_bytes(bytes(20_000))  # an earlier process's, of another file
    package = FlakyPackage(CONTENT, [Give()])
    run(place, package, ScriptedClock())
    assert package.offsets == [20_000, 0]
    assert place.verified(SHA256).read_bytes() == CONTENT


# --- What was read before ------------------------------------------------------------------------------


def test_a_file_that_was_read_already_is_not_asked_for_again(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give()])
    once = ReadOnce(package)
    assert once.read("file", len(CONTENT)) == once.read("file", len(CONTENT)) == CONTENT
    run(place, once, ScriptedClock())
    assert place.verified(SHA256).read_bytes() == CONTENT
    assert package.offsets == [0]


def test_a_file_that_broke_off_when_it_was_read_is_fetched_to_its_end(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give(count=30_000), Give()])
    once = ReadOnce(package)
    assert once.read("file", len(CONTENT)) == CONTENT[:30_000]
    run(place, once, ScriptedClock())
    assert place.verified(SHA256).read_bytes() == CONTENT
    assert package.offsets == [0, 30_000]


def test_what_was_read_is_given_once(place: Staging) -> None:
    package = FlakyPackage(CONTENT, [Give()])
    once = ReadOnce(package)
    once.read("file", len(CONTENT))
    for _ in range(2):
        with once.open("file") as stream:
            assert b"".join(stream.chunks) == CONTENT
    assert package.offsets == [0, 0]


def test_more_than_may_be_read_is_refused_and_not_kept() -> None:
    once = ReadOnce(FlakyPackage(CONTENT, [Give()]))
    for _ in range(2):
        with pytest.raises(ManifestError, match="file has more than 99999 bytes"):
            once.read("file", len(CONTENT) - 1)
