"""A download into the cache, against `curl` followed by `sync` and `sha256sum`, interleaved in one run.

    python -m tests.benchmarks.download [MEGABYTES ROUNDS [folder | presigned | s3 | mirror]]

The artifacts are in a folder behind one real `mlflow server` on this machine; or in moto's S3, behind that server,
which signs addresses, or without it; or nginx, set up as docs/mirrors.md says, is a mirror of them. `curl` gets the
file as it lies there. The agent's side is a whole sync process, Python's start and MLflow's import with it, and it ends
with a verified, committed version; the time of such a process that finds nothing to do is printed, too. Prints medians,
what an update of one small file fetches, and the memory of the sync process for two sizes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil  # type: ignore[import-untyped]
from mlflow import MlflowClient

from edge_agent.package import trust
from edge_agent.sync import process as sync_process
from edge_agent.sync.protocol import SyncJob
from tests.support import s3
from tests.support.device import Device
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.nginx import nginx
from tests.support.packages import WEIGHTS, add_manifest, make_package
from tests.support.processes import short_folder

_LIMIT_S = 600
_SAMPLE_S = 0.02
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Run:
    """One sync process: how long, how much memory at most, what it said last."""

    seconds: float
    peak_mb: float
    result: dict[str, object]


def sync(job: SyncJob) -> Run:
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.sync.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=sync_process.child_environment(),
    )
    peak = [0.0]
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended))
    watcher.start()
    out, _ = process.communicate(job.encode(), timeout=_LIMIT_S)
    seconds = time.monotonic() - began
    ended.set()
    watcher.join()
    assert process.returncode == 0, out[-2_000:]
    return Run(seconds=seconds, peak_mb=peak[0], result=json.loads(out.splitlines()[-1]))


def _watch(pid: int, peak: list[float], ended: threading.Event) -> None:
    process = psutil.Process(pid)
    while not ended.wait(_SAMPLE_S):
        try:
            peak[0] = max(peak[0], process.memory_info().rss / 1e6)
        except psutil.Error:
            return


def curl(url: str, target: Path, sha256: str) -> float:
    """The same bytes with the usual tools, on the same file system."""
    began = time.monotonic()
    subprocess.run(["curl", "-sf", "-o", str(target), url], check=True, timeout=_LIMIT_S)
    subprocess.run(["sync", str(target)], check=True, timeout=_LIMIT_S)
    done = subprocess.run(["sha256sum", str(target)], check=True, timeout=_LIMIT_S, capture_output=True)
    seconds = time.monotonic() - began
    assert done.stdout.decode().startswith(sha256)
    target.unlink()
    return seconds


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where artifacts are.

    Attributes:
        artifact_root: of experiments; empty where the server knows.
        base: the address of all of them.
        mirrors: of the device.
        blobs: the folder that its mirror gives.
    """

    server: Server
    artifact_root: str
    base: str
    mirrors: tuple[str, ...] = ()
    blobs: Path | None = None

    def device(self, folder: Path) -> Device:
        device = Device(self.server.uri, folder)
        device.artifact_root = self.artifact_root
        return device

    def job(self, device: Device) -> SyncJob:
        job = device.job(timeout_s=60)
        return replace(job, cache=replace(job.cache, mirrors=self.mirrors))

    def url(self, device: Device, package: Path) -> tuple[str, str]:
        """Where the weights are for everybody, and their sha256."""
        entries = json.loads((package / "manifest.json").read_bytes())["files"]
        sha256 = next(entry["sha256"] for entry in entries if entry["path"] == WEIGHTS)
        if self.mirrors:
            return f"{self.mirrors[0]}sha256/{sha256}", sha256
        client = MlflowClient(device.uri, device.uri)
        source = urlsplit(client.get_model_version_download_uri(device.model, "1")).path.strip("/")
        return f"{self.base}/{quote(source)}/{WEIGHTS}", sha256


@contextlib.contextmanager
def running(store: str, folder: Path) -> Iterator[Place]:
    if store == "mirror":
        folder.chmod(0o711)
        (folder / "gateway" / "blobs" / "sha256").mkdir(parents=True)
        changes = {"/srv/edge-agent": f"{folder}/gateway"}
        with (
            running_mlflow_server(folder) as server,
            nginx(folder / "nginx", "nginx", changes) as address,
        ):
            url, blobs = f"{address}/blobs/", folder / "gateway" / "blobs" / "sha256"
            yield Place(server=server, artifact_root="", base="", mirrors=(url,), blobs=blobs)
        return
    if store == "folder":
        with running_mlflow_server(folder) as server:
            base = f"{server.uri}/api/2.0/mlflow-artifacts/artifacts"
            yield Place(server=server, artifact_root="", base=base)
        return
    with s3.running_s3(folder) as port:
        endpoint = f"http://127.0.0.1:{port}"
        env = {**s3.CREDENTIALS, "MLFLOW_S3_ENDPOINT_URL": endpoint}
        os.environ.update(env if store == "s3" else {})
        destination = f"s3://{s3.BUCKET}/proxied" if store == "presigned" else ""
        with running_mlflow_server(folder, destination=destination, env=env) as server:
            base = f"{endpoint}/{s3.BUCKET}{'/proxied' if destination else ''}"
            root = "" if destination else f"s3://{s3.BUCKET}/direct"
            yield Place(server=server, artifact_root=root, base=base)


def publish(device: Device, name: str, megabytes: int, note: str) -> Path:
    package = make_package(device.folder / name, trust.WRAPPER, {"requirements.txt": note}, weights=b"x")
    generator = random.Random(megabytes)
    with (package / WEIGHTS).open("wb") as file:
        for _ in range(megabytes * 1_000_000 // _PIECE_BYTES):
            file.write(generator.randbytes(_PIECE_BYTES))
    return device.register(package, tag=add_manifest(package, device.model))


def main(megabytes: int, rounds: int, store: str) -> None:
    with short_folder() as folder, running(store, folder) as place:
        small = place.device(folder / "small")
        publish(small, "package", max(1, megabytes // 10), "mlflow\n")
        small_run = sync(small.job(timeout_s=60))
        device = place.device(folder / "device")
        package = publish(device, "package", megabytes, "mlflow\n")
        url, sha256 = place.url(device, package)
        if place.blobs:
            shutil.copyfile(package / WEIGHTS, place.blobs / sha256)
            (place.blobs / sha256).chmod(0o444)
        tools_s, agent_s, peaks = [], [], []
        for number in range(rounds + 1):
            shutil.rmtree(device.store.root, ignore_errors=True)
            tools_once = curl(url, folder / "curl.out", sha256)
            run = sync(place.job(device))
            assert run.result["new"] and bool(run.result["bytes_mirrored"]) == bool(place.mirrors)
            if number:  # both sides warm
                tools_s.append(tools_once)
                agent_s.append(run.seconds)
                peaks.append(run.peak_mb)
        idle = [sync(place.job(device)).seconds for _ in range(rounds)]
        publish(device, "changed", megabytes, "mlflow # changed\n")
        update = sync(device.job(timeout_s=60))
    tools, agent = statistics.median(tools_s), statistics.median(agent_s)
    print(f"{megabytes} MB from {store}, medians of {rounds}")
    print(f"curl + sync + sha256sum           {tools:7.2f} s")
    print(f"sync process, whole               {agent:7.2f} s   {agent / tools:5.2f} x")
    print(f"sync process with nothing to do   {statistics.median(idle):7.2f} s")
    rest = agent - update.seconds  # which starts the process, imports MLflow and commits, too
    print(f"the download itself               {rest:7.2f} s   {rest / tools:5.2f} x")
    print(
        f"update of one small file          {update.seconds:7.2f} s   "
        f"{update.result['bytes_fetched']} bytes fetched"
    )
    print(
        f"peak memory of the sync process   {max(peaks):4.0f} MB for {megabytes} MB, "
        f"{small_run.peak_mb:.0f} MB for {max(1, megabytes // 10)} MB"
    )


if __name__ == "__main__":
    megabytes, rounds, store = [*sys.argv[1:], *("500", "5", "folder")[len(sys.argv) - 1 :]]
    main(int(megabytes), int(rounds), store)
