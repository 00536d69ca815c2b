"""What the power is cut in: an update from fetch to eviction, a first pull, a repair, and others.

Each scenario has a state folder to begin with, and steps that may be repeated: a device that was cut off
starts again and does the same. What a step has reported as done must survive every cut that comes later.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_agent.cache import durable, eviction, fsck, marks
from edge_agent.cache.staging import Note, Staging, folder_of
from edge_agent.cache.store import Store
from edge_agent.package import trust
from edge_agent.package.reference import MANIFEST_TAG, ModelVersion
from edge_agent.sync import version_file
from edge_agent.sync.bring import bring, synchronise
from edge_agent.sync.files import LocalPackage
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob
from tests.support.packages import WEIGHTS, add_manifest, make_package, register

NAME = "assistant"
MODEL = "phi"
PLAIN_MODEL = "plain"
KEY = "5e" * 32

CHUNK_BYTES = 32_768
_WEIGHTS_BYTES = 75_000  # three chunks, two after the part
_PART_BYTES = 20_000
_OLD_S = 8 * 86_400


@dataclass
class Reported:
    """What a device has said so far, to who asked for it or in its status: nobody may find it undone.

    Attributes:
        committed: keys of versions that are in the cache, whole.
        active: key of the version that answers, None before that was said.
        mark: the number of the newest version that was active, see `cache/marks.py`.
    """

    committed: set[str] = field(default_factory=set)
    active: str | None = None
    mark: int = 0


@dataclass(frozen=True)
class Scenario:
    """What happens on a device, from one state folder to another.

    Attributes:
        prepare: fills an empty folder with the state before.
        run: what the device does, and what it reports meanwhile; it may be repeated, and at its end all is well.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path, Reported], None]


class Scenarios:
    """Makes the packages; gives the scenarios.

    Args:
        registry: True puts the packages into a SQLite registry and asks it each time, through MLflow; False
            takes them from their folders, which is the same for the cache, and much quicker.
    """

    def __init__(self, folder: Path, *, registry: bool = False) -> None:
        self._folder = folder
        self._uri = f"sqlite:///{folder / 'mlflow.db'}" if registry else ""
        self._tags: dict[int, str] = {}
        for version, size_bytes in ((1, 30_000), (2, 31_000), (3, 32_000), (4, _WEIGHTS_BYTES)):
            self._publish(version, size_bytes)
        make_package(folder / "plain-1", trust.WRAPPER, weights=_bytes(5, _WEIGHTS_BYTES))

    def all(self) -> list[Scenario]:
        return [
            Scenario("update", self._before_update, self._update),
            Scenario("first", lambda state: None, self._pull),
            Scenario("plain", self._before_plain, self._pull_plain),
            Scenario("repair", self._before_repair, self._repair),
            Scenario("shared", self._before_shared, self._pull),
            Scenario("import", self._before_import, self._import),
        ]

    def _publish(self, version: int, size_bytes: int) -> None:
        changes: dict[str, bytes | str | None] = {"requirements.txt": f"mlflow # {version}\n"}
        if version == 4:
            changes["artifacts/more/notes/read.txt"] = "new in 4"
        package = make_package(
            self._folder / f"{MODEL}-{version}", trust.WRAPPER, changes, weights=_bytes(version, size_bytes)
        )
        self._tags[version] = add_manifest(package, MODEL)
        if self._uri:
            register(
                self._uri,
                MODEL,
                package,
                tag=self._tags[version],
                artifacts=(self._folder / "artifacts").as_uri(),
            )

    def _package(self, version: int, model: str = MODEL) -> Path:
        return self._folder / f"{model}-{version}"

    def _weights(self, version: int) -> Path:
        return self._package(version) / WEIGHTS

    # --- Steps of a device -----------------------------------------------------------------------------

    def _sync_and_adopt(
        self,
        state: Path,
        version: int,
        reported: Reported,
        *,
        model: str = MODEL,
        quota_bytes: int = 1 << 40,
    ) -> None:
        """A sync, and the two changes of state that make its version the active one."""
        job = SyncJob(
            state_dir=str(state),
            registry=RegistryJob(uri=self._uri, timeout_s=10),
            name=NAME,
            ref=f"models:/{model}/{version}",
            cache=CacheJob(min_free_bytes=0, quota_bytes=quota_bytes),
        )
        _adopt(Store(state), self._sync(job, model, version), reported)

    def _sync(self, job: SyncJob, model: str, number: int) -> str:
        if self._uri:
            return synchronise(job, lambda event: None).key
        folder = self._package(number, model)
        tags = {MANIFEST_TAG: self._tags[number]} if model == MODEL else {}
        version = ModelVersion(name=model, version=number, run_id="", source=folder.as_uri(), tags=tags)
        return bring(job, version, LocalPackage(folder), lambda event: None).key

    def _pull(self, state: Path, reported: Reported) -> None:
        self._sync_and_adopt(state, 4, reported)
        _tidy(Store(state))

    def _pull_plain(self, state: Path, reported: Reported) -> None:
        self._sync_and_adopt(state, 1, reported, model=PLAIN_MODEL)
        _tidy(Store(state))

    # --- update: there is room only when version 1 goes; version 2 goes at the end -----------------------

    def _before_update(self, state: Path) -> None:
        for version in (1, 2, 3):
            self._sync_and_adopt(state, version, Reported())
        store = Store(state)
        store.change_state(NAME, lambda model: replace(model, previous=None))
        for age_s, record in zip((300, 200, 100), store.versions(NAME), strict=True):
            at = time.time() - age_s
            os.utime(store.record_file(record), (at, at))
        self._leave_part(store, self._weights(4), sha256=_sha256(self._weights(4).read_bytes()), version=4)
        stale = store.staging_root / "other-9" / "parts" / "old.part"
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"old")
        for path in (stale, stale.parent, stale.parent.parent):
            os.utime(path, (time.time() - _OLD_S,) * 2)

    def _update(self, state: Path, reported: Reported) -> None:
        store = Store(state)
        package = sum(path.stat().st_size for path in self._package(4).rglob("*") if path.is_file())
        older = sum(self._weights(version).stat().st_size for version in (1, 2, 3))
        self._sync_and_adopt(state, 4, reported, quota_bytes=package + older + (1 << 20) - 10_000)
        with store.lock():
            for record in eviction.evictable(store):
                store.remove(record)
        _tidy(store)

    def _before_plain(self, state: Path) -> None:
        self._leave_part(Store(state), self._package(1, PLAIN_MODEL) / WEIGHTS, sha256=None, version=1)

    def _leave_part(self, store: Store, file: Path, *, sha256: str | None, version: int) -> None:
        """What a sync that was ended in the middle leaves."""
        store.create()
        place = Staging(folder_of(store, NAME, version))
        place.parts.mkdir(parents=True)
        part = place.part(path=WEIGHTS, sha256=sha256)
        have = file.read_bytes()[:_PART_BYTES]
        part.write_bytes(have)
        status = file.stat()
        etag = f"{status.st_mtime_ns}-{status.st_size}"
        place.write_note(part, Note(etag=etag, length=len(have), sha256=_sha256(have)))

    # --- repair: flipped bits, a cut file, a missing link, a missing blob and a stray file ---------------

    def _before_repair(self, state: Path) -> None:
        for version in (3, 4):
            self._sync_and_adopt(state, version, Reported())
        store = Store(state)
        record = store.versions(NAME)[-1]
        folder = store.folder(record)
        _flip(folder / "artifacts/model/model.onnx")  # version 3 has it, too
        os.truncate(folder / WEIGHTS, 1_000)
        (folder / "requirements.txt").unlink()
        store.blob(_sha256((folder / "artifacts/more/notes/read.txt").read_bytes())).unlink()
        (folder / "artifacts/stray.txt").write_text("stray")

    def _repair(self, state: Path, reported: Reported) -> None:
        store = Store(state)
        with store.lock():
            fsck.set_aside(store, fsck.verify(store).damaged)
        self._pull(state, reported)

    # --- shared: the next version needs a blob that was damaged since --------------------------------------

    def _before_shared(self, state: Path) -> None:
        self._sync_and_adopt(state, 3, Reported())
        store = Store(state)
        _flip(store.folder(store.versions(NAME)[-1]) / "artifacts/model/model.onnx")

    # --- import: a file from elsewhere -----------------------------------------------------------------

    def _before_import(self, state: Path) -> None:
        elsewhere = self._folder / "elsewhere"
        self._sync_and_adopt(elsewhere, 4, Reported())
        store = Store(elsewhere)
        with durable.replacing(self._folder / "version.tar") as descriptor:
            version_file.export_version(store, store.versions(NAME)[0], descriptor)
        self._sync_and_adopt(state, 3, Reported())

    def _import(self, state: Path, reported: Reported) -> None:
        job = SyncJob(
            state_dir=str(state),
            registry=RegistryJob(uri=version_file.ORIGIN),
            name=NAME,
            ref=f"models:/{MODEL}/4",
            cache=CacheJob(min_free_bytes=0),
        )
        with (self._folder / "version.tar").open("rb") as stream:
            key = version_file.import_version(job, stream.fileno()).key
        _adopt(Store(state), key, reported)
        _tidy(Store(state))


def _adopt(store: Store, key: str, reported: Reported) -> None:
    """A version that was just brought becomes the active one."""
    reported.committed.add(key)
    active = store.state().model(NAME).active
    if active != key:
        store.change_state(NAME, lambda model: replace(model, candidate=key))
        store.change_state(NAME, lambda model: replace(model, active=key, previous=active, candidate=None))
    reported.active = key
    record = store.record(NAME, key)
    assert record is not None
    # As if it were signed: the marks know no more of that.
    signed = replace(record, trust=replace(record.trust, signed_by=KEY), packaged_at=1_000.0 + record.version)
    marks.note_active(store, signed)
    reported.mark = record.version


def _tidy(store: Store) -> None:
    with store.lock():
        fsck.prune(store)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)
