"""Files that a load does not open, and lines that it does not print, with a real runner."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import PolicyError
from edge_agent.publishing.package import build_package
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Load

SECRET = "correct-horse-battery-staple==1"


@pytest.fixture(scope="module")
def package(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("reads") / "package"
    return build_package(sample_model, target, name="sample", signature="chat", options={}).folder


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[RunnerProcess]:
    running = RunnerProcess(model="assistant", environment=child_environment(tmp_path))
    yield running
    running.kill()


def test_a_load_follows_no_line_of_the_requirements(
    package: Path, tmp_path: Path, runner: RunnerProcess
) -> None:
    """The pipe would hold it for ever. The policy refuses such a file; this is a version that was taken before."""
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text(SECRET)
    (folder / "requirements.txt").write_text(f"{SECRET}\n-r {tmp_path / 'secret'}\n-r {tmp_path / 'pipe'}\n")
    load = Load(folder=str(folder), context_tokens=256, max_tokens=8, threads=1)
    assert runner.load(load, timeout_s=120).signature == "chat"
    assert SECRET not in runner.last_output()


def test_a_tokenizer_that_names_a_pipe_is_refused(
    package: Path, tmp_path: Path, runner: RunnerProcess
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    os.mkfifo(tmp_path / "pipe")
    file = folder / "artifacts/onnx/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tiktoken_file": "../../../pipe"}))
    load = Load(folder=str(folder), context_tokens=256, max_tokens=8, threads=1)
    with pytest.raises(PolicyError, match="'tiktoken_file' is not allowed"):
        runner.load(load, timeout_s=120)
