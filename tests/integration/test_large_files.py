"""Files beyond 2 and 4 GiB, from `publish` to a second device, with memory that does not grow with them.

The files are sparse, with marks around the sizes where 31 and 32 bits end and on the last byte; nothing skips their
holes. The default run takes the same way with files of a few MiB.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cache.store import Store
from edge_agent.errors import PolicyError, VerificationError
from edge_agent.package import manifest as manifests
from edge_agent.package import onnx_bounds, trust
from edge_agent.package.manifest import ManifestFile
from edge_agent.package.reference import ModelVersion
from edge_agent.publishing import register
from edge_agent.publishing.package import Package
from edge_agent.sync import files as sync_files
from edge_agent.sync import version_file
from edge_agent.sync.files import LocalPackage
from edge_agent.sync.registry import Registry
from tests.support.committed import make_record
from tests.support.keys import KeyPair, make_keys
from tests.support.mlflow_server import Server
from tests.support.onnx_files import message, node, number, tensor, varint
from tests.support.processes import clean_environment, short_folder, to_toml, wait_until

MIB, GIB = 1 << 20, 1 << 30
MAX_MEMORY_MIB = 400
"""Of any process: MLflow and onnxruntime-genai with the sample model take 300."""
MODEL = "large"
WHOLE_S = 60.0
"""How long the longer file takes while it is slowed down, in order to be interrupted after a tenth of it."""
TIMEOUT_S = 900
MEASURED = """
import pathlib, resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""
"""Runs a command and writes how much memory its largest process took, in KiB. A small program does that: a process
counts what it was forked from, and pytest's memory would be the command's."""


@dataclass(frozen=True)
class Sizes:
    """Of the two files, in bytes. `longer` comes first in every order of paths."""

    shorter: int
    longer: int


@pytest.fixture(
    params=[
        pytest.param(Sizes(shorter=2 * MIB + 1, longer=5 * MIB + 1), id="MiB"),
        pytest.param(Sizes(shorter=2 * GIB + 1, longer=4 * GIB + 1), id="GiB", marks=pytest.mark.long),
    ]
)
def sizes(request: pytest.FixtureRequest) -> Sizes:
    found: Sizes = request.param
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose files are gone when the test ends: pytest would keep what `tmp_path` holds."""
    with short_folder() as folder:
        yield folder


def write_sparse(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for mark in (0, 2 * GIB - 4, 4 * GIB - 4, size_bytes - 8):
            if mark <= size_bytes - 8:
                file.seek(mark)
                file.write(mark.to_bytes(7, "big") + b"!")


def flip_last_byte(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, io.SEEK_END)
        file.write(bytes([last ^ 1]))
    path.chmod(mode)


class Device:
    """`edge-agent` without a daemon: each command does its work itself, in processes that are measured."""

    def __init__(self, folder: Path, registry_uri: str, keys: KeyPair) -> None:
        folder.mkdir()
        self.folder = folder
        self.state = folder / "state"
        self.config: dict[str, Any] = {
            "device_id": folder.name,
            "state_dir": str(self.state),
            "control_socket": str(folder / "c.sock"),
            "mqtt": {"host": "127.0.0.1"},
            "inference": {"threads": 1},
            "models": {"assistant": {"uri": f"models:/{MODEL}@prod"}},
            "registry": {"uri": registry_uri} if registry_uri else {},
            "trust": {"public_keys": [str(keys.public)]},
            "cache": {"quota_bytes": 1 << 40},
        }

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A command in a process group of its own."""
        config = self.folder / "config.toml"
        config.write_text(to_toml(self.config))
        with (self.folder / "stdout").open("wb") as stdout, (self.folder / "stderr").open("wb") as stderr:
            return subprocess.Popen(
                [
                    *(sys.executable, "-c", MEASURED, str(self.folder / "peak")),
                    *(sys.executable, "-m", "edge_agent", "--config", str(config), *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=clean_environment({"HOME": str(self.folder), "TMPDIR": str(self.folder)}),
                start_new_session=True,
            )

    def run(self, *arguments: str) -> Any:
        """Runs a command to its end, and looks at the memory of the largest of its processes; gives its JSON."""
        process = self.start(*arguments, "--json")
        with ending(process):
            process.wait(TIMEOUT_S)
        assert process.returncode == 0, (self.folder / "stderr").read_text()
        peak_mib = int((self.folder / "peak").read_text()) >> 10
        assert 20 < peak_mib < MAX_MEMORY_MIB, (arguments, peak_mib)
        return json.loads((self.folder / "stdout").read_text())

    def fetched(self, digest: str) -> int:
        """How much of a file is in staging, in bytes."""
        found = list(self.state.glob(f"models/staging/*/parts/{digest}.part"))
        return sum(path.stat().st_size for path in found)


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Everything that the process started has ended after the block."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            process.wait(60)


def children_ended(state: Path) -> bool:
    """True when no process works on a device's files any longer: a sync has a session of its own."""
    return not any(str(state) in line for line in _open_files())


def _open_files() -> Sequence[str]:
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return found


def test_large_files_go_from_publish_to_a_second_device(
    sizes: Sizes, place: Path, sample_model: Path, mlflow_server: Server
) -> None:
    keys = make_keys(place, "release")
    device = Device(place / "first", mlflow_server.uri, keys)

    source = shutil.copytree(sample_model, place / "source")
    write_sparse(source / "a-longer.data", sizes.longer)
    write_sparse(source / "shorter.data", sizes.shorter)
    published = device.run(
        *("publish", str(source), "--name", MODEL, "--alias", "prod", "--sign-key", str(keys.private))
    )
    shutil.rmtree(source)
    artifacts = mlflow_server.artifacts / next(
        path.relative_to(mlflow_server.artifacts).parts[0]
        for path in mlflow_server.artifacts.rglob("a-longer.data")
    )
    (uploaded,) = artifacts.rglob(f"{published['run_id']}/**/manifest.json")
    files = {file["path"]: file for file in json.loads(uploaded.read_text())["files"]}
    longer, shorter = (files[f"artifacts/onnx/{name}.data"] for name in ("a-longer", "shorter"))
    assert (longer["size"], shorter["size"]) == (sizes.longer, sizes.shorter)

    # A fetch that is interrupted is resumed, and what it fetched is not fetched again.
    device.config["cache"]["max_bytes_per_s"] = int(sizes.longer / WHOLE_S)
    process = device.start("models", "pull", "assistant")
    with ending(process):
        wait_until(
            lambda: device.fetched(longer["sha256"]) > sizes.longer // 10, TIMEOUT_S, "a tenth of a file"
        )
    wait_until(lambda: children_ended(device.state), 60, "the end of the sync")
    had = device.fetched(longer["sha256"])
    assert sizes.longer // 10 < had < sizes.longer
    del device.config["cache"]["max_bytes_per_s"]
    pulled = device.run("models", "pull", "assistant")
    total = sum(file["size"] for file in files.values())
    assert total - had - MIB < pulled["bytes_fetched"] <= total - had, "the small files were here, too"

    # The signature covers the last byte, and a damaged file is fetched again, and no other one.
    store = Store(device.state)
    (record,) = store.versions("assistant")
    assert record.manifest.digest == published["digest"]
    tree = store.folder(record)
    assert trust.check_signature(tree, record.manifest, [str(keys.public)])
    flip_last_byte(tree / longer["path"])
    with pytest.raises(VerificationError, match="signature"):
        trust.check_signature(tree, record.manifest, [str(keys.public)])
    repaired = device.run("models", "verify")
    assert [damage["path"] for damage in repaired["repaired"]] == [longer["path"]]
    assert trust.check_signature(tree, record.manifest, [str(keys.public)])
    shutil.rmtree(artifacts)

    # The version as a file, and on a device without a registry.
    stick = place / "large.tar"
    exported = device.run("models", "export", "assistant", str(record.version), str(stick))
    assert exported["bytes"] == stick.stat().st_size > sizes.longer + sizes.shorter
    shutil.rmtree(device.state)
    second = Device(place / "second", "", keys)
    assert second.run("models", "import", str(stick))["state"] == "active"
    (taken,) = Store(second.state).versions("assistant")
    assert taken.manifest == record.manifest


# --- Behind 32 bits, without the bytes in front of it ----------------------------------------------------

FAR = 9 * GIB + 100
"""Beyond what eleven octal digits of a tar header say, too."""


@pytest.fixture
def sparse_folder(place: Path) -> Path:
    folder = place / "package"
    folder.mkdir()
    write_sparse(folder / "far.data", FAR)
    return folder


def end_of(package: sync_files.Package) -> bytes:
    """The last eight bytes of the file, asked for by their offset."""
    assert {file.path: file.size_bytes for file in package.listing()} == {"far.data": FAR}
    with package.open("far.data", offset=FAR - 8) as stream:
        assert stream.start == FAR - 8
        return b"".join(stream.chunks)


END = (FAR - 8).to_bytes(7, "big") + b"!"


def test_a_folder_is_read_from_there(sparse_folder: Path) -> None:
    assert end_of(LocalPackage(sparse_folder)) == END


def test_a_registry_is_asked_from_there(sparse_folder: Path, mlflow_server: Server) -> None:
    artifacts = mlflow_server.artifacts / "far"
    artifacts.mkdir(parents=True)
    try:
        (sparse_folder / "far.data").rename(artifacts / "far.data")
        version = ModelVersion(name="far", version=1, run_id="", source="mlflow-artifacts:/far", tags={})
        registry = Registry(mlflow_server.uri, timeout_s=60)
        assert end_of(registry.package(version, scratch=sparse_folder)) == END
    finally:
        shutil.rmtree(artifacts)


def test_a_version_file_is_read_from_there(sparse_folder: Path, place: Path) -> None:
    file = ManifestFile(path="far.data", size_bytes=FAR, sha256="0" * 64)
    header = make_record(manifests.make("phi", [file]), 1).encode()
    with (place / "far.tar").open("w+b") as stream:
        for name, size_bytes in (("version.json", len(header)), (f"blobs/{file.sha256}", FAR)):
            info = tarfile.TarInfo(name)
            info.size = size_bytes
            stream.write(info.tobuf(tarfile.GNU_FORMAT))
            start = stream.tell()
            if name == "version.json":
                stream.write(header)
            else:
                stream.seek(start + FAR - 8)
                stream.write(END)
            stream.truncate(start + size_bytes + -size_bytes % 512)
            stream.seek(0, io.SEEK_END)
        stream.write(bytes(1024))
        assert end_of(version_file.read_package(stream)) == END


def test_a_graph_is_judged_from_there(place: Path) -> None:
    """What stands behind the weights of a graph is looked at, whatever their size."""
    loop = message(1, node("ConstantOfShape", ["shape"], ["out"]))
    shape = message(5, tensor("shape", [1 << 40]))
    weights = number(2, 1) + message(8, "weights")
    raw = varint(9 << 3 | 2) + varint(FAR)
    initializer = varint(5 << 3 | 2) + varint(len(weights) + len(raw) + FAR) + weights + raw
    graph_bytes = len(initializer) + FAR + len(shape) + len(loop)
    with (place / "far.onnx").open("wb") as stream:
        stream.write(varint(7 << 3 | 2) + varint(graph_bytes) + initializer)
        stream.seek(FAR, io.SEEK_CUR)
        stream.write(shape + loop)
    with pytest.raises(PolicyError, match="ConstantOfShape"):
        onnx_bounds.check(place / "far.onnx", "far.onnx", package_bytes=FAR)


# --- Time ------------------------------------------------------------------------------------------------


def test_an_upload_waits_as_long_as_a_server_may_need_to_store_it(
    sparse_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    waits: dict[str, int] = {}

    class Client:
        def log_artifact(self, run_id: str, path: str, place: str) -> None:
            waits[Path(path).name] = MLFLOW_HTTP_REQUEST_TIMEOUT.get()

        def set_terminated(self, run_id: str, *, status: str) -> None:
            """Nothing is registered."""

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    (sparse_folder / "MLmodel").write_text("small")
    manifest = manifests.make("phi", [ManifestFile(path="far.data", size_bytes=FAR, sha256="0" * 64)])
    package = Package(manifest=manifest, folder=sparse_folder)
    registration = register._Registration(package, "http://127.0.0.1:9", "phi")
    registration.client = Client()
    registration.upload(lambda step, done, total: None)
    assert waits == {"MLmodel": 60, "far.data": FAR // (4 << 20)}
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 60
