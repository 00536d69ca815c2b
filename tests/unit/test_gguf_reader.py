"""A GGUF file is input: what is damaged, hostile or not known is one clear error, and nothing is allocated by it."""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import PublishError
from edge_agent.publishing import gguf
from edge_agent.publishing.gguf import architecture, graph, reader, tokenizer
from tests.support import gguf_files as files
from tests.support import gguf_models as models
from tests.support.gguf_files import Q4_0, Q4_1, Q8_0, File

pytestmark = pytest.mark.attack


@functools.cache
def good() -> bytes:
    return models.small_model(Q4_1).encode()


def look(path: Path) -> None:
    """All that is read before weights are."""
    with reader.opened(path) as found:
        sizes = architecture.read(found)
        tokenizer.read(found, sizes.vocabulary)


def refusal(path: Path) -> str:
    with pytest.raises(PublishError) as caught:
        look(path)
    assert caught.value.message.startswith(f"{path} ")
    return caught.value.message


def header(*parts: bytes, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def entry(*sizes: int, kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(sizes) if dimensions is None else dimensions
    return files.text("x") + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


KEY = files.text("k")
HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GGUF", "ends in its header"),
        (b"PK\x03\x04" + bytes(64), "does not begin with GGUF"),
        (header(version=1), "its version is 1"),
        (header(version=3 << 24), "little-endian"),
        (header(tensors=HUGE), "it has 18446744073709551615 tensors"),
        (header(keys=HUGE), "it has 18446744073709551615 keys"),
        (header(keys=1), "ends in its header"),
        (header(struct.pack("<Q", HUGE), keys=1), "a text in it has 18446744073709551615 bytes"),
        (header(struct.pack("<Q", 200) + b"k", keys=1), "ends in its header"),
        (header(struct.pack("<Q", 2) + b"\xff\xff", keys=1), "not UTF-8"),
        (header(KEY, struct.pack("<I", 99), keys=1), "unknown type, 99"),
        (header(KEY, struct.pack("<II", 9, 9), bytes(8), keys=1), "unknown type, 9"),
        (header(KEY, struct.pack("<IIQ", 9, 4, HUGE), keys=1), "items of 'k'"),
        (header(KEY, struct.pack("<IIQ", 9, 8, 1 << 20), keys=1), "ends in its header"),
        (header(KEY, files.value(1), KEY, files.value(1), keys=2), "the key 'k' stands in it twice"),
        (header(files.text("general.alignment"), files.value(0), keys=1), "general.alignment is 0"),
        (header(files.text("general.alignment"), files.value(1 << 30), keys=1), "general.alignment is"),
        (header(files.text("general.alignment"), files.value("x"), keys=1), "general.alignment is 'x'"),
        (header(entry(dimensions=0), tensors=1), "has 0 dimensions"),
        (header(entry(dimensions=1 << 31), tensors=1), "has 2147483648 dimensions"),
        (header(entry(0), tensors=1), "has sizes of [0]"),
        (header(entry(1 << 40, 1 << 40), tensors=1), "has sizes of"),
        (header(entry(32, kind=10), tensors=1), "has the format Q2_K; BF16, F16, F32, Q4_0"),
        (header(entry(32, kind=4_000_000_000), tensors=1), "has the format 4000000000"),
        (header(entry(33, kind=2), tensors=1), "rows of 33, no multiple of 32"),
        (header(entry(4, offset=8), bytes(64), tensors=1), "no multiple of 32"),
        (header(entry(4, offset=HUGE - 31), bytes(64), tensors=1), "ends behind the end of the file"),
        (header(entry(1 << 30), bytes(64), tensors=1), "ends behind the end of the file"),
        (header(entry(4), entry(4), bytes(64), tensors=2), "'x' stands in it twice"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert reason in refusal(tmp_path / "m.gguf")


def test_two_tensors_do_not_share_bytes(tmp_path: Path) -> None:
    data = models.small_model(Q4_1).encode()
    name = files.text("blk.0.ffn_down.weight")
    at = data.index(name) + len(name) + 4 + 16 + 4  # behind its dimensions, sizes and format
    (offset,) = struct.unpack_from("<Q", data, at)
    assert offset > 0
    (tmp_path / "m.gguf").write_bytes(data[:at] + struct.pack("<Q", offset - 32) + data[at + 8 :])
    assert "over another tensor" in refusal(tmp_path / "m.gguf")


def test_a_file_that_was_not_copied_to_its_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(good()[:-1])
    assert "it is not complete" in refusal(tmp_path / "m.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "ends in its header" in refusal(tmp_path / "empty.gguf")
    assert "cannot be read" in refusal(tmp_path / "missing.gguf")


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Read through a map, it would end the process with SIGBUS."""
    path = models.small_model(Q4_1).write(tmp_path / "m.gguf")
    with (
        pytest.raises(PublishError, match=r"m\.gguf was changed while it was read"),
        reader.opened(path) as file,
    ):
        sizes = architecture.read(file)
        os.truncate(path, file.tensors["token_embd.weight"].offset)
        graph.write(sizes, file.tensors, tmp_path)


def test_a_file_that_was_written_to_while_it_was_read_is_an_error(tmp_path: Path) -> None:
    """Not one whose name is another file's now: what was read is whole."""
    path = models.small_model(Q4_1).write(tmp_path / "m.gguf")
    with pytest.raises(PublishError, match="was changed while it was read"), reader.opened(path):
        os.utime(path, ns=(0, 0))
    with reader.opened(path):
        (tmp_path / "other").write_bytes(b"another")
        (tmp_path / "other").replace(path)


def change(key: str, content: object) -> Callable[[File], None]:
    return lambda file: file.metadata.__setitem__(key, content)


def drop(key: str) -> Callable[[File], None]:
    return lambda file: file.metadata.pop(key)  # type: ignore[return-value]


def typed(token: int, kind: int) -> Callable[[File], None]:
    def changed(file: File) -> None:
        types = file.metadata[f"{GGML}.token_type"]
        assert isinstance(types, list)
        types[token] = kind

    return changed


def tensor(name: str, weights: files.Weights) -> Callable[[File], None]:
    return lambda file: file.tensors.__setitem__(name, weights)


def in_one_row(kind: int, length: int) -> files.Weights:
    """A quantized tensor of one dimension."""
    return dataclasses.replace(files.random(np.random.default_rng(1), kind, 1, length, 1), shape=(length,))


GGML = "tokenizer.ggml"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            change("general.architecture", "gemma3"),
            "the architecture 'gemma3'; llama (Llama 2 and 3, SmolLM 1",
        ),
        (change("general.architecture", 3), "the architecture '3'"),
        (drop("general.architecture"), "the architecture 'None'"),
        (change("llama.attention.sliding_window", 512), "it has llama.attention.sliding_window"),
        (drop("llama.feed_forward_length"), "llama.feed_forward_length is missing"),
        (change("llama.expert_count", 8), "a mixture of experts"),
        (change("split.count", 3), "llama-gguf-split --merge"),
        (change("llama.block_count", 0), "block_count is 0"),
        (change("llama.block_count", 5000), "block_count is 5000"),
        (change("llama.block_count", 3), "'blk.2.attn_norm.weight' is missing"),
        (change("llama.block_count", 1), "the tensor 'blk.1.attn_k.weight', which is not known"),
        (change("llama.embedding_length", "x"), "embedding_length is x"),
        (change("llama.attention.head_count", 3), "it has 3 heads of 85, 2 of them"),
        (change("llama.attention.head_count_kv", [2, 2]), "head_count_kv is [2, 2]"),
        (change("llama.attention.layer_norm_rms_epsilon", float("nan")), "layer_norm_rms_epsilon is nan"),
        (change("llama.context_length", 4_000_000_000), "context_length is 4000000000"),
        (change("llama.context_length", 1 << 22), "its context of 4194304 tokens is too long"),
        (change("llama.rope.dimension_count", 32), "only a part of each head"),
        (change("llama.rope.scaling.type", "yarn"), "scaled by 'yarn'; none and linear are known"),
        (change("llama.attention.value_length", 32), "keys and values differ"),
        (change("llama.rope.freq_base", 0.0), "rope.freq_base is 0.0"),
        (
            tensor("blk.0.attn_q_norm.weight", files.floats([1.0])),
            "'blk.0.attn_q_norm.weight', which is not known",
        ),
        (
            tensor("output_norm.weight", files.floats([1.0])),
            "'output_norm.weight' has sizes of (1,), and (256,)",
        ),
        (
            tensor("output_norm.weight", files.random(np.random.default_rng(1), Q8_0, 1, 256, 1)),
            "'output_norm.weight' has sizes of (1, 256)",
        ),
        (
            tensor("blk.0.attn_norm.weight", in_one_row(Q8_0, 256)),
            "'blk.0.attn_norm.weight' has the format Q8_0; norms and biases are read as floats",
        ),
        (
            tensor("blk.1.attn_k.bias", in_one_row(Q4_0, 128)),
            "'blk.1.attn_k.bias' has the format Q4_0; norms",
        ),
        (
            tensor("rope_freqs.weight", in_one_row(Q8_0, 32)),
            "'rope_freqs.weight' has the format Q8_0; norms",
        ),
        (change(f"{GGML}.model", "bert"), "its kind is 'bert'; gpt2 and llama are known"),
        (change(f"{GGML}.pre", "tekken"), "its way to split a text is 'tekken'"),
        (drop(f"{GGML}.pre"), "its way to split a text is 'not named'"),
        (change(f"{GGML}.tokens", ["a", "b"]), "it has 2 different tokens, and the model 1024"),
        (change(f"{GGML}.tokens", ["a"] * 1024), "it has 1 different tokens"),
        (change(f"{GGML}.tokens", 7), "tokens is no list of texts"),
        (change(f"{GGML}.token_type", [1]), "its tokens have no types"),
        (drop(f"{GGML}.token_type"), "its tokens have no types (tokenizer.ggml.token_type)"),
        (change(f"{GGML}.token_type", [3.0] * 1024), "a token has a type that is not known here"),
        (typed(500, 0), "a token has a type that is not known here"),
        (typed(500, 7), "a token has a type that is not known here"),
        (typed(1, 1), "'<|im_start|>' frames a turn"),
        (typed(1, 5), "'<|im_start|>' frames a turn"),
        (change(f"{GGML}.eos_token_id", 300), "frames a turn"),
        (change(f"{GGML}.eot_token_id", 300), "frames a turn"),
        (change(f"{GGML}.merges", ["a b c"]), "a merge is not of two parts"),
        (change(f"{GGML}.eos_token_id", 1024), "eos_token_id is 1024"),
        (drop(f"{GGML}.eos_token_id"), "no token ends an answer"),
        (change(f"{GGML}.add_eos_token", True), "a token behind each text (tokenizer.ggml.add_eos_token)"),
        (change(f"{GGML}.add_sep_token", True), "a token behind each text (tokenizer.ggml.add_sep_token)"),
        (change(f"{GGML}.add_eos_token", 1), "tokenizer.ggml.add_eos_token is 1"),
        (change(f"{GGML}.add_bos_token", "no"), "tokenizer.ggml.add_bos_token is no"),
        (change(f"{GGML}.add_space_prefix", 0), "tokenizer.ggml.add_space_prefix is 0"),
        (
            change(f"{GGML}.precompiled_charsmap", [1, 2]),
            "it has tokenizer.ggml.precompiled_charsmap, which is not known here",
        ),
        (change("tokenizer.chat_template", 1), "its chat template is no text"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, changed: Callable[[File], None], reason: str
) -> None:
    file = models.small_model(Q4_1)
    changed(file)
    assert reason in refusal(file.write(tmp_path / "m.gguf"))


def test_a_files_usual_keys_are_known(tmp_path: Path) -> None:
    """Those that name tokens for other tasks, and those that say what is so anyway."""
    file = models.small_model(Q4_1)
    others = ("seperator", "mask", "cls", "unknown", "prefix", "suffix", "middle", "fim_pre", "fim_rep")
    file.metadata |= {f"{GGML}.{each}_token_id": 0 for each in others}
    file.metadata |= {f"{GGML}.add_eos_token": False, f"{GGML}.add_sep_token": False}
    file.metadata |= {f"{GGML}.add_space_prefix": False, "tokenizer.chat_template.tool_use": "x"}
    look(file.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({}, 1.0),
        ({"factor": 4.0}, 4.0),
        ({"type": "linear", "factor": 4.0}, 4.0),
        ({"type": "none", "factor": 4.0}, 1.0),
    ],
)
def test_a_factor_without_a_type_scales_positions_as_in_llama_cpp(
    tmp_path: Path, scaling: dict[str, object], factor: float
) -> None:
    file = models.small_model(Q4_1)
    file.metadata |= {f"llama.rope.scaling.{key}": content for key, content in scaling.items()}
    with reader.opened(file.write(tmp_path / "m.gguf")) as found:
        assert architecture.read(found).rope_factor == factor


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, name: str) -> None:
    file = models.small_model(Q4_0)
    file.tensors[name].raw[0, 0:2] = 0xFF
    (tmp_path / "out").mkdir()
    with pytest.raises(PublishError, match=f"{name}' has weights that are no numbers"):
        gguf.convert(file.write(tmp_path / "m.gguf"), tmp_path / "out")


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 1 << 20), at=st.integers(0, 40_000), data=st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, data: bytes
) -> None:
    content = bytearray(good())
    content[at : at + len(data)] = data
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(content[: len(content) - (cut if cut % 3 == 0 else 0)])
    try:
        look(file)
    except PublishError as error:
        assert error.message.startswith(f"{file} ")
