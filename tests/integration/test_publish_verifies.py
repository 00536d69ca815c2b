"""`publish` asks the registry before it builds anything, and reads its upload back before an alias moves."""

from __future__ import annotations

import functools
import ssl
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent import publishing
from edge_agent.cli.read_back import read_back
from edge_agent.errors import PublishError
from edge_agent.package import trust
from edge_agent.publishing import publish_folder, register
from edge_agent.publishing.package import Package
from tests.support.certificates import Authority
from tests.support.device import Device
from tests.support.hostile_registry import hostile_registry
from tests.support.http_faults import FaultyProxy, HttpFault, Plan, faulty_proxy
from tests.support.mlflow_server import Server
from tests.support.packages import add_manifest, make_package, manifest_of
from tests.support.processes import free_port

WEIGHTS = "model.onnx.data"
publish_verified = functools.partial(publish_folder, read_back=read_back, alias="prod")


@pytest.fixture
def proxy(mlflow_server: Server) -> Iterator[FaultyProxy]:
    mlflow_server.start()
    with faulty_proxy(mlflow_server.host, mlflow_server.port) as before:
        yield before


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """Under a name of its own, and without a model: here it only has to arrive."""
    name = f"damaged-{uuid.uuid4().hex[:8]}"
    folder = make_package(tmp_path / "package", trust.WRAPPER)
    add_manifest(folder, name)
    return Package(manifest=manifest_of(folder, name), folder=folder)


def publish(package: Package, uri: str) -> int:
    return register.publish(
        package, registry_uri=uri, name=package.manifest.name, alias="prod", read_back=read_back
    ).version


def alias_of(uri: str, name: str) -> Any:
    import mlflow

    found = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri).get_registered_model(name)
    return found.aliases.get("prod")


def test_what_arrived_whole_gets_the_alias_and_a_device_pulls_it(
    proxy: FaultyProxy, sample_model: Path, tmp_path: Path
) -> None:
    device = Device(proxy.uri, tmp_path)
    steps: list[str] = []
    published = publish_verified(
        sample_model,
        name=device.model,
        registry_uri=proxy.uri,
        progress=lambda step, done, total: steps.append(step),
    )
    shown = list(dict.fromkeys(steps))
    assert shown[-4:] == ["uploading", "registering", "reading back", "moving the alias"]
    assert device.sync().digest == published.digest


@pytest.mark.parametrize(
    ("fault", "file", "reason"),
    [
        (HttpFault.SHORT_UPLOAD, WEIGHTS, r"model\.onnx\.data' has \d+ bytes, its manifest says \d+"),
        (HttpFault.SHORT_UPLOAD, "manifest.json", "manifest.json of version .* is not the published one"),
        (HttpFault.FLIP_UPLOAD, "MLmodel", "'MLmodel' is not what was uploaded"),
        (HttpFault.FLIP_UPLOAD, "genai_config.json", "genai_config.json' is not what was uploaded"),
    ],
)
def test_an_upload_that_was_damaged_on_its_way_leaves_the_alias_where_it_was(
    proxy: FaultyProxy, package: Package, fault: HttpFault, file: str, reason: str
) -> None:
    assert publish(package, proxy.uri) == 1
    proxy.use(Plan(fault=fault, file=file))
    with pytest.raises(PublishError, match=reason) as caught:
        publish(package, proxy.uri)
    assert f"version 2 of '{package.manifest.name}' is registered" in caught.value.message
    assert caught.value.message.endswith("alias prod still points to version 1")
    assert "delete version 2" in caught.value.remedy
    assert alias_of(proxy.uri, package.manifest.name) == "1"


def test_a_first_version_that_was_damaged_leaves_no_alias(proxy: FaultyProxy, package: Package) -> None:
    proxy.use(Plan(fault=HttpFault.SHORT_UPLOAD, file=WEIGHTS))
    with pytest.raises(PublishError, match="alias prod was not set"):
        publish(package, proxy.uri)
    assert alias_of(proxy.uri, package.manifest.name) is None


def test_the_variables_of_mlflow_are_afterwards_what_they_were(
    mlflow_server: Server, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    mlflow_server.start()
    monkeypatch.setenv(TIMEOUT.name, "17")
    monkeypatch.delenv(RETRIES.name, raising=False)
    publish(package, mlflow_server.uri)
    assert (TIMEOUT.get_raw(), RETRIES.get_raw()) == ("17", None)


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the package was built")

    monkeypatch.setattr(publishing, "build_package", build)


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "http://127.0.0.1:{nobody}",
            "reach the registry: Connection refused; check that the server is running",
        ),
        ("https://127.0.0.1:{somebody}", "does not speak TLS: is it http://?"),
        ("http://no-such-host.invalid:5000", "check that the server is running"),
    ],
)
def test_a_wrong_address_is_an_error_before_anything_is_read(
    mlflow_server: Server, sample_model: Path, uri: str, said: str
) -> None:
    started_s = time.monotonic()
    with pytest.raises(PublishError, match="could not reach the registry") as caught:
        publish_verified(
            sample_model,
            name="x",
            registry_uri=uri.format(nobody=free_port(), somebody=mlflow_server.port),
        )
    assert said in str(caught.value)
    assert time.monotonic() - started_s < 120


@pytest.mark.usefixtures("no_build")
def test_a_private_authority_is_said_to_be_unknown(sample_model: Path, tmp_path: Path) -> None:
    pair = Authority(tmp_path).server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    with hostile_registry(context) as registry, pytest.raises(PublishError, match="certificate") as caught:
        publish_verified(sample_model, name="x", registry_uri=registry.uri)
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in caught.value.remedy


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ((401, b"You are not authenticated."), "set MLFLOW_TRACKING_USERNAME"),
        ((403, b"<html>Forbidden</html>"), "set MLFLOW_TRACKING_USERNAME"),
        ((200, b"<html>Log in</html>"), "see what answers there"),
        ((404, b"not here"), "see what answers there"),
    ],
)
def test_a_registry_that_refuses_is_an_error_before_anything_is_read(
    proxy: FaultyProxy, sample_model: Path, refusal: tuple[int, bytes], remedy: str
) -> None:
    proxy.authorization, proxy.refusal = "Bearer right", refusal
    with pytest.raises(PublishError, match="could not reach the registry") as caught:
        publish_verified(sample_model, name="x", registry_uri=proxy.uri)
    assert remedy in caught.value.remedy
    assert proxy.refused == 1


@pytest.mark.usefixtures("no_build")
def test_a_database_that_cannot_be_used_is_an_error_before_anything_is_read(
    sample_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "registry.db").write_text("no database " * 100)
    with pytest.raises(PublishError, match="could not reach the registry"):
        publish_verified(sample_model, name="x", registry_uri=f"sqlite:///{tmp_path}/registry.db")
    with pytest.raises(PublishError, match=r"cannot be made: Not a directory"):
        publish_verified(sample_model, name="x", registry_uri=f"sqlite:///{tmp_path}/registry.db/new/r.db")


def test_a_folder_of_the_wrong_kind_is_an_error_before_the_registry_is_asked(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(PublishError, match="is a GGUF model"):
        publish_verified(tmp_path, name="x", registry_uri=f"http://127.0.0.1:{free_port()}")
