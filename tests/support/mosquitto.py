"""A real mosquitto on a free loopback port.

Found on PATH, in /usr/sbin, or in `.tools/bin`, where `./build.sh` puts a private copy.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.support import namespaces
from tests.support.processes import Child, accepts, free_port, started, wait_until

TOOLS = Path(__file__).parents[2] / ".tools" / "bin"

_START_TIMEOUT_S = 60


def tool(name: str) -> str:
    """The path of mosquitto, mosquitto_pub, mosquitto_sub or mosquitto_rr.

    Raises:
        FileNotFoundError: it is not on this machine.
    """
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(TOOLS), "/usr/sbin"]))
    if path is None:
        raise FileNotFoundError(f"{name} is not here; `./build.sh test` fetches it into .tools")
    return path


class Broker:
    """One mosquitto with a port and a folder that stay the same over restarts.

    Attributes:
        host, port: where it listens.
        folder: its configuration, log and, with persistence, its database.
    """

    def __init__(self, folder: Path, config: str, port: int, *, offline: bool = False) -> None:
        self.host = "127.0.0.1"
        self.port = port
        self.folder = folder
        self.config_file = folder / "mosquitto.conf"
        self.log = folder / "mosquitto.log"
        self.config_file.write_text(config)
        self._offline = offline
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None, "the broker was not started"
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    def start(self) -> None:
        """Starts it and waits until it accepts connections.

        Raises:
            AssertionError: it ended at once; its log is shown.
        """
        if self.running:
            return
        command = [tool("mosquitto"), "-c", str(self.config_file)]
        child = self._child = Child(namespaces.offline(command) if self._offline else command, self.log)
        wait_until(
            lambda: not child.running or self._listens(),
            _START_TIMEOUT_S,
            f"mosquitto on port {self.port}",
        )
        assert child.running, f"mosquitto ended with {child.process.returncode}:\n{self.log_text()}"

    def _listens(self) -> bool:
        if self._offline:  # nobody out here can connect
            return bool(re.search(r"mosquitto version \S+ running", self.log_text()))
        return accepts(self.port)

    def stop(self) -> None:
        """SIGTERM: with persistence, sessions, queues and retained messages are saved."""
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """SIGKILL, like a power cut."""
        if self._child is not None:
            self._child.kill()

    def restart(self) -> None:
        """stop and start, on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stops answering without closing a connection, like a cut cable. `thaw` undoes it."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@contextlib.contextmanager
def running_broker(
    folder: Path,
    *,
    extra_config: str = "",
    allow_anonymous: bool = True,
    persistence: bool = False,
    port: int | None = None,
    offline: bool = False,
) -> Iterator[Broker]:
    """A started mosquitto.

    Args:
        folder: an existing folder for its files.
        extra_config: more lines; they come last, so listener options (TLS) apply to the one listener.
        persistence: keep sessions and messages over `kill` too (after about a second) and `restart`.
        port: a free one when None.
        offline: in a network namespace of its own; see `tests.support.namespaces`.
    """
    broker = _start(folder, extra_config, allow_anonymous, persistence, port, offline=offline)
    try:
        yield broker
    finally:
        if broker.running:
            broker.thaw()
        broker.stop()


def _start(
    folder: Path, extra: str, anonymous: bool, persistence: bool, port: int | None, *, offline: bool
) -> Broker:
    def make() -> Broker:
        number = port or free_port()
        return Broker(folder, _config(folder, extra, anonymous, persistence, number), number, offline=offline)

    return started(make, tries=1 if port else 3)


def _config(folder: Path, extra: str, anonymous: bool, persistence: bool, port: int) -> str:
    lines = [
        "per_listener_settings false",
        "set_tcp_nodelay true",
        f"allow_anonymous {str(anonymous).lower()}",
        "log_dest stderr",
        "log_type all",
        f"persistence {str(persistence).lower()}",
    ]
    if persistence:
        lines += [f"persistence_location {folder}/", "autosave_on_changes true", "autosave_interval 1"]
    if os.geteuid() == 0:
        lines.append("user root")  # it would change to a user that cannot write here
    lines += [f"listener {port} 127.0.0.1", extra]
    return "\n".join(lines) + "\n"
