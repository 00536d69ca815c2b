"""The peer as a process: `python -m edge_agent.bench.llama_cpp GGUF THREADS CONTEXT`, JSON lines in and out.

llama.cpp's own server, from the wheel `xllamacpp`, asked in its process: what HTTP costs is not counted. It reads every
prompt anew, as the bare library does. It has no walls: that server listens on a loopback port, whether or not anybody
asks there. It answers nobody without a key, which is made here and thrown away.

    {"do": "generate", "text": …, "max_tokens": 64}    → timings, see `edge_agent.bench.timing`
    {"error": …}                                       where the file cannot be loaded, or a prompt not be answered
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any


class LlamaCpp:
    """One loaded GGUF file.

    Raises:
        RuntimeError: llama.cpp does not take it.
    """

    def __init__(self, gguf: str, *, threads: int, context_tokens: int) -> None:
        import xllamacpp  # type: ignore[import-not-found]

        settings = xllamacpp.CommonParams()
        settings.model.path = gguf
        settings.n_ctx = context_tokens
        settings.n_parallel = 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_ram_mib = 0
        settings.api_keys = [secrets.token_hex()]
        settings.verbosity = -1
        self._server = xllamacpp.Server(settings)

    def generate(self, text: str, max_tokens: int) -> dict[str, Any]:
        """Answers greedily and returns the timings."""
        question = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": False,
        }
        started, first, last = time.perf_counter(), 0.0, {}

        def take(chunk: dict[str, Any]) -> bool:
            nonlocal first, last
            if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                first = first or time.perf_counter()
            last = chunk
            return False  # do not stop

        self._server.handle_chat_completions(question, take)
        ended = time.perf_counter()
        if "usage" not in last:
            raise RuntimeError(f"llama.cpp answered {json.dumps(last)[:300]}")
        return {
            "prompt_tokens": last["usage"]["prompt_tokens"],
            "completion_tokens": last["usage"]["completion_tokens"],
            "first_token_ms": ((first or ended) - started) * 1000,
            "total_ms": (ended - started) * 1000,
        }


def serve(gguf: str, threads: int, context_tokens: int, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Loads the file, and answers requests one after the other until the input ends."""
    began = time.perf_counter()
    try:
        loaded = LlamaCpp(gguf, threads=threads, context_tokens=context_tokens)
        yield {"load_ms": (time.perf_counter() - began) * 1000}
        for line in lines:
            request = json.loads(line)
            yield loaded.generate(request["text"], request["max_tokens"])
    except (RuntimeError, OSError, ImportError) as error:
        yield {"error": " ".join(str(error).split())[:300]}


if __name__ == "__main__":
    for answer in serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.stdin):
        print(json.dumps(answer), flush=True)
