"""A version that is here already: known by what its tag promises, and kept only where `bring` would keep it, too."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.staging import folder_of
from edge_agent.cache.store import Store
from edge_agent.errors import CannotRun, PolicyError
from edge_agent.package import trust
from edge_agent.package.manifest import MANIFEST_NAME, ManifestFile
from edge_agent.package.reference import MANIFEST_TAG, ModelVersion
from edge_agent.package.trust import Rule
from edge_agent.runner import capability
from edge_agent.sync.in_cache import already_here
from edge_agent.sync.protocol import RegistryJob, SyncJob, TrustJob
from tests.support.committed import DECISION, make_record
from tests.support.packages import GENAI_CONFIG, WEIGHTS, make_package, manifest_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state")
    store.create()
    return store


@pytest.fixture
def record(store: Store) -> VersionRecord:
    """Version 7 of `phi`, published: its manifest is a file of it."""
    tree = store.staging_root / "assistant-7" / "tree"
    make_package(tree, trust.WRAPPER)
    manifest = manifest_of(tree, "phi")
    data = manifest.encode()
    (tree / MANIFEST_NAME).write_bytes(data)
    attached = ManifestFile(path=MANIFEST_NAME, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    made = replace(make_record(manifest, 7), attached=(attached,))
    with store.lock():
        store.commit(made, tree)
    return made


def job_of(store: Store, *, running: str = "", policy: TrustJob | None = None) -> SyncJob:
    return SyncJob(
        state_dir=str(store.root.parent),
        registry=RegistryJob(uri="http://nobody.asks"),
        name="assistant",
        ref="models:/phi@prod",
        check_host=True,
        running=running,
        trust=policy or TrustJob(),
    )


def promised(record: VersionRecord, **changes: object) -> ModelVersion:
    digest = next(file.sha256 for file in record.attached if file.path == MANIFEST_NAME)
    version = ModelVersion(
        name="phi", version=7, run_id="another", source="elsewhere:/x", tags={MANIFEST_TAG: digest}
    )
    return replace(version, **changes)  # type: ignore[arg-type]


def test_a_version_that_runs_and_is_promised_is_kept(store: Store, record: VersionRecord) -> None:
    result = already_here(job_of(store, running=record.key), promised(record))
    assert result is not None
    assert (result.key, result.new, result.bytes_fetched) == (record.key, False, 0)
    assert result.bytes_reused == record.total_bytes


def test_what_a_dead_process_left_of_it_is_removed(store: Store, record: VersionRecord) -> None:
    left = folder_of(store, "assistant", 7)
    left.mkdir(parents=True, exist_ok=True)
    (left / "weights.part").touch()
    assert already_here(job_of(store, running=record.key), promised(record))
    assert not left.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"tags": {}},
        {"tags": {MANIFEST_TAG: ""}},
        {"tags": {MANIFEST_TAG: "a" * 64}},
        {"version": 8},
        {"name": "other"},
    ],
    ids=["no tag", "an empty one", "another manifest", "another number", "another model"],
)
def test_anything_else_is_asked_about(
    store: Store, record: VersionRecord, changes: dict[str, object]
) -> None:
    assert already_here(job_of(store, running=record.key), promised(record, **changes)) is None


def test_a_version_without_a_manifest_of_its_own_is_known_by_its_listing_only(store: Store) -> None:
    tree = store.staging_root / "assistant-7" / "tree"
    made = make_record(manifest_of(make_package(tree, trust.WRAPPER), "phi"), 7)
    with store.lock():
        store.commit(made, tree)
    version = ModelVersion(
        name="phi", version=7, run_id="", source="file:///x", tags={MANIFEST_TAG: made.digest}
    )
    assert already_here(job_of(store, running=made.key), version) is None


def test_of_another_model_here_it_is_not_here(store: Store, record: VersionRecord) -> None:
    assert already_here(replace(job_of(store, running=record.key), name="second"), promised(record)) is None


@pytest.mark.parametrize("damage", ["shorter", "no link", "no blob", "stray", "gone"])
def test_a_damaged_version_is_brought_again(store: Store, record: VersionRecord, damage: str) -> None:
    file = store.folder(record) / WEIGHTS
    if damage in ("shorter", "no link"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-1] if damage == "shorter" else content)
    elif damage == "no blob":
        store.blob(next(each.sha256 for each in record.files if each.path == WEIGHTS)).unlink()
    elif damage == "stray":
        (store.folder(record) / "more").touch()
    else:
        file.unlink()
    assert already_here(job_of(store, running=record.key), promised(record)) is None


def test_settings_that_became_stricter_hold(store: Store, record: VersionRecord) -> None:
    unsigned = replace(DECISION, rule=Rule.UNSIGNED_CODE_ALLOWED, unsigned_code=True)
    with store.lock():
        store.rewrite(replace(record, trust=unsigned))
    result = already_here(job_of(store, running=record.key), promised(record))
    assert result is not None, "its only code is the shipped wrapper: judged again, and allowed for that"
    again = store.record("assistant", record.key)
    assert again is not None and again.trust.rule == Rule.SHIPPED_WRAPPER
    key = store.root.parent / "key.pem"
    key.touch()
    signed_only = TrustJob(public_keys=(str(key),))
    with pytest.raises(PolicyError, match="not signed"):
        already_here(job_of(store, running=record.key, policy=signed_only), promised(record))


def test_a_version_that_does_not_run_yet_is_held_against_this_host(
    store: Store, record: VersionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capability, "problem", lambda needs, **_: "no such library")
    assert already_here(job_of(store, running=record.key), promised(record)), "what runs here can run here"
    with pytest.raises(CannotRun, match="no such library"):
        already_here(job_of(store), promised(record))


def test_what_a_bad_disk_says_of_a_version_is_not_believed(
    store: Store, record: VersionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capability, "problem", lambda needs, **_: "")
    assert already_here(job_of(store), promised(record))
    file = store.folder(record) / GENAI_CONFIG
    file.chmod(0o644)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"{", b"[", 1))
    assert len(content) == file.stat().st_size, "sizes and links are as they were"
    assert already_here(job_of(store), promised(record)) is None
