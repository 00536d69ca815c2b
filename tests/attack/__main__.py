"""`./build.sh attack`: everything marked `attack`, then generated input in rounds, each round other input, until the
time is up. What got through is kept in the corpus and tried first the next time.

The last line counts: `attack: 214 tests, 41,200 generated inputs in 5 rounds, 480 s, --seed 2870177450: nothing got
through`. The same seed and the same corpus give the same input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.generated_messages import CORPUS

ROOT = Path(__file__).parents[2]
COUNTS = "PYTEST_ATTACK_COUNTS"
"""The environment's name for the file that a round's counts go to."""
HARD_LIMIT_S = 600
_END_S = 60.0
"""For pytest to end what its tests have started."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of pytest.

    Attributes:
        failed: something got through, or pytest itself failed.
        ran_out: it did not end in time; `failed` is about what it had tried by then.
    """

    tests: int
    inputs: int
    failed: bool
    ran_out: bool


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.sh attack", description=__doc__)
    parser.add_argument("--seconds", type=int, default=360, help="a new round begins until then; default 360")
    parser.add_argument("--corpus", type=Path, default=ROOT / ".tools" / "attack-corpus")
    parser.add_argument("--seed", type=int, help="of the first round; default: another one each time")
    arguments, for_pytest = parser.parse_known_args()
    seed = int.from_bytes(os.urandom(4)) if arguments.seed is None else arguments.seed
    print(f"attack: --seed {seed}", flush=True)
    started_s = time.monotonic()
    rounds: list[Round] = []
    while not rounds or not (rounds[-1].failed or rounds[-1].ran_out):
        took_s = time.monotonic() - started_s
        if rounds and took_s + took_s / len(rounds) > arguments.seconds:
            break
        chosen = "attack" if not rounds else "attack and hypothesis"
        rounds.append(
            _round(
                chosen,
                seed=seed + len(rounds),
                corpus=arguments.corpus,
                left_s=HARD_LIMIT_S - took_s,
                more=for_pytest,
            )
        )
    tests, inputs = max(each.tests for each in rounds), sum(each.inputs for each in rounds)
    took_s = time.monotonic() - started_s
    counts = (
        f"{tests} tests, {inputs:,} generated inputs in {len(rounds)} rounds, {took_s:.0f} s, --seed {seed}"
    )
    failed, outcome = _outcome(rounds)
    print(f"attack: {counts}: {outcome}")
    return int(failed)


def _outcome(rounds: list[Round]) -> tuple[bool, str]:
    """Whether that is a failure, and in words. A later round that runs out is only the last one: everything that is
    known was tried in the first."""
    if rounds[-1].failed:
        return True, "something got through"
    if rounds[0].ran_out:
        return True, f"not all was tried within {HARD_LIMIT_S} s, of that nothing got through"
    late = ", the last round did not end in time" if rounds[-1].ran_out else ""
    return False, f"nothing got through{late}"


def _round(chosen: str, *, seed: int, corpus: Path, left_s: float, more: list[str]) -> Round:
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, f"--hypothesis-seed={seed}"]
        environment = {**os.environ, CORPUS: str(corpus), COUNTS: str(counts)}
        process = subprocess.Popen([*command, *more], cwd=ROOT, env=environment)
        status = None
        try:
            status = process.wait(max(1.0, left_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest ends what its tests have started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()
            process.wait()
        counted = {"tests": 0, "inputs": 0, "failed": 0}
        if counts.is_file():
            counted = json.loads(counts.read_text())
    return Round(
        tests=counted["tests"],
        inputs=counted["inputs"],
        failed=counted["failed"] > 0 if status is None else status != 0,
        ran_out=status is None,
    )


if __name__ == "__main__":
    sys.exit(main())
