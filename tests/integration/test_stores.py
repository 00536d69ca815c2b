"""The same bad line before three stores: a folder and an S3 behind a real MLflow server, and an S3 without one.

Behind the server with S3 is a PostgreSQL, as fleets have it.
The S3 is moto's. It does not know If-Range, and signatures of any kind are right for it: what a strict store does is in
`test_presigned.py`.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from mlflow import MlflowClient
from mlflow.store.artifact import s3_artifact_repo

from edge_agent.cache import fsck, line_use
from edge_agent.cli.read_back import read_back
from edge_agent.errors import (
    LinkHeld,
    ManifestError,
    PublishError,
    RegistryRefused,
    StoreError,
    TransportError,
    VerificationError,
)
from edge_agent.host.clock import Clock
from edge_agent.package import trust
from edge_agent.publishing import register
from edge_agent.publishing.package import Package
from edge_agent.sync import http_package, s3_package
from edge_agent.sync.pace import CHUNK_BYTES
from edge_agent.sync.protocol import LinkJob
from tests.support import s3
from tests.support.clock import ScriptedClock
from tests.support.device import Device
from tests.support.http_faults import FaultyProxy, HttpFault, Plan, faulty_proxy
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.packages import WEIGHTS, add_manifest, make_package, manifest_of
from tests.support.postgres import running_postgres
from tests.support.processes import free_port, short_folder

pytestmark = pytest.mark.long  # test_presigned.py is the short way, with a scripted store

CONTENT = random.Random(5).randbytes(4_000_000)
OTHER = random.Random(6).randbytes(len(CONTENT))
FILE = Path(WEIGHTS).name
PROXIED = "proxied"
ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Store:
    """One of the three, a device that fetches from it, and the bad line in front of the store.

    Attributes:
        line: every byte of a file passes it, once.
    """

    def __init__(self, line: FaultyProxy, device: Device, artifacts: Path | None, s3_uri: str) -> None:
        self.line = line
        self.device = device
        self._artifacts = artifacts
        self._s3_uri = s3_uri

    def put(self, content: bytes) -> None:
        """Other weights, where those of the device's version are."""
        client = MlflowClient(tracking_uri=self.device.uri, registry_uri=self.device.uri)
        place = urlsplit(client.get_model_version_download_uri(self.device.model, "1"))
        path = f"{place.path.strip('/')}/{WEIGHTS}"
        if self._artifacts:
            (self._artifacts / path).write_bytes(content)
            return
        key = path if place.scheme == "s3" else f"{PROXIED}/{path}"
        s3_client = boto3.session.Session().client("s3", endpoint_url=self._s3_uri)
        s3_client.put_object(Bucket=s3.BUCKET, Key=key, Body=content)

    def cut_at(self, count: int) -> None:
        """A sync that gets so many bytes of the weights, and then nothing more."""
        self.line.use(Plan(fault=HttpFault.UNAVAILABLE, file=FILE, after_bytes=count, cut_first=True))
        with pytest.raises(TransportError, match="503"):
            self.device.sync()
        self.line.use(Plan(fault=HttpFault.NONE, file=FILE))

    def assert_whole(self) -> None:
        (record,) = self.device.store.versions()
        assert (self.device.store.folder(record) / WEIGHTS).read_bytes() == CONTENT
        assert fsck.verify(self.device.store).damaged == ()


@pytest.fixture(scope="module")
def s3_line() -> Iterator[FaultyProxy]:
    with short_folder() as folder, s3.running_s3(folder) as port, faulty_proxy("127.0.0.1", port) as line:
        yield line


@pytest.fixture(scope="module")
def s3_server(s3_line: FaultyProxy) -> Iterator[Server]:
    """An MLflow server with its artifacts in S3: it and everybody else go there over the bad line."""
    env = {**s3.CREDENTIALS, "MLFLOW_S3_ENDPOINT_URL": s3_line.uri}
    with (
        short_folder() as folder,
        short_folder() as data,
        running_postgres(data) as backend,
        running_mlflow_server(
            folder, destination=f"s3://{s3.BUCKET}/{PROXIED}", backend=backend, env=env
        ) as server,
    ):
        yield server


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"


@pytest.fixture
def direct(s3_line: FaultyProxy, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_line.uri)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # as in a new process, which a sync has
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    s3_line.use(Plan(fault=HttpFault.NONE, file=""))
    device = Device(database, tmp_path)
    device.artifact_root = f"s3://{s3.BUCKET}/direct"
    return Store(s3_line, device, None, s3_line.uri)


@pytest.fixture(params=["folder", "presigned", "direct"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "direct":
        yield request.getfixturevalue("direct")
    elif request.param == "presigned":
        line, server = request.getfixturevalue("s3_line"), request.getfixturevalue("s3_server")
        for name, value in s3.CREDENTIALS.items():
            monkeypatch.setenv(name, value)  # of the test's own S3 client; a device needs none
        line.use(Plan(fault=HttpFault.NONE, file=""))
        yield Store(line, Device(server.uri, tmp_path), None, line.uri)
    else:
        server = request.getfixturevalue("mlflow_server")
        server.start()
        with faulty_proxy(server.host, server.port) as line:
            yield Store(line, Device(line.uri, tmp_path), server.artifacts, "")


def test_a_run_goes_on_where_the_one_before_was_cut(store: Store) -> None:
    store.device.publish(weights=CONTENT)
    store.cut_at(len(CONTENT) * 9 // 10)
    assert store.device.sync().new
    store.assert_whole()
    assert store.line.body_bytes <= len(CONTENT) // 10 + http_package.LEAST_SIGNED_BYTES


def test_a_line_that_cuts_every_connection_brings_the_version_all_the_same(store: Store) -> None:
    store.device.publish(weights=CONTENT)
    store.line.use(Plan(fault=HttpFault.TRUNCATE, file=FILE, after_bytes=len(CONTENT) // 10))
    assert store.device.sync().new
    store.assert_whole()
    assert store.line.answers >= 10
    assert store.line.body_bytes <= 1.2 * len(CONTENT)


def test_a_line_that_cuts_each_connection_at_40_megabytes_ends_with_the_version(store: Store) -> None:
    content = random.Random(9).randbytes(90_000_000)
    store.device.publish(weights=content)
    store.line.use(Plan(fault=HttpFault.TRUNCATE, file=FILE, after_bytes=40_000_000))
    assert store.device.sync().new
    (record,) = store.device.store.versions()
    assert (store.device.store.folder(record) / WEIGHTS).read_bytes() == content
    assert store.line.answers >= 3
    assert store.line.body_bytes <= 1.2 * len(content)


def test_a_package_without_a_manifest_goes_on_too(store: Store) -> None:
    store.device.publish(weights=CONTENT, manifest=False)
    seconds = itertools.count(step=0.3)  # so that what is here is noted after every piece
    store.device.clock = Clock(now_s=lambda: next(seconds), sleep=lambda seconds: None)
    store.cut_at(len(CONTENT) * 9 // 10)
    assert store.device.sync().new
    store.assert_whole()
    assert store.line.body_bytes <= len(CONTENT) // 10 + CHUNK_BYTES


def test_a_file_that_is_changed_between_two_runs_is_fetched_whole(store: Store) -> None:
    store.device.publish(weights=CONTENT)
    store.put(OTHER)
    store.cut_at(len(CONTENT) // 2)
    store.put(CONTENT)
    assert store.device.sync().new
    store.assert_whole()


def test_a_file_that_is_changed_for_another_one_is_refused(store: Store) -> None:
    store.device.publish(weights=CONTENT)
    store.cut_at(len(CONTENT) // 2)
    store.put(OTHER)
    with pytest.raises(VerificationError, match="not the one in its manifest"):
        store.device.sync()
    assert store.device.has_nothing_final()


def test_the_cap_on_bandwidth_and_the_room_that_is_left_hold(store: Store) -> None:
    store.device.publish(weights=CONTENT)
    job = store.device.job()
    time = ScriptedClock()
    store.device.clock = time.clock
    with pytest.raises(StoreError, match="do not fit"):
        store.device.sync(replace(job, cache=replace(job.cache, quota_bytes=len(CONTENT))))
    assert store.device.sync(replace(job, cache=replace(job.cache, max_bytes_per_s=500_000))).new
    assert time.now_s >= len(CONTENT) / 500_000 - 2


def test_a_bound_in_bytes_holds_and_every_byte_counts_on_every_way(store: Store) -> None:
    device, job = store.device, store.device.job()
    package = device.publish(weights=CONTENT)
    size_bytes = sum(file.size_bytes for file in manifest_of(package, device.model).files)
    bound = LinkJob(allowed_bytes=1_500_000, ahead_bytes=100_000)
    with pytest.raises(LinkHeld):
        device.sync(replace(job, link=bound))
    came = used_bytes(device)
    assert 1_500_000 <= came <= 1_500_000 + CHUNK_BYTES
    (held,) = (event for event in device.events if event["event"] == "held")
    assert (held["version"], held["fetched_bytes"], held["missing_bytes"]) == (1, came, size_bytes - came)
    store.cut_at(len(CONTENT) // 10)
    assert used_bytes(device) == came, "nobody counts where there is no bound"
    with pytest.raises(LinkHeld):
        device.sync(replace(job, link=LinkJob(allowed_bytes=0)))
    assert device.sync(replace(job, link=replace(bound, allowed_bytes=None))).new
    store.assert_whole()
    assert used_bytes(device) < size_bytes, "what is here did not come again"


def used_bytes(device: Device) -> int:
    return line_use.used_bytes(device.store, lambda at_s: True)


def test_an_s3_that_is_down_is_out_of_reach(direct: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    direct.device.publish()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransportError, match=f"artifact store s3://{s3.BUCKET} cannot be reached") as caught:
        direct.device.sync()
    assert caught.value.code == "registry_unreachable"


def test_a_listing_without_end_is_left_after_as_many_files_as_a_package_may_have(
    direct: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct.device.publish(weights=b"x")
    direct.device.sync()
    monkeypatch.setattr(s3_package, "MAX_LISTED", 3)
    direct.device.publish(weights=b"y")
    with pytest.raises(ManifestError, match="more than"):
        direct.device.sync()


def test_an_s3_without_credentials_refuses(direct: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    direct.device.publish()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(RegistryRefused, match=r"no credentials.*aws-access-key-id") as caught:
        direct.device.sync()
    assert caught.value.code == "registry_refused"


@pytest.mark.parametrize("status", [401, 403])
def test_an_s3_that_does_not_let_the_device_in_refuses(direct: Store, status: int) -> None:
    direct.device.publish()
    direct.line.authorization, direct.line.refusal = "of another device", (status, b"")
    try:
        with pytest.raises(RegistryRefused, match=f"it answered {status}.*aws-access-key-id"):
            direct.device.sync()
    finally:
        direct.line.authorization = None


def test_an_object_that_is_gone_is_named(direct: Store) -> None:
    direct.device.publish()
    direct.line.use(Plan(fault=HttpFault.GONE, file=FILE))
    with pytest.raises(TransportError, match=f"s3://{s3.BUCKET} answered 404"):
        direct.device.sync()
    assert direct.line.answers == 1


def test_an_s3_behind_a_server_that_is_down_is_out_of_reach(
    s3_server: Server, s3_line: FaultyProxy, tmp_path: Path
) -> None:
    s3_line.use(Plan(fault=HttpFault.NONE, file=""))
    device = Device(s3_server.uri, tmp_path)
    device.publish(weights=CONTENT)
    s3_line.use(Plan(fault=HttpFault.UNAVAILABLE, file=FILE))
    with pytest.raises(TransportError, match="503"):
        device.sync()
    s3_line.authorization, s3_line.refusal = "nobody", (503, b"")
    try:
        with pytest.raises(TransportError):
            device.sync()
    finally:
        s3_line.authorization = None


def test_without_boto3_an_s3_source_says_what_to_install(
    direct: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct.device.publish()
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(TransportError, match=r"needs boto3; install edge-agent\[s3\]"):
        direct.device.sync()


@pytest.fixture
def package(direct: Store) -> Package:
    folder = make_package(direct.device.folder / "made", trust.WRAPPER, {"artifacts/model/empty": b""})
    add_manifest(folder, direct.device.model)
    return Package(folder=folder, manifest=manifest_of(folder, direct.device.model))


@pytest.fixture
def experiment(direct: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `publish` puts its runs is in S3."""
    client = MlflowClient(tracking_uri=direct.device.uri, registry_uri=direct.device.uri)
    name = f"exp-{direct.device.model}"
    client.create_experiment(name, artifact_location=direct.device.artifact_root)
    monkeypatch.setattr(register, "EXPERIMENT", name)


def publish(direct: Store, package: Package) -> None:
    register.publish(
        package,
        registry_uri=direct.device.uri,
        name=direct.device.model,
        alias="prod",
        read_back=read_back,
    )


@pytest.mark.usefixtures("experiment")
def test_what_was_published_to_s3_comes_from_there(direct: Store, package: Package) -> None:
    publish(direct, package)
    assert direct.device.sync().new


@pytest.mark.usefixtures("experiment")
def test_publish_says_what_is_missing_for_s3(
    direct: Store, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(PublishError, match=r"could not upload the files: .*set AWS_ACCESS_KEY_ID"):
        publish(direct, package)
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(PublishError, match=r"could not upload the files: .*install edge-agent\[s3\]"):
        publish(direct, package)


@pytest.mark.usefixtures("experiment")
def test_publish_to_an_s3_that_refuses_names_the_credentials(direct: Store, package: Package) -> None:
    direct.line.authorization, direct.line.refusal = "of nobody", (403, ACCESS_DENIED)
    try:
        with pytest.raises(PublishError, match=r"could not upload the files: .*check AWS_ACCESS_KEY_ID"):
            publish(direct, package)
    finally:
        direct.line.authorization = None
