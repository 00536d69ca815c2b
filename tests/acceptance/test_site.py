"""A site of many devices behind one line, with the configurations of docs/mirrors.md: what the line carries."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_agent.publishing import publish_folder
from edge_agent.sync.process import run_sync
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, SyncResult
from tests.support.client import chat, connected
from tests.support.http_faults import HttpFault, Plan, faulty_proxy
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.nginx import USER, block, nginx
from tests.support.processes import running_daemon, short_folder
from tests.support.proxy import Proxy
from tests.support.sample_device import settings_for, wait_for_state

pytestmark = pytest.mark.long

DEVICES = 12
NEIGHBOURS = 20
EXTRA_BYTES = 85_000_000
LINE_BYTES_PER_S = 20e6 / 8
NAME = "site"


@pytest.fixture(scope="module")
def version_bytes(mlflow_server: Server, sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The sample model with a large file beside it, in the registry; the size of the version."""
    folder = tmp_path_factory.mktemp("site") / "model"
    shutil.copytree(sample_model, folder)
    (folder / "notes.bin").write_bytes(random.Random(12).randbytes(EXTRA_BYTES))
    publish_folder(folder, name=NAME, registry_uri=mlflow_server.uri, alias="prod")
    return sum(file.stat().st_size for file in folder.iterdir())


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A short folder that nginx's workers may pass through."""
    with short_folder() as folder:
        folder.chmod(0o711)
        yield folder


def settings_of(broker: Broker, line: str, device: str, **cache: object) -> dict[str, object]:
    settings = settings_for(broker, line, device=device, cache=cache, inference={"threads": 1})
    return {**settings, "models": {"assistant": {"uri": f"models:/{NAME}@prod"}}}


def test_twelve_devices_behind_one_line_fetch_a_version_once(
    broker: Broker, mlflow_server: Server, version_bytes: int
) -> None:
    line = Proxy(mlflow_server.host, mlflow_server.port)
    line.slow(LINE_BYTES_PER_S)
    uri = f"http://{line.host}:{line.port}"
    with ExitStack() as stack:
        stack.callback(line.close)
        places = [stack.enter_context(open_folder()) for _ in range(DEVICES)]
        blobs = places[0] / "state" / "models" / "blobs"
        (blobs / "sha256").mkdir(parents=True)
        for private in (blobs / "sha256", blobs, blobs.parent, blobs.parent.parent):
            private.chmod(0o700)
        with_mount = os.geteuid() == 0
        if with_mount:  # otherwise nginx runs as this user, which may read its own files
            documented = block("sh").splitlines()[1]
            command = documented.replace("www-data", USER).replace(
                "/var/lib/edge-agent", str(places[0] / "state")
            )
            subprocess.run(command.split(), check=True)
        home = stack.enter_context(open_folder())
        root = str(home / "root") if with_mount else str(blobs.parent)
        gateway = stack.enter_context(
            nginx(home, "nginx", {"/srv/edge-agent": root}, mount=blobs if with_mount else None)
        )
        first = stack.enter_context(running_daemon(settings_of(broker, uri, "site-0"), folder=places[0]))
        others = [
            stack.enter_context(
                running_daemon(
                    settings_of(
                        broker,
                        uri,
                        f"site-{number}",
                        mirrors=[f"{gateway}/blobs"],
                        mirror_patience_s=1200,
                    ),
                    folder=places[number],
                )
            )
            for number in range(1, DEVICES)
        ]
        for daemon in (first, *others):
            wait_for_state(daemon, "ready", 600)
        assert version_bytes <= line.slowed_bytes <= 1.1 * version_bytes
        for number, daemon in enumerate(others, start=1):
            assert "bytes_mirrored=0 " not in daemon.log and "bytes_mirrored=" in daemon.log
            with connected(broker, device=f"site-{number}") as client:
                assert (
                    client.ask(chat("What is the capital of Spain?")).text
                    == "The capital of Spain is Madrid."
                )
        print(f"\n{DEVICES} devices: {line.slowed_bytes / version_bytes:.3f} of the version over the line")


def test_twenty_devices_behind_a_cache_cost_the_registry_one_request(
    mlflow_server: Server, version_bytes: int, tmp_path: Path
) -> None:
    with open_folder() as home, faulty_proxy(mlflow_server.host, mlflow_server.port) as origin:
        origin.use(Plan(fault=HttpFault.NONE, file="notes.bin"))
        places = {
            "http://mlflow.example.org": origin.uri,
            "/var/cache/nginx/mlflow": f"{home}/cache",
        }
        with nginx(home, "nginx-cache", places) as cache:
            results: list[SyncResult] = []

            def sync(number: int) -> None:
                job = SyncJob(
                    state_dir=str(tmp_path / str(number)),
                    registry=RegistryJob(uri=cache, timeout_s=120),
                    name="assistant",
                    ref=f"models:/{NAME}@prod",
                    cache=CacheJob(min_free_bytes=0),
                )
                results.append(run_sync(job, timeout_s=600))

            threads = [threading.Thread(target=sync, args=(number,)) for number in range(NEIGHBOURS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(600)
        assert len(results) == NEIGHBOURS and all(result.new for result in results)
        assert (origin.answers, origin.body_bytes) == (1, EXTRA_BYTES)
