"""Damaged files of versions in the cache: set aside, and fetched again where there is a registry.

A model goes on meanwhile with what it has loaded, which was whole then: no prompt waits for a download. At the end it
loads again, what is there now; an active version that is still damaged gives way. Whoever calls has the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edge_agent.cache import fsck
from edge_agent.cache.fsck import Damage
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError
from edge_agent.updates.check import Lifecycle


def repair(
    store: Store,
    damaged: Sequence[Damage],
    lifecycles: Mapping[str, Lifecycle],
    *,
    fetch_again: Callable[[str], None] | None,
) -> dict[str, str]:
    """
    Args:
        damaged: what a check found; it is looked at again, as an update may have changed it since.
        fetch_again: brings what is missing of a model's version; None where there is no registry.

    Returns:
        By model, why its files were not fetched again.
    """
    keys = sorted({(damage.name, damage.key) for damage in damaged})
    records = [record for name, key in keys if (record := store.record(name, key))]
    found = fsck.verify(store, records)
    with store.lock():
        fsck.set_aside(store, found.damaged)
    problems = {}
    for name in sorted({record.name for record in records if found.of(record)} & set(lifecycles)):
        try:
            if fetch_again:
                fetch_again(name)
        except EdgeAgentError as error:
            problems[name] = str(error)
    for record in records:
        lifecycle = lifecycles.get(record.name)
        if lifecycle and lifecycle.state.active == record.key and found.of(record):
            lifecycle.reload()
    return problems
