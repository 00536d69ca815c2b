"""A GGUF file as an ONNX folder: the same weights, the same tokens, and what the library computes with them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_agent.package import genai_files, genai_options, onnx_graph
from edge_agent.publishing import gguf
from edge_agent.publishing.gguf import matrix
from tests.support import gguf_files as files
from tests.support import gguf_models as models
from tests.support import onnx_weights
from tests.support.gguf_files import BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0

QUANTIZED = {
    name: getattr(files, name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
}
IDS = [1, 72, 108, 300, 5, 77, 259, 33, 140, 9, 261]


def converted(file: files.File, folder: Path) -> Path:
    out = folder / "onnx"
    out.mkdir()
    gguf.convert(file.write(folder / "model.gguf"), out)
    return out


def in_halves(rows: npt.NDArray[np.float64], heads: int) -> npt.NDArray[np.float64]:
    parts = rows.reshape(heads, models.HEAD_SIZE // 2, 2, -1)
    return np.concatenate([parts[:, :, 0], parts[:, :, 1]], axis=1).reshape(rows.shape)


@pytest.mark.parametrize("kind", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_the_weights_are_those_of_the_file(kind: int, tmp_path: Path) -> None:
    """To the bit without minima; with them but for the one rounding of a minimum to float32."""
    file = models.small_model(kind)
    model = onnx_weights.read(converted(file, tmp_path) / "model.onnx")
    bits = 4 if kind in (Q4_0, Q4_1, Q4_K) else 8
    original = {name: tensor.values for name, tensor in file.tensors.items()}
    exact = kind in (Q4_0, Q5_0, Q8_0, Q6_K)
    for title, expected in (
        ("token_embd", original["token_embd.weight"]),
        ("token_embd.head", original["token_embd.weight"]),
        ("blk.1.ffn_down", original["blk.1.ffn_down.weight"]),
        (
            "blk.0.attn_qkv",
            np.concatenate(
                [
                    in_halves(original["blk.0.attn_q.weight"], models.HEADS),
                    in_halves(original["blk.0.attn_k.weight"], models.KV_HEADS),
                    original["blk.0.attn_v.weight"],
                ]
            ),
        ),
    ):
        found = onnx_weights.dequantized(model, title, bits)
        assert np.ptp(found) > 0.1
        if exact:
            assert np.array_equal(found, expected)
        else:
            largest = np.abs(expected).max(axis=1, keepdims=True)
            assert (np.abs(found - expected) <= largest * 2.0**-23).all()


@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_weights_are_read_in_pieces_that_end_anywhere(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = models.small_model(Q4_1, biases=True)
    (tmp_path / "pieces").mkdir()
    whole = converted(file, tmp_path)
    monkeypatch.setattr(matrix, "PIECE_BYTES", rows * models.HIDDEN // 32 * 20)
    pieces = converted(file, tmp_path / "pieces")
    for name in ("model.onnx", "model.onnx.data"):
        assert (pieces / name).read_bytes() == (whole / name).read_bytes()


class Running:
    """The folder in the real library."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime_genai as og

        self._og = og
        self._model = og.Model(str(folder))
        self.tokenizer = og.Tokenizer(self._model)

    def logits(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """Of the last token, after a run of all but two and then each by itself."""
        return list(self.steps(ids, len(ids) - 2))[-1]

    def steps(self, ids: list[int], first: int) -> Iterator[npt.NDArray[np.float64]]:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=models.CONTEXT)
        generator = self._og.Generator(self._model, params)
        for start, end in ((0, first), *((at, at + 1) for at in range(first, len(ids)))):
            generator.append_tokens(np.array(ids[start:end], np.int32))
            yield np.asarray(generator.get_logits(), np.float64).reshape(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"architecture": "qwen2", "biases": True, "head": F32},
        {"biases": True, "kind": F16},
        {"head": BF16, "value": F16},
    ],
    ids=["llama", "qwen2", "biases", "mixed"],
)
def test_a_model_of_floats_computes_what_llama_cpp_computes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = models.small_model(**options)
    running = Running(converted(file, tmp_path), monkeypatch)
    expected = models.logits(file, IDS)
    for found, right in zip(running.steps(IDS, len(IDS) - 2), expected[-3:], strict=True):
        assert np.abs(found - right).max() < 1e-3 * np.std(right)


def test_rotary_positions_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = models.small_model()
    plain = models.logits(file, IDS)[-1]
    file.tensors["rope_freqs.weight"] = files.floats(np.linspace(1, 8, models.HEAD_SIZE // 2))
    expected = models.logits(file, IDS)[-1]
    assert np.abs(plain - expected).max() > 0.05 * np.std(expected)
    found = Running(converted(file, tmp_path), monkeypatch).logits(IDS)
    assert np.abs(found - expected).max() < 1e-3 * np.std(expected)


def test_rotary_positions_of_a_long_context_are_written_in_pieces(tmp_path: Path) -> None:
    """The whole tables in float64 would take 48 MiB here, and 1.5 GiB at the longest context."""
    file = models.small_model(Q4_0)
    context = file.metadata["llama.context_length"] = (1 << 16) + 1
    tracemalloc.start()
    try:
        folder = converted(file, tmp_path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24 << 20
    tensors = onnx_weights.read(folder / "model.onnx").tensors
    half = models.HEAD_SIZE // 2
    angles = np.arange(context)[:, None] * models.ROPE_BASE ** (-np.arange(half) / half)
    for name, right in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        assert tensors[name].shape == right.shape
        assert np.abs(tensors[name] - right).max() < 2.0**-24


@pytest.mark.parametrize("kind", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_quantized_model_computes_nearly_the_same_in_int8(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = models.small_model(kind, embedding=Q8_0 if kind == Q5_1 else None)
    expected = models.logits(file, IDS)
    running = Running(converted(file, tmp_path), monkeypatch)
    for found, right in zip(running.steps(IDS, len(IDS) - 2), expected[-3:], strict=True):
        assert np.sqrt(((found - right) ** 2).mean()) < 0.05 * np.std(right)


def test_a_mixed_model_of_k_quants_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = models.small_model(Q4_K, value=Q6_K, embedding=Q4_K, head=Q6_K)
    expected = models.logits(file, IDS)[-1]
    found = Running(converted(file, tmp_path), monkeypatch).logits(IDS)
    assert np.sqrt(((found - expected) ** 2).mean()) < 0.05 * np.std(expected)


def test_the_graph_is_the_model_builders(tmp_path: Path, sample_model: Path) -> None:
    """The operators of its folders, and of it those for minima, which it does not know."""
    known = {kind for kind, _, _ in onnx_weights.read(sample_model / "model.onnx").nodes}
    known |= {"GatherBlockQuantized", "Unsqueeze", "Reshape"}  # of a quantized table, and of prune_lm_head
    for kind, more in ((Q4_0, set[str]()), (Q4_1, {"FusedMatMul", "Add", "ReduceSum"})):
        (tmp_path / str(kind)).mkdir()
        folder = converted(models.small_model(kind), tmp_path / str(kind))
        nodes = [each for each, _, _ in onnx_weights.read(folder / "model.onnx").nodes]
        assert set(nodes) - known <= more
        assert nodes.count("MatMulNBits") == models.LAYERS * 5 + 1
        assert nodes.count("GroupQueryAttention") == models.LAYERS


def test_a_tied_table_lies_in_the_file_once(tmp_path: Path) -> None:
    """As embeddings and as the last matrix, quantized and of floats."""
    for kind in (Q8_0, Q4_1, F32):
        (tmp_path / str(kind)).mkdir()
        folder = converted(models.small_model(kind), tmp_path / str(kind))
        model = onnx_weights.read(folder / "model.onnx")
        table = sum(
            model.tensors[name].nbytes for name in model.tensors if name.startswith("token_embd.head.")
        )
        stored = (folder / "model.onnx.data").stat().st_size
        named = sum(tensor.nbytes for tensor in model.tensors.values())
        assert table > models.VOCABULARY * models.HIDDEN / 2
        assert stored < named - table * 0.9


def test_a_model_of_floats_is_described_as_one(tmp_path: Path) -> None:
    graph = onnx_graph.read(converted(models.small_model(F16), tmp_path) / "model.onnx")
    assert (graph.float_matmuls, graph.float_type, graph.matmuls) == (models.LAYERS * 5 + 1, "float32", ())
    assert graph.weights > 0


def test_the_folder_is_what_devices_take(tmp_path: Path) -> None:
    folder = converted(models.small_model(Q4_1), tmp_path)
    paths = {path.name for path in folder.iterdir()}
    assert paths == {
        *("chat_template.jinja", "genai_config.json", "model.onnx", "model.onnx.data"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    genai_files.check(folder, paths)
    genai_files.check_graphs(folder, paths)
    graph = onnx_graph.read(folder / "model.onnx")
    assert {(each.bits, each.block_size, each.accuracy_level) for each in graph.matmuls} == {(4, 32, 4)}
    assert graph.prunes_head
    assert graph.float_matmuls == 0, "minima are no matrix of their own"
    inner = 2 * models.HIDDEN**2 + 2 * models.HIDDEN * models.KV_HEADS * models.HEAD_SIZE
    layer = inner + 3 * models.HIDDEN * models.INNER + 2 * models.HIDDEN
    table = models.VOCABULARY * models.HIDDEN
    assert (
        graph.weights == models.LAYERS * layer + models.HIDDEN + 2 * table
    )  # once as embeddings, once as the head
    model = json.loads((folder / genai_options.FILE_NAME).read_text())["model"]
    assert (model["type"], model["context_length"], model["eos_token_id"]) == (
        "llama",
        models.CONTEXT,
        [2, 0],
    )
