"""When models are checked, for whom, and what gives way to what."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache.state import ModelState
from edge_agent.errors import (
    EdgeAgentError,
    RegistryRefused,
    RunnerError,
    StoreError,
    SyncStopped,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.serving.seat import Serving
from edge_agent.settings.model import ModelSettings
from edge_agent.updates.desired import SyncRequests
from edge_agent.updates.polls import FIRST_RETRY_S, JITTER, RETRY_JITTER, place_of
from tests.support.committed import commit
from tests.support.scripted_sync import Offer
from tests.support.scripted_updates import INTERVAL_S, OWN, UpdatingDevice, make_device

ONE, TWO = Offer(version=1, new=False), Offer(version=2)
OTHER = "models:/phi/2"
_LIMIT_S = 20.0


@pytest.fixture
def device(tmp_path: Path) -> UpdatingDevice:
    made = make_device(tmp_path, ModelState(active=ONE.key))
    made.sync.offers |= {OWN: ONE, OTHER: TWO}
    return made


# --- When ----------------------------------------------------------------------------------------------


def test_the_interval_begins_with_the_step_after_a_check_and_is_jittered(device: UpdatingDevice) -> None:
    device.updates.step(0)
    assert len(device.sync.jobs) == 1, "at once"
    assert device.drawn == []
    device.updates.step(1_000)  # the check took longer than the interval
    device.updates.step(1_000 + INTERVAL_S * JITTER[1] - 1)
    assert len(device.sync.jobs) == 1
    assert device.drawn == [JITTER], "one number for each interval"
    device.updates.step(1_000 + INTERVAL_S * JITTER[1])
    assert len(device.sync.jobs) == 2


def test_whoever_watches_is_told_of_a_check_when_it_begins_and_when_it_has_ended(
    device: UpdatingDevice,
) -> None:
    seen: list[bool] = []
    device.updates._on_turn = lambda: seen.append(device.updates.works)
    device.sync.amid = lambda ref: seen.append(device.updates.works)
    device.updates.step(0)
    device.updates.step(1)
    assert seen == [True, True, False]


def test_a_check_that_is_asked_for_does_not_wait_for_the_interval(device: UpdatingDevice) -> None:
    device.updates.step(0)
    device.updates.step(1)
    device.updates.check_now()
    device.updates.step(2)
    device.updates.step(3)
    assert len(device.sync.jobs) == 2, "once for each time it is asked for"


def test_a_check_that_is_asked_for_during_a_check_comes_after_it(device: UpdatingDevice) -> None:
    device.sync.amid = lambda ref: device.updates.check_now()
    device.updates.step(0)
    device.sync.amid = lambda ref: None
    device.updates.step(0.5)
    assert len(device.sync.jobs) == 2


def test_all_models_are_checked_and_one_that_fails_does_not_keep_the_next_from_it(tmp_path: Path) -> None:
    models = {name: ModelSettings(uri=f"models:/{name}@prod") for name in ("first", "second")}
    device = make_device(tmp_path, models=models)
    device.sync.offers |= {
        "models:/first@prod": TransportError("timed out"),
        "models:/second@prod": TWO,
    }
    device.updates.step(0)
    assert device.updates.problems == {"first": "timed out", "second": ""}
    assert device.lifecycles["second"].state.active == TWO.key


def test_a_problem_is_logged_once_and_again_when_it_comes_back(
    device: UpdatingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings_of(now_s: float) -> list[str]:
        caplog.clear()
        device.updates.check_now()
        with caplog.at_level(logging.WARNING, "edge_agent.updates"):
            device.updates.step(now_s)
        return [record.getMessage() for record in caplog.records]

    device.sync.offers[OWN] = TransportError("timed out")
    told = ["update failed model=assistant code=registry_unreachable reason='timed out'"]
    assert (warnings_of(0), warnings_of(1)) == (told, [])
    device.sync.offers[OWN] = ONE
    assert warnings_of(2) == []
    device.sync.offers[OWN] = TransportError("timed out")
    assert warnings_of(3) == told


def test_close_ends_the_thread_and_the_running_sync(tmp_path: Path) -> None:
    models = {name: ModelSettings(uri=f"models:/{name}@prod") for name in ("first", "second")}
    device = make_device(tmp_path, models=models)
    device.sync.offers |= {f"models:/{name}@prod": TWO for name in models}
    device.sync.amid = lambda ref: device.updates.close()
    device.updates.run()
    assert device.sync.refs == ["models:/first@prod"], "the second one was not begun"
    assert device.lifecycles["first"].adopted == []
    assert device.updates.problems == {}


def test_what_fails_because_the_daemon_ends_is_no_problem(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = TWO
    device.lifecycle.refusals = {TWO.key: RunnerError("the runner was stopped")}
    device.lifecycle.amid = lambda key: device.updates.close()
    device.updates.step(0)
    assert (device.lifecycle.adopted, device.problem) == ([(TWO.key, False, "")], "unset")


def test_the_progress_of_a_fetch_is_seen_until_it_ends(device: UpdatingDevice) -> None:
    seen: list[dict[str, Any] | None] = []
    device.sync.amid = lambda ref: seen.append(device.updates.outlook("assistant").progress)

    def hear(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            seen.append(device.updates.outlook("assistant").progress)

    device.updates.check("assistant", hear, asked_for=True)
    progress = {"bytes": 1_000, "total_bytes": 1_000, "bytes_per_s": 500, "eta_s": 0.0}
    assert seen == [None, progress], "a reference that is resolved is no progress yet"
    assert device.updates.outlook("assistant").progress is None


# --- A fleet -------------------------------------------------------------------------------------------

PLACE_S = place_of("dev") * INTERVAL_S


def test_the_first_poll_of_a_device_that_has_a_model_has_its_place_in_one_interval(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key), asked=False)
    device.sync.offers[OWN] = ONE
    device.updates.step(1_000)
    device.updates.step(1_000 + PLACE_S - 1)
    assert (device.sync.jobs, device.drawn) == ([], [])
    device.updates.step(1_000 + PLACE_S)
    assert len(device.sync.jobs) == 1


@pytest.mark.parametrize("loads", [True, False])
def test_a_device_that_has_nothing_to_run_asks_at_once(tmp_path: Path, loads: bool) -> None:
    device = make_device(tmp_path, ModelState() if loads else ModelState(active=ONE.key), asked=False)
    if not loads:
        device.lifecycle.serving = Serving.FAILED
    device.sync.offers[OWN] = ONE
    device.updates.step(1_000)
    assert len(device.sync.jobs) == 1


def test_a_device_that_serves_a_fallback_asks_at_once(tmp_path: Path) -> None:
    """What kept its own version from running may have been mended while it was off."""
    device = make_device(tmp_path, ModelState(active=ONE.key, instead="no library"), asked=False)
    device.sync.offers[OWN] = ONE
    device.updates.step(1_000)
    assert len(device.sync.jobs) == 1


def test_one_of_two_models_that_has_nothing_to_run_is_enough(tmp_path: Path) -> None:
    models = {name: ModelSettings(uri=OWN) for name in ("first", "second")}
    device = make_device(tmp_path, ModelState(active=ONE.key), models=models, asked=False)
    device.lifecycles["second"].state = ModelState()
    device.updates.step(1_000)
    assert len(device.sync.jobs) == 2


def test_what_was_put_off_before_a_restart_is_asked_about_at_once(tmp_path: Path) -> None:
    state = ModelState(active=ONE.key).waiting_for(TWO.key)
    device = make_device(tmp_path, state, asked=False)
    device.updates.step(1_000)
    assert len(device.sync.jobs) == 1


def test_what_is_on_disk_is_taken_up_before_the_registry_is_asked(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key), asked=False)
    device.lifecycle.on_disk = TWO.key
    device.updates.step(1_000)
    assert (device.lifecycle.state.active, device.sync.jobs) == (TWO.key, [])


def test_what_the_look_over_finds_damaged_is_fetched_again_at_once(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key), asked=False)
    record = commit(device.store, 1)
    device.store.blob(record.files[0].sha256).unlink()
    device.sync.offers[OWN] = ONE
    device.sync.amid = lambda ref: device.updates.close()
    device.updates.run()
    assert device.sync.refs == [OWN]


@pytest.mark.parametrize("how", ["ctl/sync", "model/desired"])
def test_a_check_may_come_in_the_course_of_some_time(device: UpdatingDevice, how: str) -> None:
    device.updates.step(0)
    if how == "ctl/sync":
        SyncRequests(device.updates.check_now).take(b'{"within_s": 100}')
    else:
        device.updates.desire({"assistant": OTHER}, 100.0)
    device.updates.step(10)
    assert device.lifecycle.state.desired == (OTHER if how == "model/desired" else ""), "written down at once"
    device.updates.step(10 + place_of("dev") * 100 - 0.1)
    assert len(device.sync.jobs) == 1
    device.updates.step(10 + place_of("dev") * 100)
    device.updates.step(200)
    assert len(device.sync.jobs) == 2, "once"


def test_a_desired_state_that_ends_a_poll_is_followed_when_it_says(device: UpdatingDevice) -> None:
    device.sync.amid = lambda ref: device.updates.desire({"assistant": OTHER}, 100.0)
    device.updates.step(0)
    device.sync.amid = lambda ref: None
    device.updates.step(1)
    assert device.sync.refs == [OWN]
    device.updates.step(1 + place_of("dev") * 100)
    assert device.sync.refs == [OWN, OTHER]


def test_a_request_to_check_that_is_not_understood_checks_nothing(
    device: UpdatingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.updates.step(0)
    SyncRequests(device.updates.check_now).take(b'{"within": 100}')
    device.updates.step(1)
    assert len(device.sync.jobs) == 1
    assert "request to check refused" in caplog.text
    SyncRequests(device.updates.check_now).take(b"")
    device.updates.step(2)
    assert len(device.sync.jobs) == 2


def test_a_registry_that_does_not_answer_is_asked_again_early(device: UpdatingDevice) -> None:
    device.sync.offers[OWN] = TransportError("timed out")
    device.updates.step(0)
    device.updates.step(1)
    device.updates.step(1 + FIRST_RETRY_S * RETRY_JITTER[1])
    assert device.drawn == [RETRY_JITTER]
    assert len(device.sync.jobs) == 2


@pytest.mark.parametrize("error", [RegistryRefused("no"), UnknownReference("no"), VerificationError("no")])
def test_an_answer_that_brings_nothing_is_no_reason_to_ask_again_early(
    device: UpdatingDevice, error: EdgeAgentError
) -> None:
    device.sync.offers[OWN] = error
    device.updates.step(0)
    device.updates.step(1)
    assert device.drawn == [JITTER]


# --- The desired state ---------------------------------------------------------------------------------


def test_a_desired_state_is_written_down_and_followed_at_the_next_step(device: UpdatingDevice) -> None:
    device.updates.step(0)
    device.updates.desire({"assistant": OTHER})
    device.updates.step(1)
    assert device.lifecycle.state.desired == OTHER
    assert device.sync.refs == [OWN, OTHER]
    assert device.lifecycle.state.active == TWO.key
    device.updates.desire({"assistant": ""})
    device.updates.step(2)
    assert device.sync.refs == [OWN, OTHER, OWN]


def test_a_new_desired_state_ends_the_poll_and_comes_first(device: UpdatingDevice) -> None:
    device.sync.amid = lambda ref: device.updates.desire({"assistant": OTHER})
    device.updates.step(0)
    assert (device.sync.refs, device.problem) == ([OWN], "unset"), "put off is no problem"
    assert device.updates.heard.reachable is True, "it had said which version it is"
    device.updates.step(0.5)
    assert device.sync.refs == [OWN, OTHER]
    assert device.lifecycle.state.active == TWO.key


def test_a_desired_state_that_comes_again_with_a_connection_ends_no_poll(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=ONE.key, desired=OTHER))
    device.sync.offers[OTHER] = TWO
    device.sync.amid = lambda ref: device.updates.desire({"assistant": OTHER})
    device.updates.step(0)
    assert device.lifecycle.state.active == TWO.key


def test_a_desired_state_that_is_known_already_is_no_reason_to_ask(tmp_path: Path) -> None:
    device = make_device(tmp_path, ModelState(active=TWO.key, desired=OTHER))
    device.sync.offers[OTHER] = TWO
    device.updates.step(0)
    device.updates.desire({"assistant": OTHER})
    device.updates.step(1)
    assert device.sync.refs == [OTHER]
    device.updates.desire({"assistant": ""})
    device.updates.desire({"assistant": OTHER})
    device.updates.step(2)
    assert device.lifecycle.state.desired == OTHER, "the last one counts"


def test_a_desired_state_that_cannot_be_written_down_is_tried_again(device: UpdatingDevice) -> None:
    device.lifecycle.unwritable = StoreError("no space")
    device.updates.desire({"assistant": OTHER})
    device.updates.step(0)
    assert device.sync.refs == [OWN], "what is written down counts"
    device.lifecycle.unwritable = None
    device.updates.check_now()
    device.updates.step(1)
    assert (device.lifecycle.state.desired, device.sync.refs) == (OTHER, [OWN, OTHER])


def test_a_disk_that_takes_no_desired_state_is_tried_once_a_minute(
    device: UpdatingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes with each connection, and there is a step each second."""
    device.lifecycle.unwritable = StoreError("no space")
    device.updates.desire({"assistant": OTHER})
    for second in range(180):
        device.updates.step(second)
    assert sum("not written down" in record.getMessage() for record in caplog.records) == 3
    device.lifecycle.unwritable = None
    for second in range(180, 241):
        device.updates.step(second)
    assert device.lifecycle.state.desired == OTHER


def test_what_is_desired_while_the_former_cannot_be_written_down_counts(device: UpdatingDevice) -> None:
    device.lifecycle.unwritable = StoreError("no space")
    device.lifecycle.amid = lambda uri: device.updates.desire({"assistant": OTHER})
    device.updates.desire({"assistant": "models:/phi/7"})
    device.updates.step(0)
    device.lifecycle.unwritable, device.lifecycle.amid = None, lambda what: None
    device.updates.step(1)
    assert device.lifecycle.state.desired == OTHER


# --- Operators and polls -------------------------------------------------------------------------------


class Operator:
    """Pulls the model in a thread of its own.

    Attributes:
        waits: it has heard that it has to wait.
        told: what it has to wait for.
    """

    def __init__(self, device: UpdatingDevice) -> None:
        self.waits = threading.Event()
        self.told: list[str] = []
        self.raised: list[EdgeAgentError] = []
        self._device = device
        self._thread = threading.Thread(target=self._pull, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join(_LIMIT_S)
        assert not self._thread.is_alive()

    def _pull(self) -> None:
        try:
            self._device.updates.check("assistant", self._hear, asked_for=True)
        except EdgeAgentError as error:
            self.raised.append(error)

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "waiting":
            self.told.append(event["for"])
            self.waits.set()


def test_a_poll_gives_way_to_an_operator_and_comes_back(device: UpdatingDevice) -> None:
    operator = Operator(device)

    def come(ref: str) -> None:
        if len(device.sync.jobs) == 1:
            operator.start()
            assert operator.waits.wait(_LIMIT_S)

    device.sync.amid = come
    device.updates.step(0)
    operator.join()
    assert operator.told == ["the check of assistant"]
    assert operator.raised == []
    assert len(device.lifecycle.adopted) == 1, "the poll ended before it had a version"
    assert device.lifecycle.adopted[0] == (ONE.key, True, "")
    device.updates.step(0.5)
    assert device.lifecycle.adopted[1:] == [(ONE.key, False, "")]


def test_an_operator_who_waits_goes_before_a_poll(device: UpdatingDevice) -> None:
    first, second = Operator(device), Operator(device)
    works, ends = threading.Event(), threading.Event()

    def hold(ref: str) -> None:
        works.set()
        assert ends.wait(_LIMIT_S)

    device.sync.amid = hold
    first.start()
    assert works.wait(_LIMIT_S)
    second.start()
    assert second.waits.wait(_LIMIT_S)
    device.updates.step(0)
    assert len(device.sync.jobs) == 1, "the poll has asked for nothing"
    assert device.problem == "unset"
    ends.set()
    first.join()
    second.join()
    assert (first.told, second.told) == ([], ["`models pull`"])
    device.updates.step(0.5)
    assert [asked_for for _, asked_for, _ in device.lifecycle.adopted] == [True, True, False]


def test_an_operators_work_is_ended_by_no_new_desired_state(device: UpdatingDevice) -> None:
    device.sync.amid = lambda ref: device.updates.desire({"assistant": OTHER})
    assert device.updates.check("assistant", asked_for=True).key == ONE.key


def test_the_end_of_the_daemon_ends_an_operators_work(device: UpdatingDevice) -> None:
    device.sync.amid = lambda ref: device.updates.close()
    with pytest.raises(SyncStopped):
        device.updates.check("assistant", asked_for=True)
