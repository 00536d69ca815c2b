"""Advice for ONNX folders that were built with options that are slow on CPUs, or that lose much of the model.

Pure rules over `OnnxGraph`. docs/models.md has the measurements behind them and the cost in accuracy.
"""

from __future__ import annotations

import collections

from edge_agent.package.onnx_graph import OnnxGraph

GOOD_BLOCK_SIZE = 32
PERPLEXITY = {32: 1.30, 64: 1.43, 128: 1.61}
"""Block size → that of an int4 build over its original's, for SmolLM2-135M, head included (docs/models.md)."""
_SENSITIVE = ("qkv_proj", "q_proj", "k_proj", "v_proj", "down_proj")
"""Matrices by which it loses most, as the builder names them; in a folder from a GGUF file nothing is rounded."""
_SOME_LOST = (
    "it is int4 in {}, by which a small model loses most: SmolLM2-135M had 1.11 times its perplexity with half of "
    "these in int4, and 1.05 times with all of them in int8"
)
_SMALL_MODEL_WEIGHTS = 1_000_000_000
"""A larger one loses less by the same rounding; how much was not measured."""
INT8_ACCURACY_LEVEL = 4
_LARGE_TABLE_BYTES = 256 << 20
"""A smaller table is not worth the accuracy that it costs: the whole of it is hardly ever in memory."""


def advice(graph: OnnxGraph) -> list[str]:
    """One sentence for each build option that could be better."""
    found = []
    if not graph.matmuls:
        return ["its weights are not quantized: build with -p int8"] if graph.float_matmuls else []
    if levels := {m.accuracy_level for m in graph.matmuls} - {INT8_ACCURACY_LEVEL}:
        found.append(
            f"it computes with accuracy_level={min(levels)}: accuracy_level=4 is 1.5 times as fast or more"
        )
    found += _lossy(graph)
    if not graph.prunes_head:
        found.append("it computes logits for every prompt token: prune_lm_head=true saves memory and time")
    if graph.embedding_quantized is False and graph.embedding_bytes >= _LARGE_TABLE_BYTES:
        found.append(
            f"its embeddings take {graph.embedding_bytes >> 20} MiB unquantized: "
            "op_types_to_quantize=MatMul/Gather makes the download smaller, but costs accuracy"
        )
    return found


def _lossy(graph: OnnxGraph) -> list[str]:
    """A sentence where int4 has gone further than a small model bears."""
    int4 = [matmul for matmul in graph.matmuls if matmul.bits <= 4]
    if not int4 or sum(matmul.weights for matmul in graph.matmuls) >= _SMALL_MODEL_WEIGHTS:
        return []
    sizes = collections.Counter(matmul.block_size for matmul in int4)
    most, _ = sizes.most_common(1)[0]
    if most <= GOOD_BLOCK_SIZE and not any("lm_head" in matmul.name for matmul in int4):
        kinds = [kind for kind in _SENSITIVE if any(f"/{kind}/MatMul" in matmul.name for matmul in int4)]
        return [_SOME_LOST.format(" and ".join(kinds))] if kinds else []
    measured = PERPLEXITY.get(most)
    loss = f": SmolLM2-135M had {measured:.2f} times its perplexity with that" if measured else ""
    return [
        f"it is int4 with block_size={most}, which loses much of a small model{loss}; "
        f"int8 with block_size={GOOD_BLOCK_SIZE} keeps nearly all of it"
    ]
