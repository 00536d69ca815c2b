"""Versions that come as a file, and versions in the cache that are damaged: whose they are, and what runs then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.fsck import Damage
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import CannotRun, ContentError, TransportError, UnknownModel
from edge_agent.serving.seat import Serving
from edge_agent.settings.model import ModelSettings
from edge_agent.sync import version_file
from edge_agent.sync.protocol import SyncResult
from tests.support.committed import commit
from tests.support.packages import WEIGHTS
from tests.support.scripted_sync import Offer
from tests.support.scripted_updates import FALLBACK, OWN, UpdatingDevice, make_device


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 of `phi`, as a file."""
    folder = tmp_path_factory.mktemp("elsewhere")
    store = Store(folder / "state")
    store.create()
    path = folder / "phi-1.model"
    with path.open("wb") as out:
        version_file.export_version(store, commit(store, 1), out.fileno())
    return path


def take_in(
    device: UpdatingDevice, file: Path, name: str | None = None, *, allow_older: bool = False
) -> SyncResult:
    device.sync.offers.setdefault("models:/phi/1", Offer(version=1))
    with file.open("rb") as stream:
        return device.updates.take_in(stream.fileno(), name=name, allow_older=allow_older)


# --- Files ---------------------------------------------------------------------------------------------


def test_an_imported_version_is_adopted_like_an_update(tmp_path: Path, file: Path) -> None:
    device = make_device(tmp_path, registry="")
    result = take_in(device, file)
    assert device.lifecycle.adopted == [(result.key, True, "")]
    (job,) = device.sync.jobs
    assert (job.ref, job.registry.uri, job.fallback) == ("models:/phi/1", version_file.ORIGIN, False)
    assert (job.version_file is None, job.quarantined) == (False, ())
    assert device.updates.heard.reachable is None, "no registry was asked"


def test_an_operator_may_allow_an_old_package_in_a_file(tmp_path: Path, file: Path) -> None:
    device = make_device(tmp_path, registry="")
    take_in(device, file)
    take_in(device, file, allow_older=True)
    assert [job.allow_older for job in device.sync.jobs] == [False, True]


@pytest.mark.parametrize(
    ("state", "active"),
    [
        (ModelState(active="7-bbbbbbbbbbbb", pinned="7-bbbbbbbbbbbb"), "7-bbbbbbbbbbbb"),
        (ModelState(active="7-bbbbbbbbbbbb", desired="models:/phi/7"), "7-bbbbbbbbbbbb"),
        (ModelState(active="7-bbbbbbbbbbbb", desired="models:/phi/1"), "1-aaaaaaaaaaaa"),
    ],
    ids=["another is pinned", "another is asked for by its number", "it is asked for by its number"],
)
def test_an_imported_version_is_only_kept_where_another_one_is_wanted(
    tmp_path: Path, file: Path, state: ModelState, active: str
) -> None:
    device = make_device(tmp_path, state)
    assert take_in(device, file).version == 1
    assert device.lifecycle.state.active == active


@pytest.mark.parametrize(
    ("state", "instead"),
    [
        (ModelState(), "no version of its own runs here"),
        (ModelState(active="7-bbbbbbbbbbbb"), ""),
        (ModelState(pinned="7-bbbbbbbbbbbb"), ""),
    ],
    ids=["nothing runs", "its own runs", "another is pinned"],
)
def test_an_imported_fallback_runs_only_where_nothing_of_its_own_does(
    tmp_path: Path, file: Path, state: ModelState, instead: str
) -> None:
    models = {"assistant": ModelSettings(uri=FALLBACK, fallback=OWN)}
    device = make_device(tmp_path, state, models=models)
    key = take_in(device, file).key
    assert device.sync.jobs[0].fallback
    assert device.lifecycle.adopted == ([(key, False, instead)] if instead else [])


def test_several_models_that_follow_the_files_are_told_apart_by_name(tmp_path: Path, file: Path) -> None:
    models = {
        "follows": ModelSettings(uri=OWN),
        "falls-back": ModelSettings(uri=FALLBACK, fallback=OWN),
        "other": ModelSettings(uri=FALLBACK),
    }
    device = make_device(tmp_path, models=models)
    with pytest.raises(UnknownModel, match=r"2 models here follow that.*choose with --model"):
        take_in(device, file)
    with pytest.raises(UnknownModel, match=r"'other' follows another model; there are: follows \("):
        take_in(device, file, "other")
    assert device.sync.jobs == []
    take_in(device, file, "falls-back")
    assert [name for name, life in device.lifecycles.items() if life.adopted] == ["falls-back"]


def test_a_file_that_no_model_follows_says_what_to_configure(tmp_path: Path, file: Path) -> None:
    device = make_device(tmp_path, models={"other": ModelSettings(uri=FALLBACK)})
    with pytest.raises(UnknownModel, match=r"0 models here follow that.*add a \[models\.NAME\] table"):
        take_in(device, file)


def test_what_is_desired_now_decides_whose_a_file_is(tmp_path: Path, file: Path) -> None:
    models = {"assistant": ModelSettings(uri=FALLBACK)}
    device = make_device(tmp_path, ModelState(desired=OWN), models=models)
    take_in(device, file)
    assert len(device.lifecycle.adopted) == 1


def test_a_version_from_a_file_that_the_gate_refuses_is_refused(tmp_path: Path, file: Path) -> None:
    device = make_device(tmp_path, ModelState(active="7-bbbbbbbbbbbb"), fallback=FALLBACK)
    device.lifecycle.refusals = {"1-aaaaaaaaaaaa": CannotRun("no library")}
    with pytest.raises(CannotRun):
        take_in(device, file)
    assert device.lifecycle.state.active == "7-bbbbbbbbbbbb"
    assert device.sync.refs == ["models:/phi/1"]


def test_a_file_of_something_else_is_refused_before_anybody_waits(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(b"no version at all")
    with pytest.raises(ContentError):
        take_in(device, other)
    assert device.sync.jobs == []


# --- Repair --------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[UpdatingDevice, VersionRecord]:
    """Two models, each with an active version; a blob of the first one's is gone."""
    models = {"first": ModelSettings(uri=OWN, fallback=FALLBACK), "second": ModelSettings(uri=OWN)}
    device = make_device(tmp_path, models=models)
    for name, version in (("first", 1), ("second", 2)):
        record = commit(device.store, version, name=name, weights=name.encode() * 1_000)
        device.lifecycles[name].state = ModelState(active=record.key)
    (record,) = device.store.versions("first")
    overwrite_weights(device.store, record)
    device.sync.offers[OWN] = Offer(version=1, new=False)
    return device, record


def overwrite_weights(store: Store, record: VersionRecord, content: bytes = b"other") -> None:
    (weights,) = (file for file in record.files if file.path == WEIGHTS)
    blob = store.blob(weights.sha256)
    blob.chmod(0o644)
    blob.write_bytes(content)


def found(device: UpdatingDevice) -> tuple[Damage, ...]:
    return fsck.verify(device.store).damaged


def test_repair_fetches_and_loads_again_what_was_damaged_and_nothing_else(
    damaged: tuple[UpdatingDevice, VersionRecord],
) -> None:
    device, _ = damaged
    assert device.updates.repair(found(device)) == {}
    assert [job.name for job in device.sync.jobs] == ["first"]
    assert [life.reloads for life in device.lifecycles.values()] == [1, 0]
    assert device.lifecycles["first"].adopted == []
    assert list(device.store.damaged_root.iterdir()), "it is set aside"


def test_repair_leaves_alone_what_is_whole_again(damaged: tuple[UpdatingDevice, VersionRecord]) -> None:
    device, record = damaged
    damage = found(device)
    overwrite_weights(device.store, record, b"first" * 1_000)
    assert found(device) == ()
    assert device.updates.repair(damage) == {}
    assert (device.sync.jobs, device.lifecycles["first"].reloads) == ([], 0)


def test_a_damaged_version_that_is_not_the_active_one_costs_no_reload(
    damaged: tuple[UpdatingDevice, VersionRecord],
) -> None:
    device, _ = damaged
    device.lifecycles["first"].state = ModelState(active="7-bbbbbbbbbbbb")
    device.updates.repair(found(device))
    assert (len(device.sync.jobs), device.lifecycles["first"].reloads) == (1, 0)


def test_repair_fetches_the_fallback_again_where_it_runs(
    damaged: tuple[UpdatingDevice, VersionRecord],
) -> None:
    device, record = damaged
    device.lifecycles["first"].state = ModelState(active=record.key, instead="no library")
    device.sync.offers[FALLBACK] = Offer(version=1, new=False)
    device.updates.repair(found(device))
    assert [(job.ref, job.fallback) for job in device.sync.jobs] == [(FALLBACK, True)]


def test_what_cannot_be_fetched_again_is_told_and_gives_way(
    damaged: tuple[UpdatingDevice, VersionRecord],
) -> None:
    device, _ = damaged
    device.sync.offers[OWN] = TransportError("timed out")
    assert device.updates.repair(found(device)) == {"first": "timed out"}
    assert device.lifecycles["first"].reloads == 1


def test_after_a_repair_all_models_are_checked(damaged: tuple[UpdatingDevice, VersionRecord]) -> None:
    device, _ = damaged
    device.updates.step(0)
    device.updates.step(1)
    device.sync.jobs.clear()
    device.updates.repair(found(device))
    device.updates.step(2)
    assert [job.name for job in device.sync.jobs] == ["first", "first", "second"]


def test_without_a_registry_repair_sets_aside_and_loads_again(tmp_path: Path) -> None:
    device = make_device(tmp_path, registry="")
    record = commit(device.store, 1)
    device.lifecycle.state = ModelState(active=record.key)
    overwrite_weights(device.store, record)
    assert device.updates.repair(found(device)) == {}
    assert (device.sync.jobs, device.lifecycle.reloads) == ([], 1)


# --- What is in the cache already ----------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path) -> tuple[UpdatingDevice, VersionRecord]:
    """No registry; an own version that this host lacks something for, and one of the fallback."""
    device = make_device(tmp_path, registry="", fallback=FALLBACK)
    record = replace(commit(device.store, 9), fallback=True)
    device.lifecycle.on_disk, device.lifecycle.fallback = "1-aaaaaaaaaaaa", record
    device.lifecycle.refusals = {"1-aaaaaaaaaaaa": CannotRun("no library")}
    return device, record


def test_a_cached_fallback_runs_where_the_cached_version_cannot(
    cached: tuple[UpdatingDevice, VersionRecord],
) -> None:
    device, record = cached
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.lifecycle.instead) == (record.key, "no library")


def test_a_cached_fallback_does_not_replace_a_version_that_runs(
    cached: tuple[UpdatingDevice, VersionRecord],
) -> None:
    device, _ = cached
    device.lifecycle.state = ModelState(active="7-bbbbbbbbbbbb")
    device.lifecycle.serving = Serving.READY
    device.updates.step(0)
    assert (device.lifecycle.state.active, device.problem) == ("7-bbbbbbbbbbbb", "no library")
