"""The decoder as an ONNX graph, with the operators that onnxruntime-genai's model builder uses.

    embeddings → for each layer: norm → query, key and value → GroupQueryAttention → output → norm → gated network
    → norm → the last token → logits

A quantized matrix is a MatMulNBits whose codes and scales are those of the file. Where the format has a minimum for
each group of weights, its part is added: the sums of the groups of the input, times the minima, in float32.

    x · (scale * code + minimum)  =  MatMulNBits(x)  +  ReduceSum(x in groups) · minima

(MatMulNBits itself takes a zero point that is no whole number, but then computes in float32 and without packed
weights, which is many times slower.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_agent import __version__
from edge_agent.errors import PublishError
from edge_agent.publishing.gguf import matrix as matrices
from edge_agent.publishing.gguf.architecture import ROPE_FACTORS, Architecture
from edge_agent.publishing.gguf.formats import Floats
from edge_agent.publishing.gguf.matrix import Matrix
from edge_agent.publishing.gguf.onnx_file import FLOAT, INT64, MICROSOFT, UINT8, OnnxFile, Size, Stored
from edge_agent.publishing.gguf.reader import Tensor

MODEL = "model.onnx"
DATA = "model.onnx.data"
_INT8_ACCURACY = 4
_TABLE_PIECE = 1 << 18
"""Sines or cosines that are computed at a time."""
Doubles = npt.NDArray[np.float64]


def write(
    sizes: Architecture, tensors: Mapping[str, Tensor], folder: Path, *, every_token: bool = False
) -> None:
    """Writes `model.onnx` and `model.onnx.data`.

    Args:
        every_token: logits of all tokens of a run; otherwise of the last one, which is all that an answer needs.
    """
    with (folder / DATA).open("wb") as data:
        onnx = OnnxFile(data, DATA)
        _Decoder(sizes, tensors, onnx).write(every_token=every_token)
    onnx.write(folder / MODEL, f"edge-agent {__version__}")


class _Decoder:
    """Adds the decoder's nodes; values are known by the names of the nodes that give them."""

    def __init__(self, sizes: Architecture, tensors: Mapping[str, Tensor], onnx: OnnxFile) -> None:
        self._sizes = sizes
        self._tensors = tensors
        self._onnx = onnx
        self._sums: dict[tuple[str, int], str] = {}
        self._constants: set[str] = set()
        self._tied = "output.weight" not in tensors
        self._table = Matrix.of(tensors["token_embd.weight"])
        self._stored_table = _store(onnx, self._table)

    def write(self, *, every_token: bool) -> None:
        sizes, onnx = self._sizes, self._onnx
        ids = onnx.input("input_ids", INT64, ["batch_size", "sequence_length"])
        mask = onnx.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
        past: list[Size] = ["batch_size", sizes.kv_heads, "past_sequence_length", sizes.head_size]
        present: list[Size] = ["batch_size", sizes.kv_heads, "total_sequence_length", sizes.head_size]
        tokens = 1 if not every_token else "sequence_length"
        onnx.output("logits", FLOAT, ["batch_size", tokens, sizes.vocabulary])
        for layer in range(sizes.layers):
            for kind in ("key", "value"):
                onnx.input(f"past_key_values.{layer}.{kind}", FLOAT, past)
                onnx.output(f"present.{layer}.{kind}", FLOAT, present)
        onnx.constant("one", np.array(1, np.int64))
        lengths = self._lengths(mask)
        self._rotary_tables()
        residual = self._embed(ids)
        normed = self._first_norm(residual)
        for layer in range(sizes.layers):
            residual, normed = self._layer(layer, residual, normed, lengths)
        if not every_token:
            onnx.constant("last", np.array(-1, np.int64))
            last = onnx.node("Gather", [normed, "last"], "/lm_head/prune/Gather", axis=1)
            normed = onnx.node("Unsqueeze", [last, self._numbers("axis", 1)], "/lm_head/prune/Unsqueeze")
        self._head(normed)

    def _layer(self, layer: int, residual: str, normed: str, lengths: tuple[str, str]) -> tuple[str, str]:
        """Returns the sum so far, and it again under the next layer's norm."""
        attention = self._attention(layer, normed, lengths)
        output = self._linear(f"blk.{layer}.attn_output", attention)
        normed, residual = self._skip_norm(f"blk.{layer}.ffn_norm", residual, output)
        gate = self._linear(f"blk.{layer}.ffn_gate", normed)
        up = self._linear(f"blk.{layer}.ffn_up", normed)
        sigmoid = self._onnx.node("Sigmoid", [gate], f"/blk.{layer}/ffn/Sigmoid")
        active = self._onnx.node("Mul", [gate, sigmoid], f"/blk.{layer}/ffn/silu/Mul")
        inner = self._onnx.node("Mul", [active, up], f"/blk.{layer}/ffn/Mul")
        down = self._linear(f"blk.{layer}.ffn_down", inner)
        following = "output_norm" if layer + 1 == self._sizes.layers else f"blk.{layer + 1}.attn_norm"
        normed, residual = self._skip_norm(following, residual, down)
        return residual, normed

    def _attention(self, layer: int, normed: str, lengths: tuple[str, str]) -> str:
        sizes = self._sizes
        query, key, value = (f"blk.{layer}.attn_{each}" for each in "qkv")
        heads = {query: sizes.heads, key: sizes.kv_heads}
        orders = {
            name: matrices.halves_order(count, sizes.head_size)
            for name, count in heads.items()
            if sizes.interleaved
        }
        names = [query, key, value]
        if len({self._tensors[f"{name}.weight"].type for name in names}) == 1:
            inputs = [self._linears(names, f"blk.{layer}.attn_qkv", normed, orders), "", ""]
        else:
            inputs = [self._linears([name], name, normed, orders) for name in names]
        inputs += [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", *lengths, "cos", "sin"]
        return self._onnx.node(
            "GroupQueryAttention",
            inputs,
            f"/blk.{layer}/attn/GroupQueryAttention",
            f"present.{layer}.key",
            f"present.{layer}.value",
            domain=MICROSOFT,
            num_heads=sizes.heads,
            kv_num_heads=sizes.kv_heads,
            scale=float(sizes.head_size**-0.5),
            local_window_size=-1,
            softcap=0.0,
            do_rotary=1,
            rotary_interleaved=0,
        )

    def _lengths(self, mask: str) -> tuple[str, str]:
        """(keys of each sequence but one, [batch] int32; the longest length, int32)."""
        onnx = self._onnx
        total = onnx.node("ReduceSum", [mask, self._numbers("axis", 1)], "/mask/ReduceSum", keepdims=0)
        before = onnx.node("Sub", [total, self._numbers("axis", 1)], "/mask/Sub")
        shape = onnx.node("Shape", [mask], "/mask/Shape")
        longest = onnx.node("Gather", [shape, "one"], "/mask/Gather", axis=0)
        return (
            onnx.node("Cast", [before], "/mask/Sub/Cast", to=6),
            onnx.node("Cast", [longest], "/mask/Gather/Cast", to=6),
        )

    def _rotary_tables(self) -> None:
        """Cosines and sines, [context, head_size / 2] float32."""
        sizes = self._sizes
        half = sizes.head_size // 2
        turns = sizes.rope_base ** (-np.arange(half, dtype=np.float64) / half) / sizes.rope_factor
        if ROPE_FACTORS in self._tensors:
            factors = matrices.vector(self._tensors[ROPE_FACTORS])
            if (factors <= 0).any():
                raise PublishError(f"the tensor {ROPE_FACTORS!r} has factors that are not positive")
            turns /= factors
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            stored = self._onnx.store(_rotary_table(function, turns, sizes.context_tokens))
            self._onnx.tensor(name, FLOAT, (sizes.context_tokens, half), stored)

    def _embed(self, ids: str) -> str:
        onnx, table = self._onnx, self._table
        if table.format.floats:
            onnx.tensor("token_embd.weight", FLOAT, (table.rows, table.columns), *self._stored_table)
            return onnx.node("Gather", ["token_embd.weight", ids], "/embed/Gather", axis=0)
        codes, scales, *minima = self._stored_table
        row_bytes = table.columns * table.format.bits // 8
        onnx.tensor("token_embd.codes", UINT8, (table.rows, row_bytes), codes)
        onnx.tensor("token_embd.scales", FLOAT, (table.rows, table.groups), scales)
        found = onnx.node(
            "GatherBlockQuantized",
            ["token_embd.codes", ids, "token_embd.scales"],
            "/embed/GatherBlockQuantized",
            domain=MICROSOFT,
            bits=table.format.bits,
            block_size=table.format.group,
            gather_axis=0,
            quantize_axis=1,
        )
        return self._embed_minima(ids, found, *minima) if minima else found

    def _embed_minima(self, ids: str, found: str, stored: Stored) -> str:
        """Adds each group's minimum to its weights."""
        onnx, table = self._onnx, self._table
        onnx.tensor("token_embd.minima", FLOAT, (table.rows, table.groups, 1), stored)
        groups = self._numbers("groups", 0, 0, table.groups, table.format.group)
        flat = self._numbers("flat", 0, 0, table.columns)
        minima = onnx.node("Gather", ["token_embd.minima", ids], "/embed/minima/Gather", axis=0)
        grouped = onnx.node("Reshape", [found, groups], "/embed/groups/Reshape")
        added = onnx.node("Add", [grouped, minima], "/embed/minima/Add")
        return onnx.node("Reshape", [added, flat], "/embed/flat/Reshape")

    def _head(self, normed: str) -> None:
        if not self._tied:
            self._multiply(Matrix.of(self._tensors["output.weight"]), "output", normed, result="logits")
        else:
            self._multiply(self._table, "token_embd.head", normed, result="logits", stored=self._stored_table)

    def _linear(self, name: str, value: str) -> str:
        return self._linears([name], name, value, {})

    def _linears(self, names: list[str], title: str, value: str, orders: Mapping[str, matrices.Order]) -> str:
        """A product with matrices of one format, one above the other, and their biases."""
        tensors = [self._tensors[f"{name}.weight"] for name in names]
        matrix = Matrix.of(*tensors, orders=[orders.get(name) for name in names])
        product = self._multiply(matrix, title, value)
        biases = [self._bias(name, orders.get(name)) for name in names]
        if all(bias is None for bias in biases):
            return product
        parts = [
            bias if bias is not None else np.zeros(tensor.shape[0], np.float32)
            for bias, tensor in zip(biases, tensors, strict=True)
        ]
        bias = self._onnx.constant(f"{title}.bias", np.concatenate(parts))
        return self._onnx.node("Add", [product, bias], f"/{title}/bias/Add")

    def _bias(self, name: str, order: matrices.Order | None) -> Floats | None:
        tensor = self._tensors.get(f"{name}.bias")
        if tensor is None:
            return None
        bias = matrices.vector(tensor)
        return bias if order is None else bias[order]

    def _multiply(
        self,
        matrix: Matrix,
        title: str,
        value: str,
        *,
        result: str = "",
        stored: tuple[Stored, ...] = (),
    ) -> str:
        """The product of a value's last dimension with the rows of a matrix.

        Args:
            result: the name of what is computed.
            stored: its parts, if they are in the data file already.
        """
        onnx, form = self._onnx, matrix.format
        stored = stored or _store(onnx, matrix)
        if form.floats:
            onnx.tensor(f"{title}.weight", FLOAT, (matrix.rows, matrix.columns), *stored)
            return self._rows_product(value, f"{title}.weight", result or f"/{title}/MatMul")
        codes, scales, *minima = stored
        onnx.tensor(f"{title}.codes", UINT8, (matrix.rows, matrix.groups, form.group * form.bits // 8), codes)
        onnx.tensor(f"{title}.scales", FLOAT, (matrix.rows, matrix.groups), scales)
        product = onnx.node(
            "MatMulNBits",
            [value, f"{title}.codes", f"{title}.scales"],
            f"/{title}/MatMulNBits" if form.minima or not result else result,
            domain=MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=form.bits,
            block_size=form.group,
            accuracy_level=_INT8_ACCURACY,
        )
        if not minima:
            return product
        onnx.tensor(f"{title}.minima", FLOAT, (matrix.rows, matrix.groups), *minima)
        sums = self._group_sums(value, matrix)
        added = self._rows_product(sums, f"{title}.minima", f"/{title}/minima/MatMul")
        return onnx.node("Add", [product, added], result or f"/{title}/minima/Add")

    def _rows_product(self, value: str, matrix: str, name: str) -> str:
        """The product of a value's last dimension with the rows of a float32 matrix."""
        return self._onnx.node("FusedMatMul", [value, matrix], name, domain=MICROSOFT, transB=1)

    def _group_sums(self, value: str, matrix: Matrix) -> str:
        """[batch, tokens, groups] float32: sums over the groups of a value's last dimension, made once."""
        group = matrix.format.group
        key = (value, group)
        if key not in self._sums:
            shape = self._numbers("groups", 0, 0, matrix.groups, group)
            grouped = self._onnx.node("Reshape", [value, shape], f"{value}/groups/{group}/Reshape")
            self._sums[key] = self._onnx.node(
                "ReduceSum",
                [grouped, self._numbers("axis", -1)],
                f"{value}/groups/{group}/ReduceSum",
                keepdims=0,
            )
        return self._sums[key]

    def _numbers(self, what: str, *numbers: int) -> str:
        """The name of a constant list of int64, made once."""
        name = f"/{what}/{','.join(map(str, numbers))}"
        if name not in self._constants:
            self._constants.add(name)
            self._onnx.constant(name, np.array(numbers, np.int64))
        return name

    def _first_norm(self, value: str) -> str:
        return self._onnx.node(
            "SimplifiedLayerNormalization",
            [value, self._norm("blk.0.attn_norm")],
            "/blk.0/attn_norm",
            epsilon=self._sizes.epsilon,
            axis=-1,
            stash_type=1,
        )

    def _skip_norm(self, name: str, residual: str, value: str) -> tuple[str, str]:
        """(the normed sum, the sum)."""
        total = f"/{name}/sum"
        last = name == "output_norm"
        normed = self._onnx.node(
            "SkipSimplifiedLayerNormalization",
            [residual, value, self._norm(name)],
            f"/{name}",
            *(() if last else ("", "", total)),
            domain=MICROSOFT,
            epsilon=self._sizes.epsilon,
        )
        return normed, total

    def _norm(self, name: str) -> str:
        return self._onnx.constant(f"{name}.weight", matrices.vector(self._tensors[f"{name}.weight"]))


def _rotary_table(function: np.ufunc, turns: Doubles, context_tokens: int) -> Iterator[Floats]:
    """[positions of a piece, head_size / 2] float32: a table of a long context is many times a small file."""
    step = max(1, _TABLE_PIECE // len(turns))
    for start in range(0, context_tokens, step):
        positions = np.arange(start, min(start + step, context_tokens), dtype=np.float64)
        yield function(positions[:, None] * turns).astype(np.float32)


def _store(onnx: OnnxFile, matrix: Matrix) -> tuple[Stored, ...]:
    """Writes a matrix: codes, scales and, where the format has them, minima; or floats."""
    if matrix.format.floats:
        return (onnx.store(matrix.floats()),)
    parts = onnx.store(matrix.codes()), onnx.store(matrix.scales())
    return (*parts, onnx.store(matrix.minima())) if matrix.format.minima else parts
