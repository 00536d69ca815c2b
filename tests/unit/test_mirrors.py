"""Blobs from mirrors: which are asked, in what order, what a bad one costs, and what the registry still has to give."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge_agent.cache.staging import Staging, staging
from edge_agent.cache.store import Store
from edge_agent.errors import TransportError, VerificationError
from edge_agent.sync.fetch import fetch
from edge_agent.sync.files import Stream
from edge_agent.sync.mirrors import DEAD_S, WRONG_S, Mirrors, NotThere
from edge_agent.sync.mirrors.left_alone import MAX_S, LeftAlone
from edge_agent.sync.mirrors.places import FolderMirror
from edge_agent.sync.pace import Pace
from tests.support.clock import ScriptedClock
from tests.support.flaky_package import FlakyPackage, Give

CONTENT = random.Random(7).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DOWN = TransportError("down")
ABSENT = NotThere("404", yet=True)


@dataclass
class ScriptedMirror:
    """Stands for `Mirror`: gives its content from where it is asked, or what the script says."""

    url: str
    answers: list[Give | Exception]
    content: bytes = CONTENT
    offsets: list[int] = field(default_factory=list)

    @contextmanager
    def open(self, sha256: str, *, size_bytes: int, offset: int) -> Iterator[Stream]:
        assert (sha256, size_bytes) == (SHA256, len(CONTENT))
        package = FlakyPackage(
            self.content, [self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]]
        )
        self.offsets.append(offset)
        with package.open("", offset=offset) as stream:
            yield stream


class Device:
    """A part in staging, two mirrors and a registry, on a clock."""

    def __init__(self, place: Staging, folder: Path, *mirrors: ScriptedMirror, patience_s: float = 0) -> None:
        self.place = place
        self.time = ScriptedClock()
        self.mirrors = mirrors
        self.registry = FlakyPackage(CONTENT, [Give()])
        self.pace = Pace(total_bytes=len(CONTENT), clock=self.time.clock)
        self.awaited: list[float] = []
        urls = tuple(mirror.url for mirror in mirrors)
        self.left_alone = LeftAlone(folder / "mirrors.json", urls, clock=lambda: 1e9 + self.time.now_s)
        self.source = Mirrors(
            mirrors,
            left_alone=self.left_alone,
            clock=self.time.clock,
            patience_s=patience_s,
            awaiting=self.awaited.append,
        )

    def fetch(self) -> None:
        fetch(
            self.registry,
            self.place,
            path="file",
            size_bytes=len(CONTENT),
            sha256=SHA256,
            pace=self.pace,
            mirrors=self.source,
        )
        assert self.place.verified(SHA256).read_bytes() == CONTENT

    def left(self) -> list[str]:
        return [mirror.url for mirror in self.mirrors if self.left_alone.has(mirror.url)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Staging]:
    store = Store(tmp_path)
    store.create()
    with staging(store, "assistant", 1) as taken:
        yield taken


def test_a_blob_that_a_mirror_has_costs_the_registry_nothing(place: Staging, tmp_path: Path) -> None:
    first, second = ScriptedMirror("a", [Give()]), ScriptedMirror("b", [Give()])
    device = Device(place, tmp_path, first, second)
    device.fetch()
    assert (first.offsets, second.offsets, device.registry.offsets) == ([0], [], [])
    assert device.pace.mirrored_bytes == device.pace.fetched_bytes == len(CONTENT)


def test_the_next_mirror_goes_on_where_one_died_and_the_registry_brings_the_rest(
    place: Staging, tmp_path: Path
) -> None:
    first = ScriptedMirror("a", [Give(count=30_000, breaks=True), DOWN])
    second = ScriptedMirror("b", [Give(count=20_000, breaks=True), DOWN])
    device = Device(place, tmp_path, first, second)
    device.fetch()
    assert (first.offsets, second.offsets) == ([0, 30_000], [30_000, 50_000])
    assert device.registry.offsets == [50_000]
    assert device.left() == ["a", "b"]
    assert device.pace.mirrored_bytes == 50_000


def test_wrong_bytes_come_again_from_elsewhere_and_what_the_registry_gave_before_them_stays(
    place: Staging, tmp_path: Path
) -> None:
    part = place.part(path="file", sha256=SHA256)
    part.write_bytes(CONTENT[:40_000])
    device = Device(place, tmp_path, ScriptedMirror("a", [Give()], content=bytes(len(CONTENT))))
    device.fetch()
    assert device.registry.offsets == [40_000]
    assert device.left() == ["a"]


def test_a_mirror_that_lies_does_not_keep_an_honest_one_from_giving(place: Staging, tmp_path: Path) -> None:
    liar, honest = ScriptedMirror("a", [Give()], content=bytes(len(CONTENT))), ScriptedMirror("b", [Give()])
    device = Device(place, tmp_path, liar, honest)
    device.fetch()
    assert (honest.offsets, device.registry.offsets, device.left()) == ([0], [], ["a"])


def test_wrong_bytes_that_the_registry_has_ended_come_again(place: Staging, tmp_path: Path) -> None:
    liar = ScriptedMirror("a", [Give(count=30_000, breaks=True), DOWN], content=bytes(len(CONTENT)))
    device = Device(place, tmp_path, liar)
    device.fetch()
    assert device.registry.offsets == [30_000, 0]
    device.time.pass_by(DEAD_S + 1)
    assert device.left() == ["a"], "for what it is: wrong, not dead"


def test_more_bytes_than_the_blob_has_are_a_lie(place: Staging, tmp_path: Path) -> None:
    liar = ScriptedMirror("a", [Give()], content=CONTENT + b"more")
    device = Device(place, tmp_path, liar)
    device.fetch()
    assert (device.registry.offsets, device.left()) == ([0], ["a"])


def test_the_registrys_own_wrong_bytes_are_still_refused(place: Staging, tmp_path: Path) -> None:
    device = Device(place, tmp_path, ScriptedMirror("a", [ABSENT]))
    device.registry.content = bytes(len(CONTENT))
    with pytest.raises(VerificationError, match="sha256"):
        device.fetch()
    assert device.left() == []


def test_a_blob_whose_digest_nobody_knows_is_no_mirrors_business(place: Staging, tmp_path: Path) -> None:
    mirror = ScriptedMirror("a", [Give()])
    device = Device(place, tmp_path, mirror)
    fetch(
        device.registry,
        place,
        path="file",
        size_bytes=len(CONTENT),
        sha256=None,
        pace=device.pace,
        mirrors=device.source,
    )
    assert mirror.offsets == []


def test_without_patience_an_absent_blob_comes_from_the_registry_at_once(
    place: Staging, tmp_path: Path
) -> None:
    mirror = ScriptedMirror("a", [ABSENT])
    device = Device(place, tmp_path, mirror)
    device.fetch()
    assert (mirror.offsets, device.registry.offsets, device.time.slept) == ([0], [0], [])
    assert device.left() == [], "having nothing is no fault"


def test_a_device_waits_for_a_mirror_to_get_the_blob(place: Staging, tmp_path: Path) -> None:
    mirror = ScriptedMirror("a", [ABSENT, ABSENT, ABSENT, Give()])
    device = Device(place, tmp_path, mirror, patience_s=600)
    device.fetch()
    assert device.registry.offsets == []
    assert len(device.time.slept) == 3 and device.awaited[0] <= 600


def test_patience_ends_a_little_earlier_for_some_and_for_the_whole_sync(
    place: Staging, tmp_path: Path
) -> None:
    random.seed(11)
    ends = set()
    for _ in range(5):
        mirror = ScriptedMirror("a", [ABSENT])
        device = Device(place, tmp_path, mirror, patience_s=100)
        device.fetch()
        assert 75 <= device.time.now_s <= 100
        ends.add(device.time.now_s)
        asked = len(mirror.offsets)
        place.drop_part(place.verified(SHA256))
        device.fetch()
        assert len(mirror.offsets) == asked + 1, "once for the next blob, without a wait"
        place.drop_part(place.verified(SHA256))
    assert len(ends) == 5


@pytest.mark.parametrize("answer", [NotThere("403", yet=False), DOWN])
def test_only_a_blob_that_may_come_is_waited_for(place: Staging, tmp_path: Path, answer: Exception) -> None:
    device = Device(place, tmp_path, ScriptedMirror("a", [answer]), patience_s=600)
    device.fetch()
    assert device.time.now_s < 5 and device.registry.offsets == [0]


def test_next_to_nothing_from_each_connection_does_not_keep_a_mirror_in_use(
    place: Staging, tmp_path: Path
) -> None:
    mirror = ScriptedMirror("a", [Give(count=10, breaks=True)])
    device = Device(place, tmp_path, mirror)
    device.fetch()
    assert mirror.offsets == [0, 10]
    assert device.registry.offsets == [20]


def test_a_mirror_that_ends_early_in_good_order_is_no_use_either(place: Staging, tmp_path: Path) -> None:
    mirror = ScriptedMirror("a", [Give(count=10)])
    device = Device(place, tmp_path, mirror)
    device.fetch()
    assert device.left() == ["a"]


# --- Left alone -----------------------------------------------------------------------------------------


def test_it_is_left_alone_by_the_next_process_too_and_then_asked_again(tmp_path: Path) -> None:
    now = [1000.0]
    file = tmp_path / "mirrors.json"
    LeftAlone(file, ("a", "b"), clock=lambda: now[0]).add("a", WRONG_S)
    again = LeftAlone(file, ("a", "b"), clock=lambda: now[0])
    assert (again.has("a"), again.has("b")) == (True, False)
    now[0] += WRONG_S
    assert not again.has("a")


def test_a_clock_that_was_ahead_does_not_leave_a_mirror_alone_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "mirrors.json"
    LeftAlone(file, ("a",), clock=lambda: 2e9).add("a", WRONG_S)
    assert not LeftAlone(file, ("a",), clock=lambda: 1e9).has("a")
    LeftAlone(file, ("a",), clock=lambda: 1e9).add("a", 1e12)
    assert not LeftAlone(file, ("a",), clock=lambda: 1e9 + MAX_S).has("a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"a": "x"}',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"\xff",
        b"[" * 20_000,
        b'{"a": true, "c": 3}',
    ],
)
def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mirrors.json"
    file.write_bytes(content)
    known = LeftAlone(file, ("a",), clock=lambda: 1000.0)
    assert not known.has("a")
    known.add("a", 10)
    assert set(json.loads(file.read_bytes())) == {"a"}, "nor does it grow by mirrors that are none any more"


# --- A folder of this host ------------------------------------------------------------------------------


def test_a_stick_gives_its_blobs_from_any_byte_on(tmp_path: Path) -> None:
    (tmp_path / "a b" / "sha256").mkdir(parents=True)
    (tmp_path / "a b" / "sha256" / SHA256).write_bytes(CONTENT)
    mirror = FolderMirror(f"file://{tmp_path}/a%20b/")
    with mirror.open(SHA256, size_bytes=len(CONTENT), offset=40_000) as stream:
        assert (stream.start, b"".join(stream.chunks)) == (40_000, CONTENT[40_000:])


def test_what_is_no_whole_file_on_a_stick_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "sha256"
    mirror = FolderMirror(f"file://{tmp_path}/")
    with pytest.raises(NotThere), mirror.open(SHA256, size_bytes=1, offset=0):
        pass
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(b"1")
    for make in (
        lambda path: path.write_bytes(b"half"),
        lambda path: path.symlink_to(outside),
        lambda path: path.mkdir(),
        os.mkfifo,
    ):
        path = folder / SHA256
        make(path)
        with pytest.raises(TransportError) as caught, mirror.open(SHA256, size_bytes=1, offset=0):
            pass
        assert not isinstance(caught.value, NotThere)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
