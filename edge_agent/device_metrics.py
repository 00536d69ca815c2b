"""What the device measures, in one document: that of `metrics` over MQTT and over the control socket; and what the last
prompts took, for the page of the gateway.

Owns the documents' shape. Reads everybody else: counts from `metrics/`, and what is true at this moment from the parts.
Contract: docs/mqtt.md, *Metrics*.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent import printable
from edge_agent.cache.store import Store
from edge_agent.chat.journal import Journal
from edge_agent.errors import StoreError
from edge_agent.host import memory
from edge_agent.metrics.measurements import Measurements
from edge_agent.serving.lifecycle import ModelLifecycle
from edge_agent.settings import Settings
from edge_agent.sync import process
from edge_agent.updates.updates import Updates


class DeviceMetrics:
    """Asked by the main thread and by control threads.

    Args:
        status: the status topic's object.
        connected: whether the broker is.
        gateway_bytes: what the gateway has in memory; None where none runs.
        counters: of the connection to the broker.
    """

    def __init__(
        self,
        settings: Settings,
        measurements: Measurements,
        *,
        store: Store,
        journal: Journal,
        lifecycles: Mapping[str, ModelLifecycle],
        updates: Updates,
        status: Callable[[], Mapping[str, Any]],
        connected: Callable[[], bool],
        gateway_bytes: Callable[[], int | None],
        counters: Mapping[str, int],
    ) -> None:
        self._settings = settings
        self._measurements = measurements
        self._store = store
        self._journal = journal
        self._lifecycles = lifecycles
        self._updates = updates
        self._status = status
        self._connected = connected
        self._gateway_bytes = gateway_bytes
        self._counters = counters
        self._started_at = int(time.time())

    def document(self) -> dict[str, Any]:
        """All of it. Looks at the cache's disk."""
        status, measured = self._status(), self._measurements.document()
        now = {model["name"]: model for model in status["models"]}
        models = {
            name: {**self._of_model(now[name], self._lifecycles[name]), **counts}
            for name, counts in measured["models"].items()
        }
        everything = {
            **{key: status[key] for key in ("time", "boot_id", "agent_version", "state", "queue_depth")},
            "started_at": self._started_at,
            "queue_limit": self._settings.limits.queue_depth,
            "memory_bytes": memory.resident_bytes(os.getpid()),
            "sync_memory_bytes": process.resident_bytes(),
            "gateway_memory_bytes": self._gateway_bytes(),
            "answered": {name: sum(model["answers"].values()) for name, model in models.items()},
            "answers_dropped": self._journal.dropped_answers,
            "prompts_damaged": self._journal.damaged_rows,
            "refused": measured["refused"],
            "counters": dict(self._counters),
            "models": models,
            "bounds": measured["bounds"],
            "cache": {
                "bytes": _known(self._store.used_bytes),
                "quota_bytes": self._settings.cache.quota_bytes,
                "free_bytes": _known(self._store.free_bytes),
            },
            "link": self._updates.link.document(),
            "registry": {"reachable": self._updates.heard.reachable},
            "broker": {"connected": self._connected()},
        }
        return dict(printable.document(everything))

    def recent(self) -> dict[str, Any]:
        """Whose numbers these are, since when, and the last prompts without a word of them. Looks at no disk."""
        return {
            "device_id": self._settings.device_id,
            "started_at": self._started_at,
            "prompts": self._measurements.recent(),
        }

    def _of_model(self, status: Mapping[str, Any], lifecycle: ModelLifecycle) -> dict[str, Any]:
        """What is true of a model now."""
        return {
            **{key: status[key] for key in ("version", "digest", "flavor", "state")},
            "memory_bytes": lifecycle.resident_bytes(),
            "runner_deaths": lifecycle.runner_deaths,
        }


def _known(look: Callable[[], int]) -> int | None:
    """A number of the cache's disk; None where that cannot be read, which is no reason to end the daemon."""
    try:
        return look()
    except (OSError, StoreError):
        return None
