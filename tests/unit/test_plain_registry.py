"""The one plain request of a check: what it carries, what its answer means, and when MLflow has to ask instead."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import requests

from edge_agent.errors import (
    EdgeAgentError,
    ManifestError,
    RegistryRefused,
    TransportError,
    UnknownReference,
)
from edge_agent.package.reference import MANIFEST_TAG, ModelRef, ModelVersion
from edge_agent.sync.registry import plain

URI = "http://registry.example:5000/"
REF = ModelRef.parse("models:/phi@prod")
VERSION = {"name": "phi", "version": "7", "source": "mlflow-artifacts:/x", "run_id": "r1"}


class ScriptedSession:
    """Answers each request the same way, and keeps what was asked."""

    def __init__(self, status: int, body: object) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._response = requests.Response()
        self._response.status_code = status
        self._response._content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def get(self, url: str, **kwargs: Any) -> requests.Response:
        self.asked.append((url, kwargs))
        return self._response


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No credentials of this host."""
    for name in ("TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4", "INSECURE_TLS", "SERVER_CERT_PATH"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def find(status: int, body: object, ref: ModelRef = REF) -> ModelVersion:
    return plain.find(ref, URI, ScriptedSession(status, body))  # type: ignore[arg-type]


def sent() -> dict[str, Any]:
    session = ScriptedSession(200, {"model_version": VERSION})
    plain.find(REF, URI, session)  # type: ignore[arg-type]
    ((_, kwargs),) = session.asked
    return kwargs


# --- The question --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "endpoint", "params"),
    [
        ("models:/phi@prod", "registered-models/alias", {"name": "phi", "alias": "prod"}),
        ("models:/phi/7", "model-versions/get", {"name": "phi", "version": "7"}),
    ],
)
def test_an_alias_and_a_number_are_one_request_each(uri: str, endpoint: str, params: dict[str, str]) -> None:
    session = ScriptedSession(200, {"model_version": VERSION})
    found = plain.find(ModelRef.parse(uri), URI, session)  # type: ignore[arg-type]
    assert (found.version, found.source, found.run_id) == (7, "mlflow-artifacts:/x", "r1")
    ((url, kwargs),) = session.asked
    assert url == f"http://registry.example:5000/api/2.0/mlflow/{endpoint}"
    assert kwargs["params"] == params


@pytest.mark.parametrize(
    ("credentials", "authorization"),
    [
        ({}, None),
        ({"TOKEN": "t"}, "Bearer t"),
        ({"USERNAME": "u", "PASSWORD": "pä"}, "Basic dTpww6Q="),
        ({"USERNAME": "u", "PASSWORD": "pä", "TOKEN": "t"}, "Basic dTpww6Q="),
        ({"USERNAME": "u", "TOKEN": "t"}, "Bearer t"),
        ({"TOKEN": ""}, None),
    ],
)
def test_it_carries_what_mlflow_would_send(
    variables: pytest.MonkeyPatch, credentials: dict[str, str], authorization: str | None
) -> None:
    from mlflow.utils.credentials import get_default_host_creds

    for name, value in credentials.items():
        variables.setenv(f"MLFLOW_TRACKING_{name}", value)
    assert sent()["headers"].get("Authorization") == authorization
    theirs = get_default_host_creds(URI)
    assert (theirs.username or "", theirs.password or "", theirs.token or "") == tuple(
        credentials.get(name, "") for name in ("USERNAME", "PASSWORD", "TOKEN")
    ), "MLflow reads the same variables"


def test_mlflow_s_variables_of_tls_hold(variables: pytest.MonkeyPatch) -> None:
    assert sent()["verify"] is True
    variables.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    variables.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", "/own.pem")
    assert (sent()["verify"], sent()["cert"]) == (False, "/own.pem")
    variables.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/ca.pem")
    assert sent()["verify"] == "/ca.pem"


# --- The answer ----------------------------------------------------------------------------------------


def test_tags_are_taken() -> None:
    tags = [{"key": MANIFEST_TAG, "value": "ab"}, {"key": "note"}]
    found = find(200, {"model_version": {**VERSION, "tags": tags}})
    assert (found.manifest_sha256, found.tags["note"]) == ("ab", "")


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"200 OK",
            b"[]",
            b"7",
            b"\xff",
            b"[" * 100_000,
            {},
            {"model_version": 7},
            {"model_version": {}},
        ),
        {"model_version": {**VERSION, "tags": 7}},
        {"model_version": {**VERSION, "tags": ["x"]}},
        {"model_version": {**VERSION, "tags": [{"key": 1}]}},
        {"model_version": {**VERSION, "tags": [{"key": [], "value": ""}]}},
        {"model_version": {**VERSION, "source": None}},
        {"model_version": {**VERSION, "run_id": 1}},
    ],
)
def test_an_answer_of_another_shape_is_no_version(body: object) -> None:
    with pytest.raises(TransportError, match="cannot be read"):
        find(200, body)


def test_an_answer_about_something_else_is_refused() -> None:
    with pytest.raises(TransportError, match="another model"):
        find(200, {"model_version": {**VERSION, "name": "other"}})
    with pytest.raises(TransportError, match="another model or version"):
        find(200, {"model_version": VERSION}, ModelRef.parse("models:/phi/8"))


@pytest.mark.parametrize("version", ["0", "-1", "1" * 19, "１", 1.5, None])
def test_a_number_that_no_version_has_is_refused(version: object) -> None:
    with pytest.raises(ManifestError, match="no version number"):
        find(200, {"model_version": {**VERSION, "version": version}})


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "x"}, UnknownReference, "has no models:/phi@prod"),
        (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "x"}, UnknownReference, "has no models:/phi@prod"),
        (401, b"", RegistryRefused, "refuses this device;"),
        (403, {"error_code": "PERMISSION_DENIED"}, RegistryRefused, "refuses this device;"),
        (500, {"error_code": "UNAUTHENTICATED"}, RegistryRefused, "refuses this device;"),
        (401, {"message": "No."}, RegistryRefused, "what stands before it answered 401: No."),
        (500, {"error_code": "INTERNAL_ERROR", "message": "x"}, TransportError, "an error: 500: INTERNAL_ERROR: x"),
        (503, b"<html>busy</html>", TransportError, "something else that answered: 503"),
        (404, b"<html>", TransportError, "something else that answered: 404"),
        (451, {"message": "not here"}, TransportError, "something else that answered: 451: not here"),
        (302, b"", TransportError, "something else that answered: 302"),
    ],
)  # fmt: skip
def test_what_another_status_means(
    status: int, body: object, error: type[EdgeAgentError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        find(status, body)
    assert type(caught.value) is error


def test_a_registry_that_is_not_there_is_out_of_reach() -> None:
    class Broken(ScriptedSession):
        def get(self, url: str, **kwargs: Any) -> requests.Response:
            raise requests.ConnectionError("pool") from ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(TransportError, match="cannot be reached: Connection refused"):
        plain.find(REF, URI, Broken(200, b""))  # type: ignore[arg-type]


# --- Who asks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["http://r", "https://r/base", "HTTPS://r"])
def test_an_mlflow_server_is_asked_plainly(uri: str) -> None:
    assert plain.knows_how_to_ask(uri)


@pytest.mark.parametrize(
    "uri", ["sqlite:///x", "databricks", "databricks-uc://x", "file:///x", "other://r", ""]
)
def test_another_kind_of_registry_is_mlflow_s(uri: str) -> None:
    assert not plain.knows_how_to_ask(uri)


@pytest.mark.parametrize(
    ("name", "value", "plainly"),
    [("AUTH", "kubernetes", False), ("AUTH", "", True), ("AWS_SIGV4", "true", False), ("AWS_SIGV4", "false", True)],
)  # fmt: skip
def test_what_signs_requests_is_mlflow_s(
    variables: pytest.MonkeyPatch, name: str, value: str, plainly: bool
) -> None:
    variables.setenv(f"MLFLOW_TRACKING_{name}", value)
    assert plain.knows_how_to_ask(URI) == plainly


def test_credentials_in_mlflow_s_own_file_are_mlflow_s(tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").touch()
    assert not plain.knows_how_to_ask(URI)


def test_a_home_that_cannot_be_looked_into_has_no_credentials(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("HOME", "/" + "x" * 300)  # for root, the one that always says no
    assert plain.knows_how_to_ask(URI)


def test_where_a_plugin_adds_headers_mlflow_asks(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlflow.request_header_provider]\nx = plugin:X\n")
    variables.syspath_prepend(str(tmp_path))
    assert [each.name for each in importlib.metadata.entry_points(group=plain.PLUGINS)] == ["x"]
    assert not plain.knows_how_to_ask(URI)
