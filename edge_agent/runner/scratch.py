"""A private temporary folder for one child: the only place where it may write. The daemon makes and removes it.

Those of a daemon that was killed are removed by the next one: a folder's name says whose it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "edge-agent-scratch-"


def make_scratch() -> Path | None:
    """An empty folder that only this user may enter. None if the disk takes none: most models need none."""
    try:
        _remove_orphans(Path(tempfile.gettempdir()))
        return Path(tempfile.mkdtemp(prefix=f"{_of_this_host()}{os.getpid()}-"))
    except OSError as error:
        log.warning("no temporary folder reason=%r", str(error))
        return None


def remove_scratch(folder: Path | None) -> None:
    """Removes it with all that the child left in it."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _of_this_host() -> str:
    """Process numbers mean something within their namespace only, and containers may share a folder."""
    return f"{PREFIX}{Path('/proc/self/ns/pid').stat().st_ino}-"


def _remove_orphans(folder: Path) -> None:
    for path in folder.glob(f"{_of_this_host()}*"):
        number = path.name.removeprefix(_of_this_host()).partition("-")[0]
        if number.isdecimal() and not _lives(int(number)):
            with contextlib.suppress(OSError):  # somebody else has just removed it
                if path.lstat().st_uid == os.geteuid():
                    remove_scratch(path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
