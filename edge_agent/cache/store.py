"""The cache on disk: verified blobs, whole versions, `state.json`.

Owns `<state_dir>/models` as design and ADR describe it:

    blobs/sha256/<digest>                       verified bytes, read-only
    versions/<NAME>/<version>-<digest12>/…      the package, hard links into blobs
    versions/<NAME>/<version>-<digest12>.json   the version's record; writing it is the commit
    staging/<NAME>-<version>/…                  what a running sync has so far
    damaged/  state.json  lock

Flow of a commit: blobs get their digest as name → the tree is linked and synced → the tree is renamed into
place → the record is renamed into place. What has no record does not count and is pruned. Removal goes the
other way round. Refuses: bytes that are not what a manifest promised, and a second writer at the same time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache import record as records
from edge_agent.cache import state as states
from edge_agent.cache.record import KEY, VersionRecord
from edge_agent.cache.state import CacheState, ModelState
from edge_agent.errors import CacheBusy, StoreError, VerificationError
from edge_agent.package.manifest import ManifestFile
from edge_agent.package.reference import MODEL_NAME

log = logging.getLogger(__name__)

LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.05
_MAX_RECORD_BYTES = 4 << 20
_MAX_STATE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


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
        self._state_file = self.root / "state.json"
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

        The kernel lets go when the holder dies, so there is no stale lock.

        Raises:
            CacheBusy: somebody else had it for the whole of `wait_s`.
        """
        self.create()
        with store_errors("lock the cache", self._lock_file):
            descriptor = durable.open_lock(self._lock_file)
        try:
            deadline = time.monotonic() + wait_s
            while not try_flock(descriptor):
                if time.monotonic() >= deadline:
                    raise CacheBusy(
                        f"another process has the cache's lock {self._lock_file}",
                        remedy="wait for the running command, or see `edge-agent status`",
                    )
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Makes this the only fetch into the cache, among all processes; a dead process does not hold it.

        Raises:
            CacheBusy: another process is fetching.
        """
        self.create()
        with store_errors("lock", self.staging_root):
            descriptor = os.open(self.staging_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not try_flock(descriptor):
                raise CacheBusy(
                    "another process is fetching a model into this cache",
                    remedy="wait for it, or see `edge-agent status`",
                )
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def lease(self, record: VersionRecord) -> Iterator[Path]:
        """Keeps a version from being removed while it is loaded; gives its folder.

        Raises:
            StoreError: the version is not there any more.
        """
        folder = self.folder(record)
        with store_errors("open the version", folder):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if self.record(record.name, record.key) is None:
                raise StoreError(f"version {record.key} of {record.name} was removed")
            self._touch(record)
            yield folder
        finally:
            os.close(descriptor)

    # --- Versions --------------------------------------------------------------------------------------

    def versions(self, name: str | None = None) -> list[VersionRecord]:
        """Committed versions, of one model or of all, by name and version. Damaged records are left out."""
        found = []
        for file in self.record_files(name):
            record = self._read_record(file)
            if record is not None:
                found.append(record)
        return sorted(found, key=lambda record: (record.name, record.version, record.created_at))

    def record(self, name: str, key: str) -> VersionRecord | None:
        """One committed version, or None."""
        if not MODEL_NAME.fullmatch(name) or not KEY.fullmatch(key):
            return None
        return self._read_record(self.versions_root / name / f"{key}.json")

    def record_files(self, name: str | None = None) -> list[Path]:
        """The files of all records, damaged ones too."""
        folders = [self.versions_root / name] if name else _children(self.versions_root)
        return [file for folder in folders for file in _children(folder) if file.suffix == ".json"]

    def folder(self, record: VersionRecord) -> Path:
        """Where the version's package is, committed or not."""
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
            record: what is committed; `record.files` is exactly what `tree` has.
            tree: folder in staging; it is gone afterwards.

        Raises:
            StoreError: the file system refuses.
        """
        folder = self.folder(record)
        with store_errors("commit a version", folder):
            for file in record.files:
                self._adopt(tree / file.path, file)
            durable.sync_folder(self.blobs)
            for inner in sorted({tree, *(_folders(tree))}, reverse=True):
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
        """Writes into a version's record whether it has served, where it does not say so yet."""
        with self.lock():
            record = self.record(name, key)
            if record is not None and record.served != served:
                self.rewrite(replace(record, served=served))

    def relink(self, record: VersionRecord, file: ManifestFile) -> None:
        """Makes one file of a version a link to its blob again. The caller has the lock."""
        with store_errors("relink", self.folder(record)):
            self._replace_link(record, file)

    def remove_stray(self, record: VersionRecord, path: str) -> None:
        """Removes a file that a version should not have, durably. The caller has the lock."""
        stray = self.folder(record) / path
        with store_errors("remove", stray):
            durable.unlink(stray)
            durable.sync_folder(stray.parent)

    def remove(self, record: VersionRecord) -> int:
        """Takes a version away: record, tree, blobs that nothing else links. The caller has the lock.

        Returns:
            Bytes that became free.

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
        try:
            return self.blob(file.sha256).lstat().st_size == file.size_bytes
        except OSError:
            return False

    def repair(self, source: Path, file: ManifestFile) -> list[VersionRecord]:
        """Puts verified bytes in the place of a damaged or missing blob, and relinks every version with it.

        The caller has the lock, and has stopped the runners of those versions.

        Returns:
            The versions that were relinked.
        """
        check_file(source, file)
        relinked = []
        with store_errors("repair a blob", source):
            durable.unlink(self.blob(file.sha256))
            self._move_in(source, file)
            durable.sync_folder(self.blobs)
            for record in self.versions():
                files = [known for known in record.files if known.sha256 == file.sha256]
                for known in files:
                    self._replace_link(record, known)
                if files:
                    relinked.append(record)
        return relinked

    def drop_unlinked(self, digest: str) -> int:
        """Removes a blob that no version links; gives the bytes that became free."""
        blob = self.blob(digest)
        try:
            status = blob.lstat()
        except FileNotFoundError:
            return 0
        if status.st_nlink > 1:
            return 0
        durable.unlink(blob)
        return status.st_size

    # --- State -----------------------------------------------------------------------------------------

    def state(self) -> CacheState:
        """What `state.json` says; a missing file is an empty state.

        A damaged one is set aside in `damaged/` and rebuilt from the committed versions (`rebuilt` says so):
        a version that is whole on disk is never lost to it.
        """
        try:
            return self._read_state()
        except StoreError:
            with self.lock():
                return self.state_locked()

    def state_locked(self) -> CacheState:
        """The same as `state`, for a caller who has the lock."""
        try:
            return self._read_state()
        except StoreError as error:
            return self._rebuild_state(error.message)

    def change_state(self, name: str, change: Callable[[ModelState], ModelState]) -> ModelState:
        """Reads one model's state, applies `change`, writes it with one rename; gives the new state."""
        with self.lock():
            state = self.state_locked()
            model = change(state.model(name))
            self.write_state(state.with_model(name, model))
        return model

    def write_state(self, state: CacheState) -> None:
        """Replaces `state.json`. The caller has the lock."""
        with store_errors("write", self._state_file):
            durable.write_file(self._state_file, state.encode())

    def _read_state(self) -> CacheState:
        data = _read_bounded(self._state_file, _MAX_STATE_BYTES)
        return CacheState() if data is None else states.parse(data)

    def _rebuild_state(self, reason: str) -> CacheState:
        with store_errors("set aside", self._state_file):
            durable.make_folder(self.damaged_root)
            durable.rename(self._state_file, self.damaged_root / f"state-{time.time_ns()}.json")
            durable.sync_folder(self.damaged_root)
        state = states.rebuild(self.versions(), reason=reason)
        self.write_state(state)
        log.warning("state rebuilt reason=%r models=%d", reason, len(state.models))
        return state

    # --- Space -----------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Everything that counts against the quota; hard-linked bytes count once."""
        return _tree_bytes(self.blobs, self.staging_root, self.damaged_root)

    def free_bytes(self) -> int:
        """Bytes that this user may still write on the cache's file system."""
        with store_errors("measure", self.root):
            status = os.statvfs(self.root if self.root.exists() else _existing_parent(self.root))
        return status.f_bavail * status.f_frsize

    # --- After a crash ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """Makes durable what has its final name already: whoever gave it may have died before the folder was synced.

        Without this, `state.json` could come to name, durably, a version whose record a power cut takes away. The
        caller has the lock.
        """
        with store_errors("sync", self.root):
            for kept in (self.versions_root, self.blobs.parent):
                for folder in (kept, *_folders(kept)):
                    durable.sync_folder(folder)
            for folder in (self.root, self.root.parent):
                durable.sync_folder(folder)

    # --- Inside ----------------------------------------------------------------------------------------

    def _read_record(self, file: Path) -> VersionRecord | None:
        data = _read_bounded(file, _MAX_RECORD_BYTES)
        if data is None:
            return None
        try:
            record = records.parse(data)
        except StoreError as error:
            log.warning("record unreadable file=%s reason=%r", file, str(error))
            return None
        if (record.name, record.key) != (file.parent.name, file.stem):
            log.warning("record unreadable file=%s reason='it describes another version'", file)
            return None
        return record

    def _adopt(self, path: Path, file: ManifestFile) -> None:
        """Makes a staged file's bytes a blob, or the staged name a link to the blob that is already there."""
        blob = self.blob(file.sha256)
        if not self.has_blob(file):
            durable.set_mode(path, durable.BLOB_MODE)
            durable.sync_file(path)
            durable.unlink(blob)
            durable.link(path, blob)
        elif not path.samefile(blob):
            durable.unlink(path)
            durable.link(blob, path)

    def _move_in(self, source: Path, file: ManifestFile) -> Path:
        target = self.blob(file.sha256)
        durable.set_mode(source, durable.BLOB_MODE)
        durable.sync_file(source)
        durable.rename(source, target)
        return target

    def _replace_link(self, record: VersionRecord, file: ManifestFile) -> None:
        """Makes a version's file a link to its blob, with one rename; no stray name is left inside the version."""
        path = self.folder(record) / file.path
        temporary = self.record_file(record).with_suffix(f".link{durable.TEMPORARY_SUFFIX}")
        durable.unlink(temporary)
        durable.make_folder(path.parent)
        if not (path.exists() and path.samefile(self.blob(file.sha256))):
            durable.link(self.blob(file.sha256), temporary)
            durable.rename(temporary, path)
        durable.sync_folder(path.parent)

    def _touch(self, record: VersionRecord) -> None:
        try:
            durable.touch(self.record_file(record))
        except OSError as error:
            log.warning("last use not noted version=%s reason=%r", record.key, error.strerror)

    @contextmanager
    def _unleased(self, record: VersionRecord) -> Iterator[None]:
        folder = self.folder(record)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield
            return
        try:
            if not try_flock(descriptor):
                raise CacheBusy(f"version {record.key} of {record.name} is in use", remedy="unload it first")
            yield
        finally:
            os.close(descriptor)


def check_files(folder: Path, record: VersionRecord, *, read: bool = True) -> None:
    """Checks every file of a version in its folder: what is done before it is loaded.

    Args:
        read: False leaves the sha256 out: microseconds.

    Raises:
        VerificationError: one is not what was committed; it is named.
    """
    for file in record.files:
        check_file(folder / file.path, file, read=read)


def check_file(path: Path, file: ManifestFile, *, read: bool = True) -> None:
    """Checks a file's kind, size and sha256 on disk.

    Args:
        read: False leaves the sha256 out: microseconds.

    Raises:
        VerificationError: they are not those of `file`; the path inside the package is named.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise VerificationError(f"{file.path!r} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != file.size_bytes:
            raise VerificationError(f"{file.path!r} has {size} bytes, its manifest says {file.size_bytes}")
        if not read:
            return
        digest = hashlib.sha256()
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        except OSError as error:
            raise VerificationError(f"{file.path!r} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != file.sha256:
        raise VerificationError(f"sha256 of {file.path!r} is not the one in its manifest")


def try_flock(descriptor: int) -> bool:
    """Takes the exclusive lock of an open file, or says at once that somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def store_errors(action: str, path: Path) -> Iterator[None]:
    """Wraps the operating system's errors, with a remedy for the ones that have one."""
    try:
        yield
    except OSError as error:
        raise store_error(action, path, error) from error


def store_error(action: str, path: Path, error: OSError) -> StoreError:
    """An operating system's error in this tree's words."""
    remedies = {
        errno.ENOSPC: "free some space, or lower cache.quota_bytes",
        errno.EDQUOT: "free some space, or lower cache.quota_bytes",
        errno.EACCES: "give the agent's user the state directory",
        errno.EROFS: "mount the state directory read-write",
        errno.EPERM: "the file system must have hard links; see `edge-agent doctor`",
        errno.EOPNOTSUPP: "the file system must have hard links; see `edge-agent doctor`",
        errno.EXDEV: "the whole state directory must be on one file system",
    }
    return StoreError(f"cannot {action} {path}: {error.strerror}", remedy=remedies.get(error.errno or 0, ""))


def _read_bounded(path: Path, limit: int) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise store_error("read", path, error) from error
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit + 1)[: limit + 1]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _folders(tree: Path) -> Iterable[Path]:
    return (path for path in tree.rglob("*") if path.is_dir() and not path.is_symlink())


def _tree_bytes(*roots: Path) -> int:
    """Sizes of all files under these folders, each inode once; names that vanish meanwhile are passed over."""
    seen: dict[tuple[int, int], int] = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                try:
                    status = (Path(folder) / name).lstat()
                except OSError:
                    continue
                seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
