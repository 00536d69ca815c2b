"""A cache with one version, for the benchmark's own daemon. Its files are hard links to the device's blobs.

It is always `<state_dir>/bench`, so that leftovers of a killed benchmark do not pile up: the next one removes them
first. If hard links are not allowed, the files are copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.bench.line_child import BenchError
from edge_agent.cache import durable
from edge_agent.cache.disk import store_errors
from edge_agent.cache.locks import Lock
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store


@contextmanager
def private_cache(store: Store, record: VersionRecord) -> Iterator[Path]:
    """Yields a state directory in which `record` is the active version, and removes it at the end of the block.

    Args:
        store: the device's cache.

    Raises:
        BenchError: another benchmark is running.
        StoreError: the state directory is not writable.
    """
    place = store.root.parent / "bench"
    with store_errors("prepare the benchmark in", place):
        durable.make_folder(place)
        lock = Lock.of_folder(place)
    with lock:
        if not lock.try_exclusive():
            raise BenchError("another benchmark of this device is running")
        try:
            with store_errors("prepare the benchmark in", place):
                for old in place.iterdir():
                    durable.remove_tree(old)
                _fill(Store(place), store.folder(record), record)
            yield place
        finally:
            durable.remove_tree(place)


def _fill(cache: Store, source: Path, record: VersionRecord) -> None:
    cache.create()
    tree = cache.staging_root / "bench"
    for file in record.files:
        target = tree / file.path
        durable.make_folder(target.parent)
        try:
            durable.link(source / file.path, target)
        except OSError:
            shutil.copyfile(source / file.path, target)
    with cache.lock():
        cache.commit(record, tree)
    cache.change_state(record.name, lambda state: state.switched(record.key))
