"""What the model builder's options cost and bring: speed on a random-weight model, right answers on the sample.

    .tools/train-venv/bin/python -m tests.benchmarks.builds WORK [--shape 270m] [--launches 3]

Runs in the training environment (`./build.sh random-model --help` makes it). Every build is made once and kept
in WORK. Speed: a process for each launch, the builds in turn, so that what else the machine does meets all of
them alike; medians. On a shared machine `--threads 1` and CPU time a token say most. Accuracy: the sample
model's own weights, built with the same options, and its own questions; a wrong answer is one that is not
exact. Prints one line for each build, and JSON at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import make_random_model as random_model

ROOT = Path(__file__).parents[2]
HF_SAMPLE = ROOT / "tests" / "models" / "sample_hf"
SAMPLE_SCRIPT = ROOT / "tools" / "make_sample_model.py"
GATHER = "op_types_to_quantize=MatMul/Gather"
PRUNE = "prune_lm_head=true"
BUILDS: dict[str, tuple[str, ...]] = {
    "block 32": (),
    "block 64": ("block_size=64",),
    "block 128": ("block_size=128",),
    "block 32, pruned": (PRUNE,),
    "block 64, pruned": ("block_size=64", PRUNE),
    "block 128, pruned": ("block_size=128", PRUNE),
    "block 32, pruned, Gather": (PRUNE, GATHER),
    "block 64, pruned, Gather": ("block_size=64", PRUNE, GATHER),
    "block 128, pruned, Gather": ("block_size=128", PRUNE, GATHER),
    "accuracy level 1": ("accuracy_level=1",),
}
PROMPT_TOKENS, NEW_TOKENS, SLICE_TOKENS = 512, 64, 64


def speed(folder: Path, threads: int) -> dict[str, float]:
    """In a process of its own: load, prefill in slices, decode, peak memory."""
    program = ["-m", "tests.benchmarks.builds", "--measure", str(folder), "--threads", str(threads)]
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, check=True, timeout=900)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure(folder: Path, threads: int) -> None:
    import time

    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    started = time.perf_counter()
    model = og.Model(config)
    loaded = time.perf_counter()
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=PROMPT_TOKENS + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    tokens = np.random.default_rng(1).integers(10, 1000, PROMPT_TOKENS, dtype=np.int32)
    prefill, prefill_cpu = time.perf_counter(), time.process_time()
    for start in range(0, PROMPT_TOKENS, SLICE_TOKENS):
        generator.append_tokens(tokens[start : start + SLICE_TOKENS])
    generator.generate_next_token()
    decode, decode_cpu = time.perf_counter(), time.process_time()
    count = 0
    while not generator.is_done():
        generator.generate_next_token()
        count += 1
    ended, ended_cpu = time.perf_counter(), time.process_time()
    print(
        json.dumps(
            {
                "load_s": loaded - started,
                "prefill_tokens_per_s": PROMPT_TOKENS / (decode - prefill),
                "decode_tokens_per_s": count / (ended - decode),
                "prefill_cpu_ms": (decode_cpu - prefill_cpu) / PROMPT_TOKENS * 1e3,
                "decode_cpu_ms": (ended_cpu - decode_cpu) / count * 1e3,
                "peak_mb": _peak_mb(),
            }
        )
    )


def _peak_mb() -> float:
    """Source: proc(5) VmHWM; getrusage would count what the parent had when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


def right_answers(folder: Path) -> float:
    """Share of the sample model's questions, in both forms, that a build answers exactly."""
    import onnxruntime_genai as og
    from transformers import AutoTokenizer

    # The package itself needs libraries that the training environment does not have; this file does not.
    sys.path.insert(0, str(SAMPLE_SCRIPT.parent))
    sample = importlib.import_module(SAMPLE_SCRIPT.stem)
    tokenizer = AutoTokenizer.from_pretrained(HF_SAMPLE)
    model = og.Model(str(folder))
    chats = [[pair] for pair in sample.pairs()]
    wrong = [line for form in sample.Form for line in sample._wrong_answers(model, tokenizer, chats, form)]
    return 1 - len(wrong) / (2 * len(chats))


def made(work: Path, name: str, options: Sequence[str], shape: str, precision: str = "int4") -> Path:
    """The random-weight model of this build; made when it is not there."""
    folder = work / f"{shape}-{name.replace(', ', '-').replace(' ', '')}"
    if not folder.exists():
        print(f"making {folder.name}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            random_model.make(
                folder,
                shape=random_model.SHAPES[shape],
                architecture="llama",
                precision=precision,
                options=random_model.merged(random_model.BUILDER_OPTIONS, options),
                seed=1,
            )
    return folder


def sample_built(work: Path, name: str, options: Sequence[str], precision: str = "int4") -> Path:
    folder = work / f"sample-{name.replace(', ', '-').replace(' ', '')}"
    if not folder.exists():
        defaults = random_model.BUILDER_OPTIONS if precision == "int4" else ()
        random_model.build(
            HF_SAMPLE, folder, work / "cache", precision, random_model.merged(defaults, options)
        )
    return folder


def run(work: Path, shape: str, launches: int, threads: int) -> None:
    folders = {name: made(work, name, options, shape) for name, options in BUILDS.items()}
    right = {name: right_answers(sample_built(work, name, options)) for name, options in BUILDS.items()}
    print(f"right answers: {right}", file=sys.stderr, flush=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in BUILDS}
    for launch in range(launches):
        for name, folder in folders.items():
            results[name].append(speed(folder, threads))
            print(f"{launch + 1} of {launches}: {name} {results[name][-1]}", file=sys.stderr, flush=True)
    table: dict[str, dict[str, Any]] = {}
    for name in BUILDS:
        keys = results[name][0]
        table[name] = {key: statistics.median(each[key] for each in results[name]) for key in keys}
        table[name]["mb"] = sum(file.stat().st_size for file in folders[name].iterdir()) / 1e6
        table[name]["right"] = right[name]
        print(f"{name:28s} " + "  ".join(f"{key} {value:.4g}" for key, value in table[name].items()))
    print(f"float32: right {right_answers(sample_built(work, 'float32', (), 'fp32')):.4f}")
    print(json.dumps(table))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure builds of one model.")
    parser.add_argument("work", type=Path, nargs="?", help="folder for the builds")
    parser.add_argument("--shape", choices=random_model.SHAPES, default="270m")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(TQDM_DISABLE="1")
    if given.measure:
        measure(given.measure, given.threads)
    elif given.work is None:
        parser.error("give WORK")
    else:
        given.work.mkdir(parents=True, exist_ok=True)
        run(given.work.absolute(), given.shape, given.launches, given.threads)


if __name__ == "__main__":
    main()
