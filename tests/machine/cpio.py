"""Writes a folder as a cpio archive, as Linux takes it as its first file system: `python -m tests.machine.cpio`.

Debian has the program cpio in a package that few hosts have; the format is 13 hexadecimal fields and a name. Source:
Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TRAILER = "TRAILER!!!"


def write(folder: Path, out: BinaryIO) -> None:
    """Everything in a folder, owned by root: folders and regular files."""
    for number, path in enumerate(sorted(folder.rglob("*")), 1):
        mode = path.stat().st_mode
        content = b"" if path.is_dir() else path.read_bytes()
        out.writelines(_entry(number, mode, path.relative_to(folder).as_posix(), content))
    out.writelines(_entry(0, 0, _TRAILER, b""))


def _entry(inode: int, mode: int, name: str, content: bytes) -> Iterator[bytes]:
    named = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, four numbers of devices, length of the name, checksum (unused)
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(named), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + named
    yield header + b"\0" * (-len(header) % 4)
    yield content + b"\0" * (-len(content) % 4)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.stdout.buffer)
