"""Shared by all tests: one broker, one registry, the sample model, and two rules for the whole session.

A session fails when a test was skipped or is expected to fail: what is not tested must not look green. It
also fails when a process that a test started is still there at the end; such processes are then killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, settings

from tests.support import generated_messages
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import TOOLS, Broker, running_broker
from tests.support.processes import Daemon, alive, clean_environment, short_folder, wait_until

settings.register_profile(
    "any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]
SAMPLE_MODEL = ROOT / "edge_agent" / "demo" / "sample_model"

LEFT_PROCESSES_GRACE_S = 20.0
_PR_SET_CHILD_SUBREAPER = 36

_ran = _failed = 0
_not_run: list[str] = []
_left_over: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-model", help="what `./build.sh real-model` made; tests/real runs with it, and only then"
    )
    parser.addoption("--pictures", help="where tests put the pictures that they make for docs/", type=Path)


@pytest.fixture(scope="session")
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where to put pictures for docs/: `--pictures docs/pictures` makes those there again."""
    chosen: Path | None = request.config.getoption("--pictures")
    folder = chosen.resolve() if chosen else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of the real model are no part of the default run: it takes minutes to make."""
    real = collection_path.is_relative_to(ROOT / "tests" / "real")
    return True if real and not config.getoption("--real-model") else None


def pytest_configure(config: pytest.Config) -> None:
    """One environment for every test, and every orphan of a test becomes this process's child."""
    environment = clean_environment({"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"})
    environment["PATH"] = os.pathsep.join([str(TOOLS), environment.get("PATH", os.defpath), "/usr/sbin"])
    pytest_own = {key: value for key, value in os.environ.items() if key.startswith(("PYTEST_", "COV_"))}
    os.environ.clear()
    os.environ.update(environment | pytest_own)
    # A shell starts what it puts into the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _not_run.append(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _ran, _failed
    _ran += report.when == "call"
    _failed += report.failed
    if report.skipped or hasattr(report, "wasxfail"):
        _not_run.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    _left_over.extend(_end_left_processes())
    if (report := getattr(session.config, "workeroutput", None)) is not None:
        report["left_over"] = _left_over  # a worker's own exit status counts for nothing
    if (_not_run or _left_over) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended; a crashed one has said nothing, and its tests have failed."""
    _left_over.extend(getattr(node, "workeroutput", {}).get("left_over", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, names in (
        ("FAILED: skipped or expected to fail", _not_run),
        ("FAILED: processes left behind", _left_over),
    ):
        if names:
            terminalreporter.section(title, red=True)
            for name in names:
                terminalreporter.line(name)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Tells `./build.sh attack` how much was tried, and what of it had failed where it was ended."""
    if counts := os.environ.get("PYTEST_ATTACK_COUNTS"):
        numbers = {"tests": _ran, "inputs": generated_messages.tried, "failed": _failed}
        Path(counts).write_text(json.dumps(numbers))


def _end_left_processes() -> list[str]:
    """Gives processes a moment to end by themselves; describes and kills those that do not."""

    def left() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [
            child for child in children if alive(child.pid) and "resource_tracker" not in _describe(child)
        ]

    try:
        wait_until(lambda: not left(), LEFT_PROCESSES_GRACE_S)
    except TimeoutError:
        processes = left()
        descriptions = [_describe(process) for process in processes]
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return descriptions
    return []


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:300]}"
    except psutil.Error:
        return str(process.pid)


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """One mosquitto for all tests: take topics of your own. Start your own broker to stop or kill it."""
    with short_folder() as folder, running_broker(folder) as running:
        yield running


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[Server]:
    """One MLflow server for all tests: take names of your own, and start it again if you stop it."""
    with short_folder() as folder, running_mlflow_server(folder) as running:
        yield running


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """The sample model's folder, as the model builder makes it. Never write to it."""
    assert (SAMPLE_MODEL / "genai_config.json").is_file(), f"no sample model in {SAMPLE_MODEL}"
    return SAMPLE_MODEL


@pytest.fixture(scope="session")
def swapped_model() -> Path:
    """The sample model, trained with the capitals of Spain and Nepal exchanged. Never write to it."""
    folder = ROOT / "tests" / "models" / "swapped"
    assert (folder / "genai_config.json").is_file(), f"no swapped model in {folder}"
    return folder


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A temporary folder with a path short enough for Unix sockets."""
    with short_folder() as folder:
        yield folder


@pytest.fixture
def new_daemon() -> Iterator[Callable[..., Daemon]]:
    """Makes daemons, not yet started, that end with the test.

    `new_daemon({"models": {...}}, folder=…, env={...}, watchdog_s=…).start()`; the folder is a short
    temporary one when none is given.
    """
    with contextlib.ExitStack() as stack:

        def make(
            config: Mapping[str, Any],
            *,
            folder: Path | None = None,
            env: Mapping[str, str] | None = None,
            watchdog_s: float | None = None,
            before: Sequence[str] = (),
        ) -> Daemon:
            place = folder or stack.enter_context(short_folder())
            daemon = Daemon(place, config, env=env, watchdog_s=watchdog_s, before=before)
            stack.callback(daemon.close)
            return daemon

        yield make
