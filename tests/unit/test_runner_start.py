"""A host that cannot start another runner: an error that its owner knows, and nothing left behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import RunnerError
from edge_agent.runner.process import RunnerProcess, child_environment


def no_descriptor(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_thread(*_: Any, **__: Any) -> Any:
    raise RuntimeError("can't start new thread")


def open_files() -> set[str]:
    return {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.exists()}


@pytest.mark.parametrize(
    ("lacking", "fails"),
    [
        ("socket.socketpair", no_descriptor),
        ("os.memfd_create", no_descriptor),
        ("subprocess.Popen", no_descriptor),
        ("threading.Thread.start", no_thread),
    ],
)
def test_what_the_host_lacks_is_a_runners_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, fails: Any
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before, threads = open_files(), set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(lacking, fails)
        with pytest.raises(RunnerError, match="no process can be started for model assistant"):
            RunnerProcess(model="assistant", environment=child_environment(tmp_path))
    assert open_files() <= before
    assert set(threading.enumerate()) <= threads  # one of another test may end meanwhile
