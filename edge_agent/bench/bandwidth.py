"""Memory bandwidth as a process: `python -m edge_agent.bench.bandwidth BYTES THREADS` prints bytes a second.

A scalar product of two long vectors reads each byte once and computes almost nothing, so memory sets its speed.
Each thread has its own part; numpy releases the GIL meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported: this module starts the threads itself

import numpy as np

ROUNDS = 7


def measure(size_bytes: int, threads: int) -> float:
    """The best of `ROUNDS` reads of about `size_bytes`, in bytes a second."""
    elements = size_bytes // 8 // threads
    parts = [(np.ones(elements, np.float32), np.ones(elements, np.float32)) for _ in range(threads)]
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(*part)), parts))
            best_s = min(best_s, time.perf_counter() - started)
    return 8 * elements * threads / best_s


if __name__ == "__main__":
    print(json.dumps({"bytes_per_s": measure(int(sys.argv[1]), int(sys.argv[2]))}), flush=True)
