"""A GGUF file is published as any folder is: made into one, tried, and taken by a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.cache.store import Store
from edge_agent.errors import PublishError
from edge_agent.package import onnx_graph
from edge_agent.publishing import write_folder
from edge_agent.sync.protocol import TrustJob
from tests.support import gguf_models as models
from tests.support.gguf_files import Q4_1
from tests.support.version_files import bring_in


def test_a_gguf_file_becomes_a_version_that_a_device_takes(tmp_path: Path) -> None:
    source = models.small_model(Q4_1).write(tmp_path / "small.Q4_1.gguf")
    steps: list[str] = []
    written = write_folder(
        source,
        name="small",
        file=tmp_path / "small.tar",
        progress=lambda step, done, total: steps.append(step),
    )
    assert list(dict.fromkeys(steps))[:2] == ["checking", "converting"]
    assert written.limits == ()
    store = Store(tmp_path / "device")
    record = bring_in(store, written.file, ref=f"models:/small/{written.version}", policy=TrustJob())
    paths = {file.path for file in record.manifest.files}
    assert {"artifacts/onnx/model.onnx", "artifacts/onnx/model.onnx.data"} <= paths
    assert not any(path.endswith(".gguf") for path in paths)
    folder = store.folder(record) / "artifacts" / "onnx"
    graph = onnx_graph.read(folder / "model.onnx")
    assert {matmul.bits for matmul in graph.matmuls} == {4}
    assert written.graph == graph, "`publish` says where it stands"
    assert json.loads((folder / "genai_config.json").read_text())["model"]["type"] == "llama"


def test_a_conversation_is_held_straight_with_a_gguf_file(tmp_path: Path) -> None:
    source = models.small_model(Q4_1).write(tmp_path / "small.gguf")
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent", "chat", "--direct", str(source)],
        input=b"hello\n",
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip()


def test_a_gguf_file_that_cannot_be_converted_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    file = models.small_model(Q4_1)
    file.metadata["general.architecture"] = "bert"
    source = file.write(tmp_path / "bert.gguf")
    with pytest.raises(PublishError, match="has the architecture 'bert'; llama"):
        write_folder(source, name="small", file=tmp_path / "small.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"bert.gguf"}
