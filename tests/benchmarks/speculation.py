"""Drafts from the prompt's own text: are answers the same with and without them, and what do they gain?

    python -m tests.benchmarks.speculation MODEL_FOLDER [--threads N] [--tokens N]

Three ways to decode greedily with the bare library, prompt by prompt in turn:

    plain   one token in each step, as the agent does
    wide    two rows in each step, the second one for nothing: a step of two or more rows takes one numeric path,
            whatever their number, so nothing that is drafted can change what the first row says
    drafts  as wide, but the other rows are drafts: what followed the last tokens when they last occurred. Their number
            follows what was accepted of late, down to one row for nothing

`drafts` must say what `wide` says; whether `wide` says what `plain` says is counted. A step is timed by its width too,
for ratios of whole answers depend on how much a model repeats. The folder needs all rows of the logits: none that was
made with `prune_lm_head`.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

MOST_DRAFTS = 4
NGRAM = 3
SLICE_TOKENS = 64
_TEXT = (
    "The gate of press three opens at six in the morning. A worker checks the oil level and writes it down. At "
    "seven the first steel plates arrive from the north store, and the line starts. If the pressure is above 210 "
    "bar, the valve on the left side opens by itself and the lamp turns red. Nobody may reach into the press while "
    "the lamp is red. The shift ends at two, and the last plate is measured before the line stops."
)
_SENTENCES = _TEXT.split(". ")
_TOPICS = ("the sea", "a clock", "bread", "a bridge", "winter", "a garden", "steel", "the moon")
PROMPTS: dict[str, list[str]] = {
    "repeat": [
        f"Repeat this text word for word: {' '.join(_SENTENCES[at:] + _SENTENCES[:at])}" for at in range(8)
    ],
    "summary": [f"Summarize in two sentences: {_TEXT} {sentence}." for sentence in (_SENTENCES * 2)[:8]],
    "extract": [
        f"{_TEXT}\nCopy the sentence that speaks of {what}."
        for what in (
            "oil",
            "the valve",
            "the lamp",
            "the shift",
            "plates",
            "pressure",
            "the line",
            "a worker",
        )
    ],
    "list": [f"Write a JSON list of eight objects with name and price, about {topic}." for topic in _TOPICS],
    "chat": [f"Tell me something surprising about {topic}." for topic in _TOPICS],
}


class Decoder:
    """The bare library, greedily."""

    def __init__(self, folder: Path, threads: int, new_tokens: int) -> None:
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        ends = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._new_tokens = new_tokens
        self.step_s: dict[int, list[float]] = collections.defaultdict(list)

    def encode(self, text: str) -> list[int]:
        messages = json.dumps([{"role": "user", "content": text}])
        written = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return [int(token) for token in self._tokenizer.encode(written)]

    def plain(self, prompt: Sequence[int]) -> tuple[list[int], float, int]:
        """The answer's tokens, the seconds of its decoding, and its steps."""
        generator = self._begin(prompt)
        answer: list[int] = []
        began = time.perf_counter()
        while len(answer) < self._new_tokens:
            at_s = time.perf_counter()
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
            self.step_s[1].append(time.perf_counter() - at_s)
            if answer[-1] in self._ends:
                break
        return answer, time.perf_counter() - began, len(answer)

    def wide(self, prompt: Sequence[int]) -> tuple[list[int], float, int]:
        return self._in_rows(prompt, lambda _tokens, _most: [])

    def drafts(self, prompt: Sequence[int]) -> tuple[list[int], float, int]:
        return self._in_rows(prompt, _draft)

    def _begin(self, prompt: Sequence[int]) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt) + self._new_tokens + 16, do_sample=False)
        generator = og.Generator(self._model, params)
        for start in range(0, len(prompt), SLICE_TOKENS):
            generator.append_tokens(np.array(prompt[start : start + SLICE_TOKENS], dtype=np.int32))
        return generator

    def _in_rows(
        self, prompt: Sequence[int], draft: Callable[[Sequence[int], int], list[int]]
    ) -> tuple[list[int], float, int]:
        generator = self._begin(prompt)
        tokens, steps, most = list(prompt), 0, MOST_DRAFTS
        began = time.perf_counter()
        tokens.append(int(np.argmax(generator.get_output("logits")[0, -1])))
        while len(tokens) - len(prompt) < self._new_tokens and tokens[-1] not in self._ends:
            at_s = time.perf_counter()
            drafted = draft(tokens, most)
            rows = [tokens[-1], *(drafted or [tokens[-1]])]
            generator.append_tokens(np.array(rows, dtype=np.int32))
            said = np.argmax(generator.get_output("logits")[0], axis=-1)
            accepted = 0
            while accepted < len(drafted) and drafted[accepted] == said[accepted]:
                accepted += 1
            for token in said[: accepted + 1]:
                tokens.append(int(token))
                if tokens[-1] in self._ends:
                    break
            steps += 1
            if len(rows) > accepted + 1:
                generator.rewind_to(len(tokens) - 1)
            if drafted:
                most = min(MOST_DRAFTS, most * 2) if accepted == len(drafted) else max(1, accepted)
            self.step_s[len(rows)].append(time.perf_counter() - at_s)
        return tokens[len(prompt) :][: self._new_tokens], time.perf_counter() - began, steps


def _draft(tokens: Sequence[int], most: int) -> list[int]:
    """What followed the last `NGRAM` tokens when they last occurred, at most so many tokens; often nothing."""
    key = tuple(tokens[-NGRAM:])
    for start in range(len(tokens) - NGRAM - 1, -1, -1):
        if tuple(tokens[start : start + NGRAM]) == key:
            return list(tokens[start + NGRAM : start + NGRAM + most])
    return []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    arguments = parser.parse_args()
    decoder = Decoder(arguments.folder, arguments.threads, arguments.tokens)
    decoder.drafts(decoder.encode("Hello"))
    decoder.step_s.clear()
    print(
        "| prompts | drafts = wide | wide = plain | tokens a step | wide / plain | drafts / plain (tokens/s) |"
    )
    print("|---|---|---|---|---|---|")
    for kind, texts in PROMPTS.items():
        equal, as_plain, a_step = 0, 0, []
        wide_gains, gains = [], []
        for text in texts:
            prompt = decoder.encode(text)
            plain, plain_s, _ = decoder.plain(prompt)
            wide, wide_s, _ = decoder.wide(prompt)
            drafted, drafted_s, steps = decoder.drafts(prompt)
            equal += drafted == wide
            as_plain += wide == plain
            a_step.append(len(drafted) / max(1, steps))
            plain_rate = len(plain) / plain_s
            wide_gains.append(len(wide) / wide_s / plain_rate)
            gains.append(len(drafted) / drafted_s / plain_rate)
        print(
            f"| {kind} | {equal} of {len(texts)} | {as_plain} of {len(texts)} | {statistics.median(a_step):.2f} "
            f"| {statistics.median(wide_gains):.2f} | {statistics.median(gains):.2f} |",
            flush=True,
        )
    print("\n| rows in a step | ms, median | steps |\n|---|---|---|")
    for rows, seconds in sorted(decoder.step_s.items()):
        print(f"| {rows} | {1000 * statistics.median(seconds):.1f} | {len(seconds)} |")


if __name__ == "__main__":
    main()
