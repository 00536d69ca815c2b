"""A state folder as a whole: a copy of it, and a mark by which two of them are the same."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

_AGE_STEP_S = 50  # runs differ in when "now" is; what was made old on purpose is older
_TIMES = re.compile(rb'"(created_at|at|load_ms|tokens_per_s)": ?[0-9.e+]+')
_MEASURED = "learned.json"


def copy_state(source: Path, target: Path) -> None:
    """A copy with the same hard links, and the same modes and times of files."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    copied: dict[int, Path] = {}
    for folder, folders, names in os.walk(source):
        place = target / Path(folder).relative_to(source)
        for name in folders:
            (place / name).mkdir(mode=0o700)
        for name in names:
            inode = (Path(folder) / name).stat().st_ino
            if inode in copied:
                (place / name).hardlink_to(copied[inode])
            else:
                _copy(Path(folder) / name, place / name)
                copied[inode] = place / name


def mark(folder: Path, *, of_any_run: bool = False) -> str:
    """The same for two folders that a start cannot tell apart.

    Args:
        of_any_run: the folders come from different runs: when something was written, and what was measured
            meanwhile, is left out.
    """
    lines, inodes = [], dict[int, int]()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if of_any_run and path.name == _MEASURED:
            continue
        data = b"" if path.is_dir() else path.read_bytes()
        if of_any_run and path.suffix == ".json":
            data = _TIMES.sub(b"", data)
        age = 0 if of_any_run else status.st_mtime // _AGE_STEP_S
        inode = "" if path.is_dir() else inodes.setdefault(status.st_ino, len(inodes))
        digest = hashlib.sha256(data).hexdigest()
        lines.append(f"{path.relative_to(folder)} {status.st_mode} {age} {digest} {inode}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    status = source.stat()
    target.chmod(status.st_mode & 0o777)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
