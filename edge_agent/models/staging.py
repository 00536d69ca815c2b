"""One version on its way in: what was fetched so far, and the tree that is judged before it is committed.

Owns `staging/<NAME>-<version>/`: `parts/` has the downloads by digest, unfinished ones ending in `.part`;
`tree/` is the package. One process at a time has the folder; the lock is the folder's own, so it goes with
the process. What a killed process leaves is continued by the next one, or pruned when it is old.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_agent.errors import CacheBusy
from edge_agent.models import durable
from edge_agent.models.manifest import ManifestFile
from edge_agent.models.store import Store, store_errors, try_flock

_MAX_ETAG_BYTES = 1_000


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

    def etag(self, part: Path) -> str:
        """The version of the file on the server that a part was begun with, or empty."""
        with suppress(OSError, UnicodeDecodeError):
            return part.with_suffix(".etag").read_bytes()[:_MAX_ETAG_BYTES].decode("ascii")
        return ""

    def note_etag(self, part: Path, etag: str) -> None:
        file = part.with_suffix(".etag")
        if etag and etag.isascii() and len(etag) < _MAX_ETAG_BYTES:
            durable.write_file(file, etag.encode())
        else:
            durable.unlink(file)

    def drop_part(self, part: Path) -> None:
        durable.unlink(part)
        durable.unlink(part.with_suffix(".etag"))

    def keep(self, path: str, data: bytes) -> ManifestFile:
        """Stages a small file whose bytes are here already."""
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

    def fetched_bytes(self) -> int:
        """What the parts take on disk."""
        with suppress(OSError):
            return sum(path.stat().st_size for path in self.parts.iterdir())
        return 0

    def clear(self) -> None:
        """Frees everything."""
        durable.remove_tree(self.tree)
        durable.remove_tree(self.parts)


@contextmanager
def staging(store: Store, name: str, version: int) -> Iterator[Staging]:
    """Takes a version's staging folder for this process.

    Raises:
        CacheBusy: another process is fetching this version.
    """
    folder = store.staging_root / f"{name}-{version}"
    while True:
        with store_errors("make", folder):
            durable.make_folder(folder)
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it was pruned between the two calls
        try:
            if not try_flock(descriptor):
                raise CacheBusy(f"version {version} of {name} is being fetched by another process")
            if not _is_same(folder, descriptor):
                continue
            taken = Staging(folder)
            with store_errors("make", taken.parts):
                durable.make_folder(taken.parts)
            yield taken
            return
        finally:
            durable.remove_empty(folder / "parts", folder)
            os.close(descriptor)


def remove_staging(folder: Path) -> bool:
    """Removes a version's staging folder, unless a process has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        durable.unlink(folder)
        return True
    try:
        if not try_flock(descriptor):
            return False
        durable.remove_tree(folder)
        return True
    finally:
        os.close(descriptor)


def _is_same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
