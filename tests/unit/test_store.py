"""The cache on disk: commits, crashes between steps, damage, state, room."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache import disk, durable, eviction, fsck
from edge_agent.cache import record as records
from edge_agent.cache import state as states
from edge_agent.cache.locks import Lock
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import CacheState, ModelState
from edge_agent.cache.store import Store
from edge_agent.cache.verify import check_file
from edge_agent.errors import CacheBusy, StoreError, VerificationError
from edge_agent.package import manifest as manifests
from edge_agent.package.manifest import MANIFEST_NAME, Manifest, ManifestFile
from edge_agent.serving.standing import VersionStates
from tests.support.committed import commit, fault, make_record
from tests.support.packages import WEIGHTS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state")
    store.create()
    return store


def test_a_committed_version_is_found_whole_and_read_only(store: Store) -> None:
    record = commit(store, 3)
    assert store.versions() == [record]
    assert store.record("assistant", record.key) == record
    assert record.key.startswith("3-")
    assert fsck.verify(store).damaged == ()
    for file in record.files:
        path = store.folder(record) / file.path
        assert path.samefile(store.blob(file.sha256))
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    for folder in (store.root, store.blobs, store.folder(record).parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_two_versions_share_the_blobs_that_are_equal(store: Store) -> None:
    first = commit(store, 1)
    used = store.used_bytes()
    second = commit(store, 2, weights=b"w" * 5_000)
    assert store.used_bytes() == used + 5_000
    with store.lock():
        assert store.remove(second) == 5_000
    assert store.versions() == [first]
    assert fsck.verify(store).damaged == ()


def test_a_tree_without_a_record_does_not_count_and_is_pruned(store: Store) -> None:
    record = commit(store, 1)
    store.record_file(record).unlink()
    assert store.versions() == []
    with store.lock():
        assert fsck.prune(store) == record.total_bytes
    assert not store.folder(record).exists()
    assert list(store.blobs.iterdir()) == []


def test_a_commit_after_a_crash_before_the_record_replaces_the_tree(store: Store) -> None:
    record = commit(store, 1)
    store.record_file(record).unlink()
    (store.folder(record) / "MLmodel").unlink()
    assert commit(store, 1).key == record.key
    assert fsck.verify(store).damaged == ()


def test_prune_leaves_fresh_downloads_and_removes_old_ones(store: Store) -> None:
    part = store.staging_root / "assistant-9" / "parts" / "x.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 10)
    now = part.stat().st_mtime
    with store.lock():
        assert fsck.prune(store, now=now + 60) == 0
        assert fsck.prune(store, now=now + fsck.MAX_PARTIAL_AGE_S + 60) == 10
    assert not part.exists()


def test_the_lock_keeps_a_second_writer_out(store: Store) -> None:
    with store.lock(), pytest.raises(CacheBusy), store.lock(wait_s=0):
        pass
    with store.lock(wait_s=0):
        pass


def test_a_leased_version_is_not_removed(store: Store) -> None:
    record = commit(store, 1)
    with store.lease(record) as folder:
        with store.lock(), pytest.raises(CacheBusy):
            store.remove(record)
        assert (folder / "MLmodel").is_file()
    with store.lock():
        store.remove(record)
    with pytest.raises(StoreError), store.lease(record):
        pass


def test_a_version_that_another_process_locks_is_not_waited_for_without_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.cache.store.LOCK_WAIT_S", 0.0)
    record = commit(store, 1)
    with Lock.of_folder(store.folder(record)) as other:
        assert other.try_exclusive()
        with pytest.raises(CacheBusy, match="to itself"), store.lease(record):
            pass
    with store.lease(record) as folder:
        assert folder.is_dir()


def test_bytes_that_are_not_promised_get_no_final_name(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    for wrong in (
        ManifestFile(path="a", size_bytes=4, sha256="0" * 64),
        ManifestFile(path="a", size_bytes=3, sha256="0" * 64),
    ):
        with store.lock(), pytest.raises(VerificationError, match="'a'"):
            store.repair(source, wrong)
    assert list(store.blobs.iterdir()) == []


# --- Damage --------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_by_the_full_check_only(store: Store) -> None:
    record = commit(store, 1)
    flip_bit(store.folder(record) / WEIGHTS)
    assert fsck.quick_check(store).damaged == ()
    report = fsck.verify(store)
    assert report.checked == len(record.files)
    assert [damage.path for damage in report.damaged] == [WEIGHTS]


def test_one_damaged_blob_damages_every_version_that_links_it(store: Store) -> None:
    first, second = commit(store, 1), commit(store, 2, weights=b"w" * 5_000)
    flip_bit(store.folder(first) / "requirements.txt")
    report = fsck.verify(store)
    assert [(damage.key, damage.path) for damage in report.damaged] == [
        (first.key, "requirements.txt"),
        (second.key, "requirements.txt"),
    ]


def test_a_damaged_blob_is_set_aside_and_repaired_in_every_version(store: Store, tmp_path: Path) -> None:
    first, second = commit(store, 1), commit(store, 2, weights=b"w" * 5_000)
    flip_bit(store.folder(first) / "requirements.txt")
    with store.lock():
        (digest,) = fsck.set_aside(store, fsck.verify(store).damaged)
        assert len(fsck.quick_check(store).damaged) == 2
        good = tmp_path / "good"
        good.write_bytes(b"mlflow\n")
        (file,) = [file for file in first.files if file.sha256 == digest]
        assert store.repair(good, file) == [first, second]
    assert fsck.verify(store).damaged == ()


def test_the_look_over_at_boot_mends_links_and_sets_short_files_aside(store: Store) -> None:
    first, second = commit(store, 1, weights=b"1" * 10_000), commit(store, 2, weights=b"2" * 10_000)
    lost, short = store.folder(first) / "requirements.txt", store.folder(second) / WEIGHTS
    lost.unlink()
    short.chmod(0o600)
    os.truncate(short, 9_999)
    (damage,) = fsck.look_over(store)
    assert (damage.key, damage.path) == (second.key, WEIGHTS)
    blob = next(file.sha256 for file in first.files if file.path == "requirements.txt")
    assert lost.samefile(store.blob(blob))
    assert not store.blob(damage.sha256).exists()
    assert (store.damaged_root / damage.sha256).exists()


def test_a_check_that_does_not_read_finds_a_short_file_and_not_a_flipped_bit(store: Store) -> None:
    record = commit(store, 1)
    file = next(file for file in record.files if file.path == WEIGHTS)
    weights = store.folder(record) / WEIGHTS
    weights.chmod(0o600)
    weights.write_bytes(bytes(file.size_bytes))
    check_file(weights, file, read=False)
    with pytest.raises(VerificationError, match="sha256"):
        check_file(weights, file)
    os.truncate(weights, 5)
    with pytest.raises(VerificationError, match="has 5 bytes"):
        check_file(weights, file, read=False)


@pytest.mark.parametrize("path", ["__pycache__/genai_pyfunc.cpython-311.pyc", "extra.txt"])
def test_a_file_that_was_added_to_a_version_is_damage(store: Store, path: str) -> None:
    record = commit(store, 1)
    added = store.folder(record) / path
    added.parent.mkdir(exist_ok=True)
    added.write_bytes(b"")
    assert [damage.path for damage in fsck.quick_check(store).damaged] == [path]


def test_a_missing_file_and_a_replaced_link_are_damage(store: Store) -> None:
    record = commit(store, 1)
    folder = store.folder(record)
    (folder / "requirements.txt").unlink()
    shutil.copy2(folder / "MLmodel", folder / "copy")
    (folder / "copy").rename(folder / "MLmodel")
    assert {damage.path for damage in fsck.quick_check(store).damaged} == {"requirements.txt", "MLmodel"}


NO_NUMBERS = ["Infinity", "-Infinity", "NaN", "1e999", "-1", "1.5", "true", '"1"', "null", "1" + "0" * 400]


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("field", ["version", "created_at", "size"])
def test_a_number_of_a_record_that_is_none_is_damage_and_no_crash(
    store: Store, field: str, number: str
) -> None:
    record = replace(
        commit(store, 1), attached=(ManifestFile(path=MANIFEST_NAME, size_bytes=77, sha256="0" * 64),)
    )
    value = {"version": 1, "created_at": record.created_at, "size": 77}[field]
    data = record.encode()
    assert records.parse(data) == record
    swapped = data.replace(f'"{field}": {value}'.encode(), f'"{field}": {number}'.encode())
    assert swapped != data
    if field == "created_at" and number in ("-1", "1.5"):
        return  # a time that a clock can show
    with pytest.raises(StoreError, match="damaged"):
        records.parse(swapped)


@pytest.mark.parametrize(
    "path", ["\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 80, f"{'a' * 250}/{'b' * 250}"], ids=["not ASCII", "long"]
)
def test_the_record_of_the_largest_package_is_read_back(store: Store, path: str) -> None:
    """As JSON in ASCII it is longer than `manifest.json` may be. What cannot be read back is fetched at each poll."""
    files = (ManifestFile(path=f"{number}/{path}", size_bytes=1, sha256="0" * 64) for number in range(2_000))
    record = make_record(manifests.make("phi", files), 1)
    (store.versions_root / "assistant").mkdir()
    with store.lock():
        store.rewrite(record)
    assert store.versions() == [record]


def test_a_folder_that_cannot_be_read_is_an_error_of_the_cache(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of the updates logs one; of the operating system's it would die, and the daemon with it."""
    commit(store, 1)
    names = Path.iterdir

    def failing(folder: Path) -> Iterator[Path]:
        if folder.name == "assistant":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return names(folder)

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        fsck.look_over(store)


def test_a_damaged_record_is_passed_over_and_its_tree_is_kept(store: Store) -> None:
    record = commit(store, 1)
    store.record_file(record).write_bytes(b"{")
    assert store.versions() == []
    with store.lock():
        fsck.prune(store)
    assert (store.folder(record) / "MLmodel").is_file()


# --- State ---------------------------------------------------------------------------------------------


def test_a_state_is_read_back_equal(store: Store) -> None:
    record = commit(store, 1)
    model = ModelState(
        active=record.key, candidate=record.key, quarantined={record.key: fault("why")}, pinned=record.key
    )
    assert store.state() == CacheState()
    assert store.change_state("assistant", lambda old: model) == model
    assert store.state() == CacheState(models={"assistant": model})


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{", b"[]", b'{"format": 1}', b"\xff", b'{"format": 2, "models": {}}'),
        *(
            CacheState(models={"assistant": ModelState(candidate_tries=7)})
            .encode()
            .replace(b": 7", b": " + tries)
            for tries in (b"Infinity", b"1e999", b"NaN", b"-1", b"true", b'"1"', b"1" * 5_000)
        ),
    ],
)
def test_a_damaged_state_is_rebuilt_from_what_is_committed(store: Store, damage: bytes) -> None:
    low, middle, high = (commit(store, version, weights=bytes([version])) for version in (2, 9, 10))
    (store.root / "state.json").write_bytes(damage)
    state = store.state()
    assert state.model("assistant") == ModelState(active=high.key, previous=middle.key)
    assert "damaged" in state.rebuilt
    assert store.state() == state
    assert len(list(store.damaged_root.iterdir())) == 1
    assert low in store.versions()


def test_a_damaged_state_that_cannot_be_replaced_is_not_taken_for_a_new_device(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = commit(store, 1)
    (store.root / "state.json").write_bytes(b"{")

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_file", full)
        with pytest.raises(StoreError):
            store.state()
    assert store.state().model("assistant").active == record.key
    assert store.state().rebuilt


@pytest.mark.parametrize("number", sorted(disk.PASSING))
def test_a_host_that_lacks_something_for_a_moment_finds_nothing_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    record = commit(store, 1)
    store.change_state("assistant", lambda state: replace(state.switched(record.key), pinned=record.key))
    file = record.files[0]

    def refuse(path: object, flags: int, *_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StoreError, match="cannot read"):
            store.state_locked()
        with pytest.raises(StoreError, match="cannot read"):
            check_file(store.blob(file.sha256), file)
    assert (store.state().model("assistant").pinned, store.state().rebuilt) == (record.key, "")
    check_file(store.blob(file.sha256), file)


@pytest.mark.parametrize("number", sorted(disk.DAMAGE))
def test_a_record_that_the_disk_cannot_give_back_costs_its_own_version_only(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    bad, good = commit(store, 1), commit(store, 2, weights=b"2" * 10_000)
    store.change_state("assistant", lambda state: state.switched(bad.key))
    opened = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777, **options: Any) -> int:
        if path == store.record_file(bad):
            raise OSError(number, os.strerror(number))
        return opened(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert store.versions() == [good]
    states = VersionStates(store, "assistant")
    assert (states.active, states.state.active) == (None, bad.key)
    assert fsck.look_over(store) == ()
    assert store.folder(bad).is_dir(), "until it is fetched again"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_record_that_may_not_be_read_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    commit(store, 1)

    def refuse(*_: object, **options: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="cannot read"):
        store.versions()


@pytest.mark.parametrize("number", sorted(disk.DAMAGE))
def test_an_inode_that_the_disk_cannot_give_back_stops_no_check(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Blob and link are one inode: whoever looks at either gets the error."""
    bad, good = commit(store, 1), commit(store, 2, weights=b"2" * 10_000)
    (file,) = [file for file in bad.files if file.path == WEIGHTS]
    places = {str(store.blob(file.sha256)), str(store.folder(bad) / WEIGHTS)}

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) in places:
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *arguments, **options)

        return call

    for name in ("stat", "lstat", "open", "rename", "unlink"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    with store.lock():
        store.settle()
        fsck.prune(store)
        (damage,) = fsck.verify(store).damaged
        assert (damage.key, damage.path) == (bad.key, WEIGHTS)
        with pytest.raises(StoreError, match="cannot set aside"):
            fsck.set_aside(store, [damage])
    assert fsck.verify(store, [good]).damaged == ()


@pytest.mark.parametrize("uri", ["models:/phi@", "models:/ph\u0000i@prod", "phi", 7])
def test_a_desired_state_that_is_none_is_forgotten(store: Store, uri: object) -> None:
    """One bit of it flipped would otherwise end the daemon as wrong settings do: for good."""
    store.change_state("assistant", lambda state: replace(state, desired="models:/phi@prod"))
    file = store.root / "state.json"
    file.write_text(file.read_text().replace('"models:/phi@prod"', json.dumps(uri)))
    assert store.state().model("assistant").desired == ""
    assert not store.state().rebuilt


def serve(states: VersionStates, record: VersionRecord) -> None:
    states.change(lambda state: state.switched(record.key))
    states.note_served()


def test_a_lost_state_does_not_activate_a_version_that_never_served_or_failed_since(store: Store) -> None:
    older, good, failed, refused = (
        commit(store, version, weights=bytes([version])) for version in (1, 2, 3, 4)
    )
    states = VersionStates(store, "assistant")
    for record in (older, good, failed):
        serve(states, record)
    states.change(lambda state: state.stepped_back(fault("crashes")))
    states.change(lambda state: state.trying(refused.key).refused(refused.key, fault("wrong answers")))
    (store.root / "state.json").write_bytes(b"damaged")
    assert store.state().model("assistant") == ModelState(active=good.key, previous=older.key)


def test_a_rebuilt_state_has_each_model() -> None:
    manifest = Manifest(name="m", files=(ManifestFile(path="a", size_bytes=1, sha256="0" * 64),))
    one, two = make_record(manifest, 1), make_record(manifest, 1, name="other")
    state = states.rebuild([one, two], reason="a test")
    assert {name: model.active for name, model in state.models.items()} == {
        "assistant": one.key,
        "other": two.key,
    }


# --- Room ----------------------------------------------------------------------------------------------


def test_the_least_recently_used_version_goes_first(store: Store) -> None:
    records = [commit(store, version, weights=bytes([version]) * 10_000) for version in range(1, 5)]
    os.utime(store.record_file(records[0]), (5_000, 5_000))
    store.change_state("assistant", lambda old: replace(old, active=records[2].key))
    assert eviction.evictable(store) == [records[1], records[0]]
    with store.lock():
        removed = eviction.make_room(
            store, needed_bytes=5_000, quota_bytes=store.used_bytes(), min_free_bytes=0
        )
    assert removed == [records[1]]
    assert fsck.verify(store).damaged == ()


def test_what_is_protected_stays_and_the_error_says_what_to_do(store: Store) -> None:
    records = [commit(store, version, weights=bytes([version]) * 10_000) for version in (1, 2, 3)]
    store.change_state("assistant", lambda old: ModelState(active=records[0].key, pinned=records[1].key))
    with store.lock(), pytest.raises(StoreError, match="quota_bytes"):
        eviction.make_room(store, needed_bytes=1, quota_bytes=store.used_bytes(), min_free_bytes=0)
    assert store.versions() == records


def test_a_disk_that_would_get_too_full_is_refused(store: Store) -> None:
    with store.lock(), pytest.raises(StoreError, match="free"):
        eviction.make_room(store, needed_bytes=1 << 60, quota_bytes=1 << 61, min_free_bytes=0)
