"""Power loss on the whole daemon: killed with all its processes at a change of its cache, and started again.

At each point two folders are started from: what the killed processes leave, and what a disk leaves that kept only
what was synced. What the cache does at every single point is in `tests/integration/test_powerloss.py`; here are the
real daemon, its real sync, runners and registry. The default run takes four points, `./build.sh long-test` the other
six of those that matter most, `./build.sh powerloss` all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.store import Store
from edge_agent.publishing import publish_folder
from edge_agent.transport import control
from tests.support.faulty_daemon import FaultyDaemon, Point
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.power import EVERYTHING, Call
from tests.support.processes import Daemon, short_folder, wait_until
from tests.support.sample_device import settings_for
from tests.support.state_folder import mark

MODEL = "powerloss"
SPAIN = "What is the capital of Spain?"
ANSWERS = {1: "The capital of Spain is Madrid.", 2: "The capital of Spain is Kathmandu."}

PARTS, VERSIONS = "models/staging/assistant-2/parts", "models/versions/assistant"
TEN = {
    "before the first byte": Point("open", rf"{PARTS}/\w+\.part"),
    "in a file": Point("fsync", rf"{PARTS}/\w+\.part"),
    "a file is whole": Point("rename", rf"{PARTS}/\w+", 2),
    "the first blob gets its name": Point("link", r"models/blobs/sha256/\w+"),
    "the tree gets its name": Point("rename", rf"{VERSIONS}/2-\w+"),
    "the commit": Point("rename", rf"{VERSIONS}/2-\w+\.json"),
    "the commit is not on the medium": Point("fsync", VERSIONS, 2),
    "the candidate is written down": Point("rename", r"models/state\.json"),
    "the candidate is loaded": Point("utime", rf"{VERSIONS}/2-\w+\.json"),
    "the switch": Point("rename", r"models/state\.json", 2),
}
FOUR = ("in a file", "the first blob gets its name", "the commit", "the switch")


@dataclass
class Tried:
    """What was started from so far.

    Attributes:
        killed: points at which all processes were killed.
        dropped: points at which the power was cut, too.
        folders: marks of the caches that these cuts left; one that is among them is not started from again.
    """

    killed: int = 0
    dropped: int = 0
    folders: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.killed} killed, {self.dropped} dropped in {len(self.folders)} folders"


@dataclass(frozen=True)
class Before:
    """A device with version 1, for which version 2 waits in the registry."""

    state: Path
    settings: dict[str, Any]

    @property
    def idle(self) -> dict[str, Any]:
        """Settings with which version 1 is active and need not be loaded for an update."""
        return {
            **self.settings,
            "models": {"assistant": {**self.settings["models"]["assistant"], "preload": False}},
        }


@pytest.fixture(scope="module")
def before(
    broker: Broker, mlflow_server: Server, sample_model: Path, swapped_model: Path
) -> Iterator[Before]:
    with short_folder() as folder:
        publish_folder(sample_model, name=MODEL, registry_uri=mlflow_server.uri, alias="prod")
        document = settings(broker, mlflow_server)
        daemon = Daemon(folder, document)
        pulled = daemon.cli("models", "pull", timeout_s=120)
        daemon.close()
        assert pulled.returncode == 0, pulled.stderr
        publish_folder(swapped_model, name=MODEL, registry_uri=mlflow_server.uri, alias="prod")
        yield Before(daemon.state_dir, document)


def settings(broker: Broker, server: Server) -> dict[str, Any]:
    document = settings_for(broker, server.uri, device="powerloss", inference={"threads": 1})
    document["models"] = {"assistant": {"uri": f"models:/{MODEL}@prod"}}
    document["registry"]["poll_interval_s"] = (
        5  # the first poll of a device with a model comes within one interval
    )
    return document


def model_of(daemon: Daemon) -> dict[str, Any]:
    (event,) = control.call(daemon.control_socket, "status", timeout_s=60)
    model: dict[str, Any] = event["status"]["models"][0]
    return model


def wait_for_version(daemon: Daemon, version: int) -> None:
    def active() -> bool:
        model = model_of(daemon)
        return bool(model["version"] == version and model["state"] == "ready")

    try:
        wait_until(active, 90, f"version {version}")
    except TimeoutError as error:
        raise AssertionError(f"{error}: {model_of(daemon)}\n{daemon.log}") from error


def ask(daemon: Daemon) -> tuple[int, str]:
    *_, last = control.call(daemon.control_socket, "probe", timeout_s=90, text=SPAIN)
    assert last["event"] == "done", last
    return int(last["version"]), last["answer"]["choices"][0]["message"]["content"]


def check_nothing_unverified(state: Path) -> None:
    """What has a final name has the bytes that its name or its record says."""
    store = Store(state)
    for blob in store.blobs.iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert fsck.verify(store).damaged == ()
    assert {record.key for record in store.versions()} == {file.stem for file in store.record_files()}
    assert not store.state().rebuilt


@pytest.fixture(scope="module")
def tried() -> Tried:
    return Tried()


def cut_and_start_again(before: Before, point: Point, tried: Tried) -> None:
    """Stops the daemon at the point of its update, and goes on from both folders that this may leave."""
    with short_folder() as folder:
        daemon = FaultyDaemon(folder, before.idle, state=before.state)
        try:
            daemon.stop_at(point)
            daemon.start()
            try:
                daemon.wait_fired(90)
            except TimeoutError as error:
                raise AssertionError(f"{point} did not fire; log:\n{daemon.log}") from error
            daemon.cut_power()
            daemon.write_dropped(folder / "dropped")
            finish_the_update(daemon, before)
            tried.killed += 1
        finally:
            daemon.close()
        folder_mark = mark(folder / "dropped" / "models", of_any_run=True)
        if folder_mark not in tried.folders:
            tried.folders.add(folder_mark)
            go_on_from(folder / "dropped", before)
        tried.dropped += 1


def go_on_from(dropped: Path, before: Before) -> None:
    with short_folder() as folder:
        daemon = FaultyDaemon(folder, before.settings, state=dropped)
        try:
            finish_the_update(daemon, before)
        finally:
            daemon.close()


def finish_the_update(daemon: FaultyDaemon, before: Before) -> None:
    """After the cut nothing is wrong; then the daemon answers, the update comes to its end, and stays."""
    check_nothing_unverified(daemon.state_dir)
    daemon.stop_at(None)
    daemon.config["models"] = before.settings["models"]
    daemon.start()
    version, text = ask(daemon)
    assert text == ANSWERS[version]
    wait_for_version(daemon, 2)
    assert ask(daemon) == (2, ANSWERS[2])
    check_nothing_unverified(daemon.state_dir)
    check_it_stays(daemon)


def check_it_stays(daemon: FaultyDaemon) -> None:
    """The version that answered is the active one after a power cut, too."""
    daemon.cut_power()
    assert not daemon.medium.trouble, daemon.medium.trouble
    assert daemon.medium.synced["."], "nobody told the medium that state.json was written"
    dropped = daemon.folder / "stays"
    daemon.write_dropped(dropped)
    check_nothing_unverified(dropped)
    active = Store(dropped).state().model("assistant").active
    assert active and active.startswith("2-"), f"version 2 answered, and after a power cut {active} is active"
    assert Store(dropped).record("assistant", active), f"{active} is active, and its record is gone"


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, id=name, marks=[] if name in FOUR else [pytest.mark.long])
        for name, point in TEN.items()
    ],
)
def test_cut_off_at_a_change_the_daemon_answers_again_and_finishes_its_update(
    before: Before, point: Point, tried: Tried, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_and_start_again(before, point, tried)
    with capsys.disabled():
        print(f"\nso far {tried}", end="")


if EVERYTHING in os.environ:

    def test_cut_off_at_any_change_the_daemon_answers_again_and_finishes_its_update(
        before: Before, capsys: pytest.CaptureFixture[str]
    ) -> None:
        points, tried = all_points(before), Tried()
        wrong = []
        for number, point in enumerate(points):
            with capsys.disabled():
                print(f"\n{number + 1} of {len(points)}: {point}; so far {tried}", end="", flush=True)
            try:
                cut_and_start_again(before, point, tried)
            except AssertionError as error:
                wrong.append(f"{point}: {error}")
        assert not wrong, "\n".join(wrong)
        assert tried.killed == tried.dropped == len(points)


def all_points(before: Before) -> list[Point]:
    """Every change that an undisturbed update makes, from the start to its end. Of the writes into one part only
    the first two are taken: how many there are, the network decides.
    """
    with short_folder() as folder:
        daemon = FaultyDaemon(folder, before.idle, state=before.state)
        try:
            daemon.stop_at(None)
            daemon.start()
            wait_for_version(daemon, 2)
            check_it_stays(daemon)
        finally:
            daemon.close()
        seen, points = Counter[Call](), []
        for call in daemon.calls():
            seen[call] += 1
            if not (call.name == "write" and call.path.endswith(".part") and seen[call] > 2):
                points.append(Point(call.name, re.escape(call.path), seen[call]))
    assert len(points) > 50
    return points
