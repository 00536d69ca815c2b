"""What updates report of a version on its way: what is wanted and why, how far it is, and who it is not for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache.attempt import Attempt, Step
from edge_agent.cache.state import ModelState
from edge_agent.errors import (
    CannotRun,
    EdgeAgentError,
    StoreError,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.serving.verdicts import GateFailed
from edge_agent.settings.model import ModelSettings
from edge_agent.sync import version_file
from edge_agent.updates.choice import Wanted
from edge_agent.updates.rollout import LOOK_BACK, NotInRollout
from tests.support.committed import commit, fault
from tests.support.scripted_sync import Offer
from tests.support.scripted_updates import FALLBACK, NOW, OWN, UpdatingDevice, make_device

ONE, TWO = Offer(version=1, new=False), Offer(version=2, digest="b" * 12)
RUNNING = ModelState(active=ONE.key)

Seen = tuple[int, str, str | None]


@pytest.fixture
def device(tmp_path: Path) -> UpdatingDevice:
    made = make_device(tmp_path, RUNNING)
    made.sync.offers[OWN] = TWO
    return made


def poll(device: UpdatingDevice) -> None:
    device.updates.check_now()
    device.updates.step(0)


def seen(device: UpdatingDevice) -> Seen | None:
    tried = device.updates.outlook("assistant").attempt
    return (tried.version, str(tried.step), tried.code) if tried else None


def wanted(device: UpdatingDevice) -> Wanted:
    return device.updates.outlook("assistant").wanted


# --- Attempts ------------------------------------------------------------------------------------------


def test_a_version_is_fetched_and_verified_before_the_lifecycle_has_it(device: UpdatingDevice) -> None:
    steps: list[Seen | None] = []

    def adopted(key: str) -> None:
        steps.append(seen(device))

    def on_event(event: Any) -> None:
        steps.append(seen(device))

    device.lifecycle.amid = adopted
    device.updates.check("assistant", on_event, asked_for=True)
    assert list(dict.fromkeys(steps)) == [None, (2, "fetch", None), (2, "verify", None)]
    tried = device.updates.outlook("assistant").attempt
    assert tried is None, "the lifecycle says what came then"


def test_how_long_the_fetch_took_stays_with_the_version_when_the_lifecycle_has_it(
    device: UpdatingDevice,
) -> None:
    def on_event(event: Any) -> None:
        device.time.now_s += {"resolved": 5, "fetching": 1, "verifying": 20, "progress": 3}[event["event"]]

    def adopted(key: str) -> None:
        fresh = Attempt(version=2, digest=TWO.digest, step=Step.GATE, at_s=device.time.now_s)
        device.lifecycle.note_attempt(fresh)

    device.lifecycle.amid = adopted
    device.updates.check("assistant", on_event, asked_for=True)
    tried = device.updates.outlook("assistant").attempt
    assert tried and tried.took_s == {Step.FETCH: 1.0, Step.VERIFY: 23.0}
    device.lifecycle.note_attempt(Attempt(version=3, digest="c", step=Step.GATE, at_s=device.time.now_s))
    other = device.updates.outlook("assistant").attempt
    assert other and (other.version, other.took_s) == (3, {})


def test_the_registry_is_being_asked_until_it_is_known_what_to_fetch(device: UpdatingDevice) -> None:
    seen_now: list[tuple[str, bool]] = []

    def on_event(event: Any) -> None:
        seen_now.append((event["event"], device.updates.outlook("assistant").asks))

    device.updates.check("assistant", on_event, asked_for=True)
    assert dict(seen_now) == {"resolved": True, "fetching": False, "verifying": False, "progress": False}
    assert not device.updates.outlook("assistant").asks


def test_a_check_that_finds_nothing_new_is_no_attempt(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = ONE
    tried = Attempt(version=1, digest="a" * 12, step=Step.ACTIVE, at_s=NOW - 100)
    device.lifecycle.note_attempt(tried)
    device.sync.amid = lambda ref: seen_now.append(seen(device))
    seen_now: list[Seen | None] = []
    poll(device)
    assert seen_now == [(1, "active", None)]
    assert device.updates.outlook("assistant").attempt == tried


@pytest.mark.parametrize(
    ("error", "step", "code"),
    [
        (TransportError("timed out"), "fetch", "registry_unreachable"),
        (StoreError("no space"), "fetch", "cache_failed"),
        (CannotRun("no library"), "fetch", "cannot_run"),
        (VerificationError("wrong bytes"), "verify", "verification_failed"),
    ],
)
def test_a_version_that_is_not_brought_says_why_and_is_written_down(
    device: UpdatingDevice, error: EdgeAgentError, step: str, code: str
) -> None:
    device.sync.offers[OWN] = replace(TWO, fails=error)
    poll(device)
    assert seen(device) == (2, step, code)
    assert device.lifecycle.state.attempt == device.updates.outlook("assistant").attempt
    assert device.lifecycle.state.attempt and device.lifecycle.state.attempt.digest == TWO.digest


def test_a_registry_that_says_nothing_of_a_version_ends_no_attempt(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = replace(TWO, fails=VerificationError("wrong bytes"))
    poll(device)
    device.sync.offers[OWN] = TransportError("timed out")
    poll(device)
    assert seen(device) == (2, "verify", "verification_failed")


def test_a_failure_that_cannot_be_written_down_is_shown_all_the_same(
    device: UpdatingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(attempt: Attempt) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(device.lifecycle, "note_attempt", full)
    device.sync.offers[OWN] = replace(TWO, fails=StoreError("no space left"))
    poll(device)
    assert (seen(device), device.problem) == ((2, "fetch", "cache_failed"), "no space left")


def test_a_check_that_gives_way_leaves_the_last_attempt(device: UpdatingDevice) -> None:
    tried = Attempt(version=1, digest="a" * 12, step=Step.ACTIVE, at_s=NOW - 100)
    device.lifecycle.note_attempt(tried)
    device.sync.amid = lambda ref: device.updates.close()
    device.updates.step(0)
    assert device.updates.outlook("assistant").attempt == tried


@pytest.mark.parametrize("here", [True, False], ids=["in the cache", "removed"])
def test_a_version_in_quarantine_stays_as_it_ended(tmp_path: Path, here: bool) -> None:
    state = replace(RUNNING, quarantined={TWO.key: fault("wrong", "load_failed")})
    device = make_device(tmp_path, state)
    device.sync.offers[OWN] = TWO
    check: Callable[[], object] = lambda: device.updates.check("assistant", asked_for=here)  # noqa: E731
    with pytest.raises(EdgeAgentError, match="in quarantine"):
        check()
    assert seen(device) == (2, "gate", "load_failed"), "it is not known any more how far it got"
    ended = Attempt(version=2, digest="b" * 12, step=Step.ACTIVE, at_s=NOW - 100, code="load_failed")
    device.lifecycle.note_attempt(ended)
    with pytest.raises(EdgeAgentError, match="in quarantine"):
        check()
    assert device.updates.outlook("assistant").attempt == ended


def test_a_version_that_the_host_cannot_run_and_that_is_not_tried_again_is_the_last_attempt(
    device: UpdatingDevice,
) -> None:
    device.lifecycle.refusals[TWO.key] = CannotRun("no library")
    poll(device)
    assert seen(device) == (2, "gate", "cannot_run")


def test_the_fallback_is_no_attempt(tmp_path: Path) -> None:
    device = make_device(tmp_path, fallback=FALLBACK)
    device.sync.offers |= {OWN: replace(TWO, fails=CannotRun("no library")), FALLBACK: Offer(version=9)}
    poll(device)
    assert device.lifecycle.instead
    assert seen(device) == (2, "fetch", "cannot_run")


# --- What is wanted ------------------------------------------------------------------------------------


def test_what_an_alias_means_is_wanted_as_soon_as_it_is_known_and_after_a_restart(tmp_path: Path) -> None:
    device = make_device(tmp_path, RUNNING)
    assert wanted(device) == Wanted(version=None, via="alias")
    device.sync.offers[OWN] = replace(TWO, fails=TransportError("timed out"))
    poll(device)
    assert wanted(device) == Wanted(version=2, via="alias")
    device.sync.offers[OWN] = TransportError("timed out")
    poll(device)
    again = make_device(tmp_path, device.lifecycle.state)
    assert wanted(again) == Wanted(version=2, via="alias")
    other = make_device(
        tmp_path, device.lifecycle.state, models={"assistant": ModelSettings(uri="models:/phi@test")}
    )
    assert wanted(other) == Wanted(version=None, via="alias"), "another alias may mean another version"


@pytest.mark.parametrize(
    ("state", "uri", "expected"),
    [
        (replace(RUNNING, pinned=TWO.key), OWN, Wanted(version=2, via="pin")),
        (replace(RUNNING, desired="models:/phi/7"), OWN, Wanted(version=7, via="desired")),
        (replace(RUNNING, desired="models:/phi@test"), OWN, Wanted(version=None, via="desired")),
        (
            replace(RUNNING, desired="models:/phi@test", resolved=("models:/phi@test", 3)),
            OWN,
            Wanted(version=3, via="desired"),
        ),
        (RUNNING, "models:/phi/4", Wanted(version=4, via="alias")),
    ],
)
def test_who_wants_a_version(tmp_path: Path, state: ModelState, uri: str, expected: Wanted) -> None:
    device = make_device(tmp_path, state, models={"assistant": ModelSettings(uri=uri)})
    assert wanted(device) == expected


def test_a_version_from_a_file_is_wanted_until_the_registry_says_otherwise(tmp_path: Path) -> None:
    device = make_device(tmp_path, replace(RUNNING, resolved=(OWN, 1)))
    source = make_device(tmp_path / "source")
    record = commit(source.store, 3)
    record = replace(record, manifest=replace(record.manifest, name="phi"))
    file = tmp_path / "version.tar"
    with file.open("wb") as out:
        version_file.export_version(source.store, record, out.fileno())
    device.sync.offers["models:/phi/3"] = Offer(version=3)
    with file.open("rb") as opened:
        device.updates.take_in(opened.fileno())
    assert wanted(device) == Wanted(version=3, via="import")
    device.sync.offers[OWN] = TransportError("timed out")
    poll(device)
    assert wanted(device) == Wanted(version=3, via="import")
    device.sync.offers[OWN] = TWO
    poll(device)
    assert wanted(device) == Wanted(version=2, via="alias")


# --- Rollouts ------------------------------------------------------------------------------------------


def outside(**more: Any) -> Offer:
    return replace(TWO, rollout="0", **more)


def test_a_version_that_is_not_for_this_device_yet_is_held_and_nothing_is_wrong(
    device: UpdatingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.sync.offers[OWN] = outside()
    with caplog.at_level(logging.INFO):
        poll(device)
        poll(device)
    assert seen(device) == (2, "held", "not_in_rollout")
    assert (device.problem, wanted(device)) == ("", Wanted(version=2, via="alias"))
    assert [record.levelname for record in caplog.records if "not_in_rollout" in record.message] == ["INFO"]
    assert (device.updates.heard.reachable, device.sync.refs) == (True, [OWN, OWN])
    device.updates.step(1)
    assert len(device.sync.jobs) == 2, "nobody waits for a time that would come"
    device.sync.offers[OWN] = replace(TWO, rollout="100")
    poll(device)
    assert device.lifecycle.state.active == TWO.key
    assert device.updates.outlook("assistant").waiting is None


def test_a_new_device_takes_the_version_that_the_tag_names(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    device.sync.offers |= {
        OWN: outside(version=9, rollout_from=" 3 "),
        "models:/phi/3": Offer(version=3, rollout="0"),
    }
    poll(device)
    assert device.lifecycle.state.active == f"3-{'a' * 12}", (
        "it was named, so its own rollout does not matter"
    )
    assert seen(device) == (9, "held", "not_in_rollout")
    assert wanted(device) == Wanted(version=9, via="alias")
    poll(device)
    assert device.sync.refs == [OWN, "models:/phi/3", OWN], "one that has a version asks no more"


def test_a_new_device_takes_the_newest_earlier_version_that_it_may(tmp_path: Path) -> None:
    bad = Offer(version=5)
    device = make_device(tmp_path, ModelState(quarantined={bad.key: fault("wrong")}))
    device.sync.offers |= {
        OWN: outside(version=8, rollout_from="none"),
        "models:/phi/7": Offer(version=7, rollout="0"),
        "models:/phi/5": bad,
        "models:/phi/4": Offer(version=4),
        "models:/phi/3": Offer(version=3),
    }
    poll(device)
    assert device.lifecycle.state.active == f"4-{'a' * 12}"
    assert device.sync.refs == [OWN, *(f"models:/phi/{number}" for number in (7, 6, 5, 4))]
    assert seen(device) == (8, "held", "not_in_rollout")


@pytest.mark.parametrize(("version", "asked"), [(2, 1), (LOOK_BACK + 5, LOOK_BACK)])
def test_a_search_for_an_earlier_version_is_bounded(tmp_path: Path, version: int, asked: int) -> None:
    device = make_device(tmp_path)
    device.sync.offers[OWN] = outside(version=version)
    poll(device)
    assert len(device.sync.jobs) == 1 + asked
    assert (device.lifecycle.state.active, seen(device)) == (None, (version, "held", "not_in_rollout"))


def test_an_earlier_version_that_fails_is_the_attempt_and_a_problem(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    device.sync.offers |= {OWN: outside(rollout_from="1"), "models:/phi/1": Offer(version=1)}
    device.lifecycle.refusals[f"1-{'a' * 12}"] = GateFailed("wrong")
    poll(device)
    assert device.problem == "wrong"
    assert device.updates.outlook("assistant").waiting is None
    device.sync.offers["models:/phi/1"] = UnknownReference("no version 1")
    poll(device)
    assert device.problem == "no version 1"


def test_a_pinned_device_looks_for_no_other_version(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(pinned=ONE.key))
    device.sync.offers[OWN] = outside(rollout_from="1")
    with pytest.raises(NotInRollout):
        device.updates.check("assistant", asked_for=True)
    assert device.sync.refs == [OWN]


def test_a_fallback_that_is_not_for_this_device_does_not_hide_why_it_is_wanted(tmp_path: Path) -> None:
    device = make_device(tmp_path, fallback=FALLBACK)
    device.sync.offers |= {
        OWN: replace(TWO, fails=CannotRun("no library")),
        FALLBACK: Offer(version=9, rollout="0"),
    }
    with pytest.raises(CannotRun, match="no library; and its fallback: version 9 is rolled out to 0 %"):
        device.updates.check("assistant", asked_for=True)
