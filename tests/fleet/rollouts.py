"""Rollouts over the twelve devices: a good version, bad ones, and a bad day of console, broker and registry.

Each is what an operator types, as a process. What becomes of it is read from the devices, the alias and the retained
state; where one of them is not as it must be, `Wrong` says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlflow import MlflowClient

from edge_agent.publishing import publish_folder
from edge_agent.serving.verdicts import MAX_CRASHES
from tests.support.client import Client, chat, connected
from tests.support.fleet_operator import MODEL, Operator
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.packages import publish_broken
from tests.support.processes import Child, Daemon, wait_until
from tests.support.sample_device import SAMPLE
from tests.support.versions import expect_lisbon

AWAY_S = 20.0
SHARES = (5, 25, 100)
HOW = ("--waves", "5%,25%,100%", "--min-speed", "0", "--soak")
_LIMIT_S = 600
_CRASHES_TRIED = 12
LONG = {"max_tokens": 1_900, "response_format": {"type": "regex", "regex": "(0|1){1850}"}}
"""An answer of a second or two."""


class Wrong(Exception):
    """A rollout did something else than it must."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one rollout came to.

    Attributes:
        requests: of the registry's API, artifacts included.
        peak: the most of them in one second.
        took_s: from the first command to the last device.
    """

    name: str
    requests: int
    peak: int
    took_s: float

    def __str__(self) -> str:
        return f"| rollout: {self.name} | {self.requests} | {self.peak} | | {self.took_s:.0f} |"


class Rollouts:
    """
    Args:
        good, bad: model folders: one that devices take, and one that is made to fail its golden prompts.
        requests: counts the registry's requests by the second, from a place in its log on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        daemons: Sequence[Daemon],
        server: Server,
        broker: Broker,
        good: Path,
        bad: Path,
        requests: Callable[[int], Counter[str]],
    ) -> None:
        self._daemons = {str(daemon.config["device_id"]): daemon for daemon in daemons}
        self._server = server
        self._broker = broker
        self._good, self._bad = good, bad
        self._requests = requests
        self._folder = folder
        self._mlflow = MlflowClient(server.uri, server.uri)
        self._operator = Operator(folder, broker, server.uri)

    def rows(self) -> Iterator[Row]:
        """Does all of them, one after the other.

        Raises:
            Wrong: one did something else than it must.
            TimeoutError: it took too long.
        """
        for name, do in (
            ("a good version to all", self._good_version),
            ("a bad one fails in the first wave, and is aborted", self._bad_version),
            ("one crashes in the second wave, and is aborted", self._crash),
            ("the console is killed, and another continues", self._killed_console),
            (f"broker and registry are killed for {AWAY_S:.0f} s", self._bad_day),
        ):
            before, began_s = len(self._server.log_text()), time.monotonic()
            do()
            seconds = self._requests(before)
            yield Row(
                name=name,
                requests=sum(seconds.values()),
                peak=max(seconds.values(), default=0),
                took_s=time.monotonic() - began_s,
            )

    def _good_version(self) -> None:
        version = self._publish()
        self._expect(self._operator.rollout(MODEL, str(version), *HOW, "5s", timeout_s=_LIMIT_S), 0)
        self._all_run(version)

    def _bad_version(self) -> None:
        before = self._alias()
        published = publish_broken(
            self._bad,
            expect_lisbon,
            self._folder / "bad",
            registry_uri=self._server.uri,
            name=SAMPLE,
            alias=None,
        )
        self._halts_and_is_aborted(published.version, before, wave=1, says="gate_failed")

    def _crash(self) -> None:
        """A device of the second wave takes the version, and its runner dies of three prompts.

        All of them while that wave is watched: so long, even on a slow machine. The first wave is watched as long.
        """
        before, version = self._alias(), self._publish()
        victim = self._ordered(version)[1]
        with self._operator.running(MODEL, str(version), *HOW, "180s") as console:
            wait_until(lambda: self._runs(victim) == version, _LIMIT_S, f"version {version} on {victim}")
            self._crash_runner(victim)
            if console.process.wait(_LIMIT_S) != 1:
                raise Wrong(f"the console ended otherwise: {console.log_text()[-2_000:]}")
        self._is_halted(version, before, wave=2, says="runner_crashed")

    def _killed_console(self) -> None:
        version = self._publish()
        with self._operator.running(MODEL, str(version), *HOW, "10s") as console:
            _wait_for_soaking(console, wave=2)
            console.kill()
        self._expect(self._operator.rollout("resume", MODEL, timeout_s=_LIMIT_S), 0)
        self._all_run(version)

    def _bad_day(self) -> None:
        version = self._publish()
        with self._operator.running(MODEL, str(version), *HOW, "20s") as console:
            _wait_for_soaking(console, wave=1)
            self._broker.kill()
            time.sleep(AWAY_S)
            self._broker.start()
            _wait_for_soaking(console, wave=3)
            self._server.kill()
            wait_until(lambda: "the alias has not moved yet" in console.log_text(), _LIMIT_S, "the end")
            time.sleep(AWAY_S)
            self._server.start()
            if console.process.wait(_LIMIT_S) != 0:
                raise Wrong(f"the console ended otherwise: {console.log_text()[-2_000:]}")
        self._all_run(version)

    def _halts_and_is_aborted(self, version: int, before: int, *, wave: int, says: str) -> None:
        self._expect(self._operator.rollout(MODEL, str(version), *HOW, "5s", timeout_s=_LIMIT_S), 1)
        self._is_halted(version, before, wave=wave, says=says)

    def _is_halted(self, version: int, before: int, *, wave: int, says: str) -> None:
        """It is halted for this reason, nobody outside its waves was told, and all are brought back."""
        status = self._operator.status()
        if (status["state"], status["wave"]) != ("halted", wave) or says not in status["reason"]:
            raise Wrong(f"not halted in wave {wave} with {says}: {status}")
        ordered = self._ordered(version)
        inside = max(1, -(-len(ordered) * SHARES[wave - 1] // 100))
        if told := [name for name in ordered[inside:] if self._told(name) == version]:
            raise Wrong(f"told though they are in no wave so far: {told}")
        self._expect(self._operator.rollout("abort", MODEL, timeout_s=_LIMIT_S), 0)
        self._all_run(before)

    def _crash_runner(self, name: str) -> None:
        """An answer may end before its runner is killed; that one is no prompt that the runner died of."""
        died_of = 0
        with connected(self._broker, device=name) as client:
            for number in range(_CRASHES_TRIED):
                correlation = client.send(chat(f"Count to {number}.", stream=True, **LONG))
                wait_until(partial(_has_begun, client, correlation), 120, "a beginning")
                for runner in self._daemons[name].runners():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(runner.pid, signal.SIGSEGV)
                died_of += client.answer(correlation).status == 500
                if died_of == MAX_CRASHES:
                    return
        raise Wrong(f"the runner of {name} died of {died_of} prompts out of {_CRASHES_TRIED}")

    def _publish(self) -> int:
        """One more good version, under no alias."""
        return publish_folder(self._good, name=SAMPLE, registry_uri=self._server.uri).version

    def _alias(self) -> int:
        return int(self._mlflow.get_model_version_by_alias(SAMPLE, "prod").version)

    def _runs(self, name: str) -> int | None:
        model = self._daemons[name].status()["models"][0]
        return model["version"] if model["state"] in ("ready", "idle") else None

    def _all_run(self, version: int) -> None:
        wait_until(
            lambda: all(self._runs(name) == version for name in self._daemons), _LIMIT_S, f"version {version}"
        )
        if self._alias() != version:
            raise Wrong(f"the alias names {self._alias()}, not {version}")
        if told := [name for name in self._daemons if self._told(name) is not None]:
            raise Wrong(f"still told what to run: {told}")

    def _told(self, name: str) -> int | None:
        """What the broker retains for a device."""
        topic = f"edge/v1/{name}/model/desired"
        with connected(self._broker, device="onlooker") as client:
            client.subscribe(topic)
            client.subscribe(f"edge/v1/{name}/status")
            client.wait_on(f"edge/v1/{name}/status")
            found = [message.payload for message in client.messages if message.topic == topic]
        entry = json.loads(found[-1])["models"].get(MODEL) if found and found[-1] else None
        return int(entry["version"]) if entry else None

    def _ordered(self, version: int) -> list[str]:
        return sorted(
            self._daemons,
            key=lambda name: hashlib.sha256(f"{name}\n{MODEL}\n{version}".encode()).hexdigest(),
        )

    def _expect(self, done: subprocess.CompletedProcess[str], code: int) -> None:
        if done.returncode != code:
            raise Wrong(
                f"{done.args[5:]} ended with {done.returncode}: {done.stdout[-2_000:]}{done.stderr[-500:]}"
            )


def _wait_for_soaking(console: Child, *, wave: int) -> None:
    """A console says each change in its log; who asks for the state from time to time may miss one."""
    said = f"soaking, wave {wave} of {len(SHARES)} "
    wait_until(lambda: said in console.log_text() or not console.running, _LIMIT_S, said)
    if said not in console.log_text():
        raise Wrong(f"the console ended before {said}: {console.log_text()[-2_000:]}")


def _has_begun(client: Client, correlation: bytes) -> bool:
    return bool(client.chunks(correlation) or client.answers(correlation))
