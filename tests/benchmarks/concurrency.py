"""Several prompts in one runner: throughput, what a newcomer waits, what a known prefix saves, and how long a stream is
held up by a long prompt.

    python -m tests.benchmarks.concurrency MODEL_FOLDER [--threads N] [--rounds N]

Take a model of a real size (`./build.sh random-model`): the sample model is too quick for turns to matter. Both
sides of each ratio run in the same runner, in turn, and the medians are compared. Times are taken at the
daemon's end of the runner's socket.
"""

from __future__ import annotations

import argparse
import random
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.publishing.package import build_package
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Done, Load

WORDS = ("press", "valve", "oil", "line", "part", "heat", "north", "seven", "green", "slow", "meter", "gate")
NEW_TOKENS = 48
GAP_S = 0.005


class Bench:
    """A loaded runner and what is measured on it."""

    def __init__(self, runner: RunnerProcess, rng: random.Random) -> None:
        self._runner = runner
        self._rng = rng
        self._number = 0

    def question(self, words: int) -> str:
        """Text that no kept prefix knows."""
        return " ".join(self._rng.choice(WORDS) for _ in range(words))

    def start(self, text: str, max_tokens: int) -> str:
        self._number += 1
        name = f"p{self._number}"
        document: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
        self._runner.start(name, document, timeout_s=600)
        return name

    def wait(self, names: Sequence[str], *, first: bool = False) -> dict[str, Any]:
        """Reads until all of `names` have ended, or one has its first text; gives the last frames by name."""
        waiting, seen = set(names), {}
        while waiting:
            frame = self._runner.receive(1.0)
            if frame is None or frame.id not in waiting:
                continue
            if first and isinstance(frame, Delta):
                return {frame.id: frame}
            if not isinstance(frame, Delta):
                assert isinstance(frame, Done), frame
                waiting.discard(frame.id)
                seen[frame.id] = frame
        return seen

    def pass_time(self, seconds: float) -> None:
        """Lets the runner run; what it says is read and dropped."""
        limit = time.perf_counter() + seconds
        while (left := limit - time.perf_counter()) > 0:
            select.select([self._runner], [], [], left)
            while self._runner.receive(0) is not None:
                pass

    def one_after_the_other(self, words: int) -> float:
        """Seconds for four prompts."""
        began = time.perf_counter()
        for _ in range(4):
            self.wait([self.start(self.question(words), NEW_TOKENS)])
        return time.perf_counter() - began

    def at_once(self, words: int) -> float:
        """Seconds for four prompts that come within 20 ms."""
        began = time.perf_counter()
        names = []
        for _ in range(4):
            names.append(self.start(self.question(words), NEW_TOKENS))
            time.sleep(GAP_S)
        self.wait(names)
        return time.perf_counter() - began

    def first_token(self, words: int) -> float:
        """Seconds to the first text of a prompt; it is cancelled then."""
        began = time.perf_counter()
        name = self.start(self.question(words), 8)
        self.wait([name], first=True)
        took = time.perf_counter() - began
        self.wait([name])
        return took

    def three(self, words: int, *, together: bool) -> list[str]:
        """Three prompts that run for long, come `together` (a batch) or one by one."""
        others = []
        for _ in range(3):
            others.append(self.start(self.question(words), 160))
            if not together:
                self.wait([others[-1]], first=True)
        return others

    def newcomer(self, words: int, run_s: float, *, together: bool) -> float:
        """Seconds to the first text while three run, at any time of the first half of `run_s`."""
        others = self.three(words, together=together)
        self.pass_time(self._rng.uniform(0, run_s / 2))
        took = self.first_token(words)
        for name in others:
            self._runner.cancel(name)
        self._drain(others)
        return took

    def held_up(self, words: int) -> tuple[float, float, float]:
        """A stream's (usual, median, longest) seconds between two texts: usual alone, the others while a long prompt is
        prefilled beside it."""
        stream = self.start(f"Write a long story about {self.question(12)}.", 1000)
        self.wait([stream], first=True)
        alone, _ = self._gaps(stream, lambda count: count < 24)
        long = self.start(self.question(words), 4)
        beside, ended = self._gaps(stream, lambda _: True, until=long)
        assert beside, "the stream goes on beside the prompt"
        self._runner.cancel(stream)
        self._runner.cancel(long)
        self._drain([name for name in (stream, long) if name not in ended])
        return statistics.median(alone), statistics.median(beside), max(beside)

    def _gaps(
        self, name: str, more: Callable[[int], bool], *, until: str = ""
    ) -> tuple[list[float], set[str]]:
        """Seconds between texts of `name`, up to the first frame of `until`; and who has ended meanwhile."""
        gaps: list[float] = []
        ended: set[str] = set()
        at = time.perf_counter()
        while more(len(gaps)) and name not in ended:
            frame = self._runner.receive(1.0)
            if frame is None:
                continue
            if not isinstance(frame, Delta):
                ended.add(frame.id)
            if frame.id == until:
                break
            if isinstance(frame, Delta):
                gaps.append(time.perf_counter() - at)
                at = time.perf_counter()
        return gaps, ended

    def known_prefix(self, words: int) -> tuple[float, float, int]:
        """(cold, known) seconds to the first text after a long prefix, and the tokens that were known."""
        prefix = self.question(words)
        cold = self._first(f"{prefix} {self.question(12)}")
        known = self._first(f"{prefix} {self.question(12)}")
        return cold[0], known[0], known[1]

    def _first(self, text: str) -> tuple[float, int]:
        began = time.perf_counter()
        name = self.start(text, 4)
        self.wait([name], first=True)
        took = time.perf_counter() - began
        return took, self.wait([name])[name].usage["cached_tokens"]

    def _drain(self, names: Sequence[str]) -> None:
        waiting = set(names)
        while waiting:
            frame = self._runner.receive(1.0)
            if frame is not None and not isinstance(frame, Delta):
                waiting.discard(frame.id)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.concurrency")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--words", type=int, default=20, help="of a question")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        package = build_package(
            given.folder, Path(name) / "package", name="bench", signature="chat", options={}
        )
        runner = RunnerProcess(model="bench", environment=child_environment(Path(name)))
        try:
            load = Load(
                folder=str(package.folder), context_tokens=2048, max_tokens=256, threads=given.threads,
                parallel=4, kv_bytes=1 << 30,
            )  # fmt: skip
            runner.load(load, timeout_s=300)
            report(Bench(runner, random.Random(1)), given.rounds, given.words)
        finally:
            runner.stop()


def report(bench: Bench, rounds: int, words: int) -> None:
    bench.first_token(words)
    began = time.perf_counter()
    bench.wait(bench.three(words, together=True))
    run_s = time.perf_counter() - began
    turns = [
        (
            bench.one_after_the_other(words),
            bench.at_once(words),
            bench.first_token(words),
            bench.newcomer(words, run_s, together=True),
            bench.newcomer(words, run_s, together=False),
            *bench.known_prefix(words * 17),
            *bench.held_up(words * 17),
        )
        for _ in range(rounds)
    ]
    apart, at_once, alone, batch, singles, cold, known, cached, usual, held, longest = map(
        list, zip(*turns, strict=True)
    )
    rate = 4 * NEW_TOKENS / statistics.median(apart)
    print(f"four one after the other   {rate:7.1f} tokens/s   (medians of {rounds})")
    print(f"four at once               {4 * NEW_TOKENS / statistics.median(at_once):7.1f} tokens/s   "
          f"ratio {statistics.median(apart) / statistics.median(at_once):.2f}")  # fmt: skip
    print(f"first token alone          {statistics.median(alone) * 1000:7.0f} ms")
    for label, times in (("beside a batch of three", batch), ("beside three alone", singles)):
        middle, worst = statistics.median(times), max(times)
        print(f"… {label:24s} {middle * 1000:7.0f} ms   ratio {middle / statistics.median(alone):.2f}, "
              f"worst {worst * 1000:.0f} ms")  # fmt: skip
    print(f"first token, cold          {statistics.median(cold) * 1000:7.0f} ms")
    print(f"… {statistics.median(cached):.0f} tokens known          {statistics.median(known) * 1000:7.0f} ms   "
          f"ratio {statistics.median(known) / statistics.median(cold):.3f}")  # fmt: skip
    token = statistics.median(usual)
    print(f"a token of a stream        {token * 1000:7.0f} ms")
    print(f"… beside a long prompt     {statistics.median(held) * 1000:7.0f} ms   "
          f"ratio {statistics.median(held) / token:.2f}, longest {statistics.median(longest) / token:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
