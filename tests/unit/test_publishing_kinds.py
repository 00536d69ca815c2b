"""What `publish` says of a folder that is of the wrong kind."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from edge_agent.errors import PublishError
from edge_agent.publishing import kinds


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("flavor", "names"),
    [
        ("onnx", ("genai_config.json", "model.onnx")),
        ("transformers", ("config.json", "model.safetensors")),
        ("onnx", ("genai_config.json", "config.json", "model.safetensors")),
        ("transformers", ("genai_config.json", "config.json", "model.safetensors")),
    ],
)
def test_a_folder_of_the_right_kind_passes(tmp_path: Path, flavor: str, names: tuple[str, ...]) -> None:
    kinds.check(folder_of(tmp_path, *names), flavor)


@pytest.mark.parametrize(
    ("flavor", "names", "what", "remedy"),
    [
        ("onnx", ("config.json", "model.safetensors"), "is a Hugging Face folder", "--flavor transformers"),
        (
            "onnx",
            ("config.json", "model.safetensors"),
            "",
            "onnxruntime_genai.models.builder -i {folder} -o OUT",
        ),
        ("onnx", ("config.json", "pytorch_model.bin"), "is a Hugging Face folder", "build ONNX from it"),
        ("transformers", ("genai_config.json", "model.onnx"), "model builder's folder", "without --flavor"),
        (
            "onnx",
            ("b.gguf", "a.Q4_1.gguf"),
            "is a GGUF model",
            "give the file, without --flavor transformers: {folder}/a",
        ),
        ("transformers", ("model.gguf", "README.md"), "is a GGUF model", "{folder}/model.gguf"),
        ("onnx", ("model.onnx", "tokenizer.json"), "ONNX model without genai_config.json", "build it again"),
        ("onnx", ("model.safetensors",), "has weights, and no config.json", "hf download"),
        ("transformers", ("model.safetensors", "tokenizer.json"), "no config.json", "hf download"),
        ("onnx", ("adapter_config.json", "adapter_model.safetensors"), "holds an adapter", "merge it"),
        (
            "onnx",
            ("MLmodel", "artifacts/onnx/genai_config.json"),
            "MLflow package already",
            "{folder}/artifacts/onnx",
        ),
        ("onnx", ("MLmodel", "model/config.json"), "MLflow package already", "create_model_version"),
        ("onnx", ("cpu/genai_config.json", "README.md"), "its folder 'cpu' has one", "give {folder}/cpu"),
        ("transformers", ("hf/config.json",), "its folder 'hf' has one", "give {folder}/hf"),
        ("onnx", ("phi3.tar.gz",), "holds an archive, 'phi3.tar.gz'", "unpack it"),
        ("onnx", ("README.md",), "has no genai_config.json", "make the folder with python -m onnx"),
        ("transformers", ("README.md",), "has no config.json", "give a Hugging Face folder"),
        ("onnx", (), "is empty", "make the folder with"),
        ("transformers", (), "is empty", "give a Hugging Face folder"),
    ],
)
def test_a_folder_of_another_kind_is_told_what_it_is_and_what_to_do(
    tmp_path: Path, flavor: str, names: tuple[str, ...], what: str, remedy: str
) -> None:
    with pytest.raises(PublishError) as caught:
        kinds.check(folder_of(tmp_path, *names), flavor)
    assert caught.value.message.startswith(f"{tmp_path} ")
    assert what in caught.value.message
    assert remedy.format(folder=tmp_path) in caught.value.remedy


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("x", "x")
    return data.getvalue()


def _tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (_zip(), "is an archive, not a folder", "unpack it"),
        (_tar(), "is an archive, not a folder", "unpack it"),
        (gzip.compress(b"x"), "is an archive, not a folder", "unpack it"),
        (b"{}", "is a file, not a folder", "give its folder: {folder}"),
        (b"", "is a file, not a folder", "give its folder: {folder}"),
    ],
    ids=["zip", "tar", "gz", "text", "nothing"],
)
def test_a_file_is_told_by_its_first_bytes(tmp_path: Path, content: bytes, what: str, remedy: str) -> None:
    file = tmp_path / "thing"
    file.write_bytes(content)
    with pytest.raises(PublishError) as caught:
        kinds.check(file, "onnx")
    assert what in caught.value.message
    assert remedy.format(folder=tmp_path) in caught.value.remedy


def test_a_gguf_file_passes_as_onnx_only(tmp_path: Path) -> None:
    file = tmp_path / "it's a model"
    file.write_bytes(b"GGUF\x03\x00")
    kinds.check(file, "onnx")
    with pytest.raises(PublishError, match="is a GGUF model") as caught:
        kinds.check(file, "transformers")
    assert "without --flavor transformers" in caught.value.remedy


def test_what_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="nothing does not exist"):
        kinds.check(tmp_path / "nothing", "onnx")


def test_the_command_is_the_recommended_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    (block,) = re.findall(r"```sh\n(python -m onnxruntime_genai.models.builder.*?)```", page, re.DOTALL)
    recommended = set(block.replace("\\\n", " ").split())
    assert set(kinds.BUILD.format(source="HF_FOLDER").split()) == recommended
