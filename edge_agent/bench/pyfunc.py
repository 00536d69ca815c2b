"""The package through `mlflow.pyfunc` as a process: `python -m edge_agent.bench.pyfunc FOLDER CONTEXT THREADS`.

Shows what the wrapper and MLflow cost, without the agent's processes. JSON lines in and out, as in
`edge_agent.bench.bare`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from edge_agent.host import memory
from edge_agent.runner import loader


def generate(model: loader.Model, text: str, max_tokens: int) -> dict[str, Any]:
    """Answers greedily and returns the timings."""
    started = time.perf_counter()
    document = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0.0}
    first = 0.0
    for item in model.stream(document):
        if isinstance(item, loader.End):
            ended = time.perf_counter()
            return {
                "prompt_tokens": item.usage["prompt_tokens"],
                "completion_tokens": item.usage["completion_tokens"],
                "first_token_ms": ((first or ended) - started) * 1000,
                "total_ms": (ended - started) * 1000,
            }
        if item:
            first = first or time.perf_counter()
    raise RuntimeError("the stream ended without its usage")


if __name__ == "__main__":
    began = time.perf_counter()
    loaded = loader.load(
        Path(sys.argv[1]), context_tokens=int(sys.argv[2]), max_tokens=64, threads=int(sys.argv[3])
    )
    memory.end_huge_pages()  # as a runner does
    print(json.dumps({"load_ms": (time.perf_counter() - began) * 1000}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(generate(loaded, request["text"], request["max_tokens"])), flush=True)
