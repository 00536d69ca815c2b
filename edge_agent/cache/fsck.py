"""Checking the cache: is what was committed still what was verified?

`quick_check` looks at sizes and links; `verify` reads every byte. A damaged blob is set aside, so that the
next sync fetches that blob and nothing else. `prune` tidies up what a crash left between two steps. What happens to a
damaged version is not decided here: that is the lifecycle's work.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.disk import children, store_errors
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.staging import remove_staging
from edge_agent.cache.store import Store
from edge_agent.cache.verify import damage_of
from edge_agent.package.manifest import ManifestFile

log = logging.getLogger(__name__)

MAX_PARTIAL_AGE_S = 7 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file of one version that is not what was verified.

    Attributes:
        name, key: the version.
        path: inside the package.
        sha256: of the blob that should be there, empty for a file that should not be there at all.
    """

    name: str
    key: str
    path: str
    sha256: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a check found.

    Attributes:
        checked: the number of files that were checked.
    """

    checked: int
    damaged: tuple[Damage, ...]

    def of(self, record: VersionRecord) -> tuple[Damage, ...]:
        return tuple(
            damage for damage in self.damaged if (damage.name, damage.key) == (record.name, record.key)
        )


def quick_check(store: Store, records: Iterable[VersionRecord] | None = None) -> Verification:
    """Checks sizes and links of the given versions, or of all. It takes milliseconds and runs at every boot."""
    return _check(store, records, lambda path, file: None)


def verify(
    store: Store,
    records: Iterable[VersionRecord] | None = None,
    *,
    on_file: Callable[[ManifestFile], None] = lambda file: None,
) -> Verification:
    """Reads and hashes every byte of the given versions, or of all. Changes nothing.

    Args:
        on_file: called before each file is read, to show progress; it may raise to stop the check.
    """
    found: dict[tuple[int, int], str] = {}

    def read(path: Path, file: ManifestFile) -> str | None:
        status = path.lstat()
        inode = status.st_dev, status.st_ino
        if inode not in found:  # hard links: one inode is read once
            on_file(file)
            found[inode] = damage_of(path, file)
        return found[inode] or None

    return _check(store, records, read)


def set_aside(store: Store, damaged: Iterable[Damage]) -> list[str]:
    """Moves damaged blobs to `damaged/`, where nothing finds them; the next sync fetches them again.

    Versions keep their links until then, so a runner that has them open is not disturbed. The caller has
    the store's lock.

    Returns:
        Digests that were moved.
    """
    digests = sorted({damage.sha256 for damage in damaged if damage.sha256})
    return [digest for digest in digests if set_aside_blob(store, digest)]


def set_aside_blob(store: Store, digest: str) -> bool:
    """Moves one blob to `damaged/`, if it is there. The caller has the store's lock."""
    blob = store.blob(digest)
    with store_errors("set aside", blob):
        if not blob.exists():
            return False
        durable.make_folder(store.damaged_root)
        durable.rename(blob, store.damaged_root / digest)
        durable.sync_folder(store.damaged_root)
        durable.sync_folder(store.blobs)
    log.warning("blob set aside code=verification_failed digest=%s", digest)
    return True


def mend_links(store: Store) -> list[Damage]:
    """Restores the links of every version to blobs that are whole.

    They are missing after a process died between repairing a blob and repairing the links to it. The caller has
    the store's lock.

    Returns:
        The damage that was mended.
    """
    mended = []
    found = quick_check(store)
    for record in store.versions():
        files = {file.path: file for file in record.files}
        for damage in found.of(record):
            file = files.get(damage.path)
            if file is None or not store.has_blob(file) or damage_of(store.blob(file.sha256), file):
                continue
            store.relink(record, file)
            log.warning(
                "link mended code=verification_failed model=%s version=%s path=%r",
                record.name,
                record.key,
                file.path,
            )
            mended.append(damage)
    return mended


def look_over(store: Store) -> tuple[Damage, ...]:
    """The check at each boot: tidies up after a crash, and sets aside what sizes and links show to be damaged.

    Returns:
        The damage. The next sync fetches those blobs again.
    """
    with store.lock():
        store.settle()
        prune(store)
        damaged = quick_check(store).damaged
        set_aside(store, damaged)
    for damage in damaged:
        log.warning(
            "damaged code=verification_failed model=%s version=%s path=%r reason=%r",
            damage.name,
            damage.key,
            damage.path,
            damage.reason,
        )
    return damaged


def prune(
    store: Store,
    *,
    now: float | None = None,
    max_partial_age_s: float = MAX_PARTIAL_AGE_S,
    all_partial: bool = False,
) -> int:
    """Removes what no record needs: trees and blobs left by a crash, old downloads, old or replaced damage.

    A repair that a crash interrupted is completed first. A tree stays if its record exists but is unreadable. The
    caller has the store's lock.

    Args:
        now: seconds since the epoch.
        all_partial: removes downloads of any age, except one that a process is fetching now.

    Returns:
        Bytes that became free.
    """
    before = store.used_bytes()
    now = time.time() if now is None else now
    with store_errors("prune", store.root):
        mend_links(store)
        for path in children(store.root):
            if path.suffix == durable.TEMPORARY_SUFFIX:
                durable.unlink(path)
        for folder in children(store.staging_root):
            newest = _newest_file(folder)
            if all_partial or newest is None or now - newest >= max_partial_age_s:
                remove_staging(folder)
        for name in children(store.versions_root):
            for path in children(name):
                if path.suffix == durable.TEMPORARY_SUFFIX:
                    durable.unlink(path)
                elif path.suffix != ".json" and not path.with_name(f"{path.name}.json").exists():
                    durable.remove_tree(path)
        for blob in children(store.blobs):
            store.drop_unlinked(blob.name)
        for aside in children(store.damaged_root):
            is_old = now - aside.lstat().st_mtime >= max_partial_age_s
            if is_old or store.blob(aside.name).exists():
                durable.unlink(aside)
    return max(0, before - store.used_bytes())


def _check(
    store: Store,
    records: Iterable[VersionRecord] | None,
    read: Callable[[Path, ManifestFile], str | None],
) -> Verification:
    checked, damaged = 0, []
    for record in store.versions() if records is None else records:
        folder = store.folder(record)
        for file in record.files:
            checked += 1
            path = folder / file.path
            reason = _link_reason(store, path, file) or read(path, file)
            if reason:
                damaged.append(_damage(record, file.path, file.sha256, reason))
        expected = {file.path for file in record.files}
        with store_errors("check", folder):
            found = _files(folder)
        for stray in sorted(found - expected):
            checked += 1
            damaged.append(_damage(record, stray, "", "is not in the manifest"))
    return Verification(checked=checked, damaged=tuple(damaged))


def _link_reason(store: Store, path: Path, file: ManifestFile) -> str | None:
    """What is wrong with a file's place, size and link, or None."""
    try:
        status = path.lstat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if status.st_size != file.size_bytes:
        return f"has {status.st_size} bytes instead of {file.size_bytes}"
    try:
        blob = store.blob(file.sha256).lstat()
    except OSError:
        return "its blob is missing"
    return None if os.path.samestat(status, blob) else "is not a link to its blob"


def _damage(record: VersionRecord, path: str, sha256: str, reason: str) -> Damage:
    return Damage(name=record.name, key=record.key, path=path, sha256=sha256, reason=reason)


def _files(folder: Path) -> set[str]:
    found: set[str] = set()
    for inner, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(inner) / name).is_symlink()]
        found.update((Path(inner) / name).relative_to(folder).as_posix() for name in [*names, *links])
    return found


def _newest_file(folder: Path) -> float | None:
    """When a file below the folder was last written, in seconds since the epoch; None where there is none."""
    found = [(Path(inner) / name).lstat().st_mtime for inner, _, names in os.walk(folder) for name in names]
    return max(found, default=None)
