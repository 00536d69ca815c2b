"""What a version would take of a device: room, memory, its time. What the registry says is scripted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import (
    EdgeAgentError,
    QueueFull,
    RegistryRefused,
    SyncStopped,
    TransportError,
    UnknownModel,
    UnknownReference,
)
from edge_agent.settings import Settings
from edge_agent.settings.cache import CacheSettings
from edge_agent.settings.link import LinkSettings
from edge_agent.settings.model import ModelSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.sync.protocol import Outline, SyncJob
from edge_agent.updates.link import Link
from edge_agent.updates.plans import MAX_WAITING, Plan, Plans
from tests.support.committed import commit, fault
from tests.support.scripted_updates import ScriptedLifecycle

TWO_PM = datetime(2026, 11, 27, 14, tzinfo=UTC).timestamp()
TEN_PM = datetime(2026, 11, 27, 22, tzinfo=UTC).timestamp()
KEY = f"7-{'d' * 12}"
OUTLINE = Outline(version=7, digest="d" * 64, missing_bytes=400, needed_bytes=500, total_bytes=1_000)
HERE = replace(OUTLINE, missing_bytes=0, needed_bytes=0)


class Registry:
    """Stands where `run_outline` does."""

    def __init__(self) -> None:
        self.says: Outline | Exception = OUTLINE
        self.jobs: list[SyncJob] = []
        self.amid: Callable[[Callable[[], bool]], None] = lambda should_stop: None

    def __call__(self, job: SyncJob, *, timeout_s: float, should_stop: Callable[[], bool]) -> Outline:
        self.jobs.append(job)
        self.amid(should_stop)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


class Device:
    """Plans of a device with one model, `assistant`."""

    def __init__(self, folder: Path, *, link: dict[str, Any], registry: str, quota_bytes: int) -> None:
        settings = Settings(
            device_id="dev",
            state_dir=folder / "state",
            control_socket=folder / "c.sock",
            registry=RegistrySettings(uri=registry),
            cache=CacheSettings(quota_bytes=quota_bytes, min_free_bytes=0),
            models={"assistant": ModelSettings(uri="models:/phi@prod")},
            link=LinkSettings(**link),
        )
        self.store = Store(settings.state_dir)
        self.store.create()
        self.registry = Registry()
        self.lifecycle = ScriptedLifecycle()
        self.memory_bytes = 1 << 40
        self.heard: list[EdgeAgentError | None] = []
        self.plans = Plans(
            settings,
            self.store,
            {"assistant": self.lifecycle},
            link=Link(settings.link, self.store, lambda: TWO_PM),
            attainable_bytes=lambda: self.memory_bytes,
            note_registry=self.heard.append,
            run_outline=self.registry,
        )

    def plan(self) -> Plan:
        return self.plans.plan("assistant", 7)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Device]:
    def device(
        *, link: dict[str, Any] | None = None, registry: str = "http://r", quota_bytes: int = 10_000
    ) -> Device:
        return Device(tmp_path, link=link or {}, registry=registry, quota_bytes=quota_bytes)

    return device


@pytest.fixture
def device(make: Callable[..., Device]) -> Device:
    return make()


def test_a_version_that_fits_would_begin_at_once(device: Device) -> None:
    plan = device.plan()
    assert plan == Plan(missing_bytes=400, free_bytes=10_000, fits=True)
    assert device.heard == [None], "the registry answered"
    assert plan.document() == {
        "missing_bytes": 400,
        "free_bytes": 10_000,
        "fits": True,
        "would_start_at": None,
        "code": None,
        "reason": "",
    }
    (job,) = device.registry.jobs
    assert (job.name, job.ref) == ("assistant", "models:/phi/7")


def test_the_version_is_one_of_what_is_desired(device: Device) -> None:
    device.lifecycle.state = ModelState(desired="models:/other@prod")
    device.plan()
    assert device.registry.jobs[0].ref == "models:/other/7"


def test_what_may_be_removed_is_room_and_what_is_needed_is_not(make: Callable[..., Device]) -> None:
    device = make(quota_bytes=40_000)
    records = [commit(device.store, version, weights=bytes([version]) * 10_000) for version in (1, 2, 3)]
    used, size = device.store.used_bytes(), records[0].total_bytes
    device.store.change_state("assistant", lambda state: replace(state, active=records[1].key))
    assert device.plan().free_bytes == 40_000 - used + size, "the newest and the active one stay"


@pytest.mark.parametrize(
    ("needed", "memory", "fits", "code"),
    [
        (10_000, 1_000, True, None),
        (10_001, 1_000, False, "cache_full"),
        (10_000, 999, False, "memory_short"),
        (10_001, 999, False, "cache_full"),
    ],
)
def test_it_fits_where_cache_and_memory_have_room(
    device: Device, needed: int, memory: int, fits: bool, code: str | None
) -> None:
    device.registry.says = replace(OUTLINE, needed_bytes=needed)
    device.memory_bytes = memory
    plan = device.plan()
    assert (plan.fits, plan.code, bool(plan.reason)) == (fits, code, code is not None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransportError("timed out"), "registry_unreachable"),
        (RegistryRefused("no"), "registry_refused"),
        (UnknownReference("no version 7"), "unknown_reference"),
        (SyncStopped("the daemon ends"), "sync_stopped"),
        (OSError("no process"), "cache_failed"),
    ],
)
def test_where_nobody_knows_the_answer_says_why(device: Device, error: Exception, code: str) -> None:
    device.registry.says = error
    plan = device.plan()
    assert (plan.missing_bytes, plan.free_bytes, plan.fits, plan.code) == (None, 10_000, None, code)
    of_registry = isinstance(error, TransportError | RegistryRefused | UnknownReference)
    assert device.heard == ([error] if of_registry else [])


def test_without_a_registry_nobody_is_asked(make: Callable[..., Device]) -> None:
    device = make(registry="")
    assert (device.plan().code, device.registry.jobs) == ("settings_invalid", [])


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (ModelState(active="6-aaaaaaaaaaaa", quarantined={KEY: fault("wrong")}), "quarantined"),
        (ModelState(pinned="6-aaaaaaaaaaaa"), "pinned"),
        (ModelState(pinned=KEY), None),
        (ModelState(quarantined={f"7-{'e' * 12}": fault("wrong")}), None),
    ],
    ids=["in quarantine", "another is pinned", "it is pinned", "another of that number is in quarantine"],
)
def test_what_keeps_a_device_from_a_version_that_fits(
    device: Device, state: ModelState, code: str | None
) -> None:
    device.lifecycle.state = state
    plan = device.plan()
    assert (plan.fits, plan.code) == (True, code)


def test_a_version_that_runs_already_takes_nothing(device: Device) -> None:
    device.lifecycle.state = ModelState(active=KEY)
    device.registry.says, device.memory_bytes = HERE, 0
    assert device.plan() == Plan(missing_bytes=0, free_bytes=10_000, fits=True)


@pytest.mark.parametrize(
    ("link", "outline", "code", "starts"),
    [
        ({"windows": ["22:00-05:00"]}, OUTLINE, "link_held", TEN_PM),
        ({"windows": ["13:00-15:00"]}, OUTLINE, None, None),
        ({"windows": ["22:00-05:00"]}, HERE, None, None),
        ({"activate_windows": ["22:00-05:00"]}, HERE, "activation_held", TEN_PM),
        ({"activate_windows": ["22:00-05:00"]}, OUTLINE, None, None),
        ({"inhibit_file": "/"}, HERE, "activation_held", None),
    ],
)
def test_when_it_would_begin(
    make: Callable[..., Device],
    link: dict[str, Any],
    outline: Outline,
    code: str | None,
    starts: float | None,
) -> None:
    device = make(link={"timezone": "UTC", **link})
    device.registry.says = outline
    plan = device.plan()
    assert (plan.fits, plan.code, plan.would_start_at) == (True, code, starts)


def test_what_is_in_the_way_for_good_is_said_before_a_wait(make: Callable[..., Device]) -> None:
    device = make(link={"windows": ["22:00-05:00"], "timezone": "UTC"})
    device.memory_bytes = 0
    plan = device.plan()
    assert (plan.fits, plan.code, plan.would_start_at) == (False, "memory_short", TEN_PM)


# --- The thread ----------------------------------------------------------------------------------------


@pytest.fixture
def running(device: Device) -> Iterator[Device]:
    thread = threading.Thread(target=device.plans.run, daemon=True)
    thread.start()
    yield device
    device.plans.close()
    thread.join(20)
    assert not thread.is_alive()


class Asked:
    """Who waits for answers."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self._came = threading.Condition()

    def answer(self, plan: Plan) -> None:
        with self._came:
            self.plans.append(plan)
            self._came.notify_all()

    def wait(self, count: int) -> list[Plan]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.plans) >= count, 20)
        return self.plans


def test_questions_are_answered_one_after_the_other_and_too_many_are_refused(running: Device) -> None:
    begun, go_on, asked = threading.Event(), threading.Event(), Asked()

    def wait(should_stop: Callable[[], bool]) -> None:
        begun.set()
        assert go_on.wait(20)

    running.registry.amid = wait
    running.plans.ask("assistant", 7, asked.answer)
    assert begun.wait(20)
    for _ in range(MAX_WAITING):
        running.plans.ask("assistant", 7, asked.answer)
    with pytest.raises(QueueFull):
        running.plans.ask("assistant", 7, asked.answer)
    assert (len(running.registry.jobs), asked.plans) == (1, [])
    go_on.set()
    assert len(asked.wait(1 + MAX_WAITING)) == len(running.registry.jobs) == 1 + MAX_WAITING


def test_a_question_about_no_model_is_refused_at_once(device: Device) -> None:
    with pytest.raises(UnknownModel, match="assistant"):
        device.plans.ask("other", 7, lambda plan: None)


def test_a_failure_that_nobody_foresaw_is_answered_and_the_next_question_too(running: Device) -> None:
    asked = Asked()
    running.registry.says = RuntimeError("unforeseen")
    running.plans.ask("assistant", 7, asked.answer)
    assert asked.wait(1)[0].code == "internal"
    running.registry.says = OUTLINE
    running.plans.ask("assistant", 7, asked.answer)
    assert asked.wait(2)[1].fits


def test_the_end_of_the_daemon_ends_what_is_asked(device: Device) -> None:
    stopped: list[bool] = []

    def end(should_stop: Callable[[], bool]) -> None:
        device.plans.close()
        stopped.append(should_stop())

    device.registry.amid = end
    device.plans.ask("assistant", 7, lambda plan: None)
    device.plans.run()
    assert stopped == [True]
