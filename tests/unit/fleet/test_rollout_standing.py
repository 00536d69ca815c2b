"""How a device stands to a version: what counts, and what is only listed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_agent.fleet.devices import NEVER_SEEN, Attempt, Device, Gate, ModelReport, Quarantined, Wanted
from edge_agent.fleet.rollout.standing import FAILURES, Before, Seen, Standing, seen_of
from tests.support.scripted_rollout import NAME, NEW, OLD, plan_of

PLAN = plan_of(["dev"])
BEFORE = Before(version=OLD, state="ready", tokens_per_s=20.0, gate_tokens_per_s=100.0)


def seen(device_state: str = "ready", *, before: Before = BEFORE, **model: Any) -> Seen:
    report = replace(ModelReport(name=NAME, version=OLD, state="ready"), **model)
    device = Device(device_id="dev", state=device_state, models=(report,))
    return seen_of(device, plan=PLAN, wave=0, before=before)


def tried(code: str, at: float = 5.0) -> Attempt:
    return Attempt(version=NEW, step="gate", code=code, at=at)


@pytest.mark.parametrize(
    "code", ["gate_failed", "load_failed", "runner_crashed", "verification_failed", "code_refused"]
)
def test_what_is_wrong_with_a_version_is_held_against_it(code: str) -> None:
    assert code in FAILURES
    assert seen(attempt=tried(code)).standing is Standing.FAILED
    assert seen("offline", quarantined=(Quarantined(version=NEW, code=code),)).code == code


@pytest.mark.parametrize(
    ("code", "standing"),
    [
        ("cannot_run", Standing.CANNOT_RUN),
        ("unconfined", Standing.CANNOT_RUN),
        ("memory_short", Standing.CANNOT_RUN),
        ("cache_full", Standing.CANNOT_RUN),
        ("registry_refused", Standing.CANNOT_RUN),
        ("link_held", Standing.HELD),
        ("activation_held", Standing.HELD),
        ("registry_unreachable", Standing.PENDING),
        ("cache_busy", Standing.PENDING),
        ("desired_invalid", Standing.PENDING),
        ("of a newer agent", Standing.PENDING),
        ("", Standing.PENDING),
    ],
)
def test_what_a_device_lacks_or_waits_for_is_not(code: str, standing: Standing) -> None:
    assert (seen(attempt=tried(code)).standing, seen(attempt=tried(code)).code) == (standing, code)


def test_a_device_that_rolled_back_after_a_crash_has_failed() -> None:
    back = seen("degraded", quarantined=(Quarantined(version=NEW, code="runner_crashed"),))
    assert (back.standing, back.code) == (Standing.FAILED, "runner_crashed")


def test_a_quarantine_of_another_version_says_nothing() -> None:
    assert seen(quarantined=(Quarantined(version=5, code="gate_failed"),)).standing is Standing.PENDING


def test_an_attempt_from_before_the_rollout_is_none() -> None:
    before = replace(BEFORE, attempt_at=5.0)
    assert seen(before=before, attempt=tried("verification_failed")).standing is Standing.PENDING
    assert seen(before=before, attempt=tried("verification_failed", at=6)).standing is Standing.FAILED


@pytest.mark.parametrize("state", ["offline", NEVER_SEEN, "unknown"])
def test_a_device_away_is_unreachable_until_it_has_the_version(state: str) -> None:
    assert seen(state).standing is Standing.UNREACHABLE
    assert seen(state).known is (state != NEVER_SEEN)
    gone = seen(state, version=NEW)
    assert (gone.standing, gone.trouble) == (Standing.TAKEN, "offline")


def test_a_pinned_device_follows_its_pin() -> None:
    assert seen(wanted=Wanted(version=OLD, via="pin")).standing is Standing.PINNED


@pytest.mark.parametrize(
    ("state", "standing"),
    [
        ("ready", Standing.TAKEN),
        ("idle", Standing.TAKEN),
        ("loading", Standing.PENDING),
        ("failed", Standing.FAILED),
    ],
)
def test_a_version_is_taken_once_it_answers(state: str, standing: Standing) -> None:
    assert seen(version=NEW, state=state).standing is standing


def test_degraded_counts_where_it_is_new() -> None:
    assert seen("degraded", version=NEW).trouble == "degraded"
    assert seen("degraded", version=NEW, before=replace(BEFORE, state="degraded")).trouble == ""


def test_a_device_that_ran_it_before_and_was_away_is_no_trouble() -> None:
    assert seen("offline", version=NEW, before=Before(version=NEW, state="offline")).trouble == ""


@pytest.mark.parametrize(
    ("answers", "gate", "speed", "trouble"),
    [
        (16.0, None, 0.8, ""),
        (15.9, None, 0.795, "slow"),
        (None, 70.0, 0.7, "slow"),
        (None, 120.0, 1.2, ""),
        (20.0, 10.0, 1.0, ""),
        (None, None, None, ""),
    ],
)
def test_a_speed_is_held_against_the_devices_own(
    answers: float | None, gate: float | None, speed: float | None, trouble: str
) -> None:
    measured = Gate(tokens_per_s=gate) if gate else None
    taken = seen(version=NEW, tokens_per_s=answers, gate=measured)
    assert (taken.speed, taken.trouble) == (speed, trouble)
    assert seen(version=NEW, tokens_per_s=1.0, before=Before(version=OLD, state="ready")).trouble == ""
