"""The same weights in llama.cpp's formats, so that its builds and ours have one origin.

llama.cpp's own rules choose each matrix's format (src/llama-quant.cpp): a Q4_K_M gives more bits to the values and the
second feed-forward matrix of some layers, and rows that superblocks of 256 do not fit get the next larger format.
Norms stay float32. The GGUF that the model came from is the third build: its weights are the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tools.real_model import llama_cpp

FORMATS = ("Q4_0", "Q4_K_M")
_WITHOUT_SUPERBLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_SUPERBLOCK = 256


def format_of(build: str, tensor: str, columns: int, layers: int) -> str:
    """The name of the format of one matrix of a llama architecture with tied embeddings.

    Args:
        build: one of `FORMATS`.
        tensor: its name, such as `blk.3.ffn_down.weight`.
        columns: elements of a row.
        layers: of the model.
    """
    wanted = "Q4_0" if build == "Q4_0" else "Q4_K"
    if tensor == "token_embd.weight":
        wanted = "Q6_K"  # it is the head as well
    elif build == "Q4_K_M" and tensor.endswith(("attn_v.weight", "ffn_down.weight")):
        layer = int(tensor.split(".")[1])
        eighth = layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            wanted = "Q6_K"
    return (
        _WITHOUT_SUPERBLOCKS[wanted] if columns % _SUPERBLOCK and wanted in _WITHOUT_SUPERBLOCKS else wanted
    )


def write(source: Path, build: str, target: Path) -> None:
    """Writes the file `target` from a GGUF file."""
    import gguf  # type: ignore[import-not-found]

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{architecture}.block_count"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        _copy(writer, name, field)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = gguf.GGMLQuantizationType[format_of(build, tensor.name, weights.shape[1], layers)]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        data = llama_cpp.quantize(weights, kind.value, weights.shape[1] // elements * size)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy(writer: Any, name: str, field: Any) -> None:
    """One entry of the metadata; the file's own counts, and what the writer has written, are not."""
    if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
        return
    inner = field.types[1] if len(field.types) > 1 else None
    writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
