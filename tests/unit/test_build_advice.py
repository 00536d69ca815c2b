"""What an ONNX folder says about its build, and that damaged or hostile files say nothing worse than an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import ContentError
from edge_agent.package import onnx_graph
from edge_agent.package.onnx_graph import OnnxGraph, QuantizedMatMul
from edge_agent.publishing import build_advice
from tests.support import onnx_files

GOOD = OnnxGraph(
    matmuls=(QuantizedMatMul(name="q", bits=4, block_size=32, accuracy_level=4),),
    float_matmuls=0,
    embedding_bytes=512 << 20,
    embedding_quantized=True,
    prunes_head=True,
)


def with_matmul(**changes: int) -> OnnxGraph:
    return replace(GOOD, matmuls=(replace(GOOD.matmuls[0], **changes),))  # type: ignore[arg-type]


def test_the_sample_models_build_is_read_from_its_graph(sample_model: Path) -> None:
    graph = onnx_graph.read(sample_model / "model.onnx")
    assert len(graph.matmuls) == 21  # qkv, o, gate, up and down of four layers, and the head
    assert {(m.bits, m.block_size, m.accuracy_level) for m in graph.matmuls} == {(4, 32, 4)}
    assert graph.float_matmuls == 0
    assert graph.embedding_bytes == 1152 * 128 * 4
    assert graph.embedding_quantized is False
    assert not graph.prunes_head


@pytest.mark.parametrize(
    ("head", "shared"),
    [(("x", "other"), False), (("x", "table"), True), (("x", "turned"), True)],
    ids=["of its own", "the table", "the table, turned"],
)
def test_a_table_of_embeddings_that_is_the_last_matrix_is_read_whole(
    tmp_path: Path, head: tuple[str, ...], shared: bool
) -> None:
    nodes = [
        onnx_files.node("Gather", ("table", "tokens"), ("x",)),
        onnx_files.node("MatMul", head, ("logits",)),
    ]
    if "turned" in head:
        nodes.append(onnx_files.node("Transpose", ("table",), ("turned",)))
    tensors = [onnx_files.tensor(name, (), shape=(64, 8)) for name in ("table", "other")]
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_files.model(nodes, tensors))
    graph = onnx_graph.read(file)
    assert (graph.embedding_bytes, graph.embedding_shared) == (64 * 8 * 8, shared)


HEAD = QuantizedMatMul(name="/lm_head/MatMul_Q4", bits=4, block_size=32, accuracy_level=4)


@pytest.mark.parametrize(("block_size", "measured"), [(32, "1.30"), (64, "1.43"), (128, "1.61"), (16, "")])
def test_an_int4_head_is_lossy_and_the_measured_figure_is_told(block_size: int, measured: str) -> None:
    head = replace(HEAD, block_size=block_size)
    (line,) = build_advice.advice(replace(GOOD, matmuls=(head,)))
    assert f"block_size={block_size}," in line
    assert ("perplexity" in line, measured in line) == (bool(measured), True)


def test_an_int8_head_and_small_blocks_are_not_lossy() -> None:
    assert build_advice.advice(replace(GOOD, matmuls=(*GOOD.matmuls, replace(HEAD, bits=8)))) == []
    assert build_advice.advice(with_matmul(bits=8, block_size=128)) == []


@pytest.mark.parametrize("kind", ["qkv_proj", "v_proj", "down_proj"])
def test_int4_where_a_small_model_loses_most_is_lossy(kind: str) -> None:
    layer = replace(HEAD, name=f"/model/layers.3/x/{kind}/MatMul_Q4")
    (line,) = build_advice.advice(replace(GOOD, matmuls=(layer, *GOOD.matmuls)))
    assert f"int4 in {kind}," in line
    assert "1.11" in line
    assert build_advice.advice(replace(GOOD, matmuls=(replace(layer, bits=8), *GOOD.matmuls))) == []
    for unharmed in ("/model/layers.3/mlp/up_proj/MatMul_Q4", f"/blk.3.{kind}/MatMulNBits"):
        assert build_advice.advice(replace(GOOD, matmuls=(replace(layer, name=unharmed),))) == []


def test_of_a_large_model_nothing_was_measured() -> None:
    assert build_advice.advice(replace(GOOD, matmuls=(replace(HEAD, weights=1_000_000_000),))) == []


def test_a_good_build_gets_no_advice() -> None:
    assert build_advice.advice(GOOD) == []
    assert build_advice.advice(replace(GOOD, embedding_quantized=False, embedding_bytes=128 << 20)) == []


@pytest.mark.parametrize(
    ("graph", "word"),
    [
        (with_matmul(block_size=64), "block_size=64"),
        (with_matmul(block_size=128), "block_size=128"),
        (with_matmul(accuracy_level=1), "accuracy_level=4"),
        (replace(GOOD, prunes_head=False), "prune_lm_head=true"),
        (replace(GOOD, embedding_quantized=False), "MatMul/Gather"),
        (replace(GOOD, matmuls=(), float_matmuls=9), "not quantized"),
    ],
)
def test_each_slow_or_lossy_way_has_its_advice(graph: OnnxGraph, word: str) -> None:
    (line,) = build_advice.advice(graph)
    assert word in line


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 100_000), at=st.integers(0, 100_000), byte=st.integers(0, 255))
def test_a_damaged_file_is_an_error_or_a_graph(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, byte: int
) -> None:
    source = Path(__file__).parents[2] / "edge_agent" / "demo" / "sample_model" / "model.onnx"
    data = bytearray(source.read_bytes())
    data[at % len(data)] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.onnx"
    file.write_bytes(data[: cut % (len(data) + 1)])
    try:
        assert isinstance(onnx_graph.read(file), OnnxGraph)
    except ContentError as error:
        assert "not an ONNX file" in error.message
