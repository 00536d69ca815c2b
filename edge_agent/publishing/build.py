"""Where a model builder's folder stands: which matrices have how many bits, in blocks of how many weights.

Read from the graph's own attributes (`package/onnx_graph.py`), without a library. The names of a graph's nodes are
input: what is no plain word, or one kind too many, is `other`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import ContentError
from edge_agent.package import genai_options, onnx_graph
from edge_agent.package.onnx_graph import OnnxGraph

EMBEDDINGS = "embeddings"
HEAD = "lm_head"
OTHER = "other"
_MAX_PARTS = 32
_FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_NODE = re.compile(
    r"(?:/model/layers\.\d{1,6})?/(?:[a-z_]{1,32}/){0,3}?([a-z_]{1,32})/MatMul(?:_matmul)?(?:_Q\d)?"
)
_NODE_OF_GGUF = re.compile(r"/blk\.\d{1,6}\.([a-z_]{1,32})/MatMul(?:NBits)?|(logits)")
_WORDS_OF_GGUF = {
    **{f"attn_{each}": f"{each}_proj" for each in ("qkv", "q", "k", "v")},
    **{f"ffn_{each}": f"{each}_proj" for each in ("gate", "up", "down")},
    "attn_output": "o_proj",
    "logits": HEAD,
}
"""Where a node of publishing/gguf is → the builder's word for that matrix."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Matrices of one kind that were built alike.

    Attributes:
        part: the builder's word: `qkv_proj`, `down_proj`, `lm_head`; `embeddings`.
        bits: of a weight; 16 or 32 where they are not quantized, 0 where they have several types.
        block_size: weights that share a scale; 0 where none do.
        matrices: how many of them.
    """

    part: str
    bits: int
    block_size: int
    matrices: int


def read(folder: Path) -> OnnxGraph | None:
    """The graph of a model builder's folder; None if it cannot be read, or is not a decoder of one graph."""
    try:
        (name,) = genai_options.graphs(folder / genai_options.FILE_NAME, genai_options.FILE_NAME)
        return onnx_graph.read(folder / name)
    except (ContentError, OSError, ValueError):
        return None


def parts(graph: OnnxGraph) -> list[Part]:
    """All matrices: those that are quantized, the most frequent first, the others, and the embeddings."""
    counted: Counter[tuple[str, int, int]] = Counter()
    kinds: set[str] = set()
    for matmul in graph.matmuls:
        kind = _kind(matmul.name)
        if kind not in kinds and len(kinds) >= _MAX_PARTS:
            kind = OTHER
        kinds.add(kind)
        counted[kind, matmul.bits, matmul.block_size] += 1
    common = counted.most_common(_MAX_PARTS)
    found = [Part(part=kind, bits=bits, block_size=size, matrices=n) for (kind, bits, size), n in common]
    if graph.float_matmuls:
        bits = _FLOAT_BITS.get(graph.float_type, 0)
        found.append(Part(part=OTHER, bits=bits, block_size=0, matrices=graph.float_matmuls))
    if graph.embedding_quantized is not None:
        bits = graph.embedding_bits
        found.append(Part(part=EMBEDDINGS, bits=bits, block_size=graph.embedding_block_size, matrices=1))
    return found


def document(graph: OnnxGraph | None) -> list[dict[str, Any]] | None:
    """The same for `--json`."""
    return None if graph is None else [asdict(part) for part in parts(graph)]


def text(graph: OnnxGraph) -> str:
    """One line: `int4 in blocks of 32; int8 in blocks of 32: lm_head, 14 of 30 down_proj; int8: embeddings`."""
    found = parts(graph)
    matrices = [part for part in found if part.part != EMBEDDINGS]
    alike: dict[tuple[int, int], list[Part]] = {}
    for part in matrices:
        alike.setdefault((part.bits, part.block_size), []).append(part)
    groups = sorted(alike.items(), key=lambda group: -sum(part.matrices for part in group[1]))
    totals = Counter[str]()
    for part in matrices:
        totals[part.part] += part.matrices
    lines = [_stored(*built) for built, _ in groups[:1]]
    lines += [f"{_stored(*built)}: {_names(members, totals)}" for built, members in groups[1:]]
    lines += [f"{_stored(part.bits, 0)}: {EMBEDDINGS}" for part in found if part.part == EMBEDDINGS]
    return "; ".join(lines) or "no matrices"


def _kind(node: str) -> str:
    if named := _NODE.fullmatch(node):
        return named[1]
    named = _NODE_OF_GGUF.fullmatch(node)
    return _WORDS_OF_GGUF.get(named[1] or named[2], OTHER) if named else OTHER


def _stored(bits: int, block_size: int) -> str:
    kind = f"float{bits}" if bits in _FLOAT_BITS.values() else f"int{bits}" if bits else "floats"
    return f"{kind} in blocks of {block_size}" if block_size else kind


def _names(members: Sequence[Part], totals: Counter[str]) -> str:
    return ", ".join(
        part.part
        if part.matrices == totals[part.part]
        else f"{part.matrices} of {totals[part.part]} {part.part}"
        for part in members
    )
