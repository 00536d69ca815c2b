"""What the cache reads of its disk: small files, the names in a folder, used and free space.

Changes nothing: only `durable.py` does. `store_errors` turns what the operating system refuses, there or here, into a
`StoreError` with a remedy where there is one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.errors import CacheFull, StoreError, disk_remedy

_NO_LINKS = "the file system must have hard links; see `edge-agent doctor`"
PASSING = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
"""What a host lacks for a moment. Who meets one of these knows nothing of the file."""
DAMAGE = frozenset((errno.EIO, errno.EBADMSG, errno.EUCLEAN))
"""What a disk answers that cannot give a file or its inode back; with the last two, a checksum was wrong."""
_REMEDIES = {
    errno.ENOSPC: "free some space, or lower cache.quota_bytes",
    errno.EPERM: _NO_LINKS,
    errno.EOPNOTSUPP: _NO_LINKS,
    errno.EXDEV: "the whole state directory must be on one file system",
}


@contextmanager
def store_errors(action: str, path: Path) -> Iterator[None]:
    """Turns errors of the operating system into `StoreError`."""
    try:
        yield
    except OSError as error:
        raise store_error(action, path, error) from error


def store_error(action: str, path: Path, error: OSError) -> StoreError:
    """The operating system's error as a `StoreError`."""
    remedy = _REMEDIES.get(error.errno or 0) or disk_remedy(error)
    kind = CacheFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
    return kind(f"cannot {action} {path}: {error.strerror}", remedy=remedy)


def passes(error: StoreError) -> bool:
    """Whether it is one of `PASSING`."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in PASSING


def read_bounded(path: Path, limit_bytes: int) -> bytes | None:
    """A small file, None where there is none. Of one over the bound, only its first `limit_bytes + 1` bytes.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise store_error("read", path, error) from error
    try:
        # A folder is opened above, and refused here.
        with store_errors("read", path), open(descriptor, "rb", closefd=False) as file:
            return file.read(limit_bytes + 1)
    finally:
        os.close(descriptor)


def children(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name; none if there is no such folder.

    Raises:
        StoreError: it cannot be read.
    """
    with store_errors("read", folder):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def folders_below(tree: Path) -> Iterable[Path]:
    """Every folder inside a tree; links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    # Without a look at the files themselves: one that the disk cannot even describe is no folder.
    return (Path(inner) for inner, _, _ in os.walk(tree, onerror=refuse) if Path(inner) != tree)


def tree_bytes(*roots: Path) -> int:
    """The size of all files under these folders, each inode counted once. Names that vanish meanwhile are skipped."""
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


def free_bytes(path: Path) -> int:
    """The bytes that this user may still write on the file system of `path`, which need not exist yet.

    Raises:
        StoreError: the file system does not say.
    """
    with store_errors("measure", path):
        existing = path
        while not existing.exists():
            existing = existing.parent
        status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize
