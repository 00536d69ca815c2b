"""The two versions of the sample model that a machine goes to and fro between: from a registry, and from files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from edge_agent.publishing import publish_folder
from tests.machine import tokens
from tests.support.mlflow_server import Server

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "edge_agent" / "demo" / "sample_model"
_FOLDERS = (SAMPLE, ROOT / "tests" / "models" / "swapped")
_FILES = ("sample.model", "second.model")
_NAME, _ALIAS = "sample", "prod"


def publish(server: Server) -> None:
    """Both, in the order in which prepare.sh makes the files; the alias is the first one's."""
    for folder in _FOLDERS:
        publish_folder(folder, name=_NAME, registry_uri=server.uri)
    move_alias(server, 1)


def move_alias(server: Server, version: int) -> None:
    MlflowClient(server.uri, server.uri).set_registered_model_alias(_NAME, _ALIAS, str(version))


def file(version: int) -> str:
    """The name of a version file in the payload."""
    return _FILES[version - 1]


def reference(questions: tuple[str, ...], version: int = 1) -> list[dict[str, object]]:
    """What this host's library answers, in a process of its own."""
    command = [sys.executable, tokens.__file__, str(_FOLDERS[version - 1]), *questions]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found: list[dict[str, object]] = json.loads(said.splitlines()[-1])
    return found
