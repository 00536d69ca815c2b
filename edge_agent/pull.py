"""`models pull` without a daemon: the same sync, the same lifecycle, one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.errors import SettingsError
from edge_agent.models.lifecycle import lifecycle_of
from edge_agent.models.store import Store
from edge_agent.models.sync_process import SyncResult
from edge_agent.models.updates import Updates
from edge_agent.settings import Settings


def without_daemon(
    settings: Settings, names: list[str], on_event: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """Brings the named models up to date; each passes the gate (its runner loads it) before it is active.

    Raises:
        EdgeAgentError: no registry is configured, or the registry, a package, the cache or the gate says no.
    """
    if not settings.registry.uri:
        raise SettingsError(
            "registry.uri: no registry is configured", remedy="set registry.uri in the settings"
        )
    store = Store(settings.state_dir)
    store.create()
    lifecycles = {name: lifecycle_of(settings, name, store) for name in names}
    updates = Updates(settings, lifecycles)
    try:
        return [pulled(updates.check(name, on_event)) for name in names]
    finally:
        for lifecycle in lifecycles.values():
            lifecycle.close()


def pulled(result: SyncResult) -> dict[str, Any]:
    """A pull's result as `models pull --json` prints it."""
    return {
        "name": result.name,
        "version": result.version,
        "digest": result.digest,
        "bytes_fetched": result.bytes_fetched,
        "bytes_reused": result.bytes_reused,
    }
