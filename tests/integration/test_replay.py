"""An old signed package that is registered anew under a higher number, and every way back that stays open."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache import durable, marks
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import PackageReplayed
from edge_agent.package import trust
from edge_agent.package.manifest import SIGNATURE_NAME
from edge_agent.package.reference import MANIFEST_TAG, ModelVersion
from edge_agent.sync.bring import bring
from edge_agent.sync.files import LocalPackage, Stream
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, TrustJob
from edge_agent.sync.version_file import export_version
from tests.support.keys import KeyPair, make_keys, sign
from tests.support.packages import MLMODEL, WEIGHTS, add_manifest, make_package
from tests.support.version_files import MODEL, bring_in

pytestmark = pytest.mark.attack


class Watched(LocalPackage):
    """A package that notes what is opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened: list[str] = []

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        self.opened.append(path)
        with super().open(path, offset=offset, etag=etag) as stream:
            yield stream


class Fleet:
    """A publisher with keys, and a device that trusts all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = make_keys(folder, "ours")
        self.more: list[KeyPair] = []
        self.store = Store(folder / "state")

    def package(self, day: str, *, key: KeyPair | None = None, manifest: bool = True) -> Path:
        """One that was made on this day, signed; of an empty day, one that says no time."""
        folder = self.folder / f"package-{len(list(self.folder.glob('package-*')))}"
        says = f"utc_time_created: '{day} 12:00:00.123456'\n" if day else ""
        weights = random.Random(day).randbytes(5_000)
        make_package(folder, trust.WRAPPER, {"MLmodel": MLMODEL + says}, weights=weights)
        if manifest:
            add_manifest(folder, MODEL)
        sign(folder, (key or self.keys).private)
        return folder

    def job(self, version: int, *, allow_older: bool = False) -> SyncJob:
        return SyncJob(
            state_dir=str(self.folder / "state"),
            registry=RegistryJob(uri="sqlite:///registry.db"),
            name="assistant",
            ref=f"models:/{MODEL}/{version}",
            trust=TrustJob(public_keys=tuple(str(pair.public) for pair in (self.keys, *self.more))),
            cache=CacheJob(min_free_bytes=0),
            allow_older=allow_older,
        )

    def offer(
        self, package: Path, version: int, *, adopt: bool = True, allow_older: bool = False
    ) -> tuple[VersionRecord, list[str]]:
        """The version as the device takes it, and what it opened for that."""
        watched = Watched(package)
        tags = {}
        if (manifest := package / "manifest.json").exists():
            tags = {MANIFEST_TAG: hashlib.sha256(manifest.read_bytes()).hexdigest()}
        offered = ModelVersion(name=MODEL, version=version, run_id="", source=package.as_uri(), tags=tags)
        try:
            result = bring(self.job(version, allow_older=allow_older), offered, watched, lambda event: None)
        finally:
            self.opened = watched.opened
        record = self.store.record("assistant", result.key)
        assert record is not None
        if adopt:
            marks.note_active(self.store, record)
        return record, watched.opened


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
def test_an_old_package_under_a_new_number_is_refused_before_its_weights_are_fetched(
    fleet: Fleet, manifest: bool
) -> None:
    old = fleet.package("2026-01-05", manifest=manifest)
    fleet.offer(old, 7)
    fleet.offer(fleet.package("2026-02-05", manifest=manifest), 8)
    for _ in range(3):  # as a poll meets it again and again
        with pytest.raises(
            PackageReplayed, match=r"version 9 .* 2026-01-05 .* version 8, .* 2026-02-05"
        ) as refused:
            fleet.offer(old, 9)
        assert WEIGHTS not in fleet.opened
        assert "--allow-older" in refused.value.remedy
    assert [record.version for record in fleet.store.versions()] == [7, 8]


def test_newer_packages_and_the_newest_one_again_are_taken(fleet: Fleet) -> None:
    fleet.offer(fleet.package("2026-01-05"), 7)
    newest = fleet.package("2026-02-05")
    fleet.offer(newest, 8)
    fleet.offer(newest, 9)
    fleet.offer(fleet.package("2026-03-05"), 12)
    assert [record.version for record in fleet.store.versions()] == [7, 8, 9, 12]


def test_the_way_back_to_an_older_number_stays_open(fleet: Fleet) -> None:
    old = fleet.package("2026-01-05")
    record, _ = fleet.offer(old, 7)
    fleet.offer(fleet.package("2026-02-05"), 8)
    assert fleet.offer(old, 7)[0].key == record.key
    with fleet.store.lock():
        fleet.store.remove(record)
    assert fleet.offer(old, 7)[0].key == record.key, "it may be fetched again, too"


def test_an_operator_may_allow_it_and_from_then_on_that_time_counts(fleet: Fleet) -> None:
    old, newer = fleet.package("2026-01-05"), fleet.package("2026-01-06")
    fleet.offer(old, 7)
    fleet.offer(fleet.package("2026-02-05"), 8)
    fleet.offer(old, 9, adopt=False, allow_older=True)
    with pytest.raises(PackageReplayed):
        fleet.offer(old, 9)  # it did not pass the gate, for example: nothing has changed
    fleet.offer(old, 9, allow_older=True)
    fleet.offer(old, 9)
    fleet.offer(newer, 10)
    with pytest.raises(PackageReplayed):
        fleet.offer(old, 11)


def test_a_package_that_says_no_time_is_old(fleet: Fleet) -> None:
    silent = fleet.package("")
    fleet.offer(silent, 6)
    fleet.offer(fleet.package("2026-02-05"), 8)
    with pytest.raises(PackageReplayed, match="does not say when"):
        fleet.offer(silent, 9)


def test_a_signature_that_does_not_name_its_key_gains_nothing(fleet: Fleet) -> None:
    """It is fetched once, since nothing is known before, and refused all the same."""
    old = fleet.package("2026-01-05")
    fleet.offer(fleet.package("2026-02-05"), 8)
    signature = json.loads((old / SIGNATURE_NAME).read_bytes())
    signature["verificationMaterial"]["publicKey"]["hint"] = ""
    (old / SIGNATURE_NAME).write_text(json.dumps(signature))
    with pytest.raises(PackageReplayed):
        fleet.offer(old, 9)
    assert WEIGHTS in fleet.opened
    with pytest.raises(PackageReplayed):
        fleet.offer(old, 9)
    assert WEIGHTS not in fleet.opened, "what was fetched is kept for the next poll"
    assert [record.version for record in fleet.store.versions()] == [8]


def test_another_key_has_a_mark_of_its_own(fleet: Fleet) -> None:
    fleet.more.append(make_keys(fleet.folder, "theirs"))
    fleet.offer(fleet.package("2026-02-05"), 8)
    fleet.offer(fleet.package("2026-01-05", key=fleet.more[0]), 9)
    with pytest.raises(PackageReplayed):
        fleet.offer(fleet.package("2026-01-06"), 10)


def test_a_version_that_came_before_the_mark_rose_is_not_taken_up_after_it(fleet: Fleet) -> None:
    early = fleet.package("2026-01-05")
    fleet.offer(early, 9, adopt=False)
    fleet.offer(fleet.package("2026-02-05"), 8)
    with pytest.raises(PackageReplayed):
        fleet.offer(early, 9)


def test_a_record_of_an_earlier_release_gets_its_time(fleet: Fleet) -> None:
    package = fleet.package("2026-02-05")
    record, _ = fleet.offer(package, 8, adopt=False)
    with fleet.store.lock():
        fleet.store.rewrite(replace(record, packaged_at=None))
    again, _ = fleet.offer(package, 8)
    assert again.packaged_at == record.packaged_at == 1_770_292_800.123456
    with pytest.raises(PackageReplayed):
        fleet.offer(fleet.package("2026-01-05"), 9)


def test_a_version_file_that_lies_about_its_number_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    another = Fleet(elsewhere)
    another.keys = fleet.keys
    record, _ = another.offer(another.package("2026-01-05"), 9)
    fleet.offer(fleet.package("2026-02-05"), 8)
    file = tmp_path / "lies.tar"
    with durable.replacing(file) as descriptor:
        export_version(another.store, record, descriptor)
    policy = fleet.job(9).trust
    with pytest.raises(PackageReplayed):
        bring_in(fleet.store, file, policy=policy, ref=f"models:/{MODEL}/9")
