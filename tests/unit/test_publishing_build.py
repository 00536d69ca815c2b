"""Where a folder stands: read from its graph, whatever that says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import publishing
from edge_agent.cli import main
from edge_agent.publishing import build
from edge_agent.publishing.build import Part
from edge_agent.publishing.register import Published
from tests.support.onnx_files import attribute, message, model, node, number

FLOAT, FLOAT16, UINT8, INT8, UINT4, INT4 = 1, 10, 2, 3, 21, 22
Sizes = Sequence[int]


def matmul(name: str, bits: int = 4, block_size: int = 32) -> bytes:
    sizes = {"bits": bits, "block_size": block_size, "accuracy_level": 4}
    attributes = [attribute(key, number(3, value)) for key, value in sizes.items()]
    return node("MatMulNBits", ["x", "w"], ["y"], *attributes) + message(3, name)


def layer(at: int, kind: str, **sizes: int) -> bytes:
    return matmul(f"/model/layers.{at}/mlp/{kind}/MatMul_Q4", **sizes)


def tensor(name: str, sizes: Sizes, kind: int) -> bytes:
    return b"".join(number(1, size) for size in sizes) + number(2, kind) + message(8, name)


def folder_of(place: Path, nodes: Sequence[bytes], tensors: Sequence[bytes] = ()) -> Path:
    place.mkdir(exist_ok=True)
    (place / "model.onnx").write_bytes(model(nodes, tensors))
    config = {"model": {"decoder": {"filename": "model.onnx"}}}
    (place / "genai_config.json").write_text(json.dumps(config))
    return place


def line(place: Path, nodes: Sequence[bytes], tensors: Sequence[bytes] = ()) -> str:
    graph = build.read(folder_of(place, nodes, tensors))
    assert graph is not None
    return build.text(graph)


@pytest.mark.parametrize(
    "config",
    [
        json.dumps({"model": {"decoder": {"filename": "model.onnx"}, "embedding": {"filename": "b.onnx"}}}),
        json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}) + " " * (1 << 20),
        '{"model": {"decoder": {"filename": "model.onnx", "filename": "model.onnx"}}}',
        "{",
        "{}",
    ],
    ids=["several graphs", "too long", "a key twice", "no JSON", "none"],
)
def test_what_is_no_folder_of_one_graph_says_nothing(tmp_path: Path, config: str) -> None:
    folder = folder_of(tmp_path, [layer(0, "down_proj")])
    assert build.read(folder) is not None
    (folder / "genai_config.json").write_text(config)
    assert build.read(folder) is None


def test_the_sample_model_stands_where_its_builder_left_it(sample_model: Path) -> None:
    graph = build.read(sample_model)
    assert graph is not None
    assert build.text(graph) == "int4 in blocks of 32; float32: embeddings"
    document = build.document(graph)
    assert document is not None
    assert {"part": "lm_head", "bits": 4, "block_size": 32, "matrices": 1} in document
    assert sum(part["matrices"] for part in document) == 22


def test_what_most_matrices_have_comes_first_and_the_rest_is_named(tmp_path: Path) -> None:
    nodes = [layer(at, kind) for at in range(4) for kind in ("gate_proj", "down_proj")]
    nodes[1] = layer(0, "down_proj", bits=8)
    nodes += [matmul("/lm_head/MatMul_Q8", bits=8, block_size=128)]
    table = [attribute("bits", number(3, 8)), attribute("block_size", number(3, 32))]
    nodes += [node("GatherBlockQuantized", ["table", "ids", "scales"], ["e"], *table)]
    assert line(tmp_path, nodes, [tensor("table", [9, 9], UINT8)]) == (
        "int4 in blocks of 32; int8 in blocks of 32: 1 of 4 down_proj; int8 in blocks of 128: lm_head; int8: embeddings"
    )


@pytest.mark.parametrize(
    ("kind", "bits", "turned"), [(INT4, 4, False), (UINT4, 4, True), (INT8, 8, False), (UINT8, 8, True)]
)
def test_matrices_that_are_dequantized_beside_their_product_are_quantized(
    tmp_path: Path, kind: int, bits: int, turned: bool
) -> None:
    """The builder's `use_qdq=true`, and what other exporters write."""
    nodes = [node("DequantizeLinear", ["w", "s"], ["d"], attribute("block_size", number(3, 64)))]
    if turned:
        nodes.append(node("Transpose", ["d"], ["t"]))
    product = node("MatMul", ["x", "t" if turned else "d"], ["y"])
    nodes.append(product + message(3, "/model/layers.0/mlp/up_proj/MatMul_matmul_Q4"))
    graph = build.read(
        folder_of(tmp_path, nodes, [tensor("w", [128, 32], kind), tensor("s", [2, 32], FLOAT)])
    )
    assert graph is not None
    assert build.parts(graph) == [Part(part="up_proj", bits=bits, block_size=64, matrices=1)]
    assert (graph.weights, graph.matmuls[0].weights) == (128 * 32, 128 * 32)
    assert build.text(graph) == f"int{bits} in blocks of 64"


def test_numbers_of_a_computation_that_are_dequantized_are_no_matrix(tmp_path: Path) -> None:
    nodes = [node("DequantizeLinear", ["x", "s"], ["d"]), node("MatMul", ["d", "d"])]
    assert line(tmp_path, nodes, [tensor("s", [1], FLOAT)]) == "no matrices"


def test_a_folder_from_a_gguf_file_is_told_in_the_builders_words(tmp_path: Path) -> None:
    names = ("attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    nodes = [matmul(f"/blk.{at}.{name}/MatMulNBits") for at in range(2) for name in names]
    nodes[4] = matmul("/blk.0.ffn_down/MatMulNBits", bits=8)
    assert line(tmp_path, [*nodes, matmul("logits", bits=8)]) == (
        "int4 in blocks of 32; int8 in blocks of 32: 1 of 2 down_proj, lm_head"
    )
    assert line(
        tmp_path, [matmul("/blk.0.ffn_norm/MatMulNBits"), matmul("/blk.0.attn_q/MatMulNBits", bits=8)]
    ) == ("int4 in blocks of 32; int8 in blocks of 32: q_proj")


def test_matrices_that_are_not_quantized_are_named_too(tmp_path: Path) -> None:
    weights = [tensor("w1", [8, 8], FLOAT16), tensor("table", [9, 9], FLOAT16)]
    nodes = [node("Gather", ["table", "ids"]), node("MatMul", ["x", "w1"])]
    assert line(tmp_path, nodes, weights) == "float16; float16: embeddings"
    assert line(tmp_path, [layer(0, "up_proj"), layer(1, "up_proj"), *nodes], weights) == (
        "int4 in blocks of 32; float16: other; float16: embeddings"
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/" * 100_000,
        "\x1b[2J/MatMul",
        "/model/layers.0/mlp/" + "a" * 33 + "/MatMul",
        "a/MatMul",
        "/A/MatMul",
    ],
)
def test_a_name_that_is_no_plain_word_is_not_repeated(tmp_path: Path, name: str) -> None:
    graph = build.read(folder_of(tmp_path, [matmul(name)]))
    assert graph is not None
    assert build.parts(graph) == [Part(part="other", bits=4, block_size=32, matrices=1)]


def test_a_graph_of_many_kinds_has_a_short_line(tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    graph = build.read(folder_of(tmp_path, [layer(0, word, bits=at) for at, word in enumerate(words)]))
    assert graph is not None
    assert len(build.parts(graph)) <= 32
    assert len(build.text(graph)) < 4000


def test_numbers_beyond_all_measure_are_told_as_they_are(tmp_path: Path) -> None:
    assert line(tmp_path, [layer(0, "up_proj", bits=1 << 63, block_size=0)]) == f"int{1 << 63}"


def test_a_graph_without_matrices_is_no_error(tmp_path: Path) -> None:
    assert line(tmp_path, []) == "no matrices"


@pytest.mark.parametrize(
    "config",
    ["", "[]", '{"model": {"decoder": {"filename": 3}}}', '{"model": {"decoder": {"filename": "x"}}}'],
)
def test_a_folder_that_cannot_be_read_stands_nowhere(tmp_path: Path, config: str) -> None:
    assert build.read(tmp_path) is None
    folder_of(tmp_path, [])
    (tmp_path / "genai_config.json").write_text(config)
    assert build.read(tmp_path) is None
    assert build.document(None) is None


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 10_000), at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_graph_has_a_line_or_none(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, byte: int
) -> None:
    nodes = [layer(0, "up_proj", bits=8), matmul("/lm_head/MatMul"), node("Gather", ["table", "ids"])]
    place = folder_of(
        tmp_path_factory.getbasetemp() / "damaged-build", nodes, [tensor("table", [9, 9], FLOAT)]
    )
    data = bytearray((place / "model.onnx").read_bytes())
    data[at % len(data)] = byte
    (place / "model.onnx").write_bytes(data[: cut % (len(data) + 1)])
    graph = build.read(place)
    if graph is not None:
        assert build.text(graph)
        assert json.loads(json.dumps(build.document(graph))) == build.document(graph)


def test_the_command_says_where_the_folder_stands(
    monkeypatch: pytest.MonkeyPatch, sample_model: Path
) -> None:
    graph = build.read(sample_model)
    published = Published(name="m", version=3, alias=None, digest="d", run_id="r", graph=graph)
    monkeypatch.setattr(publishing, "publish_folder", lambda *_, **__: published)
    arguments = ["publish", str(sample_model), "--name", "m", "--registry", "sqlite:///r.db"]
    said = CliRunner().invoke(main, arguments).stdout
    assert said.splitlines()[-1] == "build: int4 in blocks of 32; float32: embeddings"
    told = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)["build"]
    assert told == build.document(graph)
    monkeypatch.setattr(publishing, "publish_folder", lambda *_, **__: replace(published, graph=None))
    assert json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)["build"] is None
    assert "build:" not in CliRunner().invoke(main, arguments).stdout
