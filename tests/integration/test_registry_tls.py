"""A registry with an authority of its own that asks for a certificate: who must prove what to whom."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.doctor import certificates as certificates_check
from edge_agent.doctor import registry as registry_check
from edge_agent.doctor.finding import Level
from edge_agent.errors import SettingsError, TransportError, UnknownReference
from edge_agent.package.reference import ModelRef
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.sync.process import run_sync
from edge_agent.sync.protocol import RegistryJob, SyncJob
from edge_agent.sync.registry import Registry
from edge_agent.sync.tls import NO_FILES, TlsFiles
from tests.support.certificates import Authority, Pair
from tests.support.hostile_registry import HostileRegistry, as_json, few_requests, hostile_registry, status
from tests.support.processes import clean_environment, to_toml

CONTENT = b"w" * 100_000
FILES = "/api/2.0/mlflow-artifacts/artifacts"
SIGNED = "/api/2.0/mlflow-artifacts/presigned"
TOKEN = "a-token-of-this-device"


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    few_requests(monkeypatch, token=TOKEN)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def server_context(authority: Authority, *, asks: ssl.VerifyMode) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.file))
    pair = authority.server()
    context.load_cert_chain(pair.certificate, pair.key)
    context.verify_mode = asks
    return context


@pytest.fixture
def registry(authority: Authority) -> Iterator[HostileRegistry]:
    with hostile_registry(server_context(authority, asks=ssl.CERT_REQUIRED)) as running:
        running.version("phi", source="mlflow-artifacts:/x")
        listed = {"path": "weights", "is_dir": False, "file_size": len(CONTENT)}
        running.answers[FILES] = as_json({"files": [listed]})
        running.answers[f"{FILES}/x/weights"] = status(200, body=b"through the registry")
        yield running


def files_of(authority: Authority, pair: Pair) -> TlsFiles:
    return TlsFiles(ca_file=str(authority.file), cert_file=str(pair.certificate), key_file=str(pair.key))


@pytest.fixture
def files(authority: Authority) -> TlsFiles:
    return files_of(authority, authority.client("press-3"))


def read_weights(registry: HostileRegistry, files: TlsFiles, tmp_path: Path) -> bytes:
    client = Registry(registry.uri, timeout_s=10, tls=files)
    version = client.resolve(ModelRef.parse("models:/phi@prod"))
    package = client.package(version, scratch=tmp_path / "scratch")
    package.listing()
    with package.open("weights") as stream:
        return b"".join(stream.chunks)


def test_the_registry_sees_the_device_s_certificate_in_each_request(
    registry: HostileRegistry, files: TlsFiles, tmp_path: Path
) -> None:
    assert read_weights(registry, files, tmp_path) == b"through the registry"
    assert len(registry.peers) >= 4
    assert set(registry.peers) == {"press-3"}


@pytest.mark.parametrize("wrong", ["no authority", "another authority", "no certificate"])
def test_a_registry_is_out_of_reach_where_one_side_proves_nothing(
    registry: HostileRegistry, authority: Authority, files: TlsFiles, tmp_path: Path, wrong: str
) -> None:
    other = Authority(tmp_path, "Other CA")
    others = {
        "no authority": TlsFiles(cert_file=files.cert_file, key_file=files.key_file),
        "another authority": TlsFiles(
            ca_file=str(other.file), cert_file=files.cert_file, key_file=files.key_file
        ),
        "no certificate": TlsFiles(ca_file=str(authority.file)),
    }
    with pytest.raises(TransportError, match="cannot be reached"):
        read_weights(registry, others[wrong], tmp_path)
    assert registry.requests == []


def test_a_store_of_the_same_authority_gives_files_and_sees_no_certificate(
    registry: HostileRegistry, authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    with hostile_registry(server_context(authority, asks=ssl.CERT_OPTIONAL)) as store:
        store.answers["/object"] = status(200, {"ETag": '"v1"'}, CONTENT)
        registry.answers["/api/3.0/mlflow/server-info"] = as_json({"multipart_downloads_enabled": True})
        registry.answers[f"{SIGNED}/x/weights"] = as_json({"url": f"{store.uri}/object?key", "headers": {}})
        assert read_weights(registry, files, tmp_path) == CONTENT
        assert store.peers == [""]
        assert TOKEN not in str(store.requests)


def test_public_authorities_count_for_a_store_and_not_for_the_registry(
    registry: HostileRegistry, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`REQUESTS_CA_BUNDLE` stands for the public ones: the store is of them, and so is a registry in the middle."""
    public = Authority(tmp_path, "Public CA")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(public.file))
    files = files_of(authority, authority.client("press-3"))
    with hostile_registry(server_context(public, asks=ssl.CERT_OPTIONAL)) as other:
        other.answers["/object"] = status(200, body=CONTENT)
        registry.answers["/api/3.0/mlflow/server-info"] = as_json({"multipart_downloads_enabled": True})
        registry.answers[f"{SIGNED}/x/weights"] = as_json({"url": f"{other.uri}/object?key", "headers": {}})
        assert read_weights(registry, files, tmp_path) == CONTENT
        with pytest.raises(TransportError, match="cannot be reached"):
            read_weights(other, files, tmp_path)


def test_the_sync_process_and_doctor_get_the_files(
    registry: HostileRegistry, files: TlsFiles, tmp_path: Path
) -> None:
    registry.answers["/api/2.0/mlflow/registered-models/alias"] = status(
        404,
        {"Content-Type": "application/json"},
        b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}',
    )
    job = SyncJob(
        state_dir=str(tmp_path / "state"),
        registry=RegistryJob(uri=registry.uri, timeout_s=10, tls=files),
        name="assistant",
        ref="models:/phi@prod",
    )
    with pytest.raises(UnknownReference):
        run_sync(job, timeout_s=300)
    registry.version("phi", source="mlflow-artifacts:/x")
    found = {
        finding.check: finding for finding in registry_check.check(settings_of(registry, files, tmp_path))
    }
    assert {check: finding.level for check, finding in found.items()} == {
        "registry.reach": Level.OK,
        "registry.alias": Level.OK,
        "registry.files": Level.OK,
    }
    assert set(registry.peers) == {"press-3"}


def settings_of(registry: HostileRegistry, files: TlsFiles, tmp_path: Path) -> Settings:
    return Settings(
        device_id="dev",
        state_dir=tmp_path / "state",
        control_socket=tmp_path / "c.sock",
        registry=RegistrySettings(
            uri=registry.uri, ca_file=files.ca_file, cert_file=files.cert_file, key_file=files.key_file
        ),
        models={"assistant": ModelSettings(uri="models:/phi@prod")},
    )


@pytest.mark.parametrize("code", [403, 500])
def test_doctor_finds_a_version_whose_files_do_not_come(
    registry: HostileRegistry, files: TlsFiles, tmp_path: Path, code: int
) -> None:
    registry.answers[f"{FILES}/x/weights"] = status(code)
    found = {
        finding.check: finding for finding in registry_check.check(settings_of(registry, files, tmp_path))
    }
    assert found["registry.alias"].level is Level.OK
    assert found["registry.files"].level is Level.FAIL
    assert found["registry.files"].code == ("registry_refused" if code == 403 else "registry_unreachable")


def test_files_that_do_not_load_are_named_by_their_key_and_not_shown(
    authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    NO_FILES.check()
    files.check()
    key = Path(files.key_file).read_text()
    other = authority.client("press-4")
    for wrong, named in (
        (TlsFiles(ca_file=str(tmp_path / "gone")), r"registry\.ca_file: "),
        (TlsFiles(ca_file=files.key_file), r"registry\.ca_file: "),
        (
            TlsFiles(cert_file=files.cert_file, key_file=str(other.key)),
            r"registry\.cert_file, registry\.key_file: ",
        ),
    ):
        with pytest.raises(SettingsError, match=named) as caught:
            wrong.check()
        assert key.splitlines()[1] not in str(caught.value)


def test_doctor_says_when_the_certificates_expire(files: TlsFiles) -> None:
    settings = RegistrySettings(
        uri="https://registry.example",
        ca_file=files.ca_file,
        cert_file=files.cert_file,
        key_file=files.key_file,
    )
    found = list(certificates_check.check_registry(settings))
    assert [finding.level for finding in found] == [Level.WARN, Level.WARN], "they last a day"
    assert "registry.ca_file" in found[0].message and "registry.cert_file" in found[1].message


def test_the_daemon_does_not_start_with_files_that_do_not_load(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    registry = {"uri": "https://registry.example", "ca_file": str(tmp_path / "gone.crt")}
    config.write_text(to_toml({"state_dir": str(tmp_path / "state"), "registry": registry}))
    result = subprocess.run(
        [sys.executable, "-m", "edge_agent", "--config", str(config), "run"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean_environment(),
    )
    assert result.returncode == 78
    assert "registry.ca_file" in result.stderr
