"""What a runner may use while it reads a package and a prompt, and whose doing it is when it is too much."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.errors import CannotRun, LoadFailed, PolicyError, RunnerError
from edge_agent.host import cpus
from edge_agent.runner import bounds, child, process
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Load

ROOT = Path(__file__).parents[2]


class PanicException(BaseException):
    """As pyo3's."""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from edge_agent.runner import bounds\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize(
    "block",
    ["while True: pass", "sum(iter(int, 1))", "10 ** 10 ** 9"],
    ids=["python", "one-call", "native"],
)
def test_a_block_that_computes_without_end_ends_the_process_with_a_signal_of_its_own(block: str) -> None:
    ended = run(f"with bounds.computing(0.2):\n    {block}")
    assert ended.returncode == -signal.SIGPROF


def test_waiting_is_not_computing() -> None:
    ended = run("import time\nwith bounds.computing(0.2): time.sleep(0.5)\nprint('through')")
    assert ended.stdout == "through\n"


def test_after_a_block_a_process_may_compute_again() -> None:
    ended = run(
        "import time\nwith bounds.computing(0.2): pass\nwhile time.process_time() < 1: pass\nprint('through')"
    )
    assert ended.stdout == "through\n"


def test_memory_beyond_the_limit_is_refused_as_an_error() -> None:
    ended = run(
        "bounds.limit_memory(1 << 30)\n"
        "try: bytearray(1 << 31)\n"
        "except MemoryError as error: print(bounds.is_memory_error(error))\n"
        "bounds.limit_memory(1 << 40)\nbounds.limit_memory(0)\n"
        "import resource\nprint(resource.getrlimit(resource.RLIMIT_DATA)[0] == 1 << 30)"
    )
    assert ended.stdout == "True\nTrue\n", ended.stderr


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc at row 1"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 17"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("Protobuf parsing failed."), False),
        (ValueError(), False),
    ],
)
def test_a_refused_allocation_is_known_by_its_text(error: Exception, is_memory: bool) -> None:
    assert bounds.is_memory_error(error) is is_memory


@pytest.mark.parametrize(
    ("error", "is_short", "code"),
    [
        (MemoryError(), False, "load_failed"),
        (MemoryError(), True, "cannot_run"),
        (ValueError("x"), True, "load_failed"),
        (PolicyError("x"), False, "code_refused"),
        (CannotRun("x"), False, "cannot_run"),
    ],
)
def test_a_load_that_fails_says_whose_doing_it_is(error: Exception, is_short: bool, code: str) -> None:
    request = Load(
        folder="x",
        context_tokens=1,
        max_tokens=1,
        threads=1,
        memory_bytes=1 << 30,
        memory_is_short=is_short,
    )
    failed = child._failed(error, request)
    assert failed.code == code
    assert ("its limit is 1024 MiB" in failed.message) is isinstance(error, MemoryError)


def test_a_panic_of_a_native_library_is_an_error_without_its_text() -> None:
    with (
        pytest.raises(bounds.Panic, match=r"^the model gave up \(PanicException\)$"),
        bounds.panics_caught(),
    ):
        raise PanicException("secret")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_what_is_no_panic_goes_on_as_it_is(kind: type[BaseException]) -> None:
    with pytest.raises(kind), bounds.panics_caught():
        raise kind


def test_processor_time_of_a_process_is_known() -> None:
    until_s = time.process_time() + 0.2
    while time.process_time() < until_s:
        pass
    assert 0.1 < cpus.used_s(os.getpid()) <= time.process_time() + 0.1
    assert cpus.used_s(2**22 + 1) == 0.0


@pytest.mark.parametrize(
    ("used_s", "kind"), [(0.1, LoadFailed), (0.0, RunnerError)], ids=["computing", "waiting"]
)
def test_a_load_that_does_not_end_is_the_packages_doing_if_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used_s: float, kind: type[RunnerError]
) -> None:
    monkeypatch.setattr(cpus, "used_s", lambda pid: used_s)
    runner = RunnerProcess(model="assistant", environment=child_environment(tmp_path))
    os.kill(runner.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RunnerError, match="did not load within 0 s") as caught:
            runner.load(Load(folder=str(tmp_path), context_tokens=1, max_tokens=1, threads=1), timeout_s=0.1)
        assert type(caught.value) is kind
        assert not runner.alive
    finally:
        runner.kill()


def test_a_frame_without_text_counts_towards_the_bound_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "MAX_ANSWER_CHARACTERS", 3)
    runner = RunnerProcess(model="assistant", environment=child_environment(tmp_path))
    try:
        runner.start("1.1", {"prompt": "x"}, timeout_s=60)
        for _ in range(3):
            runner._checked(Delta(id="1.1", text=""))
        with pytest.raises(RunnerError, match="more than 3 characters"):
            runner._checked(Delta(id="1.1", text=""))
    finally:
        runner.kill()
