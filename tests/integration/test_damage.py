"""Truncated files and flipped bits, in every file of a package: found before a load, and one blob is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.staging import folder_of
from edge_agent.cache.verify import check_file
from edge_agent.errors import PolicyError, VerificationError
from edge_agent.package import trust
from edge_agent.sync.protocol import TrustJob
from tests.support.device import Device
from tests.support.packages import GENAI_CONFIG, WEIGHTS, make_package

PATHS = (
    "MLmodel",
    "genai_pyfunc.py",
    GENAI_CONFIG,
    "artifacts/model/model.onnx",
    WEIGHTS,
    "requirements.txt",
    "manifest.json",
)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    _rewrite(path, bytes(data))


def truncate(path: Path) -> None:
    _rewrite(path, path.read_bytes()[:-1])


def empty(path: Path) -> None:
    _rewrite(path, b"")


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)  # the same inode: every link of it is damaged


DAMAGES = (flip, truncate, empty)


@pytest.fixture
def device(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Device:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards
    registry = tmp_path_factory.getbasetemp() / "damage-registry"
    registry.mkdir(exist_ok=True)
    return Device(f"sqlite:///{registry / 'mlflow.db'}", tmp_path, artifacts=registry / "artifacts")


def committed(device: Device) -> VersionRecord:
    (record,) = device.store.versions("assistant")
    return record


def refused_paths(device: Device, record: VersionRecord) -> list[str]:
    """What the check before each load refuses."""
    refused = []
    for file in record.files:
        try:
            check_file(device.store.folder(record) / file.path, file)
        except VerificationError:
            refused.append(file.path)
    return refused


def test_the_paths_are_all_files_of_a_package(tmp_path: Path) -> None:
    package = make_package(tmp_path, trust.WRAPPER)
    found = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert found | {"manifest.json"} == set(PATHS)


def test_a_damaged_stored_file_is_found_before_a_load_and_is_the_only_one_fetched_again(
    device: Device,
) -> None:
    device.publish()
    device.sync()
    record = committed(device)
    assert {file.path for file in record.files} == set(PATHS)
    for path in PATHS:
        for damage in DAMAGES:
            file = device.store.folder(record) / path
            size_bytes = file.stat().st_size
            damage(file)
            assert refused_paths(device, record) == [path]
            damaged = fsck.verify(device.store).damaged
            assert [found.path for found in damaged] == [path], damage
            with device.store.lock():
                fsck.set_aside(device.store, damaged)
            result = device.sync()
            # What describes the package is read with each check; the rest is fetched once, by its digest.
            assert result.bytes_fetched == (0 if path == "manifest.json" else size_bytes), (path, damage)
            assert refused_paths(device, record) == []
            assert fsck.verify(device.store).damaged == ()
            assert committed(device).key == record.key


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blob_is_not_taken_for_the_next_version(
    device: Device, damage: Callable[[Path], None]
) -> None:
    device.publish()
    device.sync()
    first = committed(device)
    damage(device.store.folder(first) / WEIGHTS)
    device.publish({"requirements.txt": "mlflow # 2\n"})
    result = device.sync()
    weights = next(file.size_bytes for file in first.files if file.path == WEIGHTS)
    assert result.bytes_fetched == weights + len("mlflow # 2\n")
    assert len(device.store.versions("assistant")) == 2
    assert fsck.verify(device.store).damaged == ()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
def test_a_damaged_staged_file_is_not_committed(
    device: Device, damage: Callable[[Path], None], manifest: bool
) -> None:
    """The policy refuses a package when all of it is staged; when it is allowed, all of it is damaged."""
    package = device.publish({"genai_pyfunc.py": "print()"}, manifest=manifest)
    with pytest.raises(PolicyError):
        device.sync()
    staged = sorted(folder_of(device.store, "assistant", 1).glob("parts/*"))
    assert len(staged) == len(PATHS) - (not manifest)
    for part in staged:
        damage(part)
    assert device.has_nothing_final()
    assert device.sync(device.job(policy=TrustJob(allow_unsigned_code=True))).new
    record = committed(device)
    assert refused_paths(device, record) == []
    assert fsck.verify(device.store).damaged == ()
    for file in record.files:
        assert (device.store.folder(record) / file.path).read_bytes() == (package / file.path).read_bytes()
