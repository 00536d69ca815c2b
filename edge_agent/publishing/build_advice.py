"""Advice for ONNX folders that were built with options that are slow on CPUs, or that lose much of the model.

Pure rules over `OnnxGraph`. docs/models.md has the measurements behind them and the cost in accuracy.
"""

from __future__ import annotations

import collections

from edge_agent.package.onnx_graph import OnnxGraph

GOOD_BLOCK_SIZE = 32
"""Larger blocks are faster; on a real model 64 cost 43 % of perplexity and 128 61 %, against 30 % (docs/models.md)."""
INT8_ACCURACY_LEVEL = 4
_LARGE_TABLE_BYTES = 256 << 20
"""A smaller table is not worth the accuracy that it costs: the whole of it is hardly ever in memory."""


def advice(graph: OnnxGraph) -> list[str]:
    """One sentence for each build option that could be better."""
    found = []
    if not graph.matmuls:
        return ["its weights are not quantized: build with -p int4"] if graph.float_matmuls else []
    if levels := {m.accuracy_level for m in graph.matmuls} - {INT8_ACCURACY_LEVEL}:
        found.append(
            f"it computes with accuracy_level={min(levels)}: accuracy_level=4 is 1.5 times as fast or more"
        )
    sizes = collections.Counter(matmul.block_size for matmul in graph.matmuls)
    most, _ = sizes.most_common(1)[0]
    if most > GOOD_BLOCK_SIZE:
        found.append(
            f"it has block_size={most}, which loses much of a small model: block_size={GOOD_BLOCK_SIZE} keeps more, "
            "and algo_config=k_quant_mixed most"
        )
    if not graph.prunes_head:
        found.append("it computes logits for every prompt token: prune_lm_head=true saves memory and time")
    if graph.embedding_quantized is False and graph.embedding_bytes >= _LARGE_TABLE_BYTES:
        found.append(
            f"its embeddings take {graph.embedding_bytes >> 20} MiB unquantized: "
            "op_types_to_quantize=MatMul/Gather makes the download smaller, but costs accuracy"
        )
    return found
