"""The same request to a device over MQTT and to `mlflow models serve` over HTTP, with the same package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing.package import build_package
from tests.real.conftest import NAME, THREADS
from tests.support.client import Client, chat
from tests.support.elsewhere import ScoringServer

PLACES = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "visits": {"type": "integer", "maximum": 99}},
    "required": ["city", "visits"],
}


@pytest.fixture(scope="module")
def server(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoringServer]:
    folder = tmp_path_factory.mktemp("elsewhere")
    package = build_package(real_model, folder / "package", name=NAME, signature="chat", options={})
    with ScoringServer(package.folder, folder / "serve", {"threads": THREADS}).running() as running:
        yield running


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.2, "seed": 5, "top_p": 0.8, "top_k": 20},
        {"repetition_penalty": 1.3, "stop": ["."]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": PLACES}}},
        {
            "response_format": {"type": "regex", "regex": "(Paris|Rome|Oslo), [0-9]{2}"},
            "temperature": 1,
            "seed": 1,
        },
    ],
    ids=str,
)
def test_a_request_has_the_same_text_over_mqtt_and_from_mlflow(
    options: dict[str, Any], client: Client, server: ScoringServer
) -> None:
    request = chat("Which city would you visit, and how often?", max_tokens=32, model="assistant", **options)
    status, answer = server.post(request)
    assert status == 200, answer
    message = client.ask(request)
    (choice,) = answer[0]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        message.text,
        message.json["choices"][0]["finish_reason"],
    )
