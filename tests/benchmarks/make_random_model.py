"""Make a model of random weights and a real size, so that measured speed means something.

    ./build.sh random-model OUT [--shape 270m] [--architecture llama] [--precision int4] [--builder K=V …]

Runs in the training environment (torch, transformers, the model builder). The weights are random, so are the
answers; two things are arranged: no answer ends by itself (the rows of the end tokens in the last matrix are
zero, and a zero never is the largest logit), and every token is text of its own (the sample model's tokenizer,
filled up with words that no text produces). The seed makes a model again, byte for byte on one machine.

Flow: tokenizer → network of that shape → Hugging Face folder in float16 → onnxruntime-genai's model builder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parents[2] / "edge_agent" / "demo" / "sample_model"
TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
VOCAB_SIZE = 32_064  # Phi-3's
CONTEXT_TOKENS = 4096
END_IDS = (4, 0)  # of the sample's tokenizer: <|end|>, <|endoftext|>
BUILDER_OPTIONS = ("accuracy_level=4", "block_size=32")
BUILDER_TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder; `heads` and `kv_heads` are of the attention."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "tiny": Shape(hidden=256, intermediate=640, layers=4, heads=8, kv_heads=2),
    "270m": Shape(hidden=1024, intermediate=3200, layers=16, heads=16, kv_heads=4),
    "1b": Shape(hidden=2048, intermediate=5632, layers=20, heads=32, kv_heads=8),
}


def make_tokenizer(folder: Path) -> None:
    """Writes the sample model's tokenizer with `VOCAB_SIZE` tokens; the new ones have no merges, so no text
    is ever encoded to them."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(SAMPLE / name, folder / name)
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    used = set(vocabulary.values()) | {token["id"] for token in document["added_tokens"]}
    for number in range(VOCAB_SIZE):
        if number not in used:
            vocabulary[f"Ġw{number}"] = number  # Ġ is how byte-level BPE writes a space
    file.write_text(json.dumps(document, ensure_ascii=False), "utf-8")


def make_network(architecture: str, shape: Shape, seed: int) -> Any:
    """A network of random weights that never says an end token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    config_class, network_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=END_IDS[1],
        eos_token_id=list(END_IDS),
        pad_token_id=END_IDS[1],
    )
    if architecture == "phi3":
        config.original_max_position_embeddings = CONTEXT_TOKENS
    network = network_class(config).eval()
    with torch.no_grad():
        network.lm_head.weight[list(END_IDS)] = 0.0
    return network


def build(hf_folder: Path, out: Path, cache: Path, precision: str, options: Sequence[str]) -> None:
    """Runs onnxruntime-genai's model builder, offline, in its own process."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(hf_folder), "-o", str(out), "-c", str(cache), "-p", precision, "-e", "cpu"]
    if options:
        command += ["--extra_options", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILDER_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"builder: exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    for name in TOKENIZER_FILES:
        shutil.copyfile(hf_folder / name, out / name)


def make(
    out: Path, *, shape: Shape, architecture: str, precision: str, options: Sequence[str], seed: int
) -> None:
    """Makes the ONNX folder `out`."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="random-model-", dir=out.parent) as name:
        work = Path(name)
        hf_folder = work / "hf"
        network = make_network(architecture, shape, seed)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        network.half().save_pretrained(hf_folder)
        del network
        make_tokenizer(hf_folder)
        build(hf_folder, work / "onnx", work / "cache", precision, options)
        shutil.rmtree(out, ignore_errors=True)
        (work / "onnx").rename(out)
    size_bytes = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {parameters / 1e6:.0f} M parameters, {size_bytes / 1e6:.0f} MB, "
          f"{time.monotonic() - started_s:.0f} s")  # fmt: skip


def merged(defaults: Sequence[str], given: Sequence[str]) -> list[str]:
    """Builder options `K=V`; a given one replaces the default of the same key."""
    options = dict(option.split("=", 1) for option in (*defaults, *given))
    return [f"{key}={value}" for key, value in options.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="build.sh random-model",
        description="Make a model of random weights and a real size.",
        epilog="example: ./build.sh random-model /tmp/fast --shape 270m --builder block_size=128 "
        "--builder prune_lm_head=true",
    )
    parser.add_argument("out", type=Path, help="folder for the ONNX model; replaced when it is there")
    parser.add_argument("--shape", choices=SHAPES, default="270m", help="about that many parameters")
    parser.add_argument("--architecture", choices=("llama", "phi3"), default="llama")
    parser.add_argument("--precision", choices=("int4", "fp32"), default="int4")
    parser.add_argument(
        "--builder", action="append", default=[], metavar="K=V",
        help=f"an option of the model builder; may be repeated; {' '.join(BUILDER_OPTIONS)} with int4",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    if bad := [option for option in given.builder if "=" not in option]:
        parser.error(f"--builder {bad[0]} is not K=V")
    if given.out.exists() and not (given.out / "genai_config.json").is_file() and any(given.out.iterdir()):
        parser.error(f"{given.out} is there, and is no model folder")
    # Before torch and onnxruntime are imported: no network, no telemetry.
    os.environ.update(
        HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1"
    )
    given.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    make(
        given.out.absolute(),
        shape=SHAPES[given.shape],
        architecture=given.architecture,
        precision=given.precision,
        options=merged(BUILDER_OPTIONS if given.precision == "int4" else (), given.builder),
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
