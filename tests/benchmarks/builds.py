"""What the model builder's options cost and bring: quality and speed of each, and llama.cpp beside them.

    ./build.sh real-model                                      makes the original that is built from
    PYTHONPATH=.tools/llama-cpp .tools/train-venv/bin/python -m tests.benchmarks.builds WORK --real .tools/real-model
    .tools/train-venv/bin/python -m tests.benchmarks.builds WORK --shape 1b        random weights: speed only

Every build is made once and kept in WORK, and so is its quality. Options that the builder, or the library that
runs the folder, cannot do are named, and left out. `--only k_quant` chooses builds by a part of their names. Speed is
measured as tools/real_model/speed.py says; on a shared machine `--threads 1` and the CPU time of a token, in the JSON
on standard error, say most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.benchmarks import make_random_model as random_model
from tools.build_model import build
from tools.real_model import report, speed
from tools.real_model.__main__ import NAMES, SMALL, add_limits
from tools.real_model.building import made
from tools.real_model.progress import say
from tools.real_model.table import table

LEVEL = ("accuracy_level=4",)
ASYMMETRIC = "is_symmetric=false"
UNTIED = "shared_embeddings=false"
MIXED = "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"
BUILDS: dict[str, tuple[str, Sequence[str]]] = {
    **{f"block {size}": ("int4", (f"block_size={size}",)) for size in (16, 32, 64, 128)},
    **{
        f"{method} {size}": ("int4", (f"algo_config={method}", f"block_size={size}"))
        for method in ("k_quant", "k_quant_last", "k_quant_mixed")
        for size in (16, 32, 64, 128)
    },
    **{
        f"{method} 32": ("int4", (f"algo_config={method}", "block_size=32")) for method in ("rtn", "rtn_last")
    },
    "rtn 32 asymmetric": ("int4", ("algo_config=rtn", "block_size=32", ASYMMETRIC)),
    "rtn_last 32 asymmetric": ("int4", ("algo_config=rtn_last", "block_size=32", ASYMMETRIC)),
    "rtn 32 asymmetric, mixed": ("int4", ("algo_config=rtn", "block_size=32", ASYMMETRIC, MIXED)),
    "block 32 asymmetric": ("int4", ("block_size=32", ASYMMETRIC)),
    "block 32 asymmetric, untied": ("int4", ("block_size=32", ASYMMETRIC, UNTIED)),
    "block 32, mixed": ("int4", ("block_size=32", MIXED)),
    "k_quant_mixed 32, untied": ("int4", ("algo_config=k_quant_mixed", "block_size=32", UNTIED)),
    "k_quant_mixed 32, level 0": (
        "int4",
        ("algo_config=k_quant_mixed", "block_size=32", "accuracy_level=0"),
    ),
    "k_quant_mixed 32, level 1": (
        "int4",
        ("algo_config=k_quant_mixed", "block_size=32", "accuracy_level=1"),
    ),
    "int8, block 32": ("int8", ("block_size=32",)),
    "int8, block 128": ("int8", ("block_size=128",)),
    "int8, k_quant 32": ("int8", ("algo_config=k_quant", "block_size=32")),
    "int8, rtn 32": ("int8", ("algo_config=rtn", "block_size=32")),
    "block 32, pruned": ("int4", ("block_size=32", "prune_lm_head=true")),
    "block 32, Gather": ("int4", ("block_size=32", "op_types_to_quantize=MatMul/Gather")),
}
"""Name → precision, and options of the model builder beside `LEVEL`."""


def of_real_model(work: Path, real: Path, names: Sequence[str]) -> dict[str, Path]:
    """What `./build.sh real-model` made, llama.cpp's builds too, and every build here that can be made."""
    sides = {NAMES[folder]: real / folder for folder in ("onnx-int8", SMALL, "onnx-gguf")}
    for name in names:
        precision, given = BUILDS[name]
        options = random_model.merged(LEVEL, given)
        arguments = ["-e", "cpu", "-p", precision, "--extra_options", *options]
        with _named_when_it_fails(name):
            sides[name] = made(
                work / _file_name(name),
                " ".join(arguments),
                lambda folder, arguments=arguments: build(real / "hf", folder, arguments),  # type: ignore[misc]
            )
    sides |= {f"llama.cpp {file.stem}": file for file in sorted(real.glob("gguf*/*.gguf"))}
    return {name: path for name, path in sides.items() if path.exists()}


def of_random_weights(work: Path, shape: str, names: Sequence[str]) -> dict[str, Path]:
    """Every build of a random-weight model of this shape that can be made."""
    sides = {}
    for name in names:
        precision, options = BUILDS[name]
        with _named_when_it_fails(name), contextlib.redirect_stdout(sys.stderr):
            sides[name] = made(
                work / f"{shape}-{_file_name(name)}",
                f"{precision} {' '.join(options)}",
                lambda folder, p=precision, o=options: random_model.make(  # type: ignore[misc]
                    folder,
                    shape=random_model.SHAPES[shape],
                    architecture="llama",
                    precision=p,
                    options=random_model.merged(LEVEL, o),
                    seed=1,
                ),
            )
    return sides


@contextlib.contextmanager
def _named_when_it_fails(name: str) -> Iterator[None]:
    try:
        yield
    except (ChildProcessError, SystemExit) as error:
        say(f"{name} cannot be built: {str(error).strip().splitlines()[-1]}")


def _file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _print_speed(found: Mapping[str, speed.Figures]) -> None:
    for name, figures in found.items():
        print(f"{name:28s} " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for the builds")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--real", type=Path, metavar="OUT", help="what ./build.sh real-model made")
    what.add_argument("--shape", choices=random_model.SHAPES)
    parser.add_argument("--only", default="", metavar="TEXT", help="builds with this in their names")
    add_limits(parser, limit_s=900)
    given = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(TQDM_DISABLE="1")
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in BUILDS if given.only in name]
    limits = {"launches": given.launches, "threads": given.threads, "limit_s": given.limit_s}
    if given.real:
        sides = of_real_model(work, given.real, names)
        found = report.measure(given.real / "hf", sides, work / "quality.json", **limits)
        print(table(found))
        print(json.dumps(found), file=sys.stderr)
    else:
        tokens = range(10, 10 + max(speed.PROMPT_TOKENS))
        measured = speed.measure(of_random_weights(work, given.shape, names), tokens, say=say, **limits)
        _print_speed(measured)


if __name__ == "__main__":
    main()
