"""Builds a Hugging Face folder for a CPU, as docs/models.md recommends: `as the original`, or `small`.

    python -m tools.build_model HF_FOLDER OUT [--small [--calibrate TEXT…]]

It runs onnxruntime-genai's model builder with options that name matrices one by one, which its short options cannot:
all in int8; or int4 with int8 for what a language model loses most by (the head, the matrix in front of the attention,
the second feed-forward matrix). With texts, the int4 matrices are rounded again (calibrated.py).
Tied embeddings share the head's int8 weights. For decoders whose layers the builder
makes of qkv_proj, o_proj, gate_proj, up_proj and down_proj: Llama, Mistral, Qwen, SmolLM, Phi-3 and their like.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = "/lm_head/MatMul"
LAYER = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
SENSITIVE = ("attn/qkv_proj", "mlp/down_proj")
BLOCK_SIZE = 32
BUILDER_TIMEOUT_S = 3600


def arguments(config: Mapping[str, Any], *, small: bool) -> list[str]:
    """The model builder's arguments beside its folders.

    Args:
        config: the model's config.json.
        small: int4 where it costs least.
    """
    matrices = [
        f"/model/layers.{layer}/{kind}/MatMul"
        for layer in range(config["num_hidden_layers"])
        for kind in (SENSITIVE if small else LAYER)
    ]
    # Without the table among the kinds the builder does not tie it to the head; an untied table stays as it is.
    kinds = ["MatMul", "Gather"] if config.get("tie_word_embeddings") else ["MatMul"]
    weights = {
        "type": "int4",
        "method": "k_quant" if small else "rtn",
        "symmetric": not small,
        "block_size": BLOCK_SIZE,
        "accuracy_level": 4,
        "op_types": kinds,
        "overrides": [{"match": {"name": name}, "type": "int8"} for name in (HEAD, *matrices)],
    }
    options = json.dumps({"quant_config": {"weights": weights}})
    return ["-e", "cpu", "--builder_config_version", "2", "--target_options", options]


def build(hf: Path, out: Path, arguments: Sequence[str]) -> None:
    """Runs the model builder, in a process of its own.

    Raises:
        ChildProcessError: it failed; the message ends with what it said last.
    """
    with tempfile.TemporaryDirectory(prefix="builder-", dir=out.parent) as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(hf), "-o", str(out), "-c", cache, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILDER_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise ChildProcessError(f"the model builder failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf", type=Path, metavar="HF_FOLDER", help="config.json, safetensors and a tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for `edge-agent publish`")
    parser.add_argument(
        "--small", action="store_true", help="a fifth smaller, and a little less of the original"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=(),
        metavar="TEXT",
        help="with --small: files of a few thousand words or more, by which the int4 matrices are rounded again; "
        "closer to the original at the same size",
    )
    given = parser.parse_args()
    if given.calibrate and not given.small:
        parser.error("--calibrate is for --small: int8 needs no text")
    out = given.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{given.out} is there already")
    texts = [file.read_text("utf-8") for file in given.calibrate]
    try:
        _make(given.hf, out, small=given.small, texts=texts)
    except (ChildProcessError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _make(hf: Path, out: Path, *, small: bool, texts: Sequence[str]) -> None:
    """The whole folder or none: what failed, or was built and not calibrated, is never at `out`."""
    config = json.loads((hf / "config.json").read_text("utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as unfinished:
        made = Path(unfinished) / out.name
        if not texts:
            build(hf, made, arguments(config, small=small))
        else:
            from tools import calibrated  # with torch

            windows = calibrated.windows(hf, texts)  # before the builder's minutes
            build(hf, made, arguments(config, small=small))
            calibrated.improve(made, hf, windows)
        made.rename(out)


if __name__ == "__main__":
    main()
