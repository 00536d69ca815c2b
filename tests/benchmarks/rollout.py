"""What moving many devices to another version costs: an alias that moves under their polls, and a rollout in waves.

    python -m tests.benchmarks.rollout [--devices 1000] [--interval 60]

A real mosquitto, a real `mlflow server` on PostgreSQL, and devices that are simulated: each retains a real status and
report, asks the registry the one request of a poll, at its interval and at its place within `within_s`, and reports the
version that it got. The rollout is `edge-agent fleet rollout` as a process. Prints, for each, how many requests there
were, the most of them in a second, and how long it took until every device knew.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import http.client
import itertools
import json
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow import MlflowClient
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.fleet.rollout import desired
from edge_agent.updates.polls import JITTER
from tests.support import scripted_fleet as simulated
from tests.support.client import connected
from tests.support.fleet_operator import MODEL, Operator
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import Broker, running_broker
from tests.support.postgres import running_postgres
from tests.support.processes import short_folder, wait_until

NAME = "phi3-mini"
_AT_ONCE = 64
_LIMIT_S = 900
_API = "/api/2.0/mlflow"
_BY_ALIAS = f"{_API}/registered-models/alias?name={NAME}&alias=prod"


class Devices:
    """All of them, in this process: one connection to the broker, and a pool for their requests.

    Attributes:
        runs: version by device.
        asked: requests by the second in which they began.
    """

    def __init__(self, count: int, *, broker: Broker, server: Server, interval_s: float) -> None:
        self.runs = {f"dev-{number:05}": 1 for number in range(count)}
        self.asked: Counter[int] = Counter()
        self._server = server
        self._interval_s = interval_s
        self._told: dict[str, int | None] = {}
        self._due: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._ended = False
        self._mqtt = Paho(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._mqtt.on_message = self._on_message
        self._mqtt.connect(broker.host, broker.port)
        self._mqtt.loop_start()
        for device_id in self.runs:
            for topic, body in simulated.device(device_id, version=1).items():
                self._mqtt.publish(topic, body, qos=1, retain=True)
        self._mqtt.subscribe("edge/v1/+/model/desired", qos=1)

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """They poll, each from a place of its own in the interval on, until the block ends."""
        for device_id in self.runs:
            self._ask_in(random.uniform(0, self._interval_s), device_id)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            working = [pool.submit(self._work) for _ in range(_AT_ONCE)]
            try:
                yield
            finally:
                with self._changed:
                    self._ended = True
                    self._changed.notify_all()
                for each in working:
                    each.result()
        self._mqtt.loop_stop()

    def _ask_in(self, seconds: float, device_id: str) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), device_id))
            self._changed.notify()

    def _work(self) -> None:
        while (device_id := self._next()) is not None:
            told = self._told.get(device_id)
            path = f"{_API}/model-versions/get?name={NAME}&version={told}" if told else _BY_ALIAS
            version = self._get(path)
            if version is not None and version != self.runs[device_id]:
                self.runs[device_id] = version
                topic = simulated.TOPICS.of(device_id).reported
                report = json.dumps(simulated.reported(MODEL, version))
                self._mqtt.publish(topic, report, qos=1, retain=True)
            self._ask_in(self._interval_s * random.uniform(*JITTER), device_id)

    def _next(self) -> str | None:
        """The device that is due next, when it is; None at the end."""
        with self._changed:
            while not self._ended:
                wait_s = self._due[0][0] - time.monotonic() if self._due else 1.0
                if wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(min(wait_s, 1.0))
        return None

    def _get(self, path: str) -> int | None:
        """What the registry says, on a connection of its own as a device's check has; None for an error."""
        with self._changed:
            self.asked[int(time.monotonic())] += 1
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            document = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return int(document["model_version"]["version"]) if answer.status == 200 else None

    def _on_message(self, _client: Paho, _userdata: object, message: Any) -> None:
        device_id, _ = simulated.TOPICS.speaker(message.topic) or ("", "")
        body = bytes(message.payload)
        version = desired.version_in(body, MODEL)
        if device_id in self.runs and self._told.get(device_id) != version:
            self._told[device_id] = version
            within_s = json.loads(body).get("within_s", 0) if body else 0
            self._ask_in(random.uniform(0, within_s), device_id)


def measure(name: str, devices: Devices, do: Callable[[], None], version: int) -> None:
    """Does it, waits until every device runs the version, and prints a row."""
    began_s = time.monotonic()
    do()
    wait_until(lambda: set(devices.runs.values()) == {version}, _LIMIT_S, f"version {version} everywhere")
    took_s = time.monotonic() - began_s
    seconds = {second: count for second, count in devices.asked.items() if second >= int(began_s)}
    print(
        f"| {name} | {sum(seconds.values())} | {max(seconds.values(), default=0)} | {took_s:.0f} |",
        flush=True,
    )


def roll_out(operator: Operator, version: int) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = operator.rollout(
        *(MODEL, str(version), "--waves", "1%,10%,100%", "--soak", "2s"), timeout_s=_LIMIT_S
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"the console took {cpu_s:.1f} s of CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=1_000)
    parser.add_argument("--interval", type=float, default=60.0, help="registry.poll_interval_s")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder, data = stack.enter_context(short_folder()), stack.enter_context(short_folder())
        backend = stack.enter_context(running_postgres(data))
        server = stack.enter_context(running_mlflow_server(folder, backend=backend, workers=2))
        broker = stack.enter_context(running_broker(folder))
        mlflow = MlflowClient(server.uri, server.uri)
        mlflow.create_registered_model(NAME)
        for _ in range(3):
            mlflow.create_model_version(NAME, source="s3://nowhere/model")
        mlflow.set_registered_model_alias(NAME, "prod", "1")
        devices = Devices(options.devices, broker=broker, server=server, interval_s=options.interval)
        operator = Operator(folder, broker, server.uri)
        print("| what | requests | most in a second | all know after s |\n|---|---|---|---|", flush=True)
        with devices.living():
            measure(
                f"alias moved, polls each {options.interval:.0f} s",
                devices,
                lambda: mlflow.set_registered_model_alias(NAME, "prod", "2"),
                2,
            )
            measure("rollout 1%, 10%, 100%", devices, lambda: roll_out(operator, 3), 3)
            print(f"the retained state has {len(state_of(broker))} bytes", flush=True)


def state_of(broker: Broker) -> bytes:
    """The rollout's retained document."""
    topic = simulated.TOPICS.rollout(MODEL)
    with connected(broker, device="onlooker") as client:
        client.subscribe(topic)
        return client.wait_on(topic).payload


if __name__ == "__main__":
    main()
