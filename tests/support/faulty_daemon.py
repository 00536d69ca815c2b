"""`edge-agent` as a real process that stands still at a chosen change of its cache, until it is killed.

    python faulty_daemon.py FOLDER -m MODULE ARGUMENT…

The daemon and each sync that it starts write their changes, in the order in which they come, to `FOLDER/calls`.
At the one that `FOLDER/point` names, the process that is about to make it writes `FOLDER/fired` and waits: then
the test kills all of them at once, as a power cut does. Without that file, nothing stops.

Beside the folder there is what a disk would hold of the cache: the test's process keeps it, in
`tests.support.medium_server`. It knows nothing of `journal.db`, whose durability is SQLite's own.

Runs as a script, because a sync's interpreter is started with an environment that names no path of the tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil  # type: ignore[import-untyped]

from edge_agent.host.confinement import Confinement
from tests.support.medium_server import MediumServer, RemoteMedium
from tests.support.power import Call, Power
from tests.support.processes import Daemon, wait_until
from tests.support.state_folder import copy_state

_CACHE = "models"
_MEDIUM = "m.sock"


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
    """A daemon that stands still at a point; the folder of its settings is the faults' folder, too.

    Args:
        state: copied, for the daemon to begin with.

    Attributes:
        medium: what a disk would hold of the cache, through every start.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, state: Path) -> None:
        super().__init__(folder, config)
        copy_state(state, self.state_dir)
        self.medium = MediumServer(self.state_dir / _CACHE, folder / _MEDIUM)

    def close(self) -> None:
        super().close()
        self.medium.close()

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
            AssertionError: the medium failed.
        """
        fired = self.folder / "fired"
        wait_until(lambda: fired.exists() or self.medium.trouble, timeout_s, "the point")
        assert not self.medium.trouble, self.medium.trouble

    def cut_power(self) -> None:
        """Kills the daemon and all that it started."""
        daemon = psutil.Process(self.pid)
        daemon.suspend()  # it starts nothing while its children are looked up
        children = daemon.children(recursive=True)
        for process in children:
            process.suspend()  # and none gets the turn of one that was killed before it
        for process in [daemon, *children]:
            process.kill()
        self.child.process.wait(60)

    def write_dropped(self, target: Path) -> None:
        """Makes the state folder that a power cut leaves now: of the cache, what the medium holds. All else goes as
        it is; of it the journal's durability is SQLite's own, and tested with the journal.
        """
        copy_state(self.state_dir, target)
        shutil.rmtree(target / _CACHE)
        self.medium.write(target / _CACHE)

    def calls(self) -> list[Call]:
        """All changes since `stop_at`, in their order."""
        return [Call(*json.loads(line)) for line in (self.folder / "calls").read_text().splitlines()]

    def _command(self, *arguments: str) -> list[str]:
        command = super()._command(*arguments)
        if "run" not in arguments:
            return command
        return [command[0], __file__, str(self.folder), *command[1:]]


def _watch(folder: Path, call: Call) -> None:
    """Before each change of any of the processes, which has the turn."""
    with (folder / "calls").open("a+") as calls:
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
    """One change at a time, of all the processes: with it the medium sees them in their order."""
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
        f'edge_agent.sync.*) exec {python} {shlex.quote(__file__)} {shlex.quote(str(folder))} "$@" ;;\n'
        f'*) exec {python} "$@" ;;\nesac\n'
    )
    script.chmod(0o700)
    return str(script)


def _open_walls(folder: Path) -> None:
    """Lets a sync write the faults' folder, too."""
    from edge_agent.sync import walls

    around = walls.around_sync

    def around_sync(*args: Any, **kwargs: Any) -> Confinement:
        found = around(*args, **kwargs)
        return replace(found, write=(*found.write, folder))

    walls.around_sync = around_sync


def main() -> None:
    folder, module, arguments = Path(sys.argv[1]), sys.argv[3], sys.argv[4:]
    if module == "edge_agent":
        sys.executable = _own_interpreter(folder)
    if module == "edge_agent.sync.child":
        _open_walls(folder)
    sys.argv = [module, *arguments]
    power = Power(
        folder / "state",
        watch=lambda number, call, torn: _watch(folder, call),
        medium=RemoteMedium(folder / _MEDIUM),
        turn=lambda: _turn(folder),
    )
    with power.installed():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
