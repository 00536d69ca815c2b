"""Versions that wait for the line, or for the moment at which they may take over: what is asked, kept and said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache import line_use
from edge_agent.cache.state import ModelState
from edge_agent.errors import (
    ActivationHeld,
    CacheBusy,
    CannotRun,
    LinkHeld,
    RegistryRefused,
    SettingsError,
    SyncStopped,
    TransportError,
)
from edge_agent.serving.seat import Serving
from edge_agent.settings.link import LinkSettings
from edge_agent.updates.syncs import OVERDUE_S
from edge_agent.updates.updates import SPREAD_S
from tests.support.committed import commit
from tests.support.scripted_sync import Offer
from tests.support.scripted_updates import FALLBACK, OWN, UpdatingDevice, make_device

ONE, TWO, THREE = Offer(version=1, new=False), Offer(version=2), Offer(version=3)
HERE = replace(TWO, new=False)
BY_NUMBER = "models:/phi/2"
HOUR_S = 3600.0
NOON = datetime(2027, 1, 15, 12, tzinfo=UTC).timestamp()
TEN_PM = NOON + 10 * HOUR_S
NIGHT = {"windows": ["22:00-05:00"], "timezone": "UTC"}
SWITCH = {"activate_windows": ["22:00-05:00"], "timezone": "UTC"}


def device_of(folder: Path, link: Mapping[str, Any], *, active: bool = True, **how: Any) -> UpdatingDevice:
    """At noon, with version 1, of an alias that has moved to version 2."""
    state = ModelState(active=ONE.key) if active else ModelState()
    device = make_device(folder, state, link=LinkSettings.model_validate(link), **how)
    device.time.now_s = NOON
    device.sync.offers |= {OWN: TWO, BY_NUMBER: TWO}
    return device


def poll(device: UpdatingDevice) -> None:
    device.updates.check_now()
    device.updates.step(0)


def held(device: UpdatingDevice) -> tuple[int, int | None, float | None] | None:
    if (waiting := device.updates.outlook("assistant").waiting) is None:
        return None
    return waiting.version, waiting.missing_bytes, waiting.until_s


def reason(device: UpdatingDevice) -> str:
    waiting = device.updates.outlook("assistant").waiting
    return waiting.reason if waiting else ""


# --- The line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False], ids=["an update", "the first version"])
def test_a_download_outside_the_windows_is_held_and_comes_when_they_open(
    tmp_path: Path, active: bool
) -> None:
    device = device_of(tmp_path, NIGHT, active=active)
    device.updates.step(0)
    before = device.lifecycle.state
    assert held(device) == (2, 1_000, TEN_PM)
    assert (device.lifecycle.adopted, device.sync.have, device.problem) == ([], {TWO.key: 0}, "")
    waiting = device.updates.outlook("assistant").waiting
    assert waiting is not None
    assert waiting.reason == (
        "version 2 is held until 22:00 UTC by link.windows, 1000 bytes are missing; "
        "`edge-agent models pull --now` fetches it now"
    )
    assert (device.updates.heard.reachable, device.updates.heard.problem) == (True, "")
    assert device.lifecycle.state == before, "nothing is left of it"
    device.updates.step(1)
    device.time.now_s = TEN_PM + SPREAD_S - 1
    device.updates.step(2)
    assert len(device.sync.jobs) == 1, "a fleet does not come in the same second"
    device.time.now_s = TEN_PM + SPREAD_S
    device.updates.step(3)
    assert device.lifecycle.state.active == TWO.key
    assert held(device) is None


def test_an_alias_that_moves_back_meanwhile_costs_nothing(tmp_path: Path) -> None:
    device = device_of(tmp_path, NIGHT)
    poll(device)
    assert held(device)
    device.sync.offers[OWN] = ONE
    before = device.lifecycle.state
    poll(device)
    after = replace(before, resolved=(OWN, 1))
    assert (held(device), device.lifecycle.state, device.problem) == (None, after, "")
    device.time.now_s = TEN_PM + SPREAD_S
    device.updates.step(0.1)
    assert device.sync.have == {TWO.key: 0}


def test_a_download_stops_with_the_days_bytes_and_goes_on_the_next_day(tmp_path: Path) -> None:
    device = device_of(tmp_path, {"bytes_per_day": 400, "timezone": "UTC"})
    for day in range(3):
        poll(device)
        line_use.add(device.store, device.time.now_s, device.sync.jobs[-1].link.allowed_bytes or 0)
        device.time.now_s += 24 * HOUR_S
        if day < 2:
            assert held(device) == (2, 600 - 400 * day, NOON + (12 + 24 * day) * HOUR_S)
    assert [job.link.allowed_bytes for job in device.sync.jobs] == [400, 400, 400]
    assert device.lifecycle.state.active == TWO.key


def test_a_restart_forgets_nothing_of_what_came_today(tmp_path: Path) -> None:
    link = {"bytes_per_day": 400, "timezone": "UTC"}
    device = device_of(tmp_path, link)
    line_use.add(device.store, NOON - HOUR_S, 300)
    again = device_of(tmp_path, link)
    poll(again)
    assert again.sync.jobs[-1].link.allowed_bytes == 100
    assert again.updates.link.document() == {"bytes_per_day": 400, "used_bytes": 300}
    again.time.now_s += 24 * HOUR_S
    assert again.updates.link.document()["used_bytes"] == 0


@pytest.mark.parametrize("link", [NIGHT, {"bytes_per_day": 1, "timezone": "UTC"}])
def test_an_operator_overrules_the_line_and_not_by_asking_alone(tmp_path: Path, link: dict[str, Any]) -> None:
    device = device_of(tmp_path, link)
    told: list[Mapping[str, Any]] = []
    with pytest.raises(LinkHeld):
        device.updates.check("assistant", told.append, asked_for=True)
    (event,) = (event for event in told if event["event"] == "waits")
    assert (event["model"], event["version"], event["missing_bytes"]) == ("assistant", 2, held(device)[1])  # type: ignore[index]
    device.updates.check("assistant", asked_for=True, now=True)
    assert device.lifecycle.state.active == TWO.key
    assert (held(device), device.sync.jobs[-1].link.allowed_bytes) == (None, None)


def test_a_clock_that_is_not_set_holds_until_it_is(tmp_path: Path) -> None:
    device = device_of(tmp_path, {"windows": ["00:00-24:00"], "timezone": "UTC"})
    device.time.now_s = 1_000.0
    poll(device)
    assert held(device) == (2, 1_000, None)
    device.updates.step(0.1)
    assert len(device.sync.jobs) == 1
    device.time.now_s = NOON
    device.updates.step(0.2)
    assert device.lifecycle.state.active == TWO.key


def test_a_sync_that_does_not_stop_by_itself_is_ended_after_the_window(tmp_path: Path) -> None:
    device = device_of(tmp_path, NIGHT)
    device.time.now_s = TEN_PM + 6.9 * HOUR_S

    def dawdle(ref: str) -> None:
        device.time.now_s = TEN_PM + 7 * HOUR_S + OVERDUE_S

    device.sync.amid = dawdle
    poll(device)
    assert held(device) == (2, 0, TEN_PM + 24 * HOUR_S)
    assert device.lifecycle.adopted == []


def test_a_poll_that_gives_way_is_not_held(tmp_path: Path) -> None:
    device = device_of(tmp_path, NIGHT)
    device.time.now_s = TEN_PM
    device.sync.amid = lambda ref: device.updates.close()
    with pytest.raises(SyncStopped):
        device.updates.check("assistant")
    assert held(device) is None


def test_a_held_download_is_no_failed_one_and_needs_no_fallback(tmp_path: Path) -> None:
    device = device_of(tmp_path, NIGHT, active=False, fallback=FALLBACK)
    device.sync.offers[FALLBACK] = Offer(version=9)
    for _ in range(5):
        poll(device)
    assert set(device.sync.refs) == {OWN}
    assert held(device) == (2, 1_000, TEN_PM)


def test_a_fallback_that_is_held_says_why_it_is_wanted(tmp_path: Path) -> None:
    device = device_of(tmp_path, NIGHT, active=False, fallback=FALLBACK)
    device.sync.offers |= {OWN: CannotRun("no library"), FALLBACK: Offer(version=9)}
    poll(device)
    assert held(device) == (9, 1_000, TEN_PM)
    assert device.problem == f"no library; and its fallback: {reason(device)}"


def test_a_registry_that_is_out_of_reach_says_nothing_of_what_waits(tmp_path: Path) -> None:
    device = device_of(tmp_path, NIGHT)
    poll(device)
    since = device.updates.outlook("assistant").waiting
    device.sync.offers[OWN] = TransportError("timed out")
    poll(device)
    assert (held(device), device.problem) == ((2, 1_000, TEN_PM), "timed out")
    device.time.now_s += 60
    device.sync.offers[OWN] = TWO
    poll(device)
    again = device.updates.outlook("assistant").waiting
    assert since is not None
    assert again is not None
    assert (again.at_s, again.reason) == (since.at_s, since.reason), "nothing new to report"


# --- Taking over ---------------------------------------------------------------------------------------


def test_a_version_that_is_here_takes_over_when_its_window_opens(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH)
    poll(device)
    assert held(device) == (2, 0, TEN_PM)
    assert (device.lifecycle.adopted, device.lifecycle.state.candidate) == ([], TWO.key)
    waiting = device.updates.outlook("assistant").waiting
    assert waiting is not None
    assert waiting.reason.startswith("version 2 is here, and held until 22:00 UTC by link.activate_windows")
    device.sync.offers[OWN] = HERE
    device.time.now_s = TEN_PM + SPREAD_S
    device.updates.step(0.1)
    assert (device.lifecycle.state.active, held(device)) == (TWO.key, None)


def test_a_version_takes_over_when_the_file_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "in-use"
    device = device_of(tmp_path, {"inhibit_file": str(file)})
    file.touch()
    poll(device)
    device.updates.step(0.1)
    assert (held(device), len(device.sync.jobs)) == ((2, 0, None), 1)
    assert str(file) in reason(device)
    file.unlink()
    device.updates.step(0.2)
    assert (device.lifecycle.state.active, held(device)) == (TWO.key, None)


def test_a_file_that_comes_while_the_gate_is_passed_holds_too(tmp_path: Path) -> None:
    file = tmp_path / "in-use"
    device = device_of(tmp_path, {"inhibit_file": str(file)})
    device.lifecycle.amid = lambda key: file.touch()
    for _ in range(5):
        file.unlink(missing_ok=True)
        poll(device)
        assert held(device) == (2, 0, None)
        assert device.lifecycle.state.candidate_tries == 0, "that is no failed try"
    assert device.lifecycle.state.active == ONE.key


def test_a_file_that_cannot_be_looked_at_holds(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    device = device_of(tmp_path, {"inhibit_file": str(loop / "in-use")})
    poll(device)
    assert held(device) == (2, 0, None)
    assert "cannot be looked at" in reason(device)


def test_a_link_that_leads_nowhere_is_a_file_that_exists(tmp_path: Path) -> None:
    file = tmp_path / "in-use"
    file.symlink_to(tmp_path / "nowhere")
    device = device_of(tmp_path, {"inhibit_file": str(file)})
    poll(device)
    assert held(device) == (2, 0, None)


def test_a_file_below_a_file_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    device = device_of(tmp_path, {"inhibit_file": str(tmp_path / "file" / "in-use")})
    poll(device)
    assert device.lifecycle.state.active == TWO.key


def test_now_overrules_the_windows_and_not_the_file(tmp_path: Path) -> None:
    file = tmp_path / "in-use"
    device = device_of(tmp_path, {**SWITCH, "inhibit_file": str(file)})
    file.touch()
    with pytest.raises(ActivationHeld, match="in-use"):
        device.updates.check("assistant", asked_for=True, now=True)
    file.unlink()
    with pytest.raises(ActivationHeld, match="22:00"):
        device.updates.check("assistant", asked_for=True)
    device.updates.check("assistant", asked_for=True, now=True)
    assert device.lifecycle.state.active == TWO.key


@pytest.mark.parametrize("to", [ONE, THREE], ids=["back", "on"])
def test_an_alias_that_moves_leaves_nothing_of_what_waited(tmp_path: Path, to: Offer) -> None:
    device = device_of(tmp_path, {**SWITCH, "windows": ["22:00-05:00"]})
    device.sync.offers[OWN] = HERE
    poll(device)
    assert device.lifecycle.state.candidate == TWO.key
    device.sync.offers[OWN] = to
    poll(device)
    assert device.lifecycle.state == ModelState(active=ONE.key, resolved=(OWN, to.version))


def test_what_waits_and_must_not_run_any_more_is_not_taken_when_the_registry_is_away(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH)
    record = commit(device.store, 2)
    back = Offer(version=2, digest=record.key.split("-")[1])
    device.sync.offers[OWN] = back
    poll(device)
    assert device.lifecycle.state.candidate == record.key
    device.sync.offers[OWN] = replace(back, rollout="0")
    poll(device)
    assert (held(device), "not yet to this one" in reason(device)) == ((2, None, None), True)
    device.sync.offers[OWN] = TransportError("timed out")
    device.time.now_s = TEN_PM
    poll(device)
    assert device.lifecycle.adopted == []


def test_a_pull_that_finds_no_registry_and_a_cache_that_is_busy_say_nothing_of_what_waits(
    tmp_path: Path,
) -> None:
    device = device_of(tmp_path, SWITCH, registry="")
    device.lifecycle.state = ModelState(active=ONE.key, candidate=TWO.key)
    with pytest.raises(SettingsError):
        device.updates.check("assistant", asked_for=True)
    assert device.lifecycle.state.candidate == TWO.key
    busy = device_of(tmp_path, SWITCH)
    poll(busy)
    busy.sync.offers[OWN] = CacheBusy("another process is fetching")
    poll(busy)
    assert held(busy) == (2, 0, TEN_PM)


@pytest.mark.parametrize("error", [TransportError("timed out"), RegistryRefused("no")])
def test_what_waits_needs_no_registry_when_its_time_comes_not_even_after_a_restart(
    tmp_path: Path, error: Exception
) -> None:
    device = device_of(tmp_path, SWITCH)
    record = commit(device.store, 2)
    device.sync.offers[OWN] = Offer(version=2, digest=record.key.split("-")[1])
    poll(device)
    again = device_of(tmp_path, SWITCH)
    again.lifecycle.state = device.lifecycle.state
    again.sync.offers[OWN] = error
    again.time.now_s = NOON + HOUR_S
    poll(again)
    assert again.lifecycle.adopted == []
    again.time.now_s = TEN_PM + SPREAD_S
    again.updates.step(0.1)
    assert again.lifecycle.state.active == record.key


def test_what_waits_is_not_tried_where_the_registry_says_nothing_and_another_one_is_wanted(
    tmp_path: Path,
) -> None:
    device = device_of(tmp_path, SWITCH)
    record = commit(device.store, 2)
    device.lifecycle.state = ModelState(active=ONE.key, candidate=record.key, desired="models:/phi/7")
    device.sync.offers["models:/phi/7"] = TransportError("timed out")
    device.time.now_s = TEN_PM
    poll(device)
    assert device.lifecycle.adopted == []


def test_without_a_registry_an_import_waits_and_takes_over(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH, registry="")
    device.lifecycle.state = ModelState(active=ONE.key, candidate=TWO.key)
    poll(device)
    assert held(device) == (2, 0, TEN_PM)
    device.time.now_s = TEN_PM
    poll(device)
    assert device.lifecycle.state.active == TWO.key


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("desired", [BY_NUMBER, ""], ids=["by number", "by alias"])
def test_the_way_back_to_a_version_that_is_named_by_its_number_is_never_held(
    tmp_path: Path, served: bool, desired: str
) -> None:
    file = tmp_path / "in-use"
    file.touch()
    device = device_of(tmp_path, {**SWITCH, **NIGHT, "inhibit_file": str(file)})
    record = commit(device.store, 2)
    device.store.note_served("assistant", record.key, served=served)
    back = Offer(version=2, digest=record.key.split("-")[1], new=False)
    device.sync.offers |= {OWN: back, BY_NUMBER: back}
    device.lifecycle.state = ModelState(active=ONE.key, desired=desired)
    poll(device)
    assert (device.lifecycle.state.active == record.key) == (served and bool(desired))


def test_the_way_out_of_a_version_that_failed_is_never_held(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH)
    device.lifecycle.serving = Serving.FAILED
    poll(device)
    assert device.lifecycle.state.active == TWO.key


def test_a_pin_is_never_held_and_ends_what_waits(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH)
    poll(device)
    assert held(device)
    device.lifecycle.state = replace(device.lifecycle.state, pinned=THREE.key)
    assert held(device) is None
    poll(device)
    assert device.lifecycle.state.active == THREE.key


def test_the_fallback_takes_over_at_once_where_nothing_of_its_own_runs(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH, active=False, fallback=FALLBACK)
    device.sync.offers |= {OWN: CannotRun("no library"), FALLBACK: Offer(version=9)}
    poll(device)
    assert device.lifecycle.state.active == Offer(version=9).key


def test_what_an_operator_activated_meanwhile_does_not_wait(tmp_path: Path) -> None:
    device = device_of(tmp_path, SWITCH)
    poll(device)
    device.lifecycle.state = device.lifecycle.state.switched(TWO.key)
    assert held(device) is None
