"""`./build.sh attack`: everything marked `attack`, then generated input in rounds, each round other input, until the
time is up. What got through is kept in the corpus and tried first the next time.

The last line counts: `attack: 214 tests, 41,200 generated inputs in 5 rounds, 480 s: nothing got through`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.generated_messages import CORPUS

ROOT = Path(__file__).parents[2]
COUNTS = "PYTEST_ATTACK_COUNTS"
"""The environment's name for the file that a round's counts go to."""
HARD_LIMIT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.sh attack", description=__doc__)
    parser.add_argument("--seconds", type=int, default=360, help="a new round begins until then; default 360")
    parser.add_argument("--corpus", type=Path, default=ROOT / ".tools" / "attack-corpus")
    arguments, for_pytest = parser.parse_known_args()
    started_s = time.monotonic()
    tests = inputs = rounds = 0
    failed = False
    while True:
        took_s = time.monotonic() - started_s
        if rounds and took_s + took_s / rounds > arguments.seconds:
            break
        chosen = "attack" if not rounds else "attack and hypothesis"
        counts = _round(
            chosen, seed=rounds, corpus=arguments.corpus, left_s=HARD_LIMIT_S - took_s, more=for_pytest
        )
        tests, inputs, rounds = max(tests, counts["tests"]), inputs + counts["inputs"], rounds + 1
        failed = failed or not counts["passed"]
        if failed:
            break
    took_s = time.monotonic() - started_s
    outcome = "something got through" if failed else "nothing got through"
    print(f"attack: {tests} tests, {inputs:,} generated inputs in {rounds} rounds, {took_s:.0f} s: {outcome}")
    return int(failed)


def _round(chosen: str, *, seed: int, corpus: Path, left_s: float, more: list[str]) -> dict[str, int]:
    """One run of pytest; what it counted, and `passed`: 0 also when it did not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            chosen,
            f"--hypothesis-seed={seed or time.time_ns()}",
        ]
        environment = {**os.environ, CORPUS: str(corpus), COUNTS: str(counts)}
        process = subprocess.Popen([*command, *more], cwd=ROOT, env=environment)
        try:
            status = process.wait(max(1.0, left_s))
        except subprocess.TimeoutExpired:
            process.terminate()  # pytest ends what its tests have started
            status = process.wait() or 1
        counted = json.loads(counts.read_text()) if counts.is_file() else {"tests": 0, "inputs": 0}
    return {**counted, "passed": int(status == 0)}


if __name__ == "__main__":
    sys.exit(main())
