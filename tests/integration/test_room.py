"""Room for the next version: what is in its way and nobody needs, goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent.cache.staging import folder_of, staging
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError
from edge_agent.package import trust
from edge_agent.package.reference import MANIFEST_TAG, ModelVersion
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings
from edge_agent.sync.bring import bring
from edge_agent.sync.files import LocalPackage
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, SyncResult
from edge_agent.updates.operations import run_operation, without_daemon
from tests.support.committed import commit
from tests.support.packages import add_manifest, make_package

_PART_BYTES = 3_000_000
_WEIGHTS_BYTES = 2_000_000
_ROOM_BYTES = 4_000_000
"""Beside version 1: enough for version 3, but not with the part of version 2."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Version 1 is active; of version 2, and of another model, a part was fetched."""
    store = Store(tmp_path / "state")
    store.create()
    active = commit(store, 1)
    store.change_state("assistant", lambda state: state.switched(active.key))
    for name, version, size_bytes in (
        ("assistant", 2, _PART_BYTES),
        ("assistant-2", 2, 100),
        ("assistant", 3, 100),
    ):
        part = folder_of(store, name, version) / "parts" / f"{'a' * 64}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"p" * size_bytes)
    return store


def bring_version_3(store: Store, folder: Path) -> SyncResult:
    package = make_package(folder / "package", trust.WRAPPER, weights=os.urandom(_WEIGHTS_BYTES))
    tags = {MANIFEST_TAG: add_manifest(package, "phi")}
    committed_bytes = sum(record.total_bytes for record in store.versions())
    job = SyncJob(
        state_dir=str(store.root.parent),
        registry=RegistryJob(uri="sqlite:///registry.db"),
        name="assistant",
        ref="models:/phi/3",
        cache=CacheJob(quota_bytes=committed_bytes + _ROOM_BYTES, min_free_bytes=0),
    )
    version = ModelVersion(name="phi", version=3, run_id="", source=package.as_uri(), tags=tags)
    return bring(job, version, LocalPackage(package), lambda event: None)


def partly_fetched(store: Store) -> list[str]:
    return sorted(folder.name for folder in store.staging_root.iterdir())


def test_a_superseded_download_goes_when_the_next_version_needs_its_room(
    store: Store, tmp_path: Path
) -> None:
    assert bring_version_3(store, tmp_path).new
    assert partly_fetched(store) == ["assistant-2-2"], "another model's, with a name like it, stays"


def test_a_download_that_goes_on_now_stays_whatever_needs_its_room(store: Store, tmp_path: Path) -> None:
    with staging(store, "assistant", 2), pytest.raises(StoreError, match="do not fit"):
        bring_version_3(store, tmp_path)
    assert "assistant-2" in partly_fetched(store)


def test_prune_removes_downloads_in_part_but_for_the_one_that_goes_on_now(
    store: Store, tmp_path: Path
) -> None:
    settings = Settings(
        device_id="dev",
        state_dir=tmp_path / "state",
        control_socket=tmp_path / "c.sock",
        models={"assistant": ModelSettings(uri="models:/phi@prod")},
    )
    operations, lifecycles = without_daemon(settings)
    with staging(store, "assistant", 3):
        document = run_operation(operations, "prune", name=None, version=None)
        assert document["bytes_freed"] >= _PART_BYTES
        assert partly_fetched(store) == ["assistant-3"]
    for lifecycle in lifecycles.values():
        lifecycle.close()
