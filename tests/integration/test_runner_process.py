"""The daemon's side of a runner, with a real child: what it says of its death, and what it does not take."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from edge_agent.errors import PromptTooLong, RunnerError
from edge_agent.publishing.package import build_package
from edge_agent.runner import process
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Done, Load, Refused
from tests.support.processes import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "package"
    return build_package(sample_model, target, name="sample", signature="chat", options={}).folder


@pytest.fixture
def runner(package: Path, tmp_path: Path) -> Iterator[RunnerProcess]:
    running = RunnerProcess(model="assistant", environment=child_environment(tmp_path))
    try:
        load = Load(
            folder=str(package), context_tokens=2048, max_tokens=64, threads=1, parallel=4, kv_bytes=8 << 20,
            shipped_wrapper=True,
        )  # fmt: skip
        assert running.load(load, timeout_s=120).parallel == 4
        yield running
    finally:
        running.stop()


def document(text: str = "What is the capital of Spain?", **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **options}


def long() -> dict[str, Any]:
    return document("Count", max_tokens=600, response_format={"type": "regex", "regex": "(0|1){590}"})


def ends(runner: RunnerProcess, count: int) -> dict[str, Done | Refused]:
    """The last frames of so many prompts."""
    found: dict[str, Done | Refused] = {}

    def more() -> bool:
        frame = runner.receive(1.0)
        if isinstance(frame, Done | Refused):
            found[frame.id] = frame
        return len(found) == count

    wait_until(more, 300, f"{count} ends")
    return found


def test_a_dead_runner_names_whose_turn_it_was_and_only_that(runner: RunnerProcess) -> None:
    for name in ("a", "b", "c"):
        runner.start(name, long(), timeout_s=60)
    seen: set[str] = set()

    def all_run() -> bool:
        frame = runner.receive(1.0)
        if isinstance(frame, Delta):
            seen.add(frame.id)
        return seen == {"a", "b", "c"}

    wait_until(all_run, 60, "a part of each answer")
    os.kill(runner.pid, signal.SIGKILL)
    with pytest.raises(RunnerError, match="signal 9"):
        while True:
            runner.receive(1.0)
    assert len(runner.suspects) == 1
    assert runner.suspects < {"a", "b", "c"}


def test_prompts_that_need_more_memory_than_there_is_wait_and_are_all_answered(
    runner: RunnerProcess,
) -> None:
    for name in ("a", "b"):  # each one needs nearly all of one context's keys and values
        runner.start(name, document(max_tokens=1500, temperature=1.0, seed=1), timeout_s=300)
    runner.start("c", document(), timeout_s=300)
    runner.start("late", long(), timeout_s=0.001)  # shorter than any answer that has the memory
    found = ends(runner, 4)
    assert {name: type(frame) for name, frame in found.items()} == {
        "a": Done, "b": Done, "c": Done, "late": Refused,
    }  # fmt: skip
    late = found["late"]
    assert isinstance(late, Refused)
    assert late.code == "deadline_exceeded"


def test_a_prompt_that_is_no_frame_is_refused_and_the_next_one_answered(runner: RunnerProcess) -> None:
    with pytest.raises(PromptTooLong):
        runner.start("huge", document("é" * (4 << 20)), timeout_s=10)
    assert isinstance(list(runner.generate("next", document(), timeout_s=30))[-1], Done)


def test_a_child_can_neither_grow_nor_shrink_the_memory_that_it_shares(runner: RunnerProcess) -> None:
    descriptor = os.dup(runner._turn)
    try:
        size = os.fstat(descriptor).st_size
        for other in (0, size * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, other)
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x" * 10, size)
    finally:
        os.close(descriptor)


def test_a_loaded_runner_takes_no_more_huge_pages(runner: RunnerProcess) -> None:
    assert "THP_enabled:\t0" in Path(f"/proc/{runner.pid}/status").read_text()


def test_a_runner_that_waits_for_its_reader_stops_in_order(
    runner: RunnerProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_GRACE_S", 120.0)
    for number in range(4):
        runner.start(f"p{number}", long(), timeout_s=60)
    child, used_s = psutil.Process(runner.pid), [-1.0]

    def stands_still() -> bool:
        """For two dozen looks: one alone may find it between two turns on the CPU."""
        used_s.append(child.cpu_times().user)
        return child.status() == psutil.STATUS_SLEEPING and len(set(used_s[-24:])) == 1

    wait_until(stands_still, 60, "the runner to wait for its reader")
    runner.stop()
    assert not caplog.records  # it was not killed
    assert not runner.alive


def test_a_cancel_does_not_wait_for_a_runner_that_reads_nothing(runner: RunnerProcess) -> None:
    child = psutil.Process(runner.pid)
    child.suspend()
    large = document("é" * 50_000)  # more than the socket holds
    starting = threading.Thread(target=runner.start, args=("large", large), kwargs={"timeout_s": 60})
    starting.start()
    wait_until(lambda: bool(runner._unsent), 60, "the socket to be full")
    runner.cancel("nobody")
    assert starting.is_alive(), "the cancel came back while the prompt still waits"
    child.resume()
    starting.join(60)
    assert ends(runner, 1)["large"].type == "refused"
    runner.start("next", document(), timeout_s=60)
    assert ends(runner, 1)["next"].type == "done", "nothing in the stream was torn"


def test_a_runner_that_does_not_do_what_a_cancel_says_is_killed_after_its_grace(
    runner: RunnerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only at the deadline: the next prompt waits for it."""
    monkeypatch.setattr(process, "CANCEL_GRACE_S", 0.5)
    child = psutil.Process(runner.pid)

    def suspended_in_the_middle() -> bool:
        """A test that is slow itself may come when the answer is through."""
        runner.start("hangs", long(), timeout_s=3600)
        wait_until(lambda: isinstance(runner.receive(1.0), Delta), 60, "a part of the answer")
        child.suspend()
        while frame := runner.receive(0.0):
            if isinstance(frame, Done):
                child.resume()
                return False
        return True

    wait_until(suspended_in_the_middle, 60, "an answer that has not ended")
    runner.cancel("hangs")

    def killed() -> bool:
        try:
            runner.receive(1.0)
        except RunnerError as error:
            return "did not stop when it was told to" in error.message
        return False

    wait_until(killed, 60, "the end of the process")
    assert not runner.alive
    assert runner.suspects == {"hangs"}


LIGHT = """
import sys
from pathlib import Path
from edge_agent.runner import libraries, loader
libraries.lighten()
model = loader.load(Path(sys.argv[1]), context_tokens=256, max_tokens=8, threads=1)
model.warm_up("Be brief.")
print(model.ask({"messages": [{"role": "user", "content": "What is the capital of Spain?"}]})[0])
print("pandas.core" in sys.modules)
"""
TEXT_FORM = '"type": {"type": "string", "required": true}'
"""Of `response_format`, in packages up to now: MLflow makes a series of its default."""


@pytest.mark.parametrize("earlier", [False, True])
def test_a_runner_of_the_wrapper_imports_pandas_for_an_earlier_package_only(
    package: Path, tmp_path: Path, earlier: bool
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    if earlier:
        described = yaml.safe_load((folder / "MLmodel").read_text())
        params = described["signature"]["params"]
        described["signature"]["params"] = params.replace(
            '"type": {"type": "any", "required": false}', TEXT_FORM
        )
        assert described["signature"]["params"] != params
        (folder / "MLmodel").write_text(yaml.safe_dump(described))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIGHT, str(folder)],
        env={**child_environment(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=ROOT, timeout=300, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.stdout.splitlines() == ["The capital of Spain is Madrid.", str(earlier)], ended.stderr
