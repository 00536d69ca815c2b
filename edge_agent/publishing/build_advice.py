"""Advice for ONNX folders that were built with options that are slow on CPUs, or that lose much of the model.

Pure rules over `OnnxGraph`. docs/models.md has the measurements behind them and the cost in accuracy.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path

from edge_agent.errors import ContentError
from edge_agent.package import genai_options, onnx_graph
from edge_agent.package.onnx_graph import OnnxGraph

GOOD_BLOCK_SIZE = 32
"""Larger blocks are faster; on a real model 64 cost 43 % of perplexity and 128 61 %, against 30 % (docs/models.md)."""
INT8_ACCURACY_LEVEL = 4
_LARGE_TABLE_BYTES = 256 << 20
"""A smaller table is not worth the accuracy that it costs: the whole of it is hardly ever in memory."""
_MAX_CONFIG_BYTES = 1 << 20


def of_folder(folder: Path) -> list[str]:
    """Advice for a model builder's folder, one sentence for each build option that could be better.

    A folder that cannot be read, or is not a decoder of one graph, gets no advice.
    """
    try:
        with (folder / genai_options.FILE_NAME).open("rb") as stream:
            name = json.loads(stream.read(_MAX_CONFIG_BYTES + 1))["model"]["decoder"]["filename"]
        return advice(onnx_graph.read(folder / name))
    except (ContentError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def advice(graph: OnnxGraph) -> list[str]:
    """The same for a graph."""
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
