"""What operators may do to the cache, and what the control socket may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import ActivationHeld, EdgeAgentError, LinkHeld, StoreError, UnknownModel
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings
from edge_agent.updates.heard import Heard
from edge_agent.updates.operations import Operations, inventory, run_operation, without_daemon
from tests.support.committed import commit, fault


@pytest.fixture
def operations(tmp_path: Path) -> Iterator[tuple[Operations, Store]]:
    settings = Settings(
        device_id="dev",
        state_dir=tmp_path / "state",
        control_socket=tmp_path / "c.sock",
        models={"assistant": ModelSettings(uri="models:/phi@prod")},
    )
    found, lifecycles = without_daemon(settings)
    yield found, Store(settings.state_dir)
    for lifecycle in lifecycles.values():
        lifecycle.close()


@pytest.mark.parametrize("role", ["active", "candidate", "pinned"])
def test_what_a_model_needs_is_not_removed(operations: tuple[Operations, Store], role: str) -> None:
    found, store = operations
    record = commit(store, 3)
    states = {
        "active": ModelState(active=record.key),
        "candidate": ModelState(candidate=record.key),
        "pinned": ModelState(pinned=record.key),
    }
    store.change_state("assistant", lambda state: states[role])
    with pytest.raises(StoreError, match=role):
        run_operation(found, "rm", name="assistant", version=3)
    assert store.versions() == [record]


def test_what_nothing_needs_is_removed_and_forgotten(operations: tuple[Operations, Store]) -> None:
    found, store = operations
    record = commit(store, 3)
    store.change_state(
        "assistant", lambda state: replace(state, previous=record.key, quarantined={record.key: fault("x")})
    )
    assert run_operation(found, "rm", name="assistant", version=3)["bytes_freed"] > 0
    assert store.versions() == []
    state = store.state().model("assistant")
    assert (state.previous, dict(state.quarantined)) == (None, {})


def test_a_quarantined_version_that_the_cache_no_longer_has_can_be_forgotten(
    operations: tuple[Operations, Store],
) -> None:
    found, store = operations
    record = commit(store, 3)
    gone, other = "2-aaaaaaaaaaaa", "20-bbbbbbbbbbbb"
    store.change_state(
        "assistant", lambda state: replace(state, quarantined={gone: fault("x"), other: fault("y")})
    )
    document = run_operation(found, "rm", name="assistant", version=2)
    assert (document["bytes_freed"], document["forgotten"]) == (0, [gone])
    assert dict(store.state().model("assistant").quarantined) == {other: fault("y")}
    assert store.versions() == [record]
    with pytest.raises(StoreError, match="not in the cache"):
        run_operation(found, "rm", name="assistant", version=2)


def test_the_record_of_a_version_that_serves_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    record = commit(store, 3)
    store.change_state("assistant", lambda state: state.switched(record.key))
    settings = Settings(
        device_id="dev",
        state_dir=tmp_path / "state",
        control_socket=tmp_path / "c.sock",
        models={"assistant": ModelSettings(uri="models:/phi@prod")},
    )
    _, lifecycles = without_daemon(settings)
    lifecycles["assistant"].adopt(record.key)
    assert store.versions() == [replace(record, served=True)]
    lifecycles["assistant"].close()


@pytest.mark.parametrize("name", ["../../etc", "", "a/b", 7, ["x"], "x" * 65])
@pytest.mark.parametrize("do", ["rm", "export", "activate", "pull", "unpin", "import"])
def test_a_name_that_is_none_is_refused(operations: tuple[Operations, Store], do: str, name: object) -> None:
    with pytest.raises(UnknownModel):
        run_operation(operations[0], do, name=name, version=1)


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.5])
@pytest.mark.parametrize("do", ["rm", "export", "activate", "pin"])
def test_a_version_that_is_none_is_refused(
    operations: tuple[Operations, Store], do: str, version: object
) -> None:
    with pytest.raises(StoreError, match="whole number"):
        run_operation(operations[0], do, name="assistant", version=version)


@pytest.mark.parametrize("value", [True, False, None, "true", 1, ["x"]])
@pytest.mark.parametrize("do", ["pull", "import"])
def test_an_old_package_is_allowed_by_nothing_but_true(
    operations: tuple[Operations, Store], monkeypatch: pytest.MonkeyPatch, do: str, value: object
) -> None:
    asked: list[bool] = []

    def note(*_: object, allow_older: bool, **__: object) -> Any:
        asked.append(allow_older)
        raise StoreError("that is enough")

    monkeypatch.setattr("edge_agent.updates.updates.Updates.check", note)
    monkeypatch.setattr("edge_agent.updates.updates.Updates.take_in", note)
    with pytest.raises(StoreError, match="that is enough"):
        run_operation(operations[0], do, name="assistant", version=None, file=0, allow_older=value)
    assert asked == [value is True]


@pytest.mark.parametrize("value", [True, False, None, "true", 1])
def test_nothing_but_true_is_now(
    operations: tuple[Operations, Store], monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    asked: list[bool] = []

    def note(*_: object, now: bool, **__: object) -> Any:
        asked.append(now)
        raise StoreError("that is enough")

    monkeypatch.setattr("edge_agent.updates.updates.Updates.check", note)
    with pytest.raises(StoreError, match="that is enough"):
        run_operation(operations[0], "pull", name="assistant", version=None, now=value)
    assert asked == [value is True]


WAITS = {
    "event": "waits",
    "model": "assistant",
    "version": 7,
    "digest": "d",
    "missing_bytes": 5,
    "fetched_bytes": 3,
    "mirrored_bytes": 1,
    "reused_bytes": 2,
    "held_until": 1_800_000_000,
    "code": "link_held",
    "reason": "held until 22:00",
}


@pytest.mark.parametrize(
    ("do", "error", "more"),
    [
        ("pull", LinkHeld("held until 22:00"), {"instead": ""}),
        ("pull", ActivationHeld("held until 22:00"), {"instead": ""}),
        ("import", ActivationHeld("held"), {"pinned": None}),
    ],
)
def test_what_must_wait_is_a_result_and_no_failure(
    operations: tuple[Operations, Store],
    monkeypatch: pytest.MonkeyPatch,
    do: str,
    error: Exception,
    more: dict[str, object],
) -> None:
    def hold(*args: Any, on_event: Any = None, **_: object) -> Any:
        (on_event or args[2])(WAITS)
        raise error

    monkeypatch.setattr("edge_agent.updates.updates.Updates.check", hold)
    monkeypatch.setattr("edge_agent.updates.updates.Updates.take_in", hold)
    told: list[Any] = []
    document = run_operation(operations[0], do, name="assistant", version=None, file=0, on_event=told.append)
    assert (document[0] if do == "pull" else document) == {
        "name": "assistant",
        "version": 7,
        "digest": "d",
        "bytes_fetched": 3,
        "bytes_mirrored": 1,
        "bytes_reused": 2,
        "state": "held",
        "code": "link_held",
        "reason": "held until 22:00",
        "missing_bytes": 5,
        "held_until": 1_800_000_000,
        **more,
    }
    assert told == [WAITS]


@pytest.mark.parametrize("do", ["import", "export"])
def test_without_a_file_there_is_nothing_to_read_or_write(
    operations: tuple[Operations, Store], do: str
) -> None:
    found, store = operations
    commit(store, 1)
    with pytest.raises(EdgeAgentError, match="no file was given"):
        run_operation(found, do, name="assistant", version=1)


# --- What is in the cache -------------------------------------------------------------------------------


def test_the_inventory_has_each_model_with_its_versions_and_what_keeps_it(
    operations: tuple[Operations, Store],
) -> None:
    found, store = operations
    records = [commit(store, version) for version in (3, 4)]
    store.change_state(
        "assistant", lambda state: replace(state, active=records[0].key, pinned=records[0].key)
    )
    (model,) = run_operation(found, "list", name=None, version=None)
    assert (model["name"], model["uri"]) == ("assistant", "models:/phi@prod")
    assert (model["pinned"], model["wanted"]) == (records[0].key, {"version": 3, "via": "pin"})
    seen = [(version["version"], version["state"], version["pinned"]) for version in model["versions"]]
    assert seen == [(3, "active", True), (4, "cached", False)]


def test_a_model_that_the_settings_lost_is_in_the_inventory_after_the_others(tmp_path: Path) -> None:
    settings = Settings(
        device_id="dev",
        state_dir=tmp_path / "state",
        control_socket=tmp_path / "c.sock",
        models={"other": ModelSettings(uri="models:/phi/7")},
    )
    store = Store(settings.state_dir)
    commit(store, 3)
    empty, lost = inventory(settings, store, Heard("", store, lambda: 0.0))
    assert (empty["name"], empty["versions"], empty["wanted"]) == (
        "other",
        [],
        {"version": 7, "via": "alias"},
    )
    assert (lost["name"], lost["uri"], lost["wanted"], lost["held"]) == ("assistant", None, None, None)
    assert [version["version"] for version in lost["versions"]] == [3]
