"""The sides of the benchmark: bare library, MLflow pyfunc, a runner, the whole agent over MQTT.

Each is a context manager that loads the model for its block. Only one is open at a time, so memory for one copy of
the model is enough.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edge_agent.bench.line_child import BenchError, LineChild
from edge_agent.bench.mqtt_client import MqttClient
from edge_agent.bench.over_http import Gateway, gateway
from edge_agent.bench.private_cache import private_cache
from edge_agent.bench.timing import Timing
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import DaemonNotRunning
from edge_agent.host import memory
from edge_agent.package.trust import runs_own_code, runs_shipped_wrapper
from edge_agent.private_broker import child_process, private_broker, tail
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Done, Load
from edge_agent.settings import Settings
from edge_agent.transport import control

LOAD_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 900.0
DEVICE = "bench"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The version to measure.

    Attributes:
        onnx: the model builder's folder inside `folder`.
        threads: the number for every side.
    """

    settings: Settings
    store: Store
    record: VersionRecord
    folder: Path
    onnx: Path
    threads: int

    @property
    def context_tokens(self) -> int:
        return self.settings.models[self.record.name].context_tokens

    @property
    def environment(self) -> dict[str, str]:
        return child_environment(self.settings.state_dir)


class Side(Protocol):
    """One way to ask the loaded model.

    Attributes:
        load_ms: time to load the model, without the start of the process.
        pid: the process that has loaded the model.
    """

    load_ms: float
    pid: int

    def ask(self, text: str, max_tokens: int) -> Timing: ...


class LineSide:
    """A child process that answers JSON lines: the bare library or the pyfunc."""

    def __init__(self, child: LineChild) -> None:
        self._child = child
        self.load_ms = float(child.read(timeout_s=LOAD_TIMEOUT_S)["load_ms"])
        self.pid = child.pid

    def ask(self, text: str, max_tokens: int) -> Timing:
        request = {"do": "generate", "text": text, "max_tokens": max_tokens}
        return Timing.of(self._child.ask(request, timeout_s=ANSWER_TIMEOUT_S))

    def prompt(self, tokens: int) -> str:
        """A text of about `tokens` tokens with a unique beginning. Only the bare library can make one."""
        request = {"do": "prompt", "tokens": tokens, "start": uuid.uuid4().hex[:6]}
        return str(self._child.ask(request, timeout_s=ANSWER_TIMEOUT_S)["text"])


class RunnerSide:
    """The agent's runner, without the daemon."""

    def __init__(self, runner: RunnerProcess, subject: Subject) -> None:
        self._runner = runner
        sandbox = subject.settings.models[subject.record.name].sandbox
        request = Load(
            folder=str(subject.folder),
            context_tokens=subject.context_tokens,
            max_tokens=64,
            threads=subject.threads,
            network=sandbox.network,
            read=[str(path) for path in sandbox.read],
            confined=runs_own_code(subject.record.trust) and not subject.settings.trust.unconfined_code,
            shipped_wrapper=runs_shipped_wrapper(subject.record.trust),
        )
        self.load_ms = runner.load(request, timeout_s=LOAD_TIMEOUT_S).load_ms
        self.pid = runner.pid

    def ask(self, text: str, max_tokens: int) -> Timing:
        messages = [{"role": "user", "content": text}]
        document = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        started, first = time.perf_counter(), 0.0
        for item in self._runner.generate(uuid.uuid4().hex, document, timeout_s=ANSWER_TIMEOUT_S):
            now = time.perf_counter()
            if isinstance(item, Delta):
                first = first or now
            elif isinstance(item, Done):
                return Timing.of(
                    {
                        **item.usage,
                        "first_token_ms": ((first or now) - started) * 1000,
                        "total_ms": (now - started) * 1000,
                    }
                )
        raise BenchError("the runner gave no answer")


class MqttSide:
    """A private daemon behind a private broker.

    Attributes:
        gateway: starts the OpenAI interface before this daemon, for a block.
    """

    def __init__(
        self,
        client: MqttClient,
        *,
        daemon_pid: int,
        runner_pid: int,
        gateway: Callable[[], AbstractContextManager[Gateway]],
    ) -> None:
        self.client = client
        self.gateway = gateway
        self.load_ms = 0.0
        self.pid = runner_pid
        self.daemon_pid = daemon_pid

    def ask(self, text: str, max_tokens: int) -> Timing:
        return self.client.wait(self.client.send(text, max_tokens), timeout_s=ANSWER_TIMEOUT_S)


@contextlib.contextmanager
def bare(subject: Subject, threads: int) -> Iterator[LineSide]:
    """onnxruntime-genai alone; with 0 threads the library chooses the number."""
    arguments = (str(subject.onnx), str(threads))
    with LineChild("edge_agent.bench.bare", *arguments, environment=subject.environment) as child:
        yield LineSide(child)


@contextlib.contextmanager
def pyfunc(subject: Subject) -> Iterator[LineSide]:
    """The package through MLflow."""
    arguments = (str(subject.folder), str(subject.context_tokens), str(subject.threads))
    with LineChild("edge_agent.bench.pyfunc", *arguments, environment=subject.environment) as child:
        yield LineSide(child)


@contextlib.contextmanager
def runner(subject: Subject) -> Iterator[RunnerSide]:
    """The agent's runner."""
    process = RunnerProcess(model=subject.record.name, environment=subject.environment)
    try:
        yield RunnerSide(process, subject)
    finally:
        process.stop()


@contextlib.contextmanager
def mqtt(subject: Subject) -> Iterator[MqttSide]:
    """The whole agent: a daemon with the same version, a mosquitto on a loopback port, a client.

    Raises:
        BrokerMissing: mosquitto is not installed, or does not start.
        BenchError: the daemon does not become ready.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-agent-bench-")))
        port = stack.enter_context(private_broker(folder))
        state_dir = stack.enter_context(private_cache(subject.store, subject.record))
        config = folder / "config.toml"
        config.write_text(_config(subject, folder, state_dir, port))
        log = folder / "agent.log"
        command = [sys.executable, "-m", "edge_agent", "--config", str(config), "run"]
        daemon = stack.enter_context(child_process(command, log, environment=subject.environment))
        _await_ready(folder / "control.sock", log)
        client = stack.enter_context(MqttClient(port, f"edge/v1/{DEVICE}"))
        yield MqttSide(
            client,
            daemon_pid=daemon.pid,
            runner_pid=memory.children(daemon.pid)[0],
            gateway=partial(gateway, config, folder, subject.environment),
        )


def _config(subject: Subject, folder: Path, state_dir: Path, port: int) -> str:
    """The settings of the benchmark's daemon. They are the device's own wherever they affect the result."""
    model, trust = subject.settings.models[subject.record.name], subject.settings.trust
    values: dict[str, dict[str, Any]] = {
        "": {
            "device_id": DEVICE,
            "state_dir": str(state_dir),
            "control_socket": str(folder / "control.sock"),
        },
        f"models.{json.dumps(subject.record.name)}": {
            "uri": model.uri,
            "context_tokens": model.context_tokens,
            **model.generation,
        },
        f"models.{json.dumps(subject.record.name)}.sandbox": model.sandbox.model_dump(mode="json"),
        "mqtt": {"host": "127.0.0.1", "port": port},
        "http": {"listen": "", "socket": str(folder / "http.sock")},
        "limits": {"deadline_s": ANSWER_TIMEOUT_S},
        "trust": {
            "public_keys": list(trust.public_keys),
            "allow_unsigned_code": trust.allow_unsigned_code,
            "unconfined_code": trust.unconfined_code,
        },
        "inference": {"threads": subject.threads},
    }
    lines: list[str] = []
    for section, keys in values.items():
        lines += [f"[{section}]"] if section else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _await_ready(socket: Path, log: Path) -> None:
    limit_s = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < limit_s:
        with contextlib.suppress(DaemonNotRunning, TimeoutError):
            status = next((event["status"] for event in control.call(socket, "status", timeout_s=5)), None)
            if status and status["broker"]["connected"] and status["models"][0]["state"] == "ready":
                return
            if status and status["models"][0]["state"] == "failed":
                break
        time.sleep(0.05)
    raise BenchError(f"the benchmark's daemon did not become ready: {tail(log)}")
