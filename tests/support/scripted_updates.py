"""Updates of a device that has no registry and no runner: what they drive is scripted, the rest is real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_agent.cache.attempt import Attempt, Fault
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError
from edge_agent.metrics.measurements import Measurements
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.settings.link import LinkSettings
from edge_agent.settings.model import ModelSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.updates.updates import Updates
from tests.support.clock import ScriptedClock
from tests.support.scripted_sync import ScriptedSync

INTERVAL_S = 300.0
NOW = 1_800_000_000.0
OWN, FALLBACK = "models:/phi@prod", "models:/tiny@prod"


class ScriptedLifecycle:
    """Loads nothing: a version runs unless the script says why not.

    Attributes:
        refusals: by key, what the version is refused with.
        on_disk: key of a version in the cache that nobody has tried; empty for none.
        fallback: the record of a cached version of the fallback.
        unwritable: what writing a desired state down fails with.
        amid: called when a version is adopted, with its key, or a desired state written down, with its reference.
        adopted: what was asked of `adopt`, in order: key, whether an operator asked, why it is one of the fallback.
        reloads: how often the runner was to load again.
    """

    def __init__(self, state: ModelState | None = None) -> None:
        self.state = state or ModelState()
        self.serving = Serving.IDLE if self.state.active else Serving.ABSENT
        self.refusals: dict[str, EdgeAgentError] = {}
        self.on_disk = ""
        self.fallback: VersionRecord | None = None
        self.unwritable: EdgeAgentError | None = None
        self.amid: Callable[[str], None] = lambda what: None
        self.adopted: list[tuple[str, bool, str]] = []
        self.reloads = 0

    @property
    def runs_its_own(self) -> bool:
        return self.state.active is not None and not self.instead and self.serving is not Serving.FAILED

    @property
    def instead(self) -> str:
        return self.state.instead

    def status(self) -> dict[str, object]:
        active = self.state.active
        return {"version": int(active.split("-")[0]) if active else None}

    def adopt(
        self,
        key: str,
        *,
        asked_for: bool = False,
        instead: str = "",
        before_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        self.adopted.append((key, asked_for, instead))
        self.amid(key)
        if self.state.active == key and self.serving is not Serving.FAILED:
            return
        self.state.refuse_quarantined(key)
        if key in self.refusals:
            raise self.refusals[key]
        self.state = self.state.trying(key)
        before_exchange()
        self.state = self.state.switched(key, instead=instead)
        self.serving = Serving.READY

    def untried(self) -> str | None:
        return self.state.candidate or self.on_disk or None

    def put_off(self, key: str | None) -> None:
        self.state = self.state.waiting_for(key)

    def cached_fallback(self) -> VersionRecord | None:
        return self.fallback

    def set_aside(self, key: str, error: EdgeAgentError) -> None:
        self.state = replace(self.state, quarantined={**self.state.quarantined, key: Fault.of(error)})

    def note_attempt(self, attempt: Attempt) -> None:
        self.state = self.state.noting(attempt)

    def note_resolved(self, ref: str, version: int) -> None:
        self.state = replace(self.state, resolved=(ref, version))

    def set_desired(self, uri: str) -> None:
        self.amid(uri)
        if self.unwritable is not None:
            raise self.unwritable
        self.state = replace(self.state, desired=uri)

    def reload(self) -> None:
        self.reloads += 1


@dataclass
class UpdatingDevice:
    """Updates with a clock that a test moves, and the longest interval that jitter allows.

    Attributes:
        time: `now_s` is seconds since 1970.
        lifecycle: of the first model.
    """

    updates: Updates
    store: Store
    sync: ScriptedSync
    time: ScriptedClock
    lifecycles: dict[str, ScriptedLifecycle]
    drawn: list[tuple[float, float]] = field(default_factory=list)

    @property
    def lifecycle(self) -> ScriptedLifecycle:
        return next(iter(self.lifecycles.values()))

    @property
    def problem(self) -> str:
        """Of the first model; `unset` before its first check."""
        return self.updates.problems.get(next(iter(self.lifecycles)), "unset")


def make_device(
    folder: Path,
    state: ModelState | None = None,
    *,
    models: dict[str, ModelSettings] | None = None,
    fallback: str = "",
    registry: str = "http://registry",
    link: LinkSettings | None = None,
    asked: bool = True,
    unattended: bool = False,
    measurements: Measurements | None = None,
) -> UpdatingDevice:
    """A device with one model, `assistant`, that follows `OWN`.

    Args:
        state: of that model; of each, where `models` has others.
        asked: it was told to check at once, so that its first step does.
    """
    models = models or {"assistant": ModelSettings(uri=OWN, fallback=fallback)}
    settings = Settings(
        device_id="dev",
        state_dir=folder / "state",
        control_socket=folder / "c.sock",
        registry=RegistrySettings(uri=registry, poll_interval_s=INTERVAL_S),
        models=models,
        link=link or LinkSettings(),
    )
    store = Store(settings.state_dir)
    store.create()
    lifecycles = {name: ScriptedLifecycle(state) for name in models}
    sync, drawn, time = ScriptedSync(), [], ScriptedClock()
    time.now_s = NOW

    def longest(low: float, high: float) -> float:
        drawn.append((low, high))
        return high

    updates = Updates(
        settings,
        store,
        lifecycles,
        unattended=unattended,
        run_sync=sync,
        clock=lambda: time.now_s,
        jitter=longest,
        measurements=measurements,
    )
    if asked:
        updates.check_now()
    return UpdatingDevice(
        updates=updates, store=store, sync=sync, time=time, lifecycles=lifecycles, drawn=drawn
    )
