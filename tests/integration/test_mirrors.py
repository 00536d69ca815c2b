"""Mirrors that behave well and badly, before a real registry: the right bytes always, and how few from the registry."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.staging import staging
from edge_agent.doctor import mirrors
from edge_agent.settings import Settings
from edge_agent.settings.cache import CacheSettings
from edge_agent.sync import process
from edge_agent.sync.mirrors import places
from edge_agent.sync.protocol import SyncResult
from tests.support.blob_server import BlobServer, Manners, blob_server
from tests.support.certificates import Authority
from tests.support.device import Device
from tests.support.http_faults import FaultyProxy, HttpFault, Plan, faulty_proxy
from tests.support.mlflow_server import Server
from tests.support.packages import WEIGHTS
from tests.support.processes import free_port

SIZE_BYTES = 3_000_000
CONTENT = random.Random(3).randbytes(SIZE_BYTES)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = Path(WEIGHTS).name


class Site:
    """A device that reaches the registry over a line where bytes are counted, and mirrors beside it."""

    def __init__(self, device: Device, line: FaultyProxy) -> None:
        self.device = device
        self.line = line
        self.package = device.publish(weights=CONTENT)
        line.use(Plan(fault=HttpFault.NONE, file=FILE))

    def fill(self, folder: Path) -> None:
        """Gives a mirror's folder every blob of the version."""
        for file in self.package.rglob("*"):
            if file.is_file():
                target = folder / "sha256" / hashlib.sha256(file.read_bytes()).hexdigest()
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def sync(self, *mirrors: str, ca_file: str = "") -> SyncResult:
        job = self.device.job(uri=self.line.uri)
        result = self.device.sync(
            replace(job, cache=replace(job.cache, mirrors=mirrors, mirror_ca_file=ca_file))
        )
        record = self.device.store.versions("assistant")[-1]
        assert (self.device.store.folder(record) / WEIGHTS).read_bytes() == CONTENT
        assert not fsck.verify(self.device.store).damaged
        return result


@pytest.fixture
def site(mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards
    mlflow_server.start()
    with faulty_proxy(mlflow_server.host, mlflow_server.port) as line:
        yield Site(Device(mlflow_server.uri, tmp_path / "device"), line)


@pytest.fixture
def mirror(site: Site, tmp_path: Path) -> Iterator[BlobServer]:
    with blob_server(tmp_path / "mirror") as server:
        site.fill(server.folder)
        yield server


def test_a_site_fetches_nothing_twice(site: Site, mirror: BlobServer) -> None:
    result = site.sync(mirror.url)
    assert site.line.body_bytes == 0
    assert result.bytes_mirrored == result.bytes_fetched == mirror.sent_bytes > SIZE_BYTES


def test_the_confined_process_reads_a_stick(site: Site, tmp_path: Path) -> None:
    site.fill(tmp_path / "a stick" / "blobs")
    job = site.device.job(uri=site.line.uri)
    url = f"{(tmp_path / 'a stick' / 'blobs').as_uri()}/"
    result = process.run_sync(replace(job, cache=replace(job.cache, mirrors=(url,))), timeout_s=300)
    assert (site.line.body_bytes, result.bytes_mirrored) == (0, result.bytes_fetched)


def test_no_credential_and_no_cookie_reaches_a_mirror(
    site: Site, mirror: BlobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login operator password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter3")
    mirror.manners = Manners(headers={"Set-Cookie": "id=1"})
    site.sync(mirror.url)
    assert len(mirror.asked) > 1
    for asked in mirror.asked:
        assert set(asked.headers) <= {"host", "user-agent", "accept", "accept-encoding", "connection"}
        assert asked.headers["accept-encoding"] == "identity"


def test_a_mirror_that_dies_in_the_middle_leaves_the_rest_to_the_registry(
    site: Site, mirror: BlobServer
) -> None:
    mirror.manners = Manners(dies_after=2_000_000)
    site.sync(mirror.url)
    assert 0 < site.line.body_bytes <= SIZE_BYTES - 1_900_000


def test_a_mirror_without_ranges_costs_no_byte_that_is_here(site: Site, mirror: BlobServer) -> None:
    store = site.device.store
    store.create()
    with staging(store, "assistant", 1) as place:
        place.part(path=WEIGHTS, sha256=SHA256).write_bytes(CONTENT[:2_500_000])
    site.line.use(Plan(fault=HttpFault.UNAVAILABLE, file=FILE))
    mirror.manners = Manners(ranges=False)
    site.sync(mirror.url)
    assert [asked.headers["range"] for asked in mirror.asked if SHA256 in asked.path] == ["bytes=2500000-"]


@pytest.mark.parametrize(
    "manners",
    [
        Manners(flips=0),
        Manners(flips=SIZE_BYTES - 1),
        Manners(longer=1000),
        Manners(status=500),
        Manners(status=302, headers={"Location": "/elsewhere"}),
        Manners(status=206),
        Manners(headers={"Content-Encoding": "gzip"}),
        Manners(piece_bytes=1000, pause_s=0.05),
        Manners(status=404),
        Manners(status=403),
        Manners(headers={"X-Long": "x" * 100_000}),
    ],
    ids=[
        "first byte",
        "last byte",
        "longer",
        "500",
        "redirect",
        "206 unasked",
        "gzip",
        "slow",
        "404",
        "403",
        "headers",
    ],
)
def test_a_bad_mirror_costs_the_registry_one_version(
    site: Site, mirror: BlobServer, manners: Manners, monkeypatch: pytest.MonkeyPatch
) -> None:
    if manners.pause_s:  # else an answer that is late by as much is a fault of its own
        monkeypatch.setattr(places, "WINDOW_S", 0.5)
    if manners.flips >= 0:  # of this file only, for the others are shorter
        for blob in (mirror.folder / "sha256").iterdir():
            if blob.name != SHA256:
                blob.unlink()
    mirror.manners = manners
    site.sync(mirror.url)
    taken = 1_000_000 if manners.pause_s else 0  # what a slow one gave is kept
    assert SIZE_BYTES - taken <= site.line.body_bytes <= SIZE_BYTES
    assert mirror.asked
    asked = len(mirror.asked)
    site.device.publish({"requirements.txt": "mlflow>=3\n"}, weights=CONTENT)
    site.sync(mirror.url)
    left_alone = manners.status not in (403, 404)
    assert (len(mirror.asked) == asked) is left_alone


def test_nobody_listens_and_nothing_is_lost(site: Site) -> None:
    result = site.sync(f"http://127.0.0.1:{free_port()}/")
    assert (site.line.body_bytes, result.bytes_mirrored) == (SIZE_BYTES, 0)


def test_a_private_authority_vouches_for_a_mirror(site: Site, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with blob_server(tmp_path / "mirror", tls=authority.server()) as mirror:
        site.fill(mirror.folder)
        site.sync(mirror.url)
        assert mirror.asked == [], "its certificate is nobody's"
        site.device.store.mirrors_file.unlink()
        site.device.publish({"requirements.txt": "mlflow\n"}, weights=CONTENT + b"1")
        job = site.device.job(uri=site.line.uri)
        site.device.sync(
            replace(job, cache=replace(job.cache, mirrors=(mirror.url,), mirror_ca_file=str(authority.file)))
        )
        assert mirror.asked


def test_doctor_says_what_each_mirror_gives(site: Site, mirror: BlobServer, tmp_path: Path) -> None:
    site.sync()
    shutil.rmtree(mirror.folder / "sha256")
    site.fill(tmp_path / "stick")
    with blob_server(tmp_path / "wrong") as wrong, blob_server(tmp_path / "shut") as shut:
        site.fill(wrong.folder)
        wrong.manners, shut.manners = Manners(flips=0), Manners(status=403)
        urls = (
            f"{(tmp_path / 'stick').as_uri()}/",
            mirror.url,
            wrong.url,
            shut.url,
            f"{(tmp_path / 'unplugged').as_uri()}/",
            f"http://127.0.0.1:{free_port()}/",
        )
        settings = Settings(
            device_id="dev",
            state_dir=site.device.store.root.parent,
            control_socket=tmp_path / "control.sock",
            cache=CacheSettings(mirrors=urls),
        )
        found = list(mirrors.check(settings))
    assert [finding.level for finding in found] == ["ok", "ok", "warn", "warn", "warn", "warn"]
    said = [
        "gives a blob",
        "does not have",
        "other bytes",
        "answered 403",
        "is not there",
        "cannot be reached",
    ]
    for finding, part, url in zip(found, said, urls, strict=True):
        assert part in finding.message and url in finding.message
