"""A private temporary folder for one child: the only place where it may write. The daemon makes and removes it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "edge-agent-scratch-"


def make_scratch() -> Path | None:
    """An empty folder that only this user may enter. None if the disk takes none: most models need none."""
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX))
    except OSError as error:
        log.warning("no temporary folder reason=%r", str(error))
        return None


def remove_scratch(folder: Path | None) -> None:
    """Removes it with all that the child left in it."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
