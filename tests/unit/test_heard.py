"""What the last checks heard: when the registry was asked, what it was, which versions wait; also after a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache import durable
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError, RegistryRefused, StoreError, SyncStopped, TransportError
from edge_agent.settings.link import LinkSettings
from edge_agent.updates.choice import Wanted
from edge_agent.updates.heard import Heard, Hold
from edge_agent.updates.waiting import Waiting
from tests.support.scripted_sync import Offer
from tests.support.scripted_updates import NOW, OWN, UpdatingDevice, make_device

ONE, TWO = Offer(version=1, new=False), Offer(version=2, digest="b" * 12)
RUNNING = ModelState(active=ONE.key, resolved=(OWN, 2))
WANTED = Wanted(version=2, via="alias")
WAITING = Waiting(
    version=2, digest="", until_s=NOW + 60.4, at_s=NOW, code="link_held", reason="held until 22:00"
)
URI = "http://registry"


def step(device: UpdatingDevice) -> None:
    device.updates.check_now()
    device.updates.step(0)


def after_a_restart(device: UpdatingDevice) -> Heard:
    return Heard(URI, device.store, lambda: NOW)


# --- When the registry was asked -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reachable", "problem"),
    [
        (ONE, True, ""),
        (TWO, True, ""),
        (replace(TWO, fails=StoreError("no space left")), True, ""),
        (replace(TWO, fails=SyncStopped("an operator comes first")), True, ""),
        (TransportError("timed out"), False, "registry_unreachable"),
        (RegistryRefused("403"), True, "registry_refused"),
    ],
    ids=["nothing new", "a new version", "a full disk", "an operator", "out of reach", "refused"],
)
def test_the_time_of_the_last_question_is_true_however_the_check_ended_and_after_a_restart(
    tmp_path: Path, answer: Offer | EdgeAgentError, reachable: bool, problem: str
) -> None:
    device = make_device(tmp_path, RUNNING)
    assert device.updates.heard.document() == {
        "uri": URI,
        "reachable": None,
        "problem": "",
        "last_check": None,
    }
    device.sync.offers[OWN] = answer
    device.time.now_s = NOW + 5
    step(device)
    for heard in (device.updates.heard, after_a_restart(device)):
        assert heard.document() == {
            "uri": URI,
            "reachable": reachable,
            "problem": problem,
            "last_check": NOW + 5,
        }


def test_a_long_fetch_was_asked_for_when_it_began(tmp_path: Path) -> None:
    device = make_device(tmp_path, RUNNING)
    device.sync.offers[OWN] = TWO
    asked: list[float | None] = []
    device.sync.amid = lambda ref: asked.append(device.updates.heard.asked_at)
    step(device)
    assert asked == [NOW], "not only when it has ended"


def test_a_check_is_written_down_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = make_device(tmp_path, RUNNING)
    device.sync.offers[OWN] = ONE
    writes: list[Path] = []
    write = durable.write_hint

    def counted(path: Path, data: bytes) -> None:
        writes.append(path)
        write(path, data)

    monkeypatch.setattr(durable, "write_hint", counted)
    step(device)
    assert writes.count(device.store.heard_file) == 1


def test_another_registry_has_not_been_asked(tmp_path: Path) -> None:
    device = make_device(tmp_path, RUNNING)
    device.sync.offers[OWN] = ONE
    step(device)
    other = Heard("http://elsewhere", device.store, lambda: NOW)
    assert (other.reachable, other.asked_at) == (None, None)
    assert URI not in device.store.heard_file.read_text(), "nobody looks for its name here"


# --- What waits ----------------------------------------------------------------------------------------


def test_what_waits_is_known_after_a_restart_and_until_it_does_not(tmp_path: Path) -> None:
    device = make_device(tmp_path, RUNNING, link=LinkSettings(windows=("22:00-23:00",)))
    device.sync.offers[OWN] = replace(TWO, rollout="0")
    step(device)
    for heard in (device.updates.heard, after_a_restart(device)):
        hold = heard.hold("assistant", RUNNING, WANTED)
        assert hold and (hold.version, hold.code) == (2, "not_in_rollout")
        assert "rolled out to 0 %" in hold.reason
    device.sync.offers[OWN] = replace(TWO, rollout="100")
    step(device)
    for heard in (device.updates.heard, after_a_restart(device)):
        hold = heard.hold("assistant", RUNNING, WANTED)
        assert hold and (hold.version, hold.code) == (2, "link_held")
    device.updates.check("assistant", asked_for=True, now=True)
    for heard in (device.updates.heard, after_a_restart(device)):
        assert heard.hold("assistant", RUNNING, WANTED) is None


@pytest.mark.parametrize(
    ("state", "wanted", "code", "later_s", "holds"),
    [
        (RUNNING, WANTED, "link_held", 0, True),
        (RUNNING, WANTED, "link_held", 61, False),
        (replace(RUNNING, pinned=ONE.key), Wanted(version=1, via="pin"), "link_held", 0, False),
        (RUNNING, Wanted(version=3, via="desired"), "link_held", 0, False),
        (replace(RUNNING, active=TWO.key), WANTED, "link_held", 0, False),
        (replace(RUNNING, candidate=TWO.key), WANTED, "activation_held", 61, True),
        (RUNNING, WANTED, "activation_held", 0, False),
        (replace(RUNNING, candidate=TWO.key, candidate_tries=1), WANTED, "activation_held", 0, False),
    ],
)
def test_a_version_holds_as_long_as_nothing_has_ended_that(
    state: ModelState, wanted: Wanted, code: str, later_s: float, holds: bool
) -> None:
    hold = Hold.of(replace(WAITING, code=code))
    assert hold.still_holds(state, wanted, NOW + later_s) is holds


@pytest.fixture
def written(tmp_path: Path) -> Callable[[], tuple[Store, Any]]:
    def write() -> tuple[Store, Any]:
        store = Store(tmp_path)
        store.create()
        heard = Heard(URI, store, lambda: NOW)
        heard.note_registry(None)
        heard.note_hold("assistant", WAITING)
        return store, json.loads(store.heard_file.read_text())

    return write


@pytest.mark.parametrize(
    "change",
    [
        lambda document: [],
        lambda document: {**document, "format": 2},
        lambda document: {**document, "registry": "x"},
        lambda document: {"format": 1, "registry": document["registry"], "at": "yesterday", "holds": []},
        lambda document: {**document, "at": float("inf"), "holds": {"../x": document["holds"]["assistant"]}},
        lambda document: {**document, "problem": "no code", "holds": {"assistant": {"version": 1}}},
        lambda document: {
            **document,
            "reachable": 1,
            "holds": {"assistant": {**document["holds"]["assistant"], "held_until": "soon"}},
        },
    ],
)
def test_a_file_that_nobody_here_wrote_says_nothing(
    written: Callable[[], tuple[Store, Any]], change: Callable[[Any], Any]
) -> None:
    store, document = written()
    whole = Heard(URI, store, lambda: NOW)
    assert whole.asked_at == NOW and whole.hold("assistant", RUNNING, WANTED)
    store.heard_file.write_text(json.dumps(change(document)))
    heard = Heard(URI, store, lambda: NOW)
    assert (heard.reachable, heard.asked_at, heard.hold("assistant", RUNNING, WANTED)) == (None, None, None)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b" " * (2 << 20)])
def test_a_damaged_file_says_nothing(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.create()
    store.heard_file.write_bytes(content)
    assert Heard(URI, store, lambda: NOW).asked_at is None


def test_what_cannot_be_written_down_is_known_all_the_same(tmp_path: Path) -> None:
    heard = Heard(URI, Store(tmp_path / "nowhere"), lambda: NOW)
    heard.note_registry(None)
    assert heard.asked_at == NOW
