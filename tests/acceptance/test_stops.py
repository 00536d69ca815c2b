"""The daemon is stopped at every step of a version and of an answer: no word against anybody; the next start goes on.

Each step is held where it is by a process that stands still, or by work without an end: nothing here depends on speed.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from edge_agent.cache.state import parse
from tests.acceptance.test_bad_releases import search_without_end
from tests.support.mlflow_server import Server
from tests.support.processes import Daemon, alive, clean_environment, wait_until
from tests.support.proxy import running_proxy
from tests.support.versions import KATHMANDU, SPAIN, FollowingDevice, bad_release

pytestmark = pytest.mark.long
"""`tests/unit/serving/test_stop.py` has the same with scripted runners, in milliseconds."""

QUICK = {"drain_s": 0.5}
"""For prompts that stand still, nobody has to wait long."""


def state_of(daemon: Daemon) -> dict[str, Any]:
    """What the next start will find."""
    state = parse((daemon.state_dir / "models" / "state.json").read_bytes()).model("assistant")
    return {
        "active": state.active and state.active.partition("-")[0],
        "tries": state.candidate_tries,
        "quarantined": dict(state.quarantined),
        "failed": state.attempt and state.attempt.code,
    }


CLEAN = {"active": "1", "tries": 0, "quarantined": {}, "failed": None}


@contextlib.contextmanager
def stopped_quietly(daemon: Daemon) -> Iterator[None]:
    """The block stops the daemon, and nothing in its log since the block's begin asks anybody to act."""
    before = len(daemon.log)
    yield
    assert not daemon.running
    lines = [line for line in daemon.log[before:].splitlines() if " INFO " not in line]
    assert lines == [], daemon.log[before:]


def newest_runner(daemon: Daemon, known: set[int]) -> psutil.Process:
    """Of a candidate: not one of those that are known."""
    (found,) = wait_until(
        lambda: [runner for runner in daemon.runners() if runner.pid not in known],
        60,
        "the candidate's runner",
    )
    return found


@contextlib.contextmanager
def command(daemon: Daemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`edge-agent …` beside the daemon, while the block runs."""
    process = subprocess.Popen(
        daemon._command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment({"HOME": str(daemon.folder)}),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stop_candidate(device: FollowingDevice, known: set[int], *, active: int) -> None:
    """Stops the daemon while a candidate is being loaded: its runner stands still.

    Args:
        known: the runners from before it was asked for.
        active: the version that answers meanwhile.
    """
    runner = newest_runner(device.daemon, known)
    runner.suspend()
    model = device.model()
    assert (model["version"], model["attempt"]["step"]) == (active, "gate"), "it is a candidate still"
    with stopped_quietly(device.daemon):
        assert device.daemon.stop() == 0
    assert not alive(runner.pid)


def runners(daemon: Daemon) -> set[int]:
    return {runner.pid for runner in daemon.runners()}


def runners_of_active(device: FollowingDevice) -> set[int]:
    """Once the active version answers."""
    device.wait_model(lambda m: m["state"] == "ready", "the active version")
    return runners(device.daemon)


def runners_of(pid: int) -> list[psutil.Process]:
    """Those that a process has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [
            each for each in psutil.Process(pid).children() if "edge_agent.runner.child" in each.cmdline()
        ]
    return []


def test_a_stop_during_a_load_is_no_failure_of_the_candidate(
    follow: Callable[..., FollowingDevice], swapped_model: Path
) -> None:
    device = follow(inference=QUICK)
    known = runners(device.daemon)
    device.publish(swapped_model)
    device.sync()
    stop_candidate(device, known, active=1)
    assert state_of(device.daemon) == CLEAN
    device.daemon.start()
    device.wait_model(lambda m: m["version"] == 2 and m["state"] == "ready", "version 2, of the next start")
    assert device.ask() == KATHMANDU


def test_stops_at_every_other_step_are_failures_of_nobody(
    follow: Callable[..., FollowingDevice],
    mlflow_server: Server,
    sample_model: Path,
    swapped_model: Path,
    short_dir: Path,
) -> None:
    host, port = mlflow_server.uri.removeprefix("http://").split(":")
    with running_proxy(host, int(port)) as proxy:
        device = follow(inference=QUICK, registry={"uri": f"http://{proxy.host}:{proxy.port}"})
        daemon = device.daemon
        device.publish(swapped_model)
        proxy.slow(50_000)
        device.sync()
        device.wait_model(lambda m: (m["progress"] or {}).get("bytes", 0) > 0, "the fetch")
        with stopped_quietly(daemon):
            assert daemon.stop() == 0
        assert state_of(daemon) == CLEAN
        proxy.restore()

        daemon.start()
        known = runners_of_active(device)
        with command(daemon, "models", "pull", "assistant") as pull:
            stop_candidate(device, known, active=1)
            assert_stopped(pull)
        assert state_of(daemon) == CLEAN

        daemon.start()
        device.wait_model(
            lambda m: m["version"] == 2 and m["state"] == "ready", "version 2, of the next start"
        )
        device.do("export", "assistant", "1", str(short_dir / "1.tar"))
        known = runners_of_active(device)
        with command(daemon, "models", "import", str(short_dir / "1.tar")) as taken:
            stop_candidate(device, known, active=2)
            assert_stopped(taken)
        assert state_of(daemon) == {**CLEAN, "active": "2"}

        daemon.start()
        device.wait_model(lambda m: m["state"] == "ready", "version 2")
        (runner,) = daemon.runners()
        runner.suspend()
        starts = daemon.log.count("prompt starts")
        with command(daemon, "probe", SPAIN) as probe:
            wait_until(lambda: daemon.log.count("prompt starts") > starts, 60, "the prompt")
            with stopped_quietly(daemon):
                assert daemon.stop() == 0
            assert_stopped(probe)
        assert state_of(daemon) == {**CLEAN, "active": "2"}

        daemon.start()
        bad_release(device, sample_model, search_without_end, short_dir / "gate")
        device.sync()
        wait_until(
            lambda: "model loaded model=assistant version=3-" in daemon.log, 120, "the gate of version 3"
        )
        with stopped_quietly(daemon):
            assert daemon.stop() == 0
        assert state_of(daemon) == {**CLEAN, "active": "2"}

        with command(daemon, "models", "pull", "assistant") as pull:  # by itself: there is no daemon
            candidate = wait_until(lambda: runners_of(pull.pid), 120, "the candidate's runner")[0]
            candidate.suspend()
            pull.terminate()
            assert pull.wait(60) == 128 + signal.SIGTERM
        assert not alive(candidate.pid)
        assert state_of(daemon) == {**CLEAN, "active": "2"}


def assert_stopped(process: subprocess.Popen[str]) -> None:
    """A command whose daemon was stopped says so, and what to do."""
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in stderr) == (1, False)
    assert "the agent is stopping" in stderr or "closed the connection without an answer" in stderr, stderr
