"""`state.json` on disk: read within a bound, replaced with one rename, set aside when it is damaged.

The caller has the store's lock when it writes. A damaged file is never lost: it is kept in `damaged/`, and a new one
is made from the committed versions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from edge_agent.cache import disk, durable
from edge_agent.cache import state as states
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import CacheState

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20


class StateFile:
    """The file. Holds nothing but its path.

    Args:
        damaged_root: the folder for what is set aside.
    """

    def __init__(self, path: Path, *, damaged_root: Path) -> None:
        self._path = path
        self._damaged_root = damaged_root

    def read(self) -> CacheState:
        """What the file says; a missing one is an empty state.

        Raises:
            StoreError: it is damaged, or cannot be read.
        """
        data = disk.read_bounded(self._path, _MAX_BYTES)
        return CacheState() if data is None else states.parse(data)

    def write(self, state: CacheState) -> None:
        with disk.store_errors("write", self._path):
            durable.write_file(self._path, state.encode())

    def rebuild(self, records: Iterable[VersionRecord], *, reason: str) -> CacheState:
        """Sets the damaged file aside and writes a new one from what is committed.

        Args:
            reason: what is wrong with the file; it becomes the new state's `rebuilt`.
        """
        with disk.store_errors("set aside", self._path):
            durable.make_folder(self._damaged_root)
            aside = self._damaged_root / f"state-{time.time_ns()}.json"
            # A file keeps its name until the new one takes it: a missing one would be an empty state.
            move = durable.link if self._path.is_file() else durable.rename
            move(self._path, aside)
            durable.sync_folder(self._damaged_root)
        state = states.rebuild(records, reason=reason)
        self.write(state)
        log.warning("state rebuilt code=state_rebuilt reason=%r models=%d", reason, len(state.models))
        return state
