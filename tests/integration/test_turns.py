"""Who waits for whom: polls that hang in a slow registry, and operators who have something more urgent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import ContentError
from edge_agent.serving.lifecycle import ModelLifecycle, budget_of, lifecycles_of
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.updates.operations import Operations, run_operation
from edge_agent.updates.updates import Updates
from tests.support.packages import WEIGHTS
from tests.support.processes import wait_until
from tests.support.version_files import bring_in, export

_LIMIT_S = 60.0


@dataclass
class Device:
    """One model with an active version that nobody has loaded, and the file that it came from.

    Attributes:
        registry: takes connections and answers none.
        events: what operators were told.
        asked: its connections, kept open.
    """

    store: Store
    record: VersionRecord
    file: Path
    registry: socket.socket
    updates: Updates
    lifecycle: ModelLifecycle
    operations: Operations
    events: list[Mapping[str, Any]] = field(default_factory=list)
    asked: list[socket.socket] = field(default_factory=list)

    def do(self, what: str, on_event: Callable[[Mapping[str, Any]], None] | None = None) -> Any:
        with self.file.open("rb") as file:
            return run_operation(
                self.operations,
                what,
                name=None,
                version=None,
                file=file.fileno(),
                on_event=on_event or self.events.append,
            )

    def in_background(self, what: Callable[[], Any]) -> Callable[[], Any]:
        """Starts it; the result's function waits for its end, not for ever, and gives what came of it."""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(what())
            except BaseException as error:  # noqa: BLE001 - it is looked at where it is waited for
                results.append(error)

        threading.Thread(target=run, daemon=True).start()
        return lambda: (wait_until(lambda: results, _LIMIT_S, "the end of the operation"), results[0])[1]

    def poll_hangs(self) -> None:
        """Returns when a sync process waits for the registry's answer."""
        self.asked.append(self.registry.accept()[0])


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    exported = export(tmp_path / "elsewhere")
    with closing(socket.create_server(("127.0.0.1", 0))) as registry:
        registry.settimeout(_LIMIT_S)
        settings = Settings(
            device_id="dev",
            state_dir=tmp_path / "state",
            control_socket=tmp_path / "c.sock",
            registry=RegistrySettings(
                uri=f"http://127.0.0.1:{registry.getsockname()[1]}", timeout_s=2 * _LIMIT_S
            ),
            models={"assistant": ModelSettings(uri="models:/phi@prod", preload=False)},
        )
        store = Store(settings.state_dir)
        record = bring_in(store, exported.file)
        store.change_state("assistant", lambda state: state.switched(record.key))
        lifecycles = lifecycles_of(settings, store, budget_of(settings, store))
        updates = Updates(settings, store, lifecycles)
        made = Device(
            store=store,
            record=record,
            file=exported.file,
            registry=registry,
            updates=updates,
            lifecycle=lifecycles["assistant"],
            operations=Operations(settings, store, lifecycles, updates),
        )
        yield made
        updates.close()
        lifecycles["assistant"].close()
        for connection in made.asked:
            connection.close()


@pytest.fixture
def polling(device: Device) -> Iterator[Device]:
    device.updates.check_now()
    ended = device.in_background(device.updates.run)
    device.poll_hangs()
    yield device
    device.updates.close()
    ended()


def test_an_update_and_a_verify_that_found_damage_never_wait_for_each_other(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.registry.close()  # what verify cannot fetch again, the import brings
    (weights,) = (file for file in device.record.files if file.path == WEIGHTS)
    device.store.blob(weights.sha256).unlink()
    has_looked, import_has_turn = threading.Event(), threading.Event()
    repair = device.updates.repair

    def repair_later(*arguments: Any, **options: Any) -> Any:
        """Verify knows of the damage, and asks for its turn when the import has it."""
        has_looked.set()
        assert import_has_turn.wait(_LIMIT_S)
        return repair(*arguments, **options)

    monkeypatch.setattr(device.updates, "repair", repair_later)
    verify = device.in_background(lambda: device.do("verify"))
    assert has_looked.wait(_LIMIT_S)

    def amid(event: Mapping[str, Any]) -> None:
        """The import has its turn, and goes on when verify waits for it, whatever verify has taken already."""
        if not import_has_turn.is_set():
            import_has_turn.set()
            wait_until(lambda: device.events or device.lifecycle.serving is Serving.LOADING, _LIMIT_S)

    imported = device.in_background(lambda: device.do("import", amid))
    assert imported()["state"] == "active"
    document = verify()
    assert device.events == [{"event": "waiting", "for": "`models import`"}]
    assert (document["damaged"], len(document["repaired"])) == ([], 1)


def test_an_import_ends_the_check_that_is_in_its_way_and_the_check_comes_back(polling: Device) -> None:
    assert polling.in_background(lambda: polling.do("import"))()["state"] == "active"
    assert polling.events == [{"event": "waiting", "for": "the check of assistant"}]
    polling.poll_hangs()
    assert (polling.updates.problems, polling.updates.heard.reachable) == ({}, None), "nobody failed"


def test_a_file_that_is_no_bundle_is_refused_at_once_and_ends_no_check(polling: Device) -> None:
    polling.file.write_bytes(b"no bundle at all")
    error = polling.in_background(lambda: polling.do("import"))()
    assert isinstance(error, ContentError)
    assert polling.events == []


def test_a_changed_desired_state_ends_the_check_of_the_former_one(polling: Device) -> None:
    polling.updates.desire({"assistant": "models:/phi/6"})
    polling.poll_hangs()
    assert polling.store.state().model("assistant").desired == "models:/phi/6"
    assert (polling.updates.problems, polling.updates.heard.reachable) == ({}, None)
