"""The bare library as a process: `python -m edge_agent.bench.bare FOLDER THREADS`, JSON lines in and out.

Every ratio compares against it: onnxruntime-genai alone, with the same build, threads, prompt, prefill slices and
rounding of max_length as the agent's wrapper. It also makes prompts of a given length, because it has the tokenizer.

    {"do": "prompt", "tokens": 256, "start": "a1"}           → {"text", "tokens"}
    {"do": "generate", "text": …, "max_tokens": 64}           → timings, see `edge_agent.bench.timing`
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

# As in edge_agent.wrapper.genai_pyfunc; a test compares them.
SLICE_TOKENS = 64
ROUND_TOKENS = 256
_WORDS = "the capital of Spain is Madrid and a joke about atoms helps to count to one hundred"
_REQUEST = "Tell me a long story."


class Bare:
    """One loaded model."""

    def __init__(self, folder: Path, threads: int) -> None:
        config = og.Config(str(folder))
        if threads:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        described = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        self._context_tokens = int(described["context_length"])

    def prompt(self, tokens: int, start: str) -> dict[str, Any]:
        """A text of nearly `tokens` tokens as a chat. Its beginning is unique, so no cached prefix matches it."""
        words, low, high = _WORDS.split(), 0, tokens
        while low < high:  # the most words that fit
            middle = (low + high + 1) // 2
            if len(self._encode(_text(start, words, middle))) <= tokens:
                low = middle
            else:
                high = middle - 1
        text = _text(start, words, low)
        return {"text": text, "tokens": len(self._encode(text))}

    def generate(self, text: str, max_tokens: int) -> dict[str, Any]:
        """Answers greedily and returns the timings."""
        started = time.perf_counter()
        tokens = self._encode(text)
        needed = math.ceil((len(tokens) + max_tokens) / ROUND_TOKENS) * ROUND_TOKENS
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=min(needed, self._context_tokens), do_sample=False)
        generator = og.Generator(self._model, params)
        for position in range(0, len(tokens), SLICE_TOKENS):
            generator.append_tokens(np.array(tokens[position : position + SLICE_TOKENS], dtype=np.int32))
        count, first = 0, 0.0
        while count < max_tokens and not generator.is_done():
            generator.generate_next_token()
            count += 1
            first = first or time.perf_counter()
        ended = time.perf_counter()
        if generator.is_done() and count < max_tokens:
            count -= 1  # an end token is no token of the answer, here as in the agent's usage
        return {
            "prompt_tokens": len(tokens),
            "completion_tokens": count,
            "first_token_ms": (first - started) * 1000,
            "total_ms": (ended - started) * 1000,
        }

    def _encode(self, text: str) -> list[int]:
        messages = json.dumps([{"role": "user", "content": text}])
        written = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return [int(token) for token in self._tokenizer.encode(written)]


def _text(start: str, words: list[str], count: int) -> str:
    filler = " ".join(words[index % len(words)] for index in range(count))
    return f"{start} {filler} {_REQUEST}"


def serve(bare: Bare, lines: Iterator[str]) -> None:
    """Answers requests one after the other until the input ends."""
    for line in lines:
        request = json.loads(line)
        if request.pop("do") == "prompt":
            answer = bare.prompt(request["tokens"], request["start"])
        else:
            answer = bare.generate(request["text"], request["max_tokens"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    began = time.perf_counter()
    loaded = Bare(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({"load_ms": (time.perf_counter() - began) * 1000}), flush=True)
    serve(loaded, sys.stdin)
