"""One check of one model: what it asks for, what becomes of the answer, and when the fallback takes over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache.state import ModelState
from edge_agent.errors import (
    CannotRun,
    EdgeAgentError,
    LinkHeld,
    LoadFailed,
    MemoryShort,
    PackageReplayed,
    Quarantined,
    RegistryRefused,
    SettingsError,
    StoreError,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.metrics.measurements import Measurements
from edge_agent.serving.seat import Serving
from edge_agent.serving.verdicts import GateFailed
from edge_agent.updates.polls import GAP_S
from tests.support.committed import fault
from tests.support.scripted_sync import Offer
from tests.support.scripted_updates import FALLBACK, NOW, OWN, UpdatingDevice, make_device

ONE, TWO = Offer(version=1, new=False), Offer(version=2)
TINY = Offer(version=9)
RUNNING = ModelState(active=ONE.key)


@pytest.fixture
def device(tmp_path: Path) -> UpdatingDevice:
    return make_device(tmp_path, RUNNING)


def test_an_unchanged_version_goes_on(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = ONE
    device.updates.step(0)
    assert device.lifecycle.state == replace(RUNNING, resolved=(OWN, 1))
    assert (device.sync.refs, device.problem) == ([OWN], "")
    assert (device.updates.heard.reachable, device.updates.heard.asked_at) == (True, NOW)
    (job,) = device.sync.jobs
    assert (job.name, job.running, job.check_host, job.fallback) == ("assistant", ONE.key, True, False)


def test_a_new_version_is_adopted_and_the_former_one_is_the_previous(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = TWO
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.lifecycle.state.previous) == (TWO.key, ONE.key)
    assert device.lifecycle.adopted == [(TWO.key, False, "")]
    assert device.problem == ""


def test_a_version_that_failed_to_load_is_asked_about_again(device: UpdatingDevice) -> None:
    device.lifecycle.serving = Serving.FAILED
    device.sync.offers[OWN] = ONE
    device.updates.step(0)
    assert device.sync.jobs[0].running == "", "whether this host can run it is looked for again"


@pytest.mark.parametrize(
    ("error", "reachable", "problem"),
    [
        (TransportError("timed out"), False, "registry_unreachable"),
        (RegistryRefused("refuses this device"), True, "registry_refused"),
        (UnknownReference("no such alias"), True, ""),
        (VerificationError("other bytes"), True, ""),
    ],
)
def test_what_the_registry_was_is_noted_and_the_version_goes_on(
    device: UpdatingDevice, error: EdgeAgentError, reachable: bool, problem: str
) -> None:
    device.sync.offers[OWN] = error
    device.updates.step(0)
    assert device.problem == str(error)
    assert (device.updates.heard.reachable, device.updates.heard.problem) == (reachable, problem)
    assert device.updates.heard.asked_at == NOW
    assert (device.lifecycle.state, device.lifecycle.adopted) == (RUNNING, [])
    assert len(device.sync.jobs) == 1, "nothing is tried again at once"
    device.sync.offers[OWN] = ONE
    device.updates.check_now()
    device.updates.step(1)
    assert (device.updates.heard.reachable, device.updates.heard.problem, device.problem) == (True, "", "")


def test_what_says_nothing_of_the_registry_is_not_noted_of_it(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = StoreError("no space")
    device.updates.step(0)
    assert (device.updates.heard.reachable, device.updates.heard.asked_at) == (None, None)
    assert device.problem == "no space"


def test_a_process_that_cannot_be_started_is_no_fault_of_the_version(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = OSError(12, "Cannot allocate memory")
    with pytest.raises(StoreError, match="no sync can be started"):
        device.updates.check("assistant", asked_for=True)


def test_a_pinned_model_asks_nobody_and_runs_its_pin(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=TWO.key, pinned=ONE.key))
    device.updates.step(0)
    assert device.lifecycle.state.active == ONE.key
    assert (device.sync.jobs, device.problem) == ([], "")


def test_a_pull_of_a_pinned_model_brings_the_version_and_leaves_the_pin(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key, pinned=ONE.key))
    device.sync.offers[OWN] = TWO
    assert device.updates.check("assistant", asked_for=True).version == 2
    assert device.lifecycle.state.active == ONE.key


def test_only_an_operator_takes_an_old_package_under_a_new_number(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = PackageReplayed("it is old", remedy="allow it")
    device.updates.step(0)
    assert (device.problem, device.lifecycle.adopted) == ("it is old; allow it", [])
    assert (device.updates.heard.reachable, device.updates.heard.problem) == (True, "")
    device.sync.offers[OWN] = TWO
    device.updates.check("assistant", asked_for=True)
    device.updates.check("assistant", asked_for=True, allow_older=True)
    assert [job.allow_older for job in device.sync.jobs] == [False, False, True]


def test_a_service_leaves_a_gap_between_the_requests_that_nobody_waits_for(tmp_path: Path) -> None:
    device = make_device(tmp_path, RUNNING, unattended=True)
    device.sync.offers[OWN] = TWO
    device.updates.step(0)
    device.updates.check("assistant", asked_for=True)
    assert [job.registry.gap_s for job in device.sync.jobs] == [GAP_S, 0.0]


def test_a_daemon_that_somebody_has_started_leaves_no_gap(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = TWO
    device.updates.step(0)
    assert [job.registry.gap_s for job in device.sync.jobs] == [0.0]


def test_a_quarantined_version_is_not_fetched_by_a_poll(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key, quarantined={TWO.key: fault("wrong answer")}))
    device.sync.offers[OWN] = TWO
    device.updates.step(0)
    assert device.sync.jobs[0].quarantined == (TWO.key,)
    assert (device.problem, device.updates.heard.reachable) == (
        f"version {TWO.key} is in quarantine: wrong answer",
        True,
    )
    assert device.lifecycle.adopted == []


def test_a_pull_fetches_a_quarantined_version_and_does_not_run_it(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key, quarantined={TWO.key: fault("wrong answer")}))
    device.sync.offers[OWN] = TWO
    with pytest.raises(Quarantined, match="wrong answer"):
        device.updates.check("assistant", asked_for=True)
    assert device.sync.jobs[0].quarantined == ()
    assert device.lifecycle.adopted == [(TWO.key, True, "")], "it was brought, and the lifecycle said no"
    assert device.lifecycle.state.active == ONE.key


@pytest.mark.parametrize(
    ("rollout", "state", "ref", "active"),
    [
        ("0", RUNNING, OWN, ONE.key),
        ("100", RUNNING, OWN, TWO.key),
        ("0", ModelState(active=ONE.key, desired="models:/phi/2"), "models:/phi/2", TWO.key),
        ("0", ModelState(active=TWO.key), OWN, TWO.key),
    ],
    ids=["not yet", "all", "asked for by number", "runs already"],
)
def test_a_rollout_holds_back_what_an_alias_means_and_nothing_else(
    tmp_path: Path, rollout: str, state: ModelState, ref: str, active: str
) -> None:
    device = make_device(tmp_path, state)
    device.sync.offers[ref] = Offer(version=2, rollout=rollout)
    device.updates.step(0)
    assert device.lifecycle.state.active == active
    waiting = device.updates.outlook("assistant").waiting
    assert (waiting is not None and "not yet to this one" in waiting.reason) == (active == ONE.key)
    assert device.problem == ""


def test_the_number_of_a_fallback_is_not_the_models_own_for_a_rollout(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=TWO.key, instead="no library"), fallback=FALLBACK)
    device.sync.offers[OWN] = Offer(version=2, digest="b" * 12, rollout="0")
    device.updates.step(0)
    waiting = device.updates.outlook("assistant").waiting
    assert waiting is not None and "not yet to this one" in waiting.reason
    assert device.lifecycle.state.active == TWO.key


def test_without_a_registry_a_pull_says_so_and_a_poll_only_takes_up_what_is_here(tmp_path: Path) -> None:
    device = make_device(tmp_path, registry="")
    device.lifecycle.on_disk = ONE.key
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.problem) == (ONE.key, "unset")
    with pytest.raises(SettingsError, match=r"registry\.uri"):
        device.updates.check("assistant", asked_for=True)
    assert device.sync.jobs == []


def test_a_cached_version_that_is_refused_does_not_keep_the_registry_from_being_asked(
    tmp_path: Path,
) -> None:
    device = make_device(tmp_path)
    device.lifecycle.on_disk, device.lifecycle.refusals = ONE.key, {ONE.key: GateFailed("wrong")}
    device.sync.offers[OWN] = TWO
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.problem) == (TWO.key, "")


def test_without_a_registry_the_refusal_of_a_cached_version_is_the_problem(tmp_path: Path) -> None:
    device = make_device(tmp_path, registry="")
    device.lifecycle.on_disk, device.lifecycle.refusals = ONE.key, {ONE.key: GateFailed("wrong")}
    device.updates.step(0)
    assert device.problem == "wrong"


# --- The fallback --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CannotRun("no library"), VerificationError("other bytes")])
def test_a_version_that_cannot_be_brought_makes_the_fallback_run(
    tmp_path: Path, error: EdgeAgentError
) -> None:
    device = make_device(tmp_path, fallback=FALLBACK)
    device.sync.offers |= {OWN: error, FALLBACK: TINY}
    device.updates.step(0)
    assert device.sync.refs == [OWN, FALLBACK]
    assert [job.fallback for job in device.sync.jobs] == [False, True]
    assert device.lifecycle.adopted == [(TINY.key, False, str(error))]
    assert device.problem == str(error), "why it is not its own"
    assert device.lifecycle.state.quarantined == {}


@pytest.mark.parametrize(
    ("error", "quarantined"),
    [(LoadFailed("broken"), True), (CannotRun("no library"), False), (MemoryShort("8 GB"), False)],
)
def test_only_a_version_that_is_at_fault_itself_is_set_aside_for_the_fallback(
    tmp_path: Path, error: EdgeAgentError, quarantined: bool
) -> None:
    device = make_device(tmp_path, fallback=FALLBACK)
    device.lifecycle.refusals = {TWO.key: error}
    device.sync.offers |= {OWN: TWO, FALLBACK: TINY}
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.lifecycle.instead) == (TINY.key, str(error))
    assert (TWO.key in device.lifecycle.state.quarantined) == quarantined


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (RUNNING, CannotRun("no library")),
        (ModelState(), TransportError("timed out")),
        (ModelState(), RegistryRefused("refuses this device")),
        (ModelState(), UnknownReference("no such alias")),
    ],
    ids=["its own runs", "out of reach", "refused", "unknown"],
)
def test_the_fallback_is_not_asked_for_where_it_is_not_needed(
    tmp_path: Path, state: ModelState, error: EdgeAgentError
) -> None:
    device = make_device(tmp_path, state, fallback=FALLBACK)
    device.sync.offers |= {OWN: error, FALLBACK: TINY}
    device.updates.step(0)
    assert device.sync.refs == [OWN]
    assert (device.lifecycle.state, device.problem) == (state, str(error))


def test_a_pull_does_not_bring_the_fallback_where_a_version_is_pinned(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(pinned=ONE.key), fallback=FALLBACK)
    device.sync.offers |= {OWN: CannotRun("no library"), FALLBACK: TINY}
    with pytest.raises(CannotRun, match=r"^no library$"):
        device.updates.check("assistant", asked_for=True)
    assert device.sync.refs == [OWN]


def test_an_active_version_that_failed_for_good_gives_way_to_the_fallback(tmp_path: Path) -> None:
    device = make_device(tmp_path, RUNNING, fallback=FALLBACK)
    device.lifecycle.serving = Serving.FAILED
    device.sync.offers |= {OWN: CannotRun("no library"), FALLBACK: TINY}
    device.updates.step(0)
    assert device.lifecycle.state.active == TINY.key


@pytest.mark.parametrize("at", ["sync", "gate"])
def test_a_fallback_that_fails_too_is_told_with_both_reasons(tmp_path: Path, at: str) -> None:
    device = make_device(tmp_path, fallback=FALLBACK)
    trouble = LoadFailed("broken", remedy="publish it again")
    device.sync.offers |= {OWN: CannotRun("no library"), FALLBACK: trouble if at == "sync" else TINY}
    device.lifecycle.refusals = {TINY.key: trouble}
    with pytest.raises(LoadFailed) as caught:
        device.updates.check("assistant", asked_for=True)
    assert str(caught.value) == "no library; and its fallback: broken; publish it again"
    assert device.lifecycle.state.active is None


def test_the_models_own_version_replaces_the_fallback_when_it_runs(tmp_path: Path) -> None:
    device = make_device(tmp_path, fallback=FALLBACK)
    device.sync.offers |= {OWN: CannotRun("no library"), FALLBACK: TINY}
    device.updates.step(0)
    device.sync.offers[OWN] = TWO
    device.updates.check_now()
    device.updates.step(1)
    assert (device.lifecycle.state.active, device.lifecycle.instead, device.problem) == (TWO.key, "", "")


def test_a_download_that_fails_again_and_again_is_left_alone_by_polls(device: UpdatingDevice) -> None:
    fetched: list[str] = []

    def fail(ref: str) -> None:
        fetched.append(ref)
        raise TransportError("broke off")

    device.sync.offers[OWN] = TWO
    device.sync.amid = fail
    for _ in range(3):
        device.updates.check_now()
        device.updates.step(0)
    assert len(fetched) == 2
    assert len(device.sync.jobs) == 3, "polls go on, so that a new version is seen"
    assert "next try is at" in device.problem
    with pytest.raises(TransportError, match="broke off"):
        device.updates.check("assistant", asked_for=True)
    device.sync.offers[OWN] = Offer(version=3)
    device.sync.amid = fetched.append
    device.updates.check_now()
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.problem) == (Offer(version=3).key, "")


def test_checks_are_counted_and_their_failures_by_code(tmp_path: Path) -> None:
    measurements = Measurements(["assistant"])
    device = make_device(tmp_path, RUNNING, measurements=measurements)
    offers: list[Offer | EdgeAgentError] = [
        ONE,
        TransportError("timed out"),
        TransportError("timed out"),
        LinkHeld("the window is over"),
        TWO,
    ]
    for offer in offers:
        device.sync.offers[OWN] = offer
        device.updates.check_now()
        device.updates.step(0)
    of = measurements.document()["models"]["assistant"]
    assert (of["checks"], of["check_failures"]) == (5, {"registry_unreachable": 2}), "waiting is no failure"


def test_a_check_that_ends_with_the_fallback_has_failed_with_the_reason_for_it(tmp_path: Path) -> None:
    measurements = Measurements(["assistant"])
    device = make_device(tmp_path, fallback=FALLBACK, measurements=measurements)
    device.sync.offers.update({OWN: CannotRun("no library"), FALLBACK: TINY})
    device.updates.step(0)
    assert device.lifecycle.state.active == TINY.key
    of = measurements.document()["models"]["assistant"]
    assert (of["checks"], of["check_failures"]) == (1, {"cannot_run": 1})
    assert of["sync_bytes"] == 1000, "those of the fallback"
