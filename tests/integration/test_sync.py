"""Sync against a real MLflow server: what is fetched, what is reused, what is refused, what survives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient

from edge_agent.cache import fsck
from edge_agent.cache.staging import Staging
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ContentError,
    EdgeAgentError,
    LinkHeld,
    ManifestError,
    PolicyError,
    Quarantined,
    StoreError,
    SyncStopped,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.package import trust
from edge_agent.sync import process as sync_process
from edge_agent.sync.bring import outline, synchronise
from edge_agent.sync.process import run_outline, run_sync
from edge_agent.sync.protocol import CacheJob, LinkJob, RegistryJob, SyncJob, SyncResult, TrustJob
from tests.support import state_folder
from tests.support.clock import ScriptedClock
from tests.support.mlflow_server import Server
from tests.support.packages import GENAI_CONFIG, MLMODEL, WEIGHTS, add_manifest, make_package, register
from tests.support.processes import free_port, wait_until

Changes = Mapping[str, bytes | str | None]


class Device:
    """One device's cache and one registered model."""

    def __init__(self, uri: str, folder: Path, *, artifacts: Path | None = None) -> None:
        self.folder = folder
        self.uri = uri
        self.model = f"phi-{uuid.uuid4().hex[:8]}"
        self.store = Store(folder / "state")
        self.events: list[Mapping[str, Any]] = []
        self._artifacts = artifacts
        self._count = 0

    def publish(
        self, changes: Changes | None = None, *, weights: bytes = b"", manifest: bool = True, tag: str = ""
    ) -> Path:
        """Registers a package under `@prod`; gives its folder."""
        self._count += 1
        package = make_package(
            self.folder / f"package-{self._count}", trust.WRAPPER, changes, weights=weights
        )
        made = add_manifest(package, self.model) if manifest else ""
        register(
            self.uri,
            self.model,
            package,
            tag=tag or made,
            artifacts=self._artifacts.as_uri() if self._artifacts else "",
        )
        return package

    @property
    def job(self) -> SyncJob:
        return SyncJob(
            state_dir=str(self.store.root.parent),
            registry=RegistryJob(uri=self.uri, timeout_s=10),
            name="assistant",
            ref=f"models:/{self.model}@prod",
            cache=CacheJob(min_free_bytes=0),
        )

    def sync(self, job: SyncJob | None = None) -> SyncResult:
        self.events = []
        return run_sync(job or self.job, timeout_s=300, on_event=self.events.append)

    def check(self, job: SyncJob | None = None, *, clock: Clock = CLOCK) -> SyncResult:
        """The same in this process, which has MLflow already: seconds less, where the process is not the question."""
        self.events = []
        return synchronise(job or self.job, self.events.append, clock=clock)

    def has_nothing_final(self) -> bool:
        blobs = list(self.store.blobs.iterdir()) if self.store.blobs.exists() else []
        return not blobs and not self.store.record_files() and not list(self.store.versions_root.glob("*/*"))


@pytest.fixture
def device(mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # `check` sets them; they are put back afterwards
    mlflow_server.start()
    return Device(mlflow_server.uri, tmp_path)


def test_an_unchanged_check_is_one_request_and_imports_no_mlflow(
    device: Device, mlflow_server: Server
) -> None:
    device.publish()
    first = device.check()
    job = replace(device.job, check_host=True, running=first.key)
    before = mlflow_server.log_text().count("GET /api/")
    environment = {**sync_process.child_environment(), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.sync.child"],
        input=job.encode(),
        env=environment,
        capture_output=True,
        timeout=60,
        check=True,
    )
    *_, last = map(json.loads, done.stdout.splitlines())
    assert (last["event"], last["key"], last["new"]) == ("done", first.key, False)
    imported = {line.rsplit(b"|", 1)[-1].strip().split(b".")[0] for line in done.stderr.splitlines()}
    assert b"requests" in imported, "the imports were seen"
    assert not imported & {b"mlflow", b"numpy", b"onnxruntime", b"yaml", b"model_signing"}
    assert mlflow_server.log_text().count("GET /api/") == before + 1


def artifact(server: Server, path: str, model: str) -> Path:
    """A package's file in the server's own folder; the model's only version."""
    source: str = MlflowClient(server.uri, server.uri).get_model_version_download_uri(model, "1")
    return server.artifacts / urlsplit(source).path.strip("/") / path


def test_an_alias_is_resolved_and_everything_is_verified_and_committed(device: Device) -> None:
    package = device.publish()
    result = device.sync()
    (record,) = device.store.versions("assistant")
    assert (result.version, result.key, result.new) == (1, record.key, True)
    assert result.bytes == record.total_bytes
    assert record.trust.rule == trust.Rule.SHIPPED_WRAPPER
    assert record.registry_uri == device.uri
    assert record.run_id
    assert fsck.verify(device.store).damaged == ()
    folder = device.store.folder(record)
    assert stat.S_IMODE((folder / "artifacts").stat().st_mode) == 0o700
    for file in package.rglob("*"):
        if file.is_file():
            assert (folder / file.relative_to(package)).read_bytes() == file.read_bytes()
    assert device.events[0]["event"] == "resolved"
    kinds = [event["event"] for event in device.events]
    assert list(dict.fromkeys(kinds)) == ["resolved", "fetching", "progress", "verifying"]
    assert device.events[-2]["bytes"] == device.events[-2]["total_bytes"] == result.bytes_fetched
    assert device.events[1]["digest"] == device.events[-1]["digest"] == record.digest
    assert list(device.store.staging_root.iterdir()) == []


def test_the_second_sync_fetches_nothing(device: Device) -> None:
    device.publish()
    first = device.check()
    second = device.check()
    assert (second.key, second.bytes_fetched, second.bytes_reused) == (first.key, 0, first.bytes)
    assert not second.new


def test_changing_one_file_fetches_one_file(device: Device) -> None:
    device.publish()
    device.check()
    device.publish({"requirements.txt": "mlflow==3.17.2\n"})
    result = device.check()
    assert (result.version, result.new) == (2, True)
    assert result.bytes_fetched == len("mlflow==3.17.2\n")
    assert len(device.store.versions("assistant")) == 2


def test_a_plain_mlflow_package_gets_its_digests_on_arrival(device: Device) -> None:
    device.publish(manifest=False)
    first = device.check()
    assert first.new
    assert fsck.verify(device.store).damaged == ()
    assert device.check().bytes_fetched == 0


def test_a_version_in_quarantine_is_not_fetched_again_when_it_is_gone(device: Device) -> None:
    device.publish(weights=bytes(100_000))
    result = device.check()
    quarantined = replace(device.job, quarantined=(result.key,))
    assert device.check(quarantined).bytes_fetched == 0, "it is here: the lifecycle refuses it"
    (record,) = device.store.versions()
    with device.store.lock():
        device.store.remove(record)
    with pytest.raises(Quarantined, match=result.key):
        device.check(quarantined)
    assert device.events == [
        {"event": "resolved", "version": 1, "rollout": "", "rollout_from": ""},
        {"event": "quarantined", "key": result.key},
    ]
    assert device.has_nothing_final()
    assert device.store.used_bytes() == 0
    device.publish(weights=bytes(100_001))
    assert device.check(quarantined).version == 2, "another digest is tried"


def test_a_plain_package_in_quarantine_is_recognised_once_its_digest_is_known(device: Device) -> None:
    device.publish(manifest=False)
    result = device.check()
    quarantined = replace(device.job, quarantined=(result.key,))
    (record,) = device.store.versions()
    with device.store.lock():
        device.store.remove(record)
    assert device.check(quarantined).key == result.key


def test_a_version_number_can_be_asked_for(device: Device) -> None:
    device.publish()
    device.publish({"requirements.txt": "x"})
    result = device.check(replace(device.job, ref=f"models:/{device.model}/1"))
    assert result.version == 1


def test_a_held_line_changes_nothing_and_what_is_here_needs_none(device: Device) -> None:
    device.publish()
    closed = replace(device.job, link=LinkJob(allowed_bytes=0))
    with pytest.raises(LinkHeld):
        device.check(closed)
    assert [event["event"] for event in device.events] == ["resolved", "held"]
    assert list(device.store.staging_root.iterdir()) == []
    assert not device.store.line_file.exists()
    assert device.check().new
    assert not device.check(closed).new
    device.publish({"requirements.txt": "other"})
    with pytest.raises(LinkHeld):
        device.check(closed)
    assert device.events[-1]["missing_bytes"] == len("other"), "one file is missing"


@pytest.mark.parametrize("manifest", [True, False], ids=["a manifest", "a listing"])
def test_what_a_version_would_take_is_known_without_fetching_it(device: Device, manifest: bool) -> None:
    package = device.publish(manifest=manifest, weights=bytes(50_000))
    size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    before = state_folder.mark(device.store.root.parent)
    new = outline(device.job)
    assert (new.version, new.missing_bytes) == (1, new.total_bytes)
    assert new.missing_bytes < new.needed_bytes < new.missing_bytes + (2 << 20)
    assert size - 100_000 < new.total_bytes <= size, "all but the manifest and what MLflow adds"
    assert state_folder.mark(device.store.root.parent) == before, "nothing was written"
    brought = device.check()
    here = outline(device.job)
    assert (here.missing_bytes, here.needed_bytes, here.total_bytes) == (0, 0, brought.bytes)
    assert here.digest == (brought.digest if manifest else "")
    device.publish({"requirements.txt": "other"}, manifest=manifest, weights=bytes(50_000))
    second = outline(device.job)
    assert second.version == 2
    if manifest:
        assert second.missing_bytes == len("other"), "one file is missing"
    with pytest.raises(UnknownReference):
        outline(replace(device.job, ref=f"models:/{device.model}/9"))


def test_a_process_of_its_own_says_what_a_version_would_take(device: Device) -> None:
    device.publish()
    said = run_outline(device.job, timeout_s=300)
    assert (said.version, said.digest) == (1, device.check().digest)
    with pytest.raises(TransportError):
        run_outline(
            replace(device.job, registry=RegistryJob(uri=f"http://127.0.0.1:{free_port()}")), timeout_s=300
        )


def test_a_registry_on_this_host_uses_no_line(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    registry.mkdir()
    device = Device(f"sqlite:///{registry / 'mlflow.db'}", tmp_path, artifacts=registry / "artifacts")
    device.publish()
    assert device.check(replace(device.job, link=LinkJob(allowed_bytes=0, ahead_bytes=1))).new
    assert not device.store.line_file.exists()


def test_an_embedded_sqlite_registry_works(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    device = Device(
        f"sqlite:///{tmp_path / 'registry' / 'mlflow.db'}",
        tmp_path,
        artifacts=tmp_path / "registry" / "artifacts",
    )
    device.publish()
    assert device.check().new
    assert device.check().bytes_fetched == 0
    device.publish({"requirements.txt": "x"})
    assert device.check().bytes_fetched == 1


# --- Refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"weights", b"weights " * 999 + b"weightz ", b"weights " * 1001])
def test_truncated_flipped_or_longer_bytes_are_refused(
    device: Device, mlflow_server: Server, data: bytes
) -> None:
    device.publish()
    artifact(mlflow_server, WEIGHTS, device.model).write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.onnx\.data"):
        device.check()
    assert device.has_nothing_final()


def test_a_manifest_that_is_not_the_tagged_one_is_refused(device: Device) -> None:
    device.publish(tag="0" * 64)
    with pytest.raises(VerificationError, match=r"manifest\.json"):
        device.check()
    assert device.has_nothing_final()


def test_a_manifest_that_was_removed_is_missed(device: Device) -> None:
    device.publish(manifest=False, tag="0" * 64)
    with pytest.raises(VerificationError, match=r"lost its manifest\.json"):
        device.check()


@pytest.mark.parametrize("path", ["../../../escaped", "/tmp/escaped", "a\\b", "a/../b", "mlmodel", "x\ny"])
def test_a_hostile_path_in_a_manifest_is_refused(device: Device, path: str) -> None:
    entry = {"path": path, "size": 1, "sha256": "0" * 64}
    mlmodel = {"path": "MLmodel", "size": 1, "sha256": "0" * 64}
    manifest = {"format": 1, "name": device.model, "files": [mlmodel, entry]}
    device.publish({"manifest.json": json.dumps(manifest)}, manifest=False)
    with pytest.raises(ManifestError):
        device.check()
    assert device.has_nothing_final()


def test_a_manifest_of_another_model_is_refused(device: Device) -> None:
    package = make_package(device.folder / "other", trust.WRAPPER)
    register(device.uri, device.model, package, tag=add_manifest(package, "another"))
    with pytest.raises(ManifestError, match="another"):
        device.check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"MLmodel": MLMODEL.replace("mlflow.pyfunc.loaders.code_model", "evil")}, "loader_module 'evil'"),
        ({"MLmodel": MLMODEL.replace("path: artifacts/model", "path: /etc")}, "/etc"),
        (
            {GENAI_CONFIG: '{"model": {"decoder": {"session_options": {"custom_ops_library": "x"}}}}'},
            "custom_ops",
        ),
        ({"helper.py": "x = 1"}, "helper.py"),
        ({"__pycache__/genai_pyfunc.cpython-311.pyc": b"x"}, "compiled Python"),
    ],
)
def test_hostile_content_is_refused_with_its_reason(device: Device, changes: Changes, reason: str) -> None:
    device.publish(changes)
    with pytest.raises(PolicyError) as caught:
        device.check()
    assert reason in str(caught.value)
    assert device.has_nothing_final()


def test_a_version_that_today_s_policy_refuses_is_not_waved_through(device: Device) -> None:
    device.publish({"genai_pyfunc.py": "print()"})
    open_job = replace(device.job, trust=TrustJob(allow_unsigned_code=True))
    assert device.check(open_job).new
    with pytest.raises(PolicyError):
        device.check()


def test_a_missing_alias_model_or_version_is_an_unknown_reference(device: Device) -> None:
    device.publish()
    for ref in (f"models:/{device.model}@gone", f"models:/{device.model}/7", "models:/gone@prod"):
        with pytest.raises(UnknownReference, match="has no"):
            device.check(replace(device.job, ref=ref))


def test_what_does_not_fit_is_refused_before_it_is_fetched(device: Device) -> None:
    device.publish(weights=os.urandom(3_000_000))
    with pytest.raises(StoreError, match="quota"):
        device.check(replace(device.job, cache=CacheJob(quota_bytes=2_000_000, min_free_bytes=0)))
    assert "progress" not in {event["event"] for event in device.events}


# --- Repaired ------------------------------------------------------------------------------------------


def test_a_damaged_blob_is_fetched_again_and_only_it(device: Device) -> None:
    device.publish()
    device.check()
    (record,) = device.store.versions()
    weights = device.store.folder(record) / WEIGHTS
    weights.chmod(0o644)
    weights.write_bytes(b"W" + weights.read_bytes()[1:])
    with device.store.lock():
        fsck.set_aside(device.store, fsck.verify(device.store).damaged)
    result = device.check()
    assert (result.bytes_fetched, result.new, result.key) == (weights.stat().st_size, False, record.key)
    assert fsck.verify(device.store).damaged == ()


# --- Interrupted ---------------------------------------------------------------------------------------


def running_sync(job: SyncJob) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.sync.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=sync_process.child_environment(),
    )
    assert process.stdin is not None
    process.stdin.write(job.encode())
    process.stdin.close()
    return process


@pytest.mark.parametrize("manifest", [True, False])
def test_a_sync_killed_in_the_middle_is_continued(device: Device, manifest: bool) -> None:
    size = 4_000_000
    device.publish(weights=os.urandom(size), manifest=manifest)
    slow = replace(device.job, cache=CacheJob(min_free_bytes=0, max_bytes_per_s=250_000))
    process = running_sync(slow)

    def kept_bytes() -> int:
        """What the next sync can continue: without a manifest a part counts as far as its note covers it."""
        sizes = []
        for part in device.store.staging_root.rglob("*.part"):
            with contextlib.suppress(FileNotFoundError):  # it was whole, and got its next name
                size_bytes = part.stat().st_size
                sizes.append(size_bytes if manifest else Staging(part.parent.parent).note(part).length)
        return max(sizes, default=0)

    wait_until(lambda: kept_bytes() > 500_000, 60, "half a megabyte")
    process.send_signal(signal.SIGKILL)
    with process:
        pass
    have = kept_bytes()
    assert 0 < have < size
    assert device.store.versions() == []
    result = device.sync()
    assert result.new
    assert result.bytes_fetched <= result.bytes - have
    assert fsck.verify(device.store).damaged == ()


def test_the_cap_slows_the_download(device: Device) -> None:
    device.publish(weights=os.urandom(1_000_000))
    time = ScriptedClock()
    capped = replace(device.job, cache=CacheJob(min_free_bytes=0, max_bytes_per_s=500_000))
    device.check(capped, clock=time.clock)
    assert time.now_s > 2
    rates = [event["bytes_per_s"] for event in device.events if event["event"] == "progress"]
    assert rates[-1] < 600_000
    assert len(rates) < 20


def test_a_stopped_sync_ends_at_once_and_leaves_no_process(device: Device) -> None:
    device.publish(weights=os.urandom(4_000_000))
    slow = replace(device.job, cache=CacheJob(min_free_bytes=0, max_bytes_per_s=100_000))
    stop = threading.Event()

    held: list[int | None] = [sync_process.resident_bytes()]

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            held.append(sync_process.resident_bytes())
            stop.set()

    with pytest.raises(SyncStopped, match="stopped"):
        run_sync(slow, timeout_s=300, on_event=on_event, should_stop=stop.is_set)
    before, *during = held
    assert (before, sync_process.resident_bytes()) == (None, None)
    assert min(number or 0 for number in during) > 10_000_000


def test_a_sync_over_its_time_is_ended(device: Device) -> None:
    device.publish(weights=os.urandom(4_000_000))
    slow = replace(device.job, cache=CacheJob(min_free_bytes=0, max_bytes_per_s=100_000))
    time = ScriptedClock()

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            time.pass_by(3_600)

    with pytest.raises(TransportError, match="too long"):
        run_sync(slow, timeout_s=3_600, on_event=on_event, clock=time.clock)


# --- No registry ---------------------------------------------------------------------------------------


def test_an_unreachable_registry_is_told_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # MLflow's default would block for minutes
    device = Device(f"http://127.0.0.1:{free_port()}", tmp_path)
    with pytest.raises(TransportError, match="cannot be reached"):
        device.sync()  # the process's start, with MLflow's import, is most of the time
    began = time.monotonic()
    with pytest.raises(TransportError, match="cannot be reached"):
        device.check()
    assert time.monotonic() - began < 60  # MLflow by itself takes four minutes


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_a_registry_that_never_answers_is_given_up_after_the_timeout(
    tmp_path: Path, silent_port: int
) -> None:
    device = Device(f"http://127.0.0.1:{silent_port}", tmp_path)
    began = time.monotonic()
    with pytest.raises(TransportError):
        device.check(replace(device.job, registry=RegistryJob(uri=device.uri, timeout_s=1)))
    assert time.monotonic() - began < 60  # MLflow by itself waits for two minutes


def test_a_sqlite_registry_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    device = Device(f"sqlite:///{tmp_path / 'gone.db'}", tmp_path)
    with pytest.raises(TransportError, match="does not exist"):
        device.check()
    assert not (tmp_path / "gone.db").exists()


# --- The process's own rules ---------------------------------------------------------------------------


def test_a_job_that_is_no_job_is_an_error_event(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.sync.child"],
        input=b'{"no": "job"}',
        capture_output=True,
        env=sync_process.child_environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (event["event"], event["code"]) == ("error", "settings_invalid")


def test_the_environment_has_no_secrets_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_AGENT_MQTT__PASSWORD_FILE", "x")
    monkeypatch.setenv("OTHER_TOKEN", "x")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x")
    environment = sync_process.child_environment()
    assert "MLFLOW_TRACKING_TOKEN" in environment
    assert not {"OTHER_TOKEN", "EDGE_AGENT_MQTT__PASSWORD_FILE"} & set(environment)


def test_the_daemon_s_side_imports_nothing_heavy() -> None:
    code = (
        "import sys, edge_agent.cache.store, edge_agent.package.trust, edge_agent.cache.fsck,"
        " edge_agent.cache.eviction, edge_agent.sync.process;"
        "print([m for m in ('mlflow', 'numpy', 'pandas', 'yaml', 'model_signing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_keeps_its_kind_over_the_process_boundary(device: Device) -> None:
    with pytest.raises(EdgeAgentError) as caught:
        device.sync(replace(device.job, ref="models:/no-such-thing@prod"))
    assert type(caught.value) is UnknownReference
    assert not isinstance(caught.value, ContentError)
    assert caught.value.remedy
