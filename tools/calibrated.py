"""Rounds the int4 matrices of a model builder's folder again, so that they lose least on a text: GPTQ.

The builder rounds each weight by itself. Here a weight's error is made up for by the weights of its row that are not
rounded yet, by what the inputs of the matrix have in common. Of a text only these inputs' second moments are used, so
any few thousand tokens do, but not the text that a build is measured with.

    text → inputs' second moments for each matrix → codes, scales and zero points → the same tensors of the folder

Source: Frantar et al., GPTQ, arXiv 2210.17323 (act order, scales chosen before).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

WINDOW_TOKENS = 512
WINDOWS = 8
_CODES = 15
_DAMPING = 0.01
"""Of the mean second moment: what is added to each, so that their matrix can be inverted."""
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)
"""Of a block's range that its codes may cover; the best one is taken."""
_STRIPE = 128
"""Columns after which the error is carried over to all later ones."""
_NODE = re.compile(r"/model/(layers\.\d+)/(attn|mlp)/(o_proj|gate_proj|up_proj|down_proj)/MatMul_Q4")
_MODULES = {"attn": "self_attn", "mlp": "mlp"}
"""The builder's word → that of transformers."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A matrix of [rows, columns] in blocks: weight = (code - zero) * scale.

    Attributes:
        codes: [rows, blocks, weights of a block], 0 to 15.
        scales: [rows, blocks] float32.
        zeros: [rows, blocks], 0 to 15.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """[rows, columns]: what they stand for."""
        return ((self.codes - self.zeros[..., None]) * self.scales[..., None]).flatten(1)


def improve(folder: Path, hf: Path, windows: Sequence[Sequence[int]]) -> None:
    """Rewrites the folder's int4 matrices, but for those that the builder joins (qkv_proj) and the head.

    Args:
        folder: made by the model builder from `hf`, with zero points (`k_quant`).
        windows: tokens of what the model is to be good at, see `windows`.

    Raises:
        ValueError: the model has no such matrices, or others than the folder.
    """
    import onnx
    from transformers import AutoModelForCausalLM

    file = folder / "model.onnx"
    graph = onnx.load(file)
    nodes = [(node, _module(node.name)) for node in _int4(graph)]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    modules = dict(model.model.named_modules())
    if not nodes or (unknown := [name for _, name in nodes if name not in modules]):
        raise ValueError(f"of {hf} this cannot be calibrated: {unknown[0] if nodes else 'nothing is int4'}")
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    with torch.inference_mode():
        moments = second_moments(model.model, {name: modules[name] for _, name in nodes}, windows)
        for node, name in nodes:
            block_size = next(each.i for each in node.attribute if each.name == "block_size")
            found = rounded(modules[name].weight, moments[name], block_size=block_size)
            for place, values in zip(node.input[1:4], stored(found), strict=True):
                _replace(tensors[place], values)
    data = folder / "model.onnx.data"
    for old in (file, data):
        old.unlink()
    onnx.save(graph, file, save_as_external_data=True, location=data.name)


def windows(hf: Path, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of the texts, in windows that are spread over all of them.

    Raises:
        ValueError: the texts are too short.
    """
    from transformers import AutoTokenizer

    return spread(AutoTokenizer.from_pretrained(hf)("\n\n".join(texts))["input_ids"])


def spread(tokens: Sequence[int]) -> list[list[int]]:
    """At most `WINDOWS` windows.

    Raises:
        ValueError: there are fewer tokens than one window has.
    """
    if len(tokens) < WINDOW_TOKENS:
        raise ValueError(f"the texts have {len(tokens)} tokens, and {WINDOW_TOKENS} are needed at least")
    count = min(WINDOWS, len(tokens) // WINDOW_TOKENS)
    step = len(tokens) // count
    return [list(tokens[at * step : at * step + WINDOW_TOKENS]) for at in range(count)]


def second_moments(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], windows: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """For each matrix, [columns, columns]: the mean product of each two of its inputs."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.flatten(0, -2)
        found[name] = found.get(name, torch.zeros(())) + rows.T @ rows / (len(rows) * len(windows))

    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, module in modules.items()
    ]
    for window in windows:
        model(torch.tensor([list(window)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def rounded(weights: torch.Tensor, moments: torch.Tensor, *, block_size: int) -> Rounded:
    """A matrix in int4.

    Args:
        weights: [rows, columns] float32.
        moments: [columns, columns], see `second_moments`.
    """
    columns = weights.shape[1]
    moments = moments + torch.eye(columns) * _DAMPING * moments.diagonal().mean()
    importance = moments.diagonal()
    scales, zeros = _grid(weights.unflatten(1, (-1, block_size)), importance.unflatten(0, (-1, block_size)))
    order = torch.argsort(importance, descending=True)
    left = weights[:, order].clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order].double()))
    carried = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty_like(left)
    for start in range(0, columns, _STRIPE):
        stop = min(start + _STRIPE, columns)
        errors = torch.empty_like(left[:, start:stop])
        for at in range(start, stop):
            block = int(order[at]) // block_size
            scale, zero = scales[:, block], zeros[:, block]
            codes[:, at] = (left[:, at] / scale + zero).round().clamp(0, _CODES)
            error = (left[:, at] - (codes[:, at] - zero) * scale) / carried[at, at]
            left[:, at + 1 : stop] -= error[:, None] * carried[at, at + 1 : stop]
            errors[:, at - start] = error
        left[:, stop:] -= errors @ carried[start:stop, stop:]
    placed = torch.empty_like(codes)
    placed[:, order] = codes
    return Rounded(codes=placed.unflatten(1, (-1, block_size)), scales=scales, zeros=zeros)


def _grid(blocks: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each block, by the least weighted error of plain rounding."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best, scales, zeros = torch.full_like(low, torch.inf), torch.ones_like(low), torch.zeros_like(low)
    for share in _SHARES:
        plain = ((high - low) * share / _CODES).clamp(min=1e-9)
        zero = (-low * share / plain).round().clamp(0, _CODES)
        steps = _steps(blocks, plain, zero)
        # The scale that is best for these codes, where they are not all zero.
        fitted = (importance * steps * blocks).sum(-1) / (importance * steps**2).sum(-1).clamp(min=1e-20)
        scale = torch.where(fitted.abs() < 1e-9, plain, fitted)
        error = (importance * (blocks - _steps(blocks, scale, zero) * scale[..., None]) ** 2).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        zeros = torch.where(better, zero, zeros)
    return scales, zeros


def _steps(blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Codes less their zero point."""
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, _CODES)
    return codes - zeros[..., None]


def stored(matrix: Rounded) -> Sequence[npt.NDArray[Any]]:
    """Codes, scales and zero points as `MatMulNBits` takes them.

    Two codes, or two zero points of a row, are a byte, the first one its lower half.
    """
    zeros = matrix.zeros.numpy().astype(np.uint8)
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return _pairs(matrix.codes.numpy().astype(np.uint8)), matrix.scales.numpy(), _pairs(zeros)


def _pairs(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return (values[..., 0::2] | values[..., 1::2] << 4).astype(np.uint8)


def _int4(graph: Any) -> list[Any]:
    """The nodes of matrices that are rounded here."""
    return [
        node
        for node in graph.graph.node
        if node.op_type == "MatMulNBits"
        and len(node.input) > 3
        and node.input[3]
        and _NODE.fullmatch(node.name)
    ]


def _module(node: str) -> str:
    """`layers.3.mlp.up_proj`."""
    named = _NODE.fullmatch(node)
    assert named
    return f"{named[1]}.{_MODULES[named[2]]}.{named[3]}"


def _replace(tensor: Any, values: npt.NDArray[Any]) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(values.reshape(tensor.dims), tensor.name))
