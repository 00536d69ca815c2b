"""The download of one version: what was fetched so far, and the tree that is checked before it is committed.

Owns `staging/<NAME>-<version>/`: `parts/` has the downloads by digest, unfinished ones ending in `.part`;
`tree/` is the package. One process at a time has the folder; it locks the folder itself, so the lock ends with
the process. The next process continues what a killed one left, or it is pruned when it is old.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.disk import store_errors
from edge_agent.cache.locks import Lock
from edge_agent.cache.store import Store
from edge_agent.errors import CacheBusy, StoreError
from edge_agent.package.manifest import ManifestFile

_MAX_NOTE_BYTES = 2_000
_MAX_ETAG = 1_000
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@dataclass(frozen=True, kw_only=True)
class Note:
    """What is known of a part beside its bytes.

    Attributes:
        etag: the ETag of the file when the part was begun, or empty.
        length: how many bytes of the part `sha256` covers.
        sha256: of those bytes, or empty. A part whose own digest is unknown is continued only as far as this one
            matches: after a power loss, anything may follow.
    """

    etag: str = ""
    length: int = 0
    sha256: str = ""


class Staging:
    """The folder of one version that is being fetched. Get one from `staging`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = folder / "parts"
        self.tree = folder / "tree"

    def part(self, *, path: str, sha256: str | None) -> Path:
        """Where a file's bytes are collected: under its digest, or under its path where that is unknown."""
        name = sha256 or f"path-{hashlib.sha256(path.encode()).hexdigest()}"
        return self.parts / f"{name}.part"

    def verified(self, sha256: str) -> Path:
        """Where a fetched file waits once its bytes were checked."""
        return self.parts / sha256

    def note(self, part: Path) -> Note:
        """The note beside a part; an empty one where it is missing or damaged."""
        try:
            with part.with_suffix(".note").open("rb") as file:
                fields = json.loads(file.read(_MAX_NOTE_BYTES))
            note = Note(**fields)
            if isinstance(note.etag, str) and isinstance(note.length, int) and isinstance(note.sha256, str):
                return note
        except (OSError, ValueError, TypeError, RecursionError):
            pass
        return Note()

    def write_note(self, part: Path, note: Note) -> None:
        if len(note.etag) > _MAX_ETAG or not note.etag.isascii():
            note = Note()
        durable.write_hint(part.with_suffix(".note"), json.dumps(asdict(note)).encode())

    def drop_part(self, part: Path) -> None:
        durable.unlink(part)
        durable.unlink(part.with_suffix(".note"))

    def keep(self, path: str, data: bytes) -> ManifestFile:
        """Stages a small file whose bytes have been read already."""
        file = ManifestFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        with store_errors("write", self.parts):
            durable.write_file(self.verified(file.sha256), data)
        return file

    def build_tree(self, store: Store, files: tuple[ManifestFile, ...]) -> Path:
        """Links every file under its own name, from the parts or from blobs that the cache has."""
        with store_errors("stage", self.tree):
            durable.remove_tree(self.tree)
            durable.make_folder(self.tree)
            for file in files:
                target = self.tree / file.path
                durable.make_folder(target.parent)
                fetched = self.verified(file.sha256)
                durable.link(fetched if fetched.exists() else store.blob(file.sha256), target)
        return self.tree

    def bytes_of(self, part: Path) -> int:
        """How much of a part is on disk."""
        with suppress(OSError):
            return part.stat().st_size
        return 0

    def fetched_bytes(self) -> int:
        """The size of all parts on disk."""
        with suppress(OSError):
            return sum(path.stat().st_size for path in self.parts.iterdir())
        return 0

    def clear(self) -> None:
        """Frees everything."""
        for path in (self.tree, self.parts):
            durable.remove_tree(path)


@contextmanager
def staging(store: Store, name: str, version: int) -> Iterator[Staging]:
    """Takes a version's staging folder for this process.

    When the disk is full, what was fetched is removed.

    Raises:
        CacheBusy: another process is fetching this version.
    """
    folder = folder_of(store, name, version)
    with _taken(folder, busy=f"version {version} of {name} is being fetched by another process") as taken:
        try:
            yield taken
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
                taken.clear()  # what cannot be finished does not keep others from writing
            raise


@contextmanager
def _taken(folder: Path, *, busy: str) -> Iterator[Staging]:
    """Makes the folder and locks it; makes it again where it was pruned before it was locked."""
    while True:
        with store_errors("make", folder):
            durable.make_folder(folder)
            try:
                lock = Lock.of_folder(folder)
            except FileNotFoundError:
                continue  # it was pruned between the two calls
        with lock:
            try:
                if not lock.try_exclusive():
                    raise CacheBusy(busy)
                if not lock.is_of(folder):
                    continue
                taken = Staging(folder)
                with store_errors("make", taken.parts):
                    durable.make_folder(taken.parts)
                yield taken
                return
            finally:
                durable.remove_empty(folder / "parts", folder)


def folder_of(store: Store, name: str, version: int) -> Path:
    """The staging folder of a version."""
    return store.staging_root / f"{name}-{version}"


def remove_staging(folder: Path) -> bool:
    """Removes a version's staging folder, unless a process has it."""
    try:
        lock = Lock.of_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        durable.unlink(folder)
        return True
    with lock:
        if not lock.try_exclusive():
            return False
        durable.remove_tree(folder)
        return True


def remove_superseded(store: Store, name: str, *, keep: Path) -> None:
    """Removes what was fetched of other versions of a model than the one in `keep`, unless a process has it."""
    for folder in sorted(store.staging_root.iterdir()):
        if folder != keep and folder.name.rpartition("-")[0] == name:
            remove_staging(folder)
