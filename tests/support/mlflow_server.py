"""A real `mlflow server` on a free loopback port: a database behind it, artifacts proxied from a folder or from S3."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.processes import Child, free_port, is_healthy, started, wait_until

_START_TIMEOUT_S = 600
_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Server:
    """One MLflow server with a port and a store that stay the same over `stop` and `start`.

    Args:
        destination: where it keeps artifacts, such as `s3://bucket/x`; empty for a folder.
        backend: its database, such as `postgresql://…`; empty for an SQLite file.
        env: what it needs for that.
        workers: processes that answer.

    Attributes:
        uri: what clients use as tracking and registry URI.
        artifacts: the folder where it keeps artifacts, for tests that damage them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        destination: str = "",
        backend: str = "",
        env: Mapping[str, str] | None = None,
        workers: int = 1,
    ) -> None:
        self.folder = folder
        self.host = "127.0.0.1"
        self.port = free_port()
        self.uri = f"http://{self.host}:{self.port}"
        self.artifacts = folder / "artifacts"
        self.log = folder / "mlflow.log"
        self._destination = destination or str(self.artifacts)
        self._backend = backend or f"sqlite:///{folder / 'mlflow.db'}"
        self._workers = workers
        self._env = {**_ENVIRONMENT, "HOME": str(folder), **(env or {})}
        self._child: Child | None = None

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    def start(self) -> None:
        """Starts it and waits for /health.

        Raises:
            AssertionError: it ended, or was not healthy in time; its log is shown.
        """
        if self.running:
            return
        child = self._child = Child(self._command(), self.log, self._env)
        try:
            wait_until(lambda: not child.running or self.healthy(), _START_TIMEOUT_S, "the MLflow server")
        except TimeoutError as error:
            self.kill()
            raise AssertionError(f"{error}; its log:\n{self.log_text()}") from error
        assert child.running, f"the MLflow server ended with {child.process.returncode}:\n{self.log_text()}"

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """SIGKILL to it and its workers: connections break in the middle."""
        if self._child is not None:
            self._child.kill()

    def healthy(self) -> bool:
        return is_healthy(self.port, "/health", self.host)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", self.host, "--port", str(self.port), "--workers", str(self._workers)),
            *("--backend-store-uri", self._backend),
            *("--artifacts-destination", self._destination, "--serve-artifacts"),
        ]


@contextlib.contextmanager
def running_mlflow_server(
    folder: Path,
    *,
    destination: str = "",
    backend: str = "",
    env: Mapping[str, str] | None = None,
    workers: int = 1,
) -> Iterator[Server]:
    """A started server whose files are in `folder`. The first start makes the database: 10 to 20 s."""
    server = started(
        lambda: Server(folder, destination=destination, backend=backend, env=env, workers=workers)
    )
    try:
        yield server
    finally:
        server.stop()
