"""Artifact stores that MLflow reaches by itself (S3, Azure, …): whole files, through staging, within bounds.

The store here is a plugin as MLflow defines them: it shows the one interface that those stores have.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry

from edge_agent.cache import fsck, line_use
from edge_agent.errors import LinkHeld, StoreError, TransportError, VerificationError
from edge_agent.sync import fetch
from edge_agent.sync.protocol import LinkJob
from tests.support.device import Device
from tests.support.packages import WEIGHTS

SCHEME = "elsewhere"
CONTENT = random.Random(3).randbytes(2_000_000)
Fault = Callable[[str, Path], None]


def nothing(path: str, target: Path) -> None:
    """A store that works."""


class Elsewhere(ArtifactRepository):  # type: ignore[misc]
    """A folder, behind the calls that an S3 store answers; `fault` sees each file that was downloaded."""

    fault: Fault = staticmethod(nothing)

    @property
    def _folder(self) -> Path:
        return Path(self.artifact_uri.removeprefix(f"{SCHEME}:"))

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        return [
            FileInfo(
                entry.relative_to(self._folder).as_posix(),
                entry.is_dir(),
                None if entry.is_dir() else entry.stat().st_size,
            )
            for entry in sorted((self._folder / (path or "")).iterdir())
        ]

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        shutil.copyfile(self._folder / remote_file_path, local_path)
        Elsewhere.fault(remote_file_path, Path(local_path))

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        folder = self._folder / (artifact_path or "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local_file, folder / Path(local_file).name)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        shutil.copytree(local_dir, self._folder / (artifact_path or ""), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture
def device(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards
    monkeypatch.setattr(Elsewhere, "fault", staticmethod(nothing))
    monkeypatch.setitem(_artifact_repository_registry._registry, SCHEME, Elsewhere)
    device = Device(f"sqlite:///{registry / 'mlflow.db'}", tmp_path)
    device.artifact_root = f"{SCHEME}:{registry / 'bucket'}"
    return device


def test_a_version_comes_whole_and_leaves_nothing_in_staging(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    monkeypatch.setattr(Elsewhere, "fault", staticmethod(lambda path, target: places.append(target)))
    device.publish(weights=CONTENT)
    assert device.sync().new
    (record,) = device.store.versions()
    assert (device.store.folder(record) / WEIGHTS).read_bytes() == CONTENT
    assert fsck.verify(device.store).damaged == ()
    assert len(places) == len(record.files)
    assert all(place.is_relative_to(device.store.staging_root) for place in places)
    assert list(device.store.staging_root.iterdir()) == []


def test_a_file_that_grew_since_it_was_listed_is_refused(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.publish(weights=CONTENT)

    def grow(path: str, target: Path) -> None:
        if path == WEIGHTS:
            with target.open("ab") as file:
                file.write(b"x")

    monkeypatch.setattr(Elsewhere, "fault", staticmethod(grow))
    with pytest.raises(VerificationError, match="more than the listed 2000000 bytes"):
        device.sync()
    assert device.has_nothing_final()
    monkeypatch.setattr(Elsewhere, "fault", staticmethod(nothing))
    assert device.sync().new


def test_the_second_copy_of_the_largest_file_is_reserved_before_anything_is_fetched(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[str] = []
    monkeypatch.setattr(Elsewhere, "fault", staticmethod(lambda path, target: came.append(path)))
    package = device.publish(weights=CONTENT)
    package_bytes = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    job = device.job()
    once = replace(job.cache, quota_bytes=package_bytes + (1 << 20) + len(CONTENT) // 2)
    with pytest.raises(StoreError, match="do not fit"):
        device.sync(replace(job, cache=once))
    assert WEIGHTS not in came
    twice = replace(job.cache, quota_bytes=package_bytes + (1 << 20) + len(CONTENT))
    assert device.sync(replace(job, cache=twice)).new
    assert WEIGHTS in came


def test_a_fetch_that_was_interrupted_keeps_the_files_that_are_whole(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[str] = []

    def fail(path: str, target: Path) -> None:
        came.append(path)
        if path == WEIGHTS:
            raise ConnectionResetError("reset")

    monkeypatch.setattr(Elsewhere, "fault", staticmethod(fail))
    package = device.publish(weights=CONTENT, manifest=True)
    with pytest.raises(TransportError, match="reset"):
        device.sync()
    before = set(came) - {WEIGHTS}
    assert "MLmodel" in before
    came.clear()
    monkeypatch.setattr(Elsewhere, "fault", staticmethod(lambda path, target: came.append(path)))
    assert device.sync().new
    listed = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert WEIGHTS in came
    again = {path for path in came if path in before}
    assert again <= {"manifest.json"}, "what was whole came again"
    assert before | set(came) == listed


def test_a_file_is_not_begun_that_the_days_bytes_do_not_hold_and_what_broke_off_counts(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[str] = []

    def fail(path: str, target: Path) -> None:
        came.append(path)
        if path == WEIGHTS:
            os.truncate(target, 500_000)
            raise ConnectionResetError("reset")

    monkeypatch.setattr(Elsewhere, "fault", staticmethod(fail))
    monkeypatch.setattr(line_use, "QUARTER_S", 1 << 40)  # at its end, too much may stay counted
    device.publish(weights=CONTENT)
    job = replace(device.job(), link=LinkJob(allowed_bytes=1_900_000, ahead_bytes=1))
    with pytest.raises(LinkHeld, match="2000000 bytes"):
        device.sync(job)
    assert "MLmodel" in came
    assert WEIGHTS not in came
    before = line_use.used_bytes(device.store, lambda at_s: True)
    assert 0 < before < 100_000
    with pytest.raises(TransportError, match="reset"):
        device.sync(replace(job, link=LinkJob(ahead_bytes=1)))
    after = line_use.used_bytes(device.store, lambda at_s: True)
    assert after - before == came.count(WEIGHTS) * 500_000


def test_a_full_disk_is_the_cache_s_error_and_frees_what_was_taken(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.publish(weights=CONTENT)

    def fill(path: str, target: Path) -> None:
        if path == WEIGHTS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Elsewhere, "fault", staticmethod(fill))
    with pytest.raises(StoreError, match="No space left"):
        device.sync()
    assert device.store.used_bytes() == 0


def test_a_store_that_fails_is_asked_again_and_then_given_up(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.publish(weights=CONTENT)
    asked: list[str] = []

    def fail(path: str, target: Path) -> None:
        if path == WEIGHTS:
            asked.append(path)
            raise ConnectionResetError("reset")

    monkeypatch.setattr(Elsewhere, "fault", staticmethod(fail))
    with pytest.raises(TransportError, match="reset"):
        device.sync()
    assert len(asked) == fetch.MAX_ATTEMPTS
    assert device.has_nothing_final()
