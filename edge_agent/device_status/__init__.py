"""What the device says of itself: its status, what it reports of its models, and when it says so.

Owns the number of status messages, the name of this boot, and what was said last. Reads everybody else; changes
nothing. Contract: docs/mqtt.md, *Status*. The metrics are `device_metrics.py`'s.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import edge_agent
from edge_agent import printable
from edge_agent.cache.store import Store
from edge_agent.chat import messages
from edge_agent.chat.journal import Journal
from edge_agent.device_status import home_assistant, model_report, troubles
from edge_agent.device_status.troubles import Trouble
from edge_agent.errors import EdgeAgentError, JournalUnavailable
from edge_agent.host import landlock, seccomp
from edge_agent.sd_notify import Notifier
from edge_agent.serving.lifecycle import ModelLifecycle
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.topics import Topics
from edge_agent.updates.desired import DesiredState
from edge_agent.updates.updates import Updates

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 30.0
PROGRESS_INTERVAL_S = 2.0
METRICS_INTERVAL_S = 60.0
_MOST_TOKENS_PER_S = 1e9
"""A higher number, or none, was never measured. The status goes out without it, whoever let it through."""


class DeviceStatus:
    """Asked by the main thread and by control threads; the main thread sets `ready`.

    Args:
        rebuilt: why `state.json` had to be rebuilt; empty when it had not.
        tokens_per_s: of a model, by its configured name; asked once the device is ready.
        broker_troubles: what somebody should look at about the broker.

    Attributes:
        ready: every preloaded model has been loaded, or has failed to.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        journal: Journal,
        lifecycles: Mapping[str, ModelLifecycle],
        updates: Updates,
        desired: DesiredState,
        rebuilt: str,
        tokens_per_s: Callable[[str], float | None],
        broker_troubles: Callable[[], Iterable[EdgeAgentError]] = tuple,
    ) -> None:
        self.ready = False
        self._settings = settings
        self._store = store
        self._journal = journal
        self._lifecycles = lifecycles
        self._updates = updates
        self._desired = desired
        self._rebuilt = rebuilt
        self._tokens_per_s = tokens_per_s
        self._broker_troubles = broker_troubles
        self._boot_id = uuid.uuid4().hex
        self._walls = {"landlock": landlock.abi(), "seccomp": seccomp.is_available()}
        self._seq = 0

    def offline(self) -> dict[str, Any]:
        """The status topic's object once the device is gone: what its models did is no longer true."""
        stamp = self.stamp()
        return {"state": "offline", "time": stamp["time"], "boot_id": stamp["boot_id"]}

    def document(self) -> dict[str, Any]:
        """The status topic's object. Its `seq` is that of the last message."""
        troubles = list(self._troubles())
        state = self._state(troubles)
        stamp = self.stamp()
        models = [self._of_model(name, lifecycle) for name, lifecycle in self._lifecycles.items()]
        return {
            "state": state,
            "time": stamp["time"],
            "boot_id": stamp["boot_id"],
            "seq": self._seq,
            "agent_version": edge_agent.__version__,
            "queue_depth": stamp["queue_depth"],
            "models": printable.document(models),
            "troubles": [trouble.document() for trouble in troubles],
            "walls": self._walls,
        }

    def full(self, *, broker: Mapping[str, Any]) -> dict[str, Any]:
        """The status topic's object and what only the CLI shows."""
        document, asking = self.document(), False
        for lifecycle, entry in zip(self._lifecycles.values(), document["models"], strict=True):
            name, state = lifecycle.name, lifecycle.state
            outlook = self._updates.outlook(name)
            asking = asking or outlook.asks
            entry.update(state.others())
            entry["update_problem"] = self._problem(name)
            entry.update(model_report.progressing(state, outlook))
            entry.update(model_report.held(name, state, outlook.wanted, self._updates.heard))
        everything = {
            **document,
            "cache": {
                "bytes": self._store.used_bytes(),
                "quota_bytes": self._settings.cache.quota_bytes,
                "free_bytes": self._store.free_bytes(),
            },
            "registry": {**self._updates.heard.document(), "asking": asking},
            "link": self._updates.link.document(),
            "broker": dict(broker),
        }
        return dict(printable.document(everything))

    def reported(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """`model/reported`: what runs, why it is not what was desired, and how far a fetch is.

        Args:
            document: the status topic's object.
        """
        keys = ("uri", "version", "digest", "flavor", "state", "reason")
        models = {}
        for model in document["models"]:
            reason = model["reason"] or self._problem(model["name"]) or self._desired.problem
            state = self._lifecycles[model["name"]].state
            models[model["name"]] = {
                **{key: model[key] for key in keys},
                "reason": printable.text(reason),
                **model_report.progressing(state, self._updates.outlook(model["name"])),
                **model_report.versions(state),
            }
        return {"models": models}

    def number(self, document: dict[str, Any]) -> None:
        """Gives a status that is published the next number: a message has a higher one than those before it."""
        self._seq += 1
        document["seq"] = self._seq

    def headline(self) -> str:
        """In one line, for the log and the service manager."""
        parts = [f"{name}={lifecycle.serving}" for name, lifecycle in self._lifecycles.items()]
        return " ".join(parts) or "no model configured"

    def stamp(self) -> dict[str, Any]:
        """When, of which boot, and how many prompts wait."""
        return {"time": int(time.time()), "boot_id": self._boot_id, "queue_depth": self._depth()}

    def _of_model(self, name: str, lifecycle: ModelLifecycle) -> dict[str, Any]:
        document = lifecycle.status()
        if lifecycle.serving is Serving.ABSENT and self.ready:
            document["reason"] = self._problem(name) or document["reason"]
        rate = self._tokens_per_s(name) if self.ready else None
        shown = rate if rate is not None and 0 <= rate <= _MOST_TOKENS_PER_S else None
        return {**document, "tokens_per_s": shown}

    def _problem(self, name: str) -> str:
        """Why no other version comes, for people: it must wait for its time, or the last check failed."""
        waiting, problem = self._updates.outlook(name).waiting, self._updates.problems.get(name, "")
        if waiting is None or waiting.reason in problem:
            return problem
        return "; ".join(filter(None, (waiting.reason, problem)))

    def _depth(self) -> int:
        try:
            return self._journal.depth()
        except JournalUnavailable:  # it is in the status
            return 0

    def _state(self, troubles: Sequence[Trouble]) -> str:
        default = next(iter(self._lifecycles.values()), None)
        if not self.ready:
            return "starting"
        if default is None or default.serving is Serving.FAILED or troubles:
            return "degraded"
        if default.serving is Serving.ABSENT and self._problem(default.name):
            return "degraded"
        return "ready" if default.serving in (Serving.READY, Serving.IDLE) else "starting"

    def _troubles(self) -> Iterator[Trouble]:
        """What somebody should look at, though prompts are answered."""
        yield from troubles.of_journal(self._journal.trouble or "")
        yield from troubles.of_cache(self._rebuilt)
        yield from (troubles.of_broker(error) for error in self._broker_troubles())
        yield from troubles.of_trust(allow_unsigned_code=self._settings.trust.allow_unsigned_code)
        yield from troubles.of_desired(self._desired.problem)
        for of_one in (troubles.of_model, troubles.of_quarantine):
            for name, lifecycle in self._lifecycles.items():
                yield from of_one(name, lifecycle)


class Outlet(Protocol):
    """The way to the broker. Keeps what it is given until it is sent."""

    def set_retained(self, topic: str, document: bytes) -> None: ...

    def set_metrics(self, document: bytes) -> None: ...


class StatusPublisher:
    """Publishes what has changed. The main thread's.

    Args:
        metrics: gives their document.
        discovery_prefix: of Home Assistant; None where the device does not show itself there.
    """

    def __init__(
        self,
        status: DeviceStatus,
        *,
        topics: Topics,
        outlet: Outlet,
        notifier: Notifier,
        metrics: Callable[[], dict[str, Any]],
        discovery_prefix: str | None = None,
    ) -> None:
        self._status = status
        self._topics = topics
        self._outlet = outlet
        self._notifier = notifier
        self._metrics = metrics
        self._discovery_prefix = discovery_prefix
        self._published = self._reported = self._discovered = ""
        self._status_at_s = self._reported_at_s = self._metrics_at_s = 0.0

    def step(self, now_s: float) -> bool:
        """Publishes what is due. True while something goes on: it may soon be something else.

        Args:
            now_s: monotonic seconds.
        """
        document = self._status.document()
        goes_on = self._report(now_s, document)
        goes_on |= self._publish(now_s, document)
        if now_s >= self._metrics_at_s:
            self._metrics_at_s = now_s + METRICS_INTERVAL_S
            self._outlet.set_metrics(messages.encode(self._metrics()))
        loads = any(model["state"] == Serving.LOADING for model in document["models"])
        return goes_on or loads or document["queue_depth"] > 0

    def say_offline(self) -> None:
        """The last status, as the last will would say it."""
        self._outlet.set_retained(self._topics.status, messages.encode(self._status.offline()))

    def _publish(self, now_s: float, document: dict[str, Any]) -> bool:
        """The status: at each change of what people act on. Numbers that always change come along at intervals.

        Returns:
            True at a change.
        """
        lasting = {**document, "time": 0, "seq": 0, "queue_depth": 0}
        lasting["models"] = [{**model, "tokens_per_s": 0} for model in document["models"]]
        text = repr(lasting)
        changed = text != self._published
        if not changed and now_s < self._status_at_s:
            return False
        if changed:
            log.info("status %s %s", document["state"], self._status.headline())
            self._notifier.status(self._status.headline())
        self._published, self._status_at_s = text, now_s + STATUS_INTERVAL_S
        self._status.number(document)
        self._outlet.set_retained(self._topics.status, messages.encode(document))
        return changed

    def _report(self, now_s: float, document: dict[str, Any]) -> bool:
        """What runs: at each change. The progress of a fetch, and of the golden prompts, comes along at intervals, and
        once it has ended.

        Returns:
            True at a change, and while something progresses.
        """
        reported = self._status.reported(document)
        models = reported["models"].values()
        moving = any(model["progress"] or (model["attempt"] or {}).get("golden") for model in models)
        text = repr([_lasting(model) for model in models])
        changed = text != self._reported
        if changed or (moving and now_s >= self._reported_at_s):
            self._reported, self._reported_at_s = text, now_s + PROGRESS_INTERVAL_S
            self._outlet.set_retained(self._topics.reported, messages.encode(reported))
            self._discover(reported["models"])
        return changed or moving

    def _discover(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """What Home Assistant has to know: at the start, and whenever another version is the one to ask for."""
        if self._discovery_prefix is None:
            return
        text = messages.encode(home_assistant.document(self._topics, models)).decode()
        if text != self._discovered:
            self._discovered = text
            topic = home_assistant.topic(self._discovery_prefix, self._topics.device_id)
            self._outlet.set_retained(topic, text.encode())


def _lasting(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's report without what changes from moment to moment."""
    attempt = model["attempt"] and {**model["attempt"], "golden": model["attempt"].get("golden") is not None}
    return {**model, "progress": model["progress"] is not None, "attempt": attempt}
