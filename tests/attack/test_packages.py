"""A package's files with a wound: each is read, or refused with one of our errors that a terminal can show."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.cache import record as records
from edge_agent.cache.version_file import HEADER_NAME
from edge_agent.errors import MAX_MESSAGE_CHARACTERS, EdgeAgentError
from edge_agent.package import (
    genai_options,
    genai_tokenizer,
    manifest,
    mlmodel,
    onnx_bounds,
    onnx_graph,
    requirements,
    transformers_options,
)
from edge_agent.package.needs import needs_of
from edge_agent.sync import version_file
from tests.attack.wounds import encoded, torn, wounded
from tests.conftest import SAMPLE_MODEL
from tests.support.committed import make_record
from tests.support.generated_messages import examples
from tests.support.packages import CONFIG, MLMODEL

pytestmark = pytest.mark.attack

MANIFEST: dict[str, Any] = {
    "format": 1,
    "name": "phi",
    "files": [
        {"path": path, "size": 4, "sha256": f"{number:064x}"}
        for number, path in enumerate(("MLmodel", "genai_pyfunc.py", "artifacts/model/model.onnx"))
    ],
}


def stays_ours(read: Callable[[], object]) -> None:
    """What is refused is refused by one of our errors, in few words."""
    try:
        read()
    except EdgeAgentError as error:
        assert len(error.message) <= MAX_MESSAGE_CHARACTERS + 1
        assert error.message.isprintable(), error.message


@examples(300)
@given(document=wounded(MANIFEST))
def test_a_manifest(document: Any) -> None:
    stays_ours(lambda: manifest.parse(encoded(document)))


@examples(300)
@given(document=wounded(yaml.safe_load(MLMODEL)), paths=st.sampled_from([set(), {"genai_pyfunc.py"}]))
def test_an_mlmodel(document: Any, paths: set[str]) -> None:
    def read() -> None:
        model = mlmodel.parse(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace"))
        mlmodel.check(model, paths)
        assert model.golden is None or model.golden is not model

    stays_ours(read)


@examples(300)
@given(data=torn(MLMODEL.encode()))
def test_the_text_of_an_mlmodel(data: bytes) -> None:
    stays_ours(lambda: mlmodel.check(mlmodel.parse(data), {"genai_pyfunc.py"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attack")


@examples(300)
@given(document=wounded(CONFIG))
def test_a_genai_config(folder: Path, document: Any) -> None:
    file = folder / "genai_config.json"
    file.write_bytes(encoded(document))
    stays_ours(lambda: genai_options.check(file, "artifacts/model/genai_config.json"))


@examples(200)
@given(document=wounded(CONFIG))
def test_what_a_package_needs(document: Any) -> None:
    sizes = {"artifacts/model/genai_config.json": 100, "artifacts/model/model.onnx": 100}
    stays_ours(lambda: needs_of(sizes, lambda path: encoded(document)))


TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<s>", "special": True, "lstrip": False},
    "eos_token": "</s>",
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    "additional_special_tokens": ["<a>", "<b>"],
    "model_max_length": 2048,
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "generation_config.json": {"eos_token_id": [1, 2], "do_sample": False, "temperature": 0.5},
    "config.json": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "quantization_config": None,
    },
}


@examples(400)
@given(data=st.data(), name=st.sampled_from(sorted(CONFIGURATIONS)))
def test_what_a_library_sees_of_a_configuration_leads_nowhere(data: st.DataObject, name: str) -> None:
    document = data.draw(wounded(CONFIGURATIONS[name]))
    if not isinstance(document, dict):
        return
    for clean in (transformers_options.clean, genai_tokenizer.clean):
        try:
            cleaned = clean(name, document).document
        except EdgeAgentError as error:
            assert error.message.isprintable()
            continue
        transformers_options.refuse_paths(cleaned)
        assert not {"auto_map", "vocab_file", "tiktoken_file", "init_inputs", "vocab"} & cleaned.keys()


REQUIREMENTS = b"mlflow==3.17.2\nonnxruntime-genai>=0.18,<1\nnumpy ; python_version >= '3.11'\n# note\n"


@examples(400)
@given(data=torn(REQUIREMENTS))
def test_no_requirement_leads_anywhere(folder: Path, data: bytes) -> None:
    (folder / "requirements.txt").write_bytes(data)
    try:
        requirements.check(folder, {"requirements.txt"})
    except EdgeAgentError as error:
        assert error.message.isprintable()
        return
    for line in data.decode().splitlines():
        text = line.partition("#")[0].strip()
        assert not text.startswith("-") and "://" not in text and "/" not in text, text


MODEL = (SAMPLE_MODEL / "model.onnx").read_bytes()


@examples(100)
@given(data=torn(MODEL))
def test_the_bounds_of_a_graph(folder: Path, data: bytes) -> None:
    file = folder / "bounds.onnx"
    file.write_bytes(data)
    stays_ours(lambda: onnx_bounds.check(file, "model.onnx", package_bytes=2_000_000))


GRAPH = bytes.fromhex("08071a0a65646765206167656e743a") + bytes(16) + b"MatMulNBits"


@examples(300)
@given(data=torn(GRAPH))
def test_a_graph(folder: Path, data: bytes) -> None:
    file = folder / "model.onnx"
    file.write_bytes(data)
    stays_ours(lambda: onnx_graph.read(file))


RECORD = make_record(manifest.parse(encoded(MANIFEST)), 1).encode()


def version_file_of(header: bytes) -> bytes:
    tar = tarfile.TarInfo(HEADER_NAME)
    tar.size = len(header)
    return tar.tobuf(tarfile.GNU_FORMAT) + header + bytes(-len(header) % tarfile.BLOCKSIZE)


@examples(300)
@given(document=wounded(json.loads(RECORD)))
def test_the_record_of_a_version_file(document: Any) -> None:
    header = encoded(document)
    stays_ours(lambda: records.parse(header))
    stays_ours(lambda: version_file.read_package(io.BytesIO(version_file_of(header))))


@examples(300)
@given(whole=torn(version_file_of(RECORD)))
def test_the_bytes_of_a_version_file(whole: bytes) -> None:
    stays_ours(lambda: version_file.read_package(io.BytesIO(whole)))
