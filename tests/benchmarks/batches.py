"""Several prompts in one generator: does each row compute what it computes alone, and what is gained?

    python -m tests.benchmarks.batches MODEL_FOLDER [--threads N] [--tokens N] [--rounds N]

The bare library, random prompts, padded on the right. First the logits of each row of batches of two, three and four
against those of its prompt alone, to the last bit, for as long as both say the same: a row that differs takes another
path through the arithmetic. `behind the prompt` is the first step, `answer` all others. Then four prompts, each in a
generator of its own in turns, beside one batch of them: process time where there is one thread, so that a busy machine
says something, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

SLICE_TOKENS = 64
LENGTHS = ((40, 40, 40, 40), (38, 134, 135, 71), (300, 20, 500, 140))
TIMED = (60, 64, 70, 55)


class Rows:
    """The bare library, greedily, with one prompt in a generator or several."""

    def __init__(self, folder: Path, threads: int, new_tokens: int) -> None:
        described = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._pad = int(described["pad_token_id"])
        self._vocabulary = int(described["vocab_size"])
        self.new_tokens = new_tokens
        self._rng = random.Random(3)

    def prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        return [[self._rng.randrange(300, self._vocabulary - 300) for _ in range(n)] for n in lengths]

    def alone(self, prompt: Sequence[int]) -> Any:
        """A generator that has run one prompt in slices."""
        generator = self._generator(1, len(prompt))
        for start in range(0, len(prompt), SLICE_TOKENS):
            generator.append_tokens(np.array(prompt[start : start + SLICE_TOKENS], dtype=np.int32))
        return generator

    def together(self, prompts: Sequence[Sequence[int]]) -> Any:
        """A generator that has run several in one piece: the library takes them no other way."""
        longest = max(map(len, prompts))
        generator = self._generator(len(prompts), longest)
        padded = [[*prompt, *[self._pad] * (longest - len(prompt))] for prompt in prompts]
        generator.append_tokens(np.array(padded, dtype=np.int32))
        return generator

    def answer(self, generator: Any, lengths: Sequence[int]) -> tuple[list[Any], list[list[int]]]:
        """Logits [rows, vocabulary] and tokens [rows] of each step."""
        logits: list[Any] = []
        tokens: list[list[int]] = []
        while len(tokens) < self.new_tokens and not generator.is_done():
            generator.generate_next_token()
            tokens.append([int(token) for token in generator.get_next_tokens()])
            out = generator.get_output("logits")
            last = [length - 1 if not logits and out.shape[1] > 1 else -1 for length in lengths]
            if len(lengths) == 1:
                last = [-1]
            logits.append(np.array([out[row, at] for row, at in enumerate(last)]))
        return logits, tokens

    def _generator(self, rows: int, length: int) -> Any:
        params = og.GeneratorParams(self._model)
        options = {"max_length": length + self.new_tokens + 8, "do_sample": False, "batch_size": rows}
        params.set_search_options(**options)
        return og.Generator(self._model, params)


def compare(rows: Rows) -> None:
    """Prints how many steps of each batch's rows are those of their prompts alone."""
    print("| lengths | rows | behind the prompt | answer | largest difference |\n|---|---|---|---|---|")
    for lengths in LENGTHS:
        prompts = rows.prompts(lengths)
        singles = [rows.answer(rows.alone(prompt), (len(prompt),)) for prompt in prompts]
        for count in (2, 3, 4):
            logits, tokens = rows.answer(rows.together(prompts[:count]), lengths[:count])
            firsts, equal, steps, worst = 0, 0, 0, 0.0
            for row, (own_logits, own_tokens) in enumerate(singles[:count]):
                for step in range(min(len(tokens), len(own_tokens))):
                    one, other = logits[step][row], own_logits[step][0]
                    same = np.array_equal(one, other)
                    worst = max(worst, float(np.abs(one - other).max()))
                    firsts += same and step == 0
                    equal += same and step > 0
                    steps += step > 0
                    if tokens[step][row] != own_tokens[step][0]:
                        break
            print(
                f"| {lengths} | {count} | {firsts} of {count} | {equal} of {steps} | {worst:.2g} |",
                flush=True,
            )


def gain(rows: Rows, threads: int, rounds: int) -> None:
    """Prints what four prompts take in turns and as a batch."""
    clock = time.process_time if threads == 1 else time.perf_counter
    took: list[tuple[float, float, float, float]] = []
    for _ in range(rounds):
        prompts = rows.prompts(TIMED)
        at = [clock()]
        singles = [rows.alone(prompt) for prompt in prompts]
        at.append(clock())
        _decode(singles, rows)
        del singles
        at.append(clock())
        batch = [rows.together(prompts)]
        at.append(clock())
        _decode(batch, rows)
        del batch
        at.append(clock())
        took.append((at[1] - at[0], at[2] - at[1], at[3] - at[2], at[4] - at[3]))
    prefill = statistics.median(one[0] / one[2] for one in took)
    decode = statistics.median(one[1] / one[3] for one in took)
    whole = statistics.median(sum(one[:2]) / sum(one[2:]) for one in took)
    print(f"\nfour in a batch / in turns: prompts {prefill:.2f}, answers {decode:.2f}, both {whole:.2f}")


def _decode(generators: Sequence[Any], rows: Rows) -> None:
    for _ in range(rows.new_tokens):
        for generator in generators:
            generator.generate_next_token()
            generator.get_next_tokens()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed")
    given = parser.parse_args()
    rows = Rows(given.folder, given.threads, given.tokens)
    compare(rows)
    gain(rows, given.threads, given.rounds)


if __name__ == "__main__":
    main()
