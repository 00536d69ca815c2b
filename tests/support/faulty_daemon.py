"""`edge-agent` as a real process that stands still at a chosen change of its cache, until it is killed.

    python faulty_daemon.py FOLDER -m MODULE ARGUMENT…

The daemon and each sync that it starts write their changes, in the order in which they come, to `FOLDER/calls`.
At the one that `FOLDER/point` names, the process that is about to make it writes `FOLDER/fired` and waits: then
the test kills all of them at once, as a power cut does. Without that file, nothing stops.

Runs as a script, because a sync's interpreter is started with an environment that names no path of the tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil  # type: ignore[import-untyped]

from tests.support.power import Call, Power, Torn
from tests.support.processes import Daemon, wait_until


@dataclass(frozen=True)
class Point:
    """The `count`th time, from 1, that this call is made with a path like this one.

    Attributes:
        path: a regular expression for all of the path.
    """

    name: str
    path: str
    count: int = 1


class FaultyDaemon(Daemon):
    """A daemon that stands still at a point; the folder of its settings is the faults' folder, too."""

    def stop_at(self, point: Point | None) -> None:
        """Chooses the point for the next start; None only writes down the calls."""
        for name in ("calls", "fired", "point"):
            (self.folder / name).unlink(missing_ok=True)
        if point:
            (self.folder / "point").write_text(json.dumps(asdict(point)))

    def wait_fired(self, timeout_s: float) -> None:
        """Waits until the daemon, or its sync, stands at the point.

        Raises:
            TimeoutError: the point did not come.
        """
        wait_until((self.folder / "fired").exists, timeout_s, "the point")

    def cut_power(self) -> None:
        """Kills the daemon and all that it started."""
        daemon = psutil.Process(self.pid)
        daemon.suspend()  # it starts nothing while its children are looked up
        for process in [daemon, *daemon.children(recursive=True)]:
            process.kill()
        self.child.process.wait(10)

    def calls(self) -> list[Call]:
        """All changes since `stop_at`, in their order."""
        return [Call(*json.loads(line)) for line in (self.folder / "calls").read_text().splitlines()]

    def _command(self, *arguments: str) -> list[str]:
        command = super()._command(*arguments)
        if "run" not in arguments:
            return command
        return [command[0], __file__, str(self.folder), *command[1:]]


def _watch(folder: Path, call: Call) -> None:
    """Before each change of any of the processes: one at a time."""
    with _turn(folder), (folder / "calls").open("a+") as calls:
        calls.write(json.dumps([call.name, call.path]) + "\n")
        if not (folder / "point").exists():
            return
        point = Point(**json.loads((folder / "point").read_text()))
        calls.seek(0)
        like = [
            path
            for name, path in map(json.loads, calls)
            if name == point.name and re.fullmatch(point.path, path)
        ]
        if len(like) == point.count and like[-1] == call.path and call.name == point.name:
            (folder / "fired").touch()
            while True:  # the others wait for their turn
                signal.pause()


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / "turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _own_interpreter(folder: Path) -> str:
    """What this process starts its children with: a sync goes through here, a runner does not."""
    python = shlex.quote(sys.executable)
    script = folder / "python"
    script.write_text(
        f"#!/bin/sh\ncase $2 in\n"
        f'edge_agent.models.*) exec {python} {shlex.quote(__file__)} {shlex.quote(str(folder))} "$@" ;;\n'
        f'*) exec {python} "$@" ;;\nesac\n'
    )
    script.chmod(0o700)
    return str(script)


def main() -> None:
    folder, module, arguments = Path(sys.argv[1]), sys.argv[3], sys.argv[4:]

    def watch(number: int, call: Call, torn: Torn | None) -> None:
        _watch(folder, call)

    if module == "edge_agent":
        sys.executable = _own_interpreter(folder)
    sys.argv = [module, *arguments]
    with Power(folder / "state", watch=watch).installed():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
