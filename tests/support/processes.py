"""Processes that tests start: a free port, a bounded wait, and the daemon as systemd would run it.

Every process has an owner that ends it: `Child` for one process with its group and its log, `Daemon` for
`edge-agent run` with a settings file and a notify socket. `wait_until` is the only place where tests sleep.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil  # type: ignore[import-untyped]

from edge_agent.errors import DaemonNotRunning
from edge_agent.transport import control

T = TypeVar("T")

_POLL_S = 0.02
_DROPPED_PREFIXES = ("EDGE_AGENT_", "MLFLOW_", "COV_", "PYTEST_")
_DROPPED = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY"),
    *("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "CONFIGURATION_DIRECTORY"),
    *("PYTHONPATH", "PYTHONWARNINGS", "PYTHONUNBUFFERED"),
)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Server(Protocol):
    def start(self) -> None:
        """Raises AssertionError if it does not come up."""

    def kill(self) -> None: ...

    def log_text(self) -> str: ...


_AnyServer = TypeVar("_AnyServer", bound=_Server)


def started(make: Callable[[], _AnyServer], *, tries: int = 3) -> _AnyServer:
    """A server that has started. Another process may take its port before it does: then the next one is made."""
    for left in reversed(range(tries)):
        server = make()
        try:
            server.start()
        except AssertionError:
            server.kill()
            if not left or "ddress already in use" not in server.log_text():
                raise
        except BaseException:
            server.kill()
            raise
        else:
            return server
    raise AssertionError("unreachable")


def wait_until(condition: Callable[[], T], timeout_s: float = 60.0, what: str = "the condition") -> T:
    """Asks `condition` again and again until its value is true, and returns that value.

    Raises:
        TimeoutError: it stayed false for `timeout_s` seconds; the message says `what` was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(_POLL_S)


def alive(pid: int) -> bool:
    """True while the process runs. One that has ended and is not yet reaped counts as ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """True when something accepts TCP connections there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A private temporary folder with a short name: the path of a Unix socket has at most 107 bytes."""
    parent = "/tmp" if os.access("/tmp", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without anything that would change what a started process does, plus `extra`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in _DROPPED and not key.startswith(_DROPPED_PREFIXES)
    }
    return {**kept, "MLFLOW_DISABLE_TELEMETRY": "true", **(extra or {})}


class Child:
    """One process in a process group of its own, its stdout and stderr in a file.

    Owned by the thread that made it.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=clean_environment(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self, timeout_s: float = 15) -> int:
        """SIGTERM; then, after at most `timeout_s`, SIGKILL for its group. Returns the exit status."""
        if self.running:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL to the whole group. Returns the exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.process.wait(60)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path],
    log: Path,
    *,
    ready: Callable[[], bool],
    what: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> Iterator[Child]:
    """A server until the block ends, from when it is ready on.

    Raises:
        AssertionError: it ended instead; its log is shown.
    """
    child = Child(command, log, env)
    try:
        wait_until(lambda: not child.running or ready(), timeout_s, what)
        assert child.running, child.log_text()
        yield child
    finally:
        child.stop()


def is_healthy(port: int, path: str, host: str = "127.0.0.1") -> bool:
    """True when a web server there answers a path with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class NotifySocket:
    """The service manager's end of `$NOTIFY_SOCKET`: keeps every message, never lets a sender wait.

    Its thread owns the socket; `messages` only grows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._receive, name="notify-socket", daemon=True)
        self._thread.start()

    def got(self, line: str) -> bool:
        """True when any message so far has this line, for example `READY=1`."""
        return any(line in message.split("\n") for message in list(self.messages))

    def clear(self) -> None:
        self.messages.clear()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)  # ends the thread, even where the socket's folder is gone
        self._thread.join(60)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _receive(self) -> None:
        while message := self._socket.recv(65_536):
            self.messages.append(message.decode("utf-8", "replace"))


class Daemon:
    """`edge-agent run` as a process, the way systemd would start it.

    The settings come from `config` (keys as in the TOML file; change it before `start` or `restart`).
    `state_dir` and `control_socket` default to places in `folder`, whose path must be short. `python` is the
    interpreter; change it before `start` or `restart` for a host with other libraries.
    `before` is a command that becomes the daemon: a namespace, or strace.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        watchdog_s: float | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {
            "device_id": "dev",
            "state_dir": str(folder / "state"),
            "control_socket": str(folder / "c.sock"),
            **config,
            # Measuring how many threads are best would load each new version several times.
            "inference": {"threads": 1, **config.get("inference", {})},
        }
        self.env = dict(env or {})
        self.python = sys.executable
        self.config_file = folder / "config.toml"
        self.notify = NotifySocket(folder / "n.sock")
        self.before = list(before)
        self._watchdog_s = watchdog_s
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child is not None, "the daemon was not started"
        return self._child

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    @property
    def log(self) -> str:
        """All that every start so far has written to stderr and stdout."""
        file = self.folder / "daemon.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def state_dir(self) -> Path:
        return Path(self.config["state_dir"])

    @property
    def control_socket(self) -> Path:
        return Path(self.config["control_socket"])

    def start(self, *, ready: bool = True, timeout_s: float = 120) -> None:
        """Writes the settings file and starts; with `ready`, waits for READY=1.

        Raises:
            AssertionError: the process ended, or READY did not come within `timeout_s`; its log is shown.
        """
        assert not self.running, "the daemon runs already"
        self.notify.clear()
        self.config_file.write_text(to_toml(self.config))
        env = {"HOME": str(self.folder), "NOTIFY_SOCKET": str(self.notify.path), **self.env}
        if self._watchdog_s is not None:
            env["WATCHDOG_USEC"] = str(int(self._watchdog_s * 1_000_000))
        self._child = Child([*self.before, *self._command("run")], self.folder / "daemon.log", env)
        if ready:
            self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float = 120) -> None:
        try:
            wait_until(lambda: self.notify.got("READY=1") or not self.running, timeout_s, "READY=1")
        except TimeoutError as error:
            raise AssertionError(f"{error}; the daemon's log:\n{self.log}") from error
        assert self.notify.got("READY=1"), f"ended with {self.child.process.returncode}:\n{self.log}"

    def wait_exit(self, timeout_s: float = 60) -> int:
        """Waits for the process to end by itself. Returns its exit status."""
        return self.child.process.wait(timeout_s)

    def stop(self, timeout_s: float = 90) -> int:
        """SIGTERM, as systemd does it. Returns the exit status (-9 when it had to be killed)."""
        return self.child.stop(timeout_s)

    def kill(self) -> int:
        """SIGKILL to the daemon alone, like a crash: its children have to notice by themselves."""
        self.child.process.kill()
        return self.child.process.wait(60)

    def restart(self, *, ready: bool = True, timeout_s: float = 120) -> None:
        if self.running:
            self.stop()
        self.start(ready=ready, timeout_s=timeout_s)

    def close(self) -> None:
        """Ends everything that this object started."""
        if self._child is not None:
            self._child.stop()
        self.notify.close()

    def cli(
        self, *arguments: str, timeout_s: float = 120, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs `edge-agent --config FILE …` beside the daemon and waits for its end."""
        if not self.config_file.exists():
            self.config_file.write_text(to_toml(self.config))
        return subprocess.run(
            self._command(*arguments),
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=clean_environment({"HOME": str(self.folder), **self.env}),
            check=False,
        )

    def status(self) -> dict[str, Any]:
        """The status document, over the control socket, as `edge-agent status --json` prints it; without the
        half second that a process takes to start, for tests ask again and again. With the daemon down, what that
        command says of the disk.
        """
        try:
            *_, last = control.call(self.control_socket, "status", timeout_s=60)
            assert last["event"] == "done", last
            document: dict[str, Any] = last["status"]
        except DaemonNotRunning:
            result = self.cli("status", "--json")
            assert result.returncode in (0, 3), f"status exited with {result.returncode}: {result.stderr}"
            document = json.loads(result.stdout)
        return document

    def runners(self) -> list[psutil.Process]:
        """The processes that have a model loaded, or are loading one."""
        found = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                if alive(child.pid) and "edge_agent.runner.child" in child.cmdline():
                    found.append(child)
        return found

    def _command(self, *arguments: str) -> list[str]:
        return [self.python, "-m", "edge_agent", "--config", str(self.config_file), *arguments]


@contextlib.contextmanager
def standing_still(process: psutil.Process) -> Iterator[None]:
    """The process does nothing in the block: however fast it is, nothing there ends by itself."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


class Commands:
    """The command lines of the daemon and of all that it starts, looked at again and again in a block."""

    def __init__(self, daemon: Daemon) -> None:
        self.seen: set[str] = set()
        self._daemon = psutil.Process(daemon.pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="commands")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            with contextlib.suppress(psutil.NoSuchProcess):
                children = self._daemon.children(recursive=True)
                for process in [self._daemon, *children]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        self.seen.add(" ".join(process.cmdline()))


@contextlib.contextmanager
def running_daemon(
    config: Mapping[str, Any],
    *,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    watchdog_s: float | None = None,
    before: Sequence[str] = (),
    ready: bool = True,
    timeout_s: float = 120,
) -> Iterator[Daemon]:
    """A started daemon, in a short temporary folder when none is given; everything ends with the block."""
    with contextlib.ExitStack() as stack:
        place = folder or stack.enter_context(short_folder())
        daemon = Daemon(place, config, env=env, watchdog_s=watchdog_s, before=before)
        stack.callback(daemon.close)
        daemon.start(ready=ready, timeout_s=timeout_s)
        yield daemon


def to_toml(config: Mapping[str, Any]) -> str:
    """TOML for strings, numbers, booleans, paths, lists and nested tables: what a settings file has."""
    return "\n".join(_table(config, ())) + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield f"[{'.'.join(_string(part) for part in path)}]"
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{_string(key)} = {_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _table(value, (*path, key))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return _string(str(value))


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
