"""Answers of a registry with a wound: a sync gets a version and its files, or one of our errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import MAX_MESSAGE_CHARACTERS, EdgeAgentError
from edge_agent.package.reference import ModelRef
from edge_agent.sync.registry import Registry
from tests.attack.wounds import encoded, torn, wounded
from tests.support.generated_messages import examples
from tests.support.hostile_registry import HostileRegistry, as_json, few_requests, hostile_registry, status

pytestmark = pytest.mark.attack

API = "/api/2.0/mlflow"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
VERSION = {
    "model_version": {
        "name": "phi",
        "version": "1",
        "source": "mlflow-artifacts:/x",
        "run_id": "0" * 32,
        "tags": [{"key": "edge_agent.rollout", "value": "50"}],
    }
}
LISTING = {"files": [{"path": "MLmodel", "is_dir": False, "file_size": 4}, {"path": "a", "is_dir": True}]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def registry() -> Iterator[HostileRegistry]:
    with pytest.MonkeyPatch.context() as environment, hostile_registry() as running:
        few_requests(environment)
        yield running


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def asked(registry: HostileRegistry, scratch: Path) -> None:
    """What a sync does first."""
    client = Registry(registry.uri, timeout_s=5)
    try:
        version = client.resolve(ModelRef.parse("models:/phi@prod"))
        assert 0 < version.version < 10**18
        package = client.package(version, scratch=scratch)
        package.listing()
        with package.open("MLmodel") as stream:
            for _ in stream.chunks:
                pass
    except EdgeAgentError as error:
        assert len(error.message) <= MAX_MESSAGE_CHARACTERS + 1
        assert error.message.isprintable(), error.message


def good(registry: HostileRegistry) -> None:
    registry.requests.clear()
    registry.answers.clear()
    registry.version("phi", source="mlflow-artifacts:/x")
    registry.answers[FILES] = as_json(LISTING)
    registry.answers[f"{FILES}/x/MLmodel"] = status(200, body=b"here")


@examples(12)
@given(document=wounded(VERSION), place=st.sampled_from(["registered-models/alias", "model-versions/get"]))
def test_a_version(registry: HostileRegistry, scratch: Path, document: Any, place: str) -> None:
    good(registry)
    registry.answers[f"{API}/{place}"] = status(200, JSON, encoded(document))
    asked(registry, scratch)


@examples(12)
@given(document=wounded(LISTING))
def test_a_listing(registry: HostileRegistry, scratch: Path, document: Any) -> None:
    good(registry)
    registry.answers[FILES] = status(200, JSON, encoded(document))
    asked(registry, scratch)


@examples(12)
@given(
    body=torn(b'{"files": [{"path": "MLmodel", "is_dir": false, "file_size": 4}]}'),
    code=st.sampled_from([200, 200, 200, 204, 206, 301, 307, 400, 404, 416, 429, 500, 599]),
    headers=st.dictionaries(
        st.sampled_from(
            ["Content-Range", "Content-Encoding", "ETag", "Location", "Retry-After", "Content-Type"]
        ),
        st.sampled_from(
            ["", "bytes 0-3/4", "bytes 9-1/x", "gzip", "br", "-1", "1e9", "/", "//", "http://[::1", "é" * 9]
        ),
        max_size=2,
    ),
)
def test_an_answer(
    registry: HostileRegistry, scratch: Path, body: bytes, code: int, headers: dict[str, str]
) -> None:
    good(registry)
    registry.answers[FILES] = status(code, headers, body)
    registry.answers[f"{FILES}/x/MLmodel"] = status(code, headers, body)
    asked(registry, scratch)
