"""What a version says of itself in MLflow: what its package says, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from edge_agent import __version__
from edge_agent.package import onnx_graph, trust
from edge_agent.package.reference import MANIFEST_TAG
from edge_agent.publishing.description import Description, describe
from tests.support.packages import make_package, manifest_of

ROOT = Path(__file__).parents[2]
CONFIG = "artifacts/model/genai_config.json"


def described(folder: Path) -> dict[str, str]:
    """The tags, without their prefix."""
    tags = describe(folder, manifest_of(folder, "phi")).tags
    return {name.removeprefix("edge_agent."): value for name, value in tags.items()}


def packaged(folder: Path, model: Path) -> Path:
    """The sample model, as `publish` lays it out."""
    make_package(
        folder, trust.WRAPPER, {"artifacts/model/model.onnx": None, "artifacts/model/model.onnx.data": None}
    )
    shutil.copytree(model, folder / "artifacts" / "model", dirs_exist_ok=True)
    return folder


def test_an_onnx_package_is_described_by_its_own_files(sample_model: Path, tmp_path: Path) -> None:
    folder = packaged(tmp_path / "package", sample_model)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert described(folder) == {
        "architecture": "phi3",
        # 1,098,880 of the model, and its table of embeddings once more
        "parameters": "1246336",
        "quantization": "int4",
        "block_size": "32",
        "context_tokens": "2048",
        "size_bytes": str(size),
        "requires_agent": described(folder)["requires_agent"],
    }


def test_a_hugging_face_package_is_described_by_its_own_files(tmp_path: Path) -> None:
    source = ROOT / "tests" / "models" / "sample_hf"
    folder = tmp_path / "package"
    shutil.copytree(source, folder / "model")
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: mlflow.transformers\n")
    config = json.loads((source / "config.json").read_bytes())
    tags = described(folder)
    assert tags["architecture"] == config["architectures"][0]
    assert tags["context_tokens"] == str(config["max_position_embeddings"])
    assert tags["quantization"] in ("float32", "float16", "bfloat16")
    assert 500_000 < int(tags["parameters"]) < 3_000_000
    assert not {"block_size", "requires_agent", "golden"} & set(tags)


@pytest.mark.parametrize(
    ("edit", "unknown"),
    [
        (lambda config: config["model"].pop("context_length"), {"context_tokens"}),
        (lambda config: config["model"].update(type="<script>alert(1)</script>"), {"architecture"}),
        (lambda config: config["model"].update(type=["phi3"]), {"architecture"}),
        (lambda config: config["model"].update(context_length=True), {"context_tokens"}),
        (
            lambda config: config["model"].update(draft={"filename": "other.onnx"}),
            {"parameters", "quantization", "block_size"},
        ),
    ],
)
def test_what_is_not_known_has_no_tag(
    sample_model: Path, tmp_path: Path, edit: Any, unknown: set[str]
) -> None:
    folder = packaged(tmp_path / "package", sample_model)
    before = described(folder)
    config = json.loads((folder / CONFIG).read_bytes())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))
    assert set(before) - set(described(folder)) == unknown


def test_a_package_that_says_nothing_has_its_size(tmp_path: Path) -> None:
    folder = make_package(tmp_path, trust.WRAPPER, {CONFIG: None})
    assert set(described(folder)) == {"size_bytes", "requires_agent"}


def test_golden_prompts_count_from_the_packages_own_list(tmp_path: Path) -> None:
    folder = make_package(tmp_path, trust.WRAPPER)
    golden = json.dumps([{"prompt": "a", "expect": "b"}] * 3)
    with (folder / "MLmodel").open("a") as file:
        file.write(f"metadata:\n  edge_agent.golden: {golden}\n")
    assert described(folder)["golden"] == "3 of 3"


def test_the_agents_that_take_a_wrapper_are_those_from_its_first_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_package(tmp_path, trust.WRAPPER)
    digest = hashlib.sha256(trust.WRAPPER.read_bytes()).hexdigest()
    monkeypatch.setattr(trust, "SHIPPED_WRAPPERS", {digest: "0.1.0"})
    assert described(folder)["requires_agent"] == ">=0.1.0"
    monkeypatch.setattr(trust, "SHIPPED_WRAPPERS", {"0" * 64: __version__})
    assert described(folder)["requires_agent"] == f">{__version__}"
    monkeypatch.setattr(trust, "SHIPPED_WRAPPERS", {"0" * 64: "0.0.1"})
    assert described(folder)["requires_agent"] == f">={__version__}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 17) + b'{"a": {"dtype":1}}',
        struct.pack("<Q", 9) + b'{"a": 12}',
    ],
)
def test_weights_that_are_not_understood_are_not_counted(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    (tmp_path / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.transformers\n"
    )
    assert set(described(tmp_path)) == {"architecture", "size_bytes"}


def test_the_text_is_what_a_person_reads() -> None:
    known = Description(
        architecture="llama",
        parameters=134_515_008,
        quantization="int4, int8",
        block_size=32,
        context_tokens=8192,
        size_bytes=117_000_000,
        requires_agent=">=0.2.0",
        golden=3,
    )
    assert known.text == (
        "llama, 135 million parameters, int4 and int8 in blocks of 32, context of 8,192 tokens, 117.0 MB.\n\n"
        "Golden prompts when it was published: 3 of 3 as expected.\n\n"
        f"Published by edge-agent {__version__}; devices need edge-agent >=0.2.0."
    )
    assert Description(size_bytes=5).text == f"5 B.\n\nPublished by edge-agent {__version__}."


def test_no_tag_is_one_that_a_device_reads_and_the_page_lists_each() -> None:
    everything = Description(
        architecture="a",
        parameters=1,
        quantization="a",
        block_size=1,
        context_tokens=1,
        size_bytes=1,
        requires_agent="a",
        golden=1,
    ).tags
    assert not {MANIFEST_TAG, "edge_agent.rollout"} & set(everything)
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(edge_agent\.\w+)` \|", page, re.MULTILINE)) == {*everything, MANIFEST_TAG}


def test_unknown_operators_with_weights_leave_the_number_unknown(sample_model: Path, tmp_path: Path) -> None:
    data = (sample_model / "model.onnx").read_bytes()
    (tmp_path / "known.onnx").write_bytes(data)
    (tmp_path / "unknown.onnx").write_bytes(
        data.replace(b"SimplifiedLayerNormalization", b"SimplifiedLayerNormalizatiox")
    )
    assert onnx_graph.read(tmp_path / "known.onnx").weights == 1_246_336
    assert onnx_graph.read(tmp_path / "unknown.onnx").weights == 0


def test_of_two_files_of_one_name_neither_is_believed(tmp_path: Path) -> None:
    folder = make_package(tmp_path, trust.WRAPPER, {"artifacts/other/genai_config.json": "{}"})
    assert "architecture" not in described(folder)
