"""Fetching through a proxy that spoils answers: always the right bytes, or a clear error."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.store import Store
from edge_agent.errors import CacheBusy, StoreError, TransportError, VerificationError
from edge_agent.sync import fetch, process
from edge_agent.sync.protocol import CacheJob
from tests.support.device import Device
from tests.support.http_faults import FaultyProxy, HttpFault, Plan, faulty_proxy
from tests.support.mlflow_server import Server
from tests.support.packages import WEIGHTS

FILE = "model.onnx.data"
SIZE_BYTES = 3_000_000
CONTENT = random.Random(1).randbytes(SIZE_BYTES)


@pytest.fixture
def device(mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards
    mlflow_server.start()
    return Device(mlflow_server.uri, tmp_path)


@pytest.fixture
def proxy(mlflow_server: Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(mlflow_server.host, mlflow_server.port) as running:
        yield running


def has_right_bytes(device: Device) -> bool:
    (record,) = device.store.versions("assistant")
    whole = (device.store.folder(record) / WEIGHTS).read_bytes() == CONTENT
    return whole and not fsck.verify(device.store).damaged


def timeout_of(plan: Plan) -> float:
    """Seconds. It holds for every question of a sync, and only what stalls has to wait for it."""
    return 3 if plan.fault in (HttpFault.STALL, HttpFault.TRICKLE) else 60


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(fault=HttpFault.TRUNCATE, file=FILE, after_bytes=1_000_000, times=2),
        Plan(fault=HttpFault.TRUNCATE, file=FILE, after_bytes=0, times=2),
        Plan(fault=HttpFault.RESET, file=FILE, after_bytes=1_000_000, times=2),
        Plan(fault=HttpFault.STALL, file=FILE, after_bytes=1_000_000, times=1),
        Plan(fault=HttpFault.TRICKLE, file=FILE, after_bytes=1_000_000, times=1),
        Plan(fault=HttpFault.SHORTER, file=FILE, times=2),
        Plan(fault=HttpFault.LONGER, file=FILE, times=1),
        Plan(fault=HttpFault.UNAVAILABLE, file=FILE, times=2),
        Plan(fault=HttpFault.IGNORE_RANGE, file=FILE, after_bytes=1_000_000, cut_first=True),
        Plan(fault=HttpFault.WRONG_RANGE, file=FILE, after_bytes=1_000_000, cut_first=True, times=2),
        Plan(fault=HttpFault.OTHER_ETAG, file=FILE, after_bytes=1_000_000, cut_first=True, times=2),
    ],
    ids=lambda plan: f"{plan.fault}-{plan.after_bytes}",
)
def test_a_registry_that_recovers_brings_the_right_bytes(
    device: Device, proxy: FaultyProxy, plan: Plan, manifest: bool
) -> None:
    device.publish(weights=CONTENT, manifest=manifest)
    proxy.use(plan)
    assert device.sync(device.job(uri=proxy.uri, timeout_s=timeout_of(plan))).new
    assert has_right_bytes(device)
    assert proxy.answers >= 2 or plan.fault is HttpFault.LONGER


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (Plan(fault=HttpFault.TRUNCATE, file=FILE, after_bytes=0), TransportError),
        (Plan(fault=HttpFault.RESET, file=FILE, after_bytes=0), TransportError),
        (Plan(fault=HttpFault.STALL, file=FILE, after_bytes=0), TransportError),
        (Plan(fault=HttpFault.TRICKLE, file=FILE, after_bytes=0), TransportError),
        (Plan(fault=HttpFault.UNAVAILABLE, file=FILE), TransportError),
        (Plan(fault=HttpFault.GONE, file=FILE), TransportError),
        (Plan(fault=HttpFault.FLIP, file=FILE), VerificationError),
        (Plan(fault=HttpFault.WRONG_RANGE, file=FILE, after_bytes=9_000, cut_first=True), TransportError),
        (Plan(fault=HttpFault.OTHER_ETAG, file=FILE, after_bytes=9_000, cut_first=True), None),
    ],
    ids=lambda value: str(value.fault) if isinstance(value, Plan) else "",
)
def test_a_registry_that_does_not_recover_is_a_clear_error(
    device: Device, proxy: FaultyProxy, plan: Plan, error: type[Exception] | None
) -> None:
    device.publish(weights=CONTENT)
    proxy.use(plan)
    if error is None:
        assert device.sync(device.job(uri=proxy.uri, timeout_s=timeout_of(plan))).new
        assert has_right_bytes(device)
        return
    with pytest.raises(error) as caught:
        device.sync(device.job(uri=proxy.uri, timeout_s=timeout_of(plan)))
    assert FILE in str(caught.value) or "registry" in str(caught.value)
    assert 1 <= proxy.answers <= fetch.MAX_ATTEMPTS + 1
    assert device.has_nothing_final()
    proxy.use(Plan(fault=HttpFault.NONE, file=FILE))
    assert device.sync(device.job(uri=proxy.uri)).new
    assert has_right_bytes(device)


def cut_off(device: Device, proxy: FaultyProxy, after_bytes: int) -> None:
    """A sync that gets so much of the file, and then no answer any more."""
    proxy.use(Plan(fault=HttpFault.UNAVAILABLE, file=FILE, after_bytes=after_bytes, cut_first=True))
    with pytest.raises(TransportError):
        device.sync(device.job(uri=proxy.uri))
    proxy.use(Plan(fault=HttpFault.NONE, file=FILE))


def test_after_a_cut_at_90_percent_the_second_run_fetches_the_last_10(
    device: Device, proxy: FaultyProxy
) -> None:
    content = random.Random(2).randbytes(30_000_000)
    device.publish(weights=content)
    cut_off(device, proxy, 27_000_000)
    result = device.sync(device.job(uri=proxy.uri))
    assert proxy.body_bytes <= 3_000_000 + (1 << 20)
    assert result.bytes_fetched <= 3_000_000 + (1 << 20)
    assert proxy.ranges == ["bytes=27000000-"]


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
def test_a_file_that_changes_between_two_runs_is_not_mixed(
    device: Device,
    proxy: FaultyProxy,
    mlflow_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    manifest: bool,
) -> None:
    monkeypatch.setattr(fetch, "_NOTE_INTERVAL_S", 0.0)
    content, other = os.urandom(SIZE_BYTES), os.urandom(SIZE_BYTES)
    device.publish(weights=content, manifest=manifest)
    cut_off(device, proxy, 2_000_000)
    (stored,) = (path for path in mlflow_server.artifacts.rglob(FILE) if path.read_bytes() == content)
    stored.write_bytes(other)
    os.utime(stored, (1_000, 1_000))
    if manifest:
        with pytest.raises(VerificationError):
            device.sync(device.job(uri=proxy.uri))
        assert device.has_nothing_final()
        return
    assert device.sync(device.job(uri=proxy.uri)).new
    assert proxy.ranges[0].startswith("bytes="), "it has tried to go on"
    (record,) = device.store.versions()
    assert (device.store.folder(record) / WEIGHTS).read_bytes() == other


def test_bytes_that_a_power_loss_spoiled_are_not_gone_on_with(
    device: Device, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_NOTE_INTERVAL_S", 0.0)
    device.publish(weights=CONTENT, manifest=False)
    cut_off(device, proxy, 2_000_000)
    (part,) = (path for path in device.store.staging_root.rglob("*.part"))
    with part.open("r+b") as file:
        file.write(bytes(4_096))
    assert device.sync(device.job(uri=proxy.uri)).new
    assert proxy.ranges == [""]
    assert has_right_bytes(device)


# --- The disk, and others ------------------------------------------------------------------------------

LIMITED_SYNC = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
runpy.run_module("edge_agent.sync.child", run_name="__main__")
"""


def test_a_disk_that_takes_no_more_ends_the_fetch_and_is_freed(device: Device) -> None:
    device.publish(weights=CONTENT)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_SYNC, "1000000"],
        input=device.job().encode(),
        capture_output=True,
        env=process.child_environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert b'"cache_failed"' in done.stdout.splitlines()[-1]
    assert b"File too large" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert device.has_nothing_final()
    assert device.store.used_bytes() == 0
    assert device.sync().new


def test_a_fetch_stops_before_it_takes_the_last_space_of_others(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.publish(weights=CONTENT)
    free = device.store.free_bytes()

    def others_write_meanwhile(store: Store) -> int:
        return 400_000_000 if any(store.staging_root.glob("*/parts/*.part")) else free

    monkeypatch.setattr(type(device.store), "free_bytes", others_write_meanwhile)
    with pytest.raises(StoreError, match="min_free_bytes"):
        device.sync(replace(device.job(), cache=CacheJob(min_free_bytes=1_000_000_000)))
    assert device.store.used_bytes() == 0


def test_one_fetch_at_a_time_has_the_cache(device: Device, proxy: FaultyProxy) -> None:
    device.publish(weights=CONTENT)
    other = Device(device.uri, device.folder)
    other.publish()  # before the sync: its HTTP session is for every request of this process
    proxy.use(Plan(fault=HttpFault.STALL, file=FILE, after_bytes=500_000, times=1))
    first = threading.Thread(target=lambda: device.sync(device.job(uri=proxy.uri, timeout_s=20)))
    first.start()
    try:
        fetch_started(device)
        with pytest.raises(CacheBusy, match="fetching"):
            other.sync(replace(other.job(), name="other"))
    finally:
        proxy.released.set()
        first.join(60)
    assert has_right_bytes(device)


def fetch_started(device: Device) -> None:
    from tests.support.processes import wait_until

    wait_until(lambda: any(device.store.staging_root.rglob("*.part")), 60, "the first fetch")
