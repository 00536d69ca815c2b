"""The peer as a process: `python -m edge_agent.bench.llama_cpp GGUF THREADS CONTEXT SLOTS`, one JSON line out.

llama.cpp's own server, from the wheel `xllamacpp`, asked over HTTP on its loopback port. Who asks is in the benchmark's
process, as the client of MQTT is, so that this one has llama.cpp's memory and nothing of a client's. It has no walls,
as that server has none. It answers nobody without a key, which is made here and thrown away.

    {"load_ms": …, "address": "http://127.0.0.1:…", "api_key": …}     once it listens; it ends with its input
    {"error": …}                                                      where the file cannot be loaded
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any


def start(gguf: str, *, threads: int, context_tokens: int, slots: int, api_key: str) -> Any:
    """Loads the file, and returns the server, which listens as long as it exists.

    Args:
        context_tokens: of each slot. llama.cpp divides what it is given among them.
        slots: how many prompts it answers at once.

    Raises:
        RuntimeError: llama.cpp does not take the file.
    """
    import xllamacpp  # type: ignore[import-not-found]

    settings = xllamacpp.CommonParams()
    settings.model.path = gguf
    settings.n_ctx = context_tokens * slots
    settings.n_parallel = slots
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_ram_mib = 0
    settings.api_keys = [api_key]
    settings.verbosity = -1
    return xllamacpp.Server(settings)


def serve(
    gguf: str, threads: int, context_tokens: int, slots: int, lines: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Runs the server until the input ends."""
    began, api_key = time.perf_counter(), secrets.token_hex()
    try:
        server = start(gguf, threads=threads, context_tokens=context_tokens, slots=slots, api_key=api_key)
    except (RuntimeError, OSError, ImportError) as error:
        yield {"error": " ".join(str(error).split())[:300]}
        return
    load_ms = (time.perf_counter() - began) * 1000
    yield {"load_ms": load_ms, "address": server.listening_address, "api_key": api_key}
    for _ in lines:
        pass


if __name__ == "__main__":
    for answer in serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.stdin):
        print(json.dumps(answer), flush=True)
