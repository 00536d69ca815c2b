"""A private mosquitto on a free loopback port, for the demo and the benchmark."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edge_agent import environment
from edge_agent.errors import EdgeAgentError

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 30.0


class BrokerMissing(EdgeAgentError):
    """mosquitto is not installed, or does not start."""

    code = "broker_missing"


@contextlib.contextmanager
def private_broker(folder: Path) -> Iterator[int]:
    """Runs mosquitto for the block, and yields its port.

    Args:
        folder: for its configuration and its log.

    Raises:
        BrokerMissing: mosquitto is not installed, or does not start.
    """
    program, port = _find(), _free_port()
    lines = [
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        "set_tcp_nodelay true",
        "persistence false",
    ]
    if os.geteuid() == 0:
        lines.append("user root")  # by default it switches to a user that may not exist here
    config, log = folder / "mosquitto.conf", folder / "mosquitto.log"
    config.write_text("\n".join(lines) + "\n")
    with child_process([program, "-c", str(config)], log) as process:
        limit_s = time.monotonic() + _START_TIMEOUT_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > limit_s:
                raise BrokerMissing(f"mosquitto did not start: {tail(log)}")
            time.sleep(0.02)
        yield port


@contextlib.contextmanager
def child_process(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a child process for the block. Its output goes to a file."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path) -> str:
    """The last lines of a log, for an error message."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-5:])


def _find() -> str:
    path = shutil.which("mosquitto", path=os.pathsep.join((environment.search_path(), "/usr/sbin")))
    if path is None:
        raise BrokerMissing(
            "mosquitto is not installed",
            remedy="install it; in the source tree, `./build.sh demo` installs a private copy",
        )
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
