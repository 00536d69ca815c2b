"""Making room: the quota, the minimum free space, and which versions go first.

The least recently used version goes first. Never removed are active, previous, candidate and pinned versions, the
newest version of each model (it may have been committed a moment ago), and versions that a process has leased.
"""

from __future__ import annotations

import logging
from collections.abc import Set

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import CacheState
from edge_agent.cache.store import Store
from edge_agent.errors import CacheBusy, CacheFull

log = logging.getLogger(__name__)


def make_room(
    store: Store,
    *,
    needed_bytes: int,
    quota_bytes: int,
    min_free_bytes: int,
    keep: Set[tuple[str, str]] = frozenset(),
) -> list[VersionRecord]:
    """Removes versions until `needed_bytes` more fit. The caller has the store's lock.

    Args:
        keep: (name, key) of versions that must stay, besides the protected ones.

    Returns:
        The versions that were removed.

    Raises:
        CacheFull: they do not fit, and nothing more may go. Nothing is removed in vain.
    """
    excess = excess_bytes(store, needed_bytes, quota_bytes, min_free_bytes)
    if excess <= 0:
        return []
    candidates = evictable(store, keep=keep)
    if sum(record.total_bytes for record in candidates) < excess:
        raise CacheFull(
            f"the cache needs {needed_bytes} bytes more and {excess} of them do not fit "
            f"(free {store.free_bytes()}, used {store.used_bytes()} of {quota_bytes})",
            remedy="raise cache.quota_bytes, free disk space, or remove versions: `edge-agent models rm`",
        )
    removed: list[VersionRecord] = []
    for record in candidates:
        if excess_bytes(store, needed_bytes, quota_bytes, min_free_bytes) <= 0:
            break
        try:
            freed = store.remove(record)
        except CacheBusy:
            continue
        log.info("version evicted model=%s version=%s freed_bytes=%d", record.name, record.key, freed)
        removed.append(record)
    if (excess := excess_bytes(store, needed_bytes, quota_bytes, min_free_bytes)) > 0:
        raise CacheFull(f"the cache is {excess} bytes short, and every version in it is in use or protected")
    return removed


def evictable(store: Store, *, keep: Set[tuple[str, str]] = frozenset()) -> list[VersionRecord]:
    """The versions that may be removed, least recently used first."""
    state = store.state_locked()
    records = store.versions()
    protected = keep | _protected(state, records)
    return sorted(
        (record for record in records if (record.name, record.key) not in protected), key=store.last_used_at
    )


def _protected(state: CacheState, records: list[VersionRecord]) -> set[tuple[str, str]]:
    protected = {(name, key) for name, model in state.models.items() for key in model.protected}
    newest: dict[str, VersionRecord] = {}
    for record in records:
        if record.key in state.model(record.name).quarantined:
            continue
        if record.name not in newest or record.created_at >= newest[record.name].created_at:
            newest[record.name] = record
    return protected | {(record.name, record.key) for record in newest.values()}


def attainable_bytes(store: Store, quota_bytes: int, min_free_bytes: int) -> int:
    """What the cache may still take, once everything is gone that may go. The caller has the store's lock."""
    removable = sum(record.total_bytes for record in evictable(store))
    return max(0, removable - excess_bytes(store, 0, quota_bytes, min_free_bytes))


def excess_bytes(store: Store, needed_bytes: int, quota_bytes: int, min_free_bytes: int) -> int:
    """How many of `needed_bytes` do not fit; 0 or less where all of them do."""
    over_quota = store.used_bytes() + needed_bytes - quota_bytes
    too_little_free = needed_bytes + min_free_bytes - store.free_bytes()
    return max(over_quota, too_little_free)
