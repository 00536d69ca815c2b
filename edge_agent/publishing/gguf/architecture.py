"""What a GGUF file says of its model: sizes, and which tensors it must have. Anything else is refused.

Two architectures are known, which are one graph: RMS norms, grouped attention with rotary positions, and a gated
feed-forward network. A key or a tensor that is not known here would change what the model computes, so it is an error
and is never left out in silence.
Source: gguf-py/gguf/constants.py and src/llama-model.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edge_agent.documents import page
from edge_agent.errors import PublishError
from edge_agent.publishing.gguf.formats import FORMATS
from edge_agent.publishing.gguf.reader import GgufFile, Tensor, Value

LLAMA, QWEN2 = "llama", "qwen2"
SUPPORTED: Mapping[str, str] = {
    LLAMA: "llama (Llama 2 and 3, SmolLM 1 and 2, Mistral, TinyLlama)",
    QWEN2: "qwen2 (Qwen 2 and 2.5)",
}
"""`general.architecture` → what it is called in messages. onnxruntime-genai has the same words."""
_NEED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_MAY_HAVE = frozenset(
    (
        *_NEED,
        "vocab_size",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "expert_count",
        "expert_used_count",
    )
)
_MOST = {"block_count": 1024, "context_length": 1 << 22, "attention.head_count": 1024}
_MOST_SIZE = 1 << 20
_TABLES = 1 << 29
"""Bytes of the tables of sines and cosines together: a context of a million tokens with heads of 128."""

OTHERWISE = f"take the Hugging Face folder that it was made from, and the model builder ({page('models.md')})"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder.

    Attributes:
        name: a key of `SUPPORTED`.
        context_tokens: the longest context.
        hidden: size of a token's vector.
        inner: size in the feed-forward network.
        rope_base: of the rotary positions.
        rope_factor: positions are divided by it.
        interleaved: rows of the query and key matrices are in the order of llama.cpp's first kind of rotary
            positions: neighbours turn together. onnxruntime's turn with the other half of a head.
    """

    name: str
    layers: int
    context_tokens: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    epsilon: float
    rope_base: float
    rope_factor: float

    @property
    def interleaved(self) -> bool:
        return self.name == LLAMA


def read(file: GgufFile) -> Architecture:
    """Reads and checks the sizes, and holds every tensor against them.

    Raises:
        PublishError: the architecture is another one, or a key, a tensor or a size is not as expected.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in SUPPORTED:
        known = " and ".join(SUPPORTED.values())
        raise PublishError(
            f"{file.path} has the architecture {str(name)[:64]!r}; {known} can be converted", remedy=OTHERWISE
        )
    try:
        found = _sizes(name, file)
        _check_tensors(found, file.tensors)
    except _Unknown as error:
        raise PublishError(f"{file.path} cannot be converted: {error}", remedy=OTHERWISE) from error
    return found


class _Unknown(Exception):
    """Says what of the file is not understood."""


def _sizes(name: str, file: GgufFile) -> Architecture:
    prefix = f"{name}."
    keys = file.keys_under(prefix)
    if unknown := sorted(keys.keys() - _MAY_HAVE):
        raise _Unknown(f"it has {prefix}{unknown[0]}, which is not known here")
    if missing := [key for key in _NEED if key not in keys]:
        raise _Unknown(f"{prefix}{missing[0]} is missing")
    if keys.get("expert_count", 0) != 0:
        raise _Unknown("it is a mixture of experts")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise _Unknown("it is one part of several: join them with llama-gguf-split --merge")
    hidden, heads = _whole(keys, "embedding_length"), _whole(keys, "attention.head_count")
    head_size = _whole(keys, "attention.key_length", hidden // heads)
    kv_heads = _whole(keys, "attention.head_count_kv", heads)
    if heads % kv_heads or head_size % 2:
        raise _Unknown(f"it has {heads} heads of {head_size}, {kv_heads} of them with keys")
    if _whole(keys, "attention.value_length", head_size) != head_size:
        raise _Unknown("its keys and values differ in size")
    if _whole(keys, "rope.dimension_count", head_size) != head_size:
        raise _Unknown("only a part of each head has rotary positions")
    context_tokens = _whole(keys, "context_length")
    if context_tokens * head_size * 4 > _TABLES:
        raise _Unknown(f"its context of {context_tokens} tokens is too long")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise _Unknown("it has no token_embd.weight")
    return Architecture(
        name=name,
        layers=_whole(keys, "block_count"),
        context_tokens=context_tokens,
        hidden=hidden,
        inner=_whole(keys, "feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=embedding.shape[0],
        epsilon=_real(keys, "attention.layer_norm_rms_epsilon", 0, 1),
        rope_base=_real({"rope.freq_base": 10000.0, **keys}, "rope.freq_base", 1, 1e12),
        rope_factor=_rope_factor(keys),
    )


def _rope_factor(keys: Mapping[str, Value]) -> float:
    default = "linear" if "rope.scaling.factor" in keys else "none"  # as in llama.cpp
    kind = keys.get("rope.scaling.type", default)
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise _Unknown(f"its rotary positions are scaled by {str(kind)[:32]!r}; none and linear are known")
    return _real(keys, "rope.scaling.factor", 1, 1e6)


def _whole(keys: Mapping[str, Value], key: str, default: int | None = None) -> int:
    value = keys.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST.get(key, _MOST_SIZE):
        raise _Unknown(f"{key} is {str(value)[:64]}")
    return value


def _real(keys: Mapping[str, Value], key: str, least: float, most: float) -> float:
    value = keys.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _Unknown(f"{key} is {str(value)[:64]}")
    return float(value)


def _check_tensors(sizes: Architecture, tensors: Mapping[str, Tensor]) -> None:
    expected = dict(_expected(sizes))
    for name, (shape, needed) in expected.items():
        if name not in tensors:
            if needed:
                raise _Unknown(f"the tensor {name!r} is missing")
        elif tensors[name].shape != shape:
            raise _Unknown(
                f"the tensor {name!r} has sizes of {tensors[name].shape}, and {shape} are expected"
            )
        elif len(shape) == 1 and FORMATS[tensors[name].type].floats is None:
            raise _Unknown(
                f"the tensor {name!r} has the format {tensors[name].format_name}; norms and biases are read as floats"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise _Unknown(f"it has the tensor {unknown[0]!r}, which is not known here")


def _expected(sizes: Architecture) -> Iterator[tuple[str, tuple[tuple[int, ...], bool]]]:
    """(name, (sizes, whether it must be there)) of every tensor."""
    hidden, inner = sizes.hidden, sizes.inner
    query, kv = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    yield "token_embd.weight", ((sizes.vocabulary, hidden), True)
    yield "output.weight", ((sizes.vocabulary, hidden), False)  # else the head is the table of embeddings
    yield "output_norm.weight", ((hidden,), True)
    yield ROPE_FACTORS, ((sizes.head_size // 2,), False)
    matrices = {
        "attn_q": (query, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for layer in range(sizes.layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", ((hidden,), True)
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}.weight", (shape, True)
            yield f"blk.{layer}.{name}.bias", ((shape[0],), False)
