"""The cache on disk: verified blobs, whole versions, `state.json`.

Owns `<state_dir>/models`:

    blobs/sha256/<digest>                       verified bytes, read-only
    versions/<NAME>/<version>-<digest12>/…      the package, hard links into blobs
    versions/<NAME>/<version>-<digest12>.json   the version's record; writing it is the commit
    staging/<NAME>-<version>/…                  what a running sync has so far
    damaged/  state.json  lock

Flow of a commit: blobs get their digest as name → the tree is linked and synced → the tree is renamed into
place → the record is renamed into place. A tree without a record does not count and is pruned. Removal takes the
steps in reverse. Refuses: bytes that are not what a manifest promised, and a second writer at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edge_agent.cache import blobs, disk, durable
from edge_agent.cache import record as records
from edge_agent.cache.disk import store_errors
from edge_agent.cache.locks import Lock
from edge_agent.cache.record import KEY, VersionRecord
from edge_agent.cache.state import CacheState, ModelState
from edge_agent.cache.state_file import StateFile
from edge_agent.cache.verify import check_file
from edge_agent.errors import CacheBusy, StoreError
from edge_agent.package.manifest import ManifestFile
from edge_agent.package.reference import MODEL_NAME

log = logging.getLogger(__name__)

LOCK_WAIT_S = 10.0
_MAX_RECORD_BYTES = 4 << 20


class Store:
    """One state directory's cache. Any number of processes may have one; writers take turns with `lock`.

    Holds no state but paths, so threads may share it.
    """

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "models"
        self.blobs = self.root / "blobs" / "sha256"
        self.versions_root = self.root / "versions"
        self.staging_root = self.root / "staging"
        self.damaged_root = self.root / "damaged"
        self.learned_file = self.root / "learned.json"
        self.marks_file = self.root / "marks.json"
        self.mirrors_file = self.root / "mirrors.json"
        self.line_file = self.root / "line.json"
        self.heard_file = self.root / "heard.json"
        self._state_file = StateFile(self.root / "state.json", damaged_root=self.damaged_root)
        self._lock_file = self.root / "lock"

    def create(self) -> None:
        """Makes the folders that are missing.

        Raises:
            StoreError: they cannot be made.
        """
        with store_errors("create the cache folder", self.root):
            for folder in (self.blobs, self.versions_root, self.staging_root, self.damaged_root):
                durable.make_folder(folder)

    # --- Taking turns ----------------------------------------------------------------------------------

    @contextmanager
    def lock(self, *, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Makes this thread the only writer among all processes; not reentrant.

        Raises:
            CacheBusy: somebody else had it for the whole of `wait_s`.
        """
        self.create()
        with store_errors("lock the cache", self._lock_file):
            lock = Lock(durable.open_lock(self._lock_file))
        with lock:
            if not lock.wait_exclusive(wait_s):
                raise CacheBusy(
                    f"another process has the cache's lock {self._lock_file}",
                    remedy="wait for the running command, or see `edge-agent status`",
                )
            yield

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Makes this the only fetch into the cache, among all processes.

        Raises:
            CacheBusy: another process is fetching.
        """
        self.create()
        with store_errors("lock", self.staging_root):
            lock = Lock.of_folder(self.staging_root)
        with lock:
            if not lock.try_exclusive():
                raise CacheBusy(
                    "another process is fetching a model into this cache",
                    remedy="wait for it, or see `edge-agent status`",
                )
            yield

    @contextmanager
    def lease(self, record: VersionRecord) -> Iterator[Path]:
        """Keeps a version from being removed while it is loaded. Yields its folder.

        Raises:
            CacheBusy: another process has locked its folder, for longer than a removal takes.
            StoreError: the version is not there any more.
        """
        folder = self.folder(record)
        with store_errors("open the version", folder):
            lock = Lock.of_folder(folder)
        with lock:
            if not lock.wait_shared(LOCK_WAIT_S):
                raise CacheBusy(f"another process keeps version {record.key} of {record.name} to itself")
            if self.record(record.name, record.key) is None:
                raise StoreError(f"version {record.key} of {record.name} was removed")
            self._touch(record)
            yield folder

    # --- Versions --------------------------------------------------------------------------------------

    def versions(self, name: str | None = None) -> list[VersionRecord]:
        """Committed versions of one model or of all, sorted by name and version. Damaged records are left out."""
        found = []
        for file in self.record_files(name):
            record = _read_record(file)
            if record is not None:
                found.append(record)
        return sorted(found, key=lambda record: (record.name, record.version, record.created_at))

    def record(self, name: str, key: str) -> VersionRecord | None:
        """One committed version, or None."""
        if not MODEL_NAME.fullmatch(name) or not KEY.fullmatch(key):
            return None
        return _read_record(self.versions_root / name / f"{key}.json")

    def record_files(self, name: str | None = None) -> list[Path]:
        """The files of all records, including damaged ones."""
        folders = [self.versions_root / name] if name else disk.children(self.versions_root)
        return [file for folder in folders for file in disk.children(folder) if file.suffix == ".json"]

    def folder(self, record: VersionRecord) -> Path:
        """The folder of the version's package, committed or not."""
        return self.versions_root / record.name / record.key

    def record_file(self, record: VersionRecord) -> Path:
        return self.versions_root / record.name / f"{record.key}.json"

    def last_used_at(self, record: VersionRecord) -> float:
        """When the version was committed or last leased, in seconds since the epoch."""
        try:
            return self.record_file(record).stat().st_mtime
        except OSError:
            return record.created_at

    def commit(self, record: VersionRecord, tree: Path) -> None:
        """Makes a verified, staged tree a version. The caller has the lock.

        Args:
            record: describes the version; `record.files` are exactly the files in `tree`.
            tree: a folder in staging, which is moved away.

        Raises:
            StoreError: the file system refuses.
        """
        folder = self.folder(record)
        with store_errors("commit a version", folder):
            for file in record.files:
                blobs.adopt(tree / file.path, self.blob(file.sha256), file)
            durable.sync_folder(self.blobs)
            for inner in sorted({tree, *disk.folders_below(tree)}, reverse=True):
                durable.sync_folder(inner)
            durable.make_folder(folder.parent)
            durable.sync_folder(self.versions_root)  # whoever made the folder may have died before that
            durable.remove_tree(folder)  # a tree without a record: a crash before the commit
            durable.rename(tree, folder)
            durable.sync_folder(folder.parent)
            durable.write_file(self.record_file(record), record.encode())

    def rewrite(self, record: VersionRecord) -> None:
        """Replaces the record of a committed version (a new trust decision). The caller has the lock."""
        with store_errors("write", self.record_file(record)):
            durable.write_file(self.record_file(record), record.encode())

    def note_served(self, name: str, key: str, *, served: bool) -> None:
        """Records whether a version has served, if its record says otherwise."""
        with self.lock():
            record = self.record(name, key)
            if record is not None and record.served != served:
                self.rewrite(replace(record, served=served))

    def relink(self, record: VersionRecord, file: ManifestFile) -> None:
        """Makes one file of a version a link to its blob again. The caller has the lock."""
        with store_errors("relink", self.folder(record)):
            self._relink(record, file)

    def remove_stray(self, record: VersionRecord, path: str) -> None:
        """Removes a file that a version should not have, durably. The caller has the lock."""
        stray = self.folder(record) / path
        with store_errors("remove", stray):
            durable.unlink(stray)
            durable.sync_folder(stray.parent)

    def remove(self, record: VersionRecord) -> int:
        """Removes a version: its record, its tree, and blobs that no other version links. The caller has the lock.

        Returns:
            The number of bytes freed.

        Raises:
            CacheBusy: the version is leased.
        """
        folder = self.folder(record)
        with store_errors("remove a version", folder), self._unleased(record):
            durable.unlink(self.record_file(record))
            durable.sync_folder(folder.parent)
            durable.remove_tree(folder)
            return sum(self.drop_unlinked(file.sha256) for file in set(record.files))

    # --- Blobs -----------------------------------------------------------------------------------------

    def blob(self, digest: str) -> Path:
        return self.blobs / digest

    def has_blob(self, file: ManifestFile) -> bool:
        """True where a verified blob of this digest and size is in the cache."""
        return blobs.is_there(self.blob(file.sha256), file)

    def repair(self, source: Path, file: ManifestFile) -> list[VersionRecord]:
        """Replaces a damaged or missing blob with verified bytes, and relinks every version that has it.

        The caller has the lock, and has stopped the runners of those versions.

        Returns:
            The versions that were relinked.
        """
        check_file(source, file)
        relinked = []
        with store_errors("repair a blob", source):
            blobs.replace(source, self.blob(file.sha256))
            durable.sync_folder(self.blobs)
            for record in self.versions():
                files = [known for known in record.files if known.sha256 == file.sha256]
                for known in files:
                    self._relink(record, known)
                if files:
                    relinked.append(record)
        return relinked

    def drop_unlinked(self, digest: str) -> int:
        """Removes a blob that no version links. Returns the number of bytes freed. The caller has the lock."""
        return blobs.drop_unlinked(self.blob(digest))

    # --- State -----------------------------------------------------------------------------------------

    def state(self) -> CacheState:
        """What `state.json` says; a missing file is an empty state.

        A damaged file is set aside in `damaged/` and rebuilt from the committed versions (`rebuilt` says why), so no
        version that is whole on disk is lost.
        """
        try:
            return self._state_file.read()
        except StoreError:
            with self.lock():
                return self.state_locked()

    def state_locked(self) -> CacheState:
        """The same as `state`, for a caller who has the lock."""
        try:
            return self._state_file.read()
        except StoreError as error:
            if disk.passes(error):  # a new state would have no pins and no quarantine
                raise
            return self._state_file.rebuild(self.versions(), reason=error.message)

    def change_state(self, name: str, change: Callable[[ModelState], ModelState]) -> ModelState:
        """Applies `change` to one model's state, writes it with one rename, and returns it."""
        with self.lock():
            state = self.state_locked()
            model = change(state.model(name))
            self._state_file.write(state.with_model(name, model))
        return model

    # --- Space -----------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Everything that counts against the quota; hard-linked bytes count once."""
        return disk.tree_bytes(self.blobs, self.staging_root, self.damaged_root)

    def free_bytes(self) -> int:
        """Bytes that this user may still write on the cache's file system."""
        return disk.free_bytes(self.root)

    # --- After a crash ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """Syncs every folder with final names in it: the process that gave them may have died before it did.

        Without this, `state.json` could durably name a version whose record is lost in the next power cut. The caller
        has the lock.
        """
        with store_errors("sync", self.root):
            for kept in (self.versions_root, self.blobs.parent):
                for folder in (kept, *disk.folders_below(kept)):
                    durable.sync_folder(folder)
            for folder in (self.root, self.root.parent):
                durable.sync_folder(folder)

    # --- Inside ----------------------------------------------------------------------------------------

    def _relink(self, record: VersionRecord, file: ManifestFile) -> None:
        temporary = self.record_file(record).with_suffix(f".link{durable.TEMPORARY_SUFFIX}")
        blobs.relink(self.blob(file.sha256), self.folder(record) / file.path, temporary=temporary)

    def _touch(self, record: VersionRecord) -> None:
        try:
            durable.touch(self.record_file(record))
        except OSError as error:
            log.warning(
                "last use not noted code=cache_failed version=%s reason=%r", record.key, error.strerror
            )

    @contextmanager
    def _unleased(self, record: VersionRecord) -> Iterator[None]:
        folder = self.folder(record)
        try:
            lock = Lock.of_folder(folder)
        except FileNotFoundError:
            yield
            return
        with lock:
            if not lock.try_exclusive():
                raise CacheBusy(f"version {record.key} of {record.name} is in use", remedy="unload it first")
            yield


def _read_record(file: Path) -> VersionRecord | None:
    """None where there is none, or one that cannot be read: then its version is none, and is fetched again."""
    try:
        data = disk.read_bounded(file, _MAX_RECORD_BYTES)
        if data is None:
            return None
        record = records.parse(data)
    except StoreError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in disk.DAMAGE:
            raise
        log.warning("record unreadable code=file_damaged file=%s reason=%r", file, str(error))
        return None
    if (record.name, record.key) != (file.parent.name, file.stem):
        log.warning("record unreadable code=file_damaged file=%s reason='it describes another version'", file)
        return None
    return record
