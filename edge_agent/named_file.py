"""Files that people name, in settings and arguments: any path, so each is read up to a bound."""

from __future__ import annotations

import errno
from pathlib import Path


def read(path: Path, limit_bytes: int) -> bytes:
    """A file's content.

    Raises:
        OSError: it cannot be read, or has more than `limit_bytes`; `strerror` says which, for people.
    """
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"it has more than {limit_bytes} bytes")
    return data
