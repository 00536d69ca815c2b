"""A small language model of random weights as a GGUF file, and what llama.cpp's graph computes from it, in float64.

Rotary positions of `llama` turn neighbours, those of `qwen2` a head's halves: as llama.cpp has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.support.gguf_files import F32, Doubles, File, Weights, floats, random

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE, LAYERS, VOCABULARY, CONTEXT = 256, 512, 4, 2, 64, 2, 1024, 512
EPSILON, ROPE_BASE = 1e-5, 10000.0
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "o Ġ", "he ll", "Ġ t", "Ġt he", "i n", "Ġ Ġ", "e r")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def small_model(
    kind: int = F32,
    *,
    architecture: str = "llama",
    embedding: int | None = None,
    head: int | None = None,
    biases: bool = False,
    value: int | None = None,
    seed: int = 1,
) -> File:
    """
    Args:
        kind: format of the matrices.
        embedding: format of the table, if it is another one.
        head: format of a last matrix of its own; without it the table is used.
        biases: of queries, keys and values.
        value: format of the value matrices, if it is another one.
    """
    generator = np.random.default_rng(seed)
    kv = KV_HEADS * HEAD_SIZE
    table = kind if embedding is None else embedding
    tensors = {"token_embd.weight": random(generator, table, VOCABULARY, HIDDEN, 1)}
    if head is not None:
        tensors["output.weight"] = random(generator, head, VOCABULARY, HIDDEN, 0.1)
    tensors["output_norm.weight"] = _norm(generator)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = _norm(generator)
        for name, rows, columns in (
            ("attn_q", HEADS * HEAD_SIZE, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, HEADS * HEAD_SIZE),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            of = value if name == "attn_v" and value is not None else kind
            tensors[f"blk.{layer}.{name}.weight"] = random(generator, of, rows, columns, 0.15)
            if biases and name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{name}.bias"] = floats(generator.uniform(-0.3, 0.3, rows))
    return File(metadata={**sizes(architecture), **tokenizer()}, tensors=tensors)


def sizes(architecture: str) -> dict[str, object]:
    return {
        "general.architecture": architecture,
        "general.name": "small",
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": CONTEXT,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": EPSILON,
        f"{architecture}.rope.freq_base": ROPE_BASE,
        f"{architecture}.vocab_size": VOCABULARY,
    }


def tokenizer(pre: str = "smollm") -> dict[str, object]:
    """Bytes, a few merges, and tokens that no text has."""
    tokens = [*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    filling = [f"<unused{number}>" for number in range(VOCABULARY - len(tokens))]
    types = [
        *(_CONTROL for _ in SPECIAL),
        *(_NORMAL for _ in tokens[len(SPECIAL) :]),
        *(_UNUSED for _ in filling),
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *filling],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def byte_letters() -> list[str]:
    """The letter that GPT-2 has for each byte (`bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _norm(generator: np.random.Generator) -> Weights:
    return floats(generator.uniform(0.5, 1.5, HIDDEN))


def logits(file: File, ids: Sequence[int]) -> Doubles:
    """[tokens, vocabulary] of a text, computed from the file's weights at once."""
    values = {name: tensor.values for name, tensor in file.tensors.items()}
    neighbours = file.metadata["general.architecture"] == "llama"
    hidden = values["token_embd.weight"][list(ids)]
    for layer in range(LAYERS):
        block = {
            name.removeprefix(f"blk.{layer}."): tensor
            for name, tensor in values.items()
            if name.startswith(f"blk.{layer}.")
        }
        hidden = hidden + _attention(
            block, _normed(hidden, block["attn_norm.weight"]), values, neighbours=neighbours
        )
        normed = _normed(hidden, block["ffn_norm.weight"])
        gate = normed @ block["ffn_gate.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (normed @ block["ffn_up.weight"].T)
        hidden = hidden + inner @ block["ffn_down.weight"].T
    head = values.get("output.weight", values["token_embd.weight"])
    result: Doubles = _normed(hidden, values["output_norm.weight"]) @ head.T
    return result


def _normed(hidden: Doubles, weight: Doubles) -> Doubles:
    result: Doubles = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + EPSILON) * weight
    return result


def _attention(
    block: dict[str, Doubles], normed: Doubles, values: dict[str, Doubles], *, neighbours: bool
) -> Doubles:
    parts = {}
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        part = normed @ block[f"attn_{name}.weight"].T + block.get(f"attn_{name}.bias", np.zeros(1))
        parts[name] = part.reshape(len(normed), heads, HEAD_SIZE)
    factors = values.get("rope_freqs.weight", np.ones(HEAD_SIZE // 2))
    query, key = (_turned(parts[name], factors, neighbours=neighbours) for name in "qk")
    share = HEADS // KV_HEADS
    scores = np.einsum("qhd,khd->hqk", query, np.repeat(key, share, axis=1)) / np.sqrt(HEAD_SIZE)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", scores, np.repeat(parts["v"], share, axis=1))
    result: Doubles = mixed.reshape(len(normed), -1) @ block["attn_output.weight"].T
    return result


def _turned(heads: Doubles, factors: Doubles, *, neighbours: bool) -> Doubles:
    """[tokens, heads, size] with rotary positions."""
    half = HEAD_SIZE // 2
    angles = np.arange(len(heads))[:, None] * ROPE_BASE ** (-np.arange(half) / half) / factors
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first = (slice(0, None, 2) if neighbours else slice(0, half),)
    second = (slice(1, None, 2) if neighbours else slice(half, None),)
    turned = np.empty_like(heads)
    a, b = heads[..., first[0]], heads[..., second[0]]
    turned[..., first[0]], turned[..., second[0]] = a * cos - b * sin, a * sin + b * cos
    return turned
