"""How fast builds answer, and what memory they take: the bare libraries, each launch a process of its own.

    python -m tools.real_model.speed MODEL THREADS < tokens.json     one launch, as JSON; MODEL: a folder or a GGUF file

Sides take turns, so that whatever else the machine does meets all of them alike; the figures are medians over the
launches. A run ends at its deadline with the launches that it has. onnxruntime-genai gets a prompt in slices, as the
runner feeds it; llama.cpp cuts it by itself.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PROMPT_TOKENS = (32, 256, 1024)
NEW_TOKENS = 64
SLICE_TOKENS = 64
LAUNCH_TIMEOUT_S = 180.0
_WARM_UP_TOKENS = 8

Figures = dict[str, float]
"""Name → figure, such as `first_token_ms_256`, `decode_tokens_per_s_256`, `decode_cpu_ms_256`, `peak_mb`, `load_s`."""


def measure(
    sides: Mapping[str, Path],
    tokens: Sequence[int],
    *,
    launches: int,
    threads: int,
    limit_s: float,
    say: Callable[[str], None],
) -> dict[str, Figures]:
    """Medians for each side, with `launches`: how many there were.

    Args:
        sides: name → ONNX folder or GGUF file.
        tokens: at least as many as the longest prompt has.
        limit_s: after it no launch is begun.
        say: gets a line for each launch.
    """
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    deadline = time.monotonic() + limit_s
    for launch in range(launches):
        for name, model in sides.items():
            if time.monotonic() > deadline:
                say(f"{limit_s:.0f} s are over")
                return summed_up(found)
            try:
                found[name].append(_launch(model, tokens, threads))
            except subprocess.SubprocessError as error:
                say(f"{name}: {type(error).__name__}: {_last_line(error)}")
                continue
            say(
                f"launch {launch + 1} of {launches}, load {os.getloadavg()[0]:.1f}: {name} {_short(found[name][-1])}"
            )
    return summed_up(found)


def summed_up(found: Mapping[str, Sequence[Figures]]) -> dict[str, Figures]:
    """Medians, and how many launches they are from; a side without any is left out."""
    return {
        name: {key: statistics.median(each[key] for each in launches) for key in launches[0]}
        | {"launches": float(len(launches))}
        for name, launches in found.items()
        if launches
    }


def _launch(model: Path, tokens: Sequence[int], threads: int) -> Figures:
    program = [sys.executable, "-m", "tools.real_model.speed", str(model), str(threads)]
    done = subprocess.run(
        program,
        input=json.dumps(list(tokens[: max(PROMPT_TOKENS)])),
        capture_output=True,
        text=True,
        check=True,
        timeout=LAUNCH_TIMEOUT_S,
    )
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _last_line(error: subprocess.SubprocessError) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    return (str(text).strip().splitlines() or ["no message"])[-1][:200]


def _short(figures: Figures) -> str:
    middle = PROMPT_TOKENS[1]
    return (
        f"first token {figures[f'first_token_ms_{middle}']:.0f} ms, "
        f"{figures[f'decode_tokens_per_s_{middle}']:.0f} tokens/s, {figures['peak_mb']:.0f} MB"
    )


class _Side(Protocol):
    def first(self, tokens: Sequence[int]) -> None: ...

    def following(self, count: int) -> None: ...


def _once(model: Path, tokens: Sequence[int], threads: int) -> Figures:
    started = time.perf_counter()
    side: _Side = (_Genai if model.is_dir() else _LlamaCpp)(model, threads)
    figures = {"load_s": time.perf_counter() - started}
    side.first(tokens[:_WARM_UP_TOKENS])
    for length in PROMPT_TOKENS:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        side.first(tokens[:length])
        spoke, spoke_cpu = time.perf_counter(), time.process_time()
        side.following(NEW_TOKENS)
        ended, ended_cpu = time.perf_counter(), time.process_time()
        figures |= {
            f"first_token_ms_{length}": (spoke - begun) * 1e3,
            f"first_token_cpu_ms_{length}": (spoke_cpu - begun_cpu) * 1e3,
            f"decode_tokens_per_s_{length}": NEW_TOKENS / (ended - spoke),
            f"decode_cpu_ms_{length}": (ended_cpu - spoke_cpu) / NEW_TOKENS * 1e3,
        }
    return figures | {"peak_mb": _peak_mb()}


class _Genai:
    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._og, self._model = og, og.Model(config)
        self._generator: Any = None

    def first(self, tokens: Sequence[int]) -> None:
        import numpy as np

        self._generator = None  # the keys of the one before
        length = len(tokens) + 1 + NEW_TOKENS
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        for start in range(0, len(tokens), SLICE_TOKENS):
            self._generator.append_tokens(np.array(tokens[start : start + SLICE_TOKENS], dtype=np.int32))
        self._generator.generate_next_token()

    def following(self, count: int) -> None:
        for _ in range(count):
            self._generator.generate_next_token()


class _LlamaCpp:
    def __init__(self, gguf: Path, threads: int) -> None:
        from tools.real_model.llama_cpp import Llama

        room = max(PROMPT_TOKENS) + 1 + NEW_TOKENS
        self._model = Llama(gguf, threads=threads, context_tokens=room)
        self._next = 0

    def first(self, tokens: Sequence[int]) -> None:
        self._model.clear()
        self._next = int(self._model.feed(tokens).argmax())

    def following(self, count: int) -> None:
        for _ in range(count):
            self._next = int(self._model.feed([self._next]).argmax())


def _peak_mb() -> float:
    """Source: proc(5) VmHWM; getrusage would count what the parent had when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(json.dumps(_once(Path(sys.argv[1]), json.load(sys.stdin), int(sys.argv[2]))))
