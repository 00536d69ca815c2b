"""The daemon's side of a sync: starts `python -m edge_agent.sync.child`, gives it its job, reads its events, ends it.

Importing MLflow costs 120 MB and a second, and a dead registry can block for minutes: so the work is another
process, and this one only reads JSON lines. Flow: start with an environment from an allow-list → the job on
stdin → events until done or error → a process that is too slow, too talkative or no longer wanted is
killed. Killing is safe at every moment: see `sync/bring.py`. Refuses: lines over `MAX_LINE_BYTES`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

from edge_agent import environment
from edge_agent.errors import EdgeAgentError, SettingsError, SyncStopped, TransportError
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.host.memory import ProcessMemory
from edge_agent.runner.lines import LineReader
from edge_agent.runner.scratch import scratch_folder
from edge_agent.sync.protocol import (
    MAX_EVENTS,
    MAX_LINE_BYTES,
    Emit,
    Event,
    Outline,
    SyncJob,
    SyncResult,
    outcome_of,
)

log = logging.getLogger(__name__)

_RUNNING: set[ProcessMemory] = set()
"""The sync processes of this one. There may be two: a plan is made while a version is fetched."""
_STEP_S = 0.2
_EXIT_WAIT_S = 5.0
_STDERR_TAIL_BYTES = 4_000

ENVIRONMENT_NAMES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    *(
        name
        for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
        for name in (proxy, proxy.lower())
    ),
)
"""Variables that a sync inherits: never tokens of other services, never EDGE_AGENT_*."""
ENVIRONMENT_PREFIXES = ("MLFLOW_TRACKING_", "MLFLOW_S3_", "AWS_", "AZURE_", "GOOGLE_")
"""Credentials of the registry and of artifact stores."""


def run_sync(
    job: SyncJob,
    *,
    timeout_s: float,
    on_event: Emit = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Clock = CLOCK,
) -> SyncResult:
    """Runs one sync to its end in a process of its own.

    Args:
        timeout_s: for the whole sync; a large model on a slow line needs hours.
        on_event: called with every event but the last, in this thread; it must be quick.
        should_stop: called about five times a second; True ends the process.
        clock: for `timeout_s` only.

    Raises:
        SyncStopped: `should_stop` said so.
        TransportError: the registry is out of reach, or the time is over.
        RegistryRefused: it does not let this device in.
        UnknownReference: the registry has no such model, alias or version.
        CannotRun: this host lacks what the version needs.
        ContentError: the package breaks a rule (`ManifestError`, `VerificationError`, `PolicyError`).
        Quarantined: the job says that this version is not to be fetched.
        StoreError: the cache cannot take it.
        EdgeAgentError: the process died or broke the protocol.
    """
    outcome = _outcome(job, timeout_s=timeout_s, on_event=on_event, should_stop=should_stop, clock=clock)
    if not isinstance(outcome, SyncResult):
        raise EdgeAgentError(f"the sync of {job.name} brought nothing")
    return outcome


def resident_bytes() -> int | None:
    """What the running sync processes have in memory; None where none runs. Any thread."""
    return sum(process.resident_bytes() for process in running) if (running := _RUNNING.copy()) else None


def run_outline(
    job: SyncJob, *, timeout_s: float, should_stop: Callable[[], bool] = lambda: False, clock: Clock = CLOCK
) -> Outline:
    """What the version that the job means would take. A process of its own asks the registry.

    Raises:
        SyncStopped, TransportError, RegistryRefused, UnknownReference, ContentError, StoreError, EdgeAgentError: as
            `run_sync`.
    """
    outcome = _outcome(
        replace(job, outline=True),
        timeout_s=timeout_s,
        on_event=lambda event: None,
        should_stop=should_stop,
        clock=clock,
    )
    if not isinstance(outcome, Outline):
        raise EdgeAgentError(f"nothing is known of what {job.ref} would take")
    return outcome


def _outcome(
    job: SyncJob, *, timeout_s: float, on_event: Emit, should_stop: Callable[[], bool], clock: Clock
) -> SyncResult | Outline:
    stderr = _Tail()
    until_s = clock.now_s() + timeout_s
    with _started(job) as process:
        for event in _events(process, job, stderr, lambda: clock.now_s() >= until_s, should_stop):
            outcome = outcome_of(event)
            if isinstance(outcome, EdgeAgentError):
                raise outcome
            if outcome:
                return outcome
            on_event(event)
        status = _ended(process)
    log.warning("sync died code=internal model=%s status=%s stderr=%r", job.name, status, stderr.text)
    last_line = stderr.text.splitlines()[-1] if stderr.text else "it said nothing"
    raise EdgeAgentError(f"the sync of {job.name} ended with status {status}: {last_line}")


def child_environment() -> dict[str, str]:
    """The sync process's whole environment: the allow-list, systemd's credentials, and no reports to MLflow.

    Raises:
        SettingsError: a credential cannot be read, or cannot be sent.
    """
    return {
        **_sendable(
            {
                **environment.inherited_environment(*ENVIRONMENT_NAMES, prefixes=ENVIRONMENT_PREFIXES),
                **environment.registry_credentials(),
            }
        ),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _sendable(variables: dict[str, str]) -> dict[str, str]:
    """Returns them unchanged, or refuses what no HTTP header can hold: the client library quotes it in its error,
    secret or not.
    """
    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        value = variables.get(name, "")
        if not value.isprintable() or (name.endswith("TOKEN") and not value.isascii()):
            raise SettingsError(
                f"{name}, or the credential of that name, has a character that cannot be sent",
                remedy="write it again: one line, without a line break, and a token in ASCII",
            )
    return variables


@contextlib.contextmanager
def _started(job: SyncJob) -> Iterator[subprocess.Popen[bytes]]:
    """The process, with its job on stdin. When the block ends, the process is dead."""
    # Not a pipe: that would block on a job larger than its buffer.
    with scratch_folder() as scratch, _memory_file("sync") as stdin:
        stdin.write(job.encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.sync.child", *([str(scratch)] if scratch else [])],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**child_environment(), **({"TMPDIR": str(scratch)} if scratch else {})},
            cwd="/",
            close_fds=True,
            pass_fds=() if job.version_file is None else (job.version_file,),
            start_new_session=True,
        )
        memory = ProcessMemory(process.pid)
        _RUNNING.add(memory)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            _RUNNING.discard(memory)
            memory.close()
            for pipe in (process.stdout, process.stderr):
                if pipe:
                    pipe.close()


class _Tail:
    """The end of what the process wrote to stderr."""

    def __init__(self) -> None:
        self._data = b""

    def add(self, data: bytes) -> None:
        self._data = (self._data + data)[-_STDERR_TAIL_BYTES:]

    @property
    def text(self) -> str:
        return self._data.decode("utf-8", "replace").strip()


def _memory_file(name: str) -> IO[bytes]:
    """A file in memory, so that a sync can start, and report it, when the disk is full."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _events(
    process: subprocess.Popen[bytes],
    job: SyncJob,
    stderr: _Tail,
    is_late: Callable[[], bool],
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    """Events until the process closes its stdout."""
    count = 0
    lines = LineReader(
        limit_bytes=MAX_LINE_BYTES,
        broken=lambda reason: EdgeAgentError(f"the sync of {job.name} wrote {reason}"),
    )
    for data in _output(process, job, stderr, is_late, should_stop):
        lines.add(data)
        while (event := lines.document()) is not None:
            count += 1
            if count > MAX_EVENTS:
                raise EdgeAgentError(f"the sync of {job.name} sent more than {MAX_EVENTS} events")
            yield event


def _output(
    process: subprocess.Popen[bytes],
    job: SyncJob,
    stderr: _Tail,
    is_late: Callable[[], bool],
    should_stop: Callable[[], bool],
) -> Iterator[bytes]:
    """Yields what the process writes to stdout. The end of its stderr is kept in case it dies."""
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr):
            selector.register(_descriptor(pipe), selectors.EVENT_READ)
        while selector.get_map():
            if should_stop():
                raise SyncStopped(f"the sync of {job.name} was stopped")
            if is_late():
                raise TransportError(
                    f"the sync of {job.name} took too long and was ended",
                    remedy="what it fetched is kept for the next one",
                )
            for key, _ in selector.select(_STEP_S):
                chunk = os.read(key.fd, MAX_LINE_BYTES)
                if not chunk:
                    selector.unregister(key.fd)
                elif key.fd == _descriptor(process.stderr):
                    stderr.add(chunk)
                else:
                    yield chunk


def _descriptor(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_EXIT_WAIT_S)
    except subprocess.TimeoutExpired:
        return None
