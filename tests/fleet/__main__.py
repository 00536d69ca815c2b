"""Twelve real daemons, one mosquitto and one `mlflow server` on PostgreSQL: `python -m tests.fleet --help`.

Each step does to all of them what an operator, or a bad day, does; waits until each device has what it should have; and
prints the requests that the registry got meanwhile, the most of them in one second, and the time that it took. A
step fails, and the exit code is 1, where a device has not arrived in time, or the registry gets more than `MOST_PER_S`
in a second. The daemons start as services do, as those of a fleet would. Called by `./build.sh fleet-test`: ten
minutes, and twelve more for the rollouts (`rollouts.py`), which are all that `--rollouts` does.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from edge_agent.publishing import publish_folder
from edge_agent.updates.polls import JITTER
from tests.fleet.rollouts import Rollouts, Wrong
from tests.support.client import Client, connected
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import Broker, running_broker
from tests.support.postgres import running_postgres
from tests.support.processes import Daemon, short_folder
from tests.support.sample_device import SAMPLE, settings_for

MOST_PER_S = 20
ROOT = Path(__file__).parents[2]
VERSIONS = (ROOT / "edge_agent" / "demo" / "sample_model", ROOT / "tests" / "models" / "swapped")
AWAY_S = 50.0
SLOW_MACHINE_S = 120.0
"""More than any step's limit: the server starts, and twelve models load, beside whatever else this machine does."""
AS_A_SERVICE = ("sh", "-c", 'SYSTEMD_EXEC_PID=$$ exec "$@"', "sh")
"""Source: systemd.exec(5)."""
_REQUEST = re.compile(r'^(\S+ \S+) INFO: .* "[A-Z]+ /api/', re.MULTILINE)


class NotInTime(Exception):
    """A device has not arrived."""


@dataclass(frozen=True)
class Step:
    """What is done to all, and what comes of it.

    Attributes:
        arrived: whether a device has what it should have.
        limit_s: in which each must have it on a machine that does nothing else.
    """

    name: str
    do: Callable[[], None]
    arrived: Callable[[Daemon], bool]
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one step came to.

    Attributes:
        requests: of the registry's API, artifacts included.
        peak: the most of them in one second.
        first_s, last_s: when the first and the last device had arrived.
    """

    step: str
    requests: int
    peak: int
    first_s: float
    last_s: float

    def __str__(self) -> str:
        return f"| {self.step} | {self.requests} | {self.peak} | {self.first_s:.0f} | {self.last_s:.0f} |"


class Fleet:
    """The devices, and what they share."""

    def __init__(
        self, daemons: Sequence[Daemon], server: Server, broker: Broker, client: Client, interval_s: float
    ) -> None:
        self.daemons = daemons
        self.server = server
        self.broker = broker
        self.client = client
        self.interval_s = interval_s
        self._mlflow = MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)

    def steps(self) -> Iterator[Step]:
        interval_s, checked = self.interval_s * JITTER[1], self._checked
        first = b'{"models": {"assistant": {"version": 1}}}'
        back = b'{"models": {"assistant": null}, "within_s": 20}'
        yield Step("start together, nothing cached", self._start, runs(1), 240)
        yield Step("start together, with a model", self._restart, checked, 90 + interval_s)
        yield Step("alias moved", lambda: self._alias(2), runs(2), 60 + interval_s)
        yield Step("ctl/sync", lambda: self._sync(b""), checked, 30)
        yield Step("ctl/sync within 20 s", lambda: self._sync(b'{"within_s": 20}'), checked, 50)
        yield Step("model/desired", lambda: self._desire(first), runs(1), 60)
        yield Step("model/desired within 20 s", lambda: self._desire(back), runs(2), 80)
        yield Step(
            f"alias moved, registry killed for {AWAY_S:.0f} s", self._kill_registry, runs(1), 90 + interval_s
        )
        yield Step(f"broker killed for {AWAY_S:.0f} s", self._kill_broker, connected_again, 150)

    def run(self, step: Step) -> Row:
        """
        Raises:
            NotInTime: a device has not arrived in time.
        """
        before, began_s, self._began_at = len(self.server.log_text()), time.monotonic(), time.time()
        step.do()
        arrivals: dict[str, float] = {}
        while len(arrivals) < len(self.daemons):
            for daemon in self.daemons:
                name = str(daemon.config["device_id"])
                if name not in arrivals and step.arrived(daemon):
                    arrivals[name] = time.monotonic() - began_s
            if time.monotonic() - began_s > step.limit_s + SLOW_MACHINE_S:
                late = {str(daemon.config["device_id"]): daemon for daemon in self.daemons}
                name, daemon = next((name, daemon) for name, daemon in late.items() if name not in arrivals)
                raise NotInTime(
                    f"{step.name}: {len(late) - len(arrivals)} are late; {name}: {daemon.log[-3_000:]}"
                )
            time.sleep(0.25)
        seconds = Counter(_REQUEST.findall(self.server.log_text()[before:]))
        return Row(
            step=step.name,
            requests=sum(seconds.values()),
            peak=max(seconds.values(), default=0),
            first_s=min(arrivals.values()),
            last_s=max(arrivals.values()),
        )

    def _checked(self, daemon: Daemon) -> bool:
        """It has asked the registry since the step began."""
        status = daemon.status() if daemon.control_socket.exists() else {}
        return bool((status.get("registry", {}).get("last_check") or 0) > self._began_at)

    def _start(self) -> None:
        for daemon in self.daemons:
            daemon.start(ready=False)

    def _restart(self) -> None:
        for daemon in self.daemons:
            daemon.child.process.terminate()
        for daemon in self.daemons:
            daemon.stop()
        self._began_at = time.time()
        self._start()

    def _alias(self, version: int) -> None:
        self._mlflow.set_registered_model_alias(SAMPLE, "prod", str(version))

    def _sync(self, payload: bytes) -> None:
        for daemon in self.daemons:
            self.client.publish(f"edge/v1/{daemon.config['device_id']}/ctl/sync", payload)

    def _desire(self, payload: bytes) -> None:
        for daemon in self.daemons:
            topic = f"edge/v1/{daemon.config['device_id']}/model/desired"
            self.client.publish(topic, payload, retain=True)

    def _kill_registry(self) -> None:
        self._alias(1)
        self.server.kill()
        time.sleep(AWAY_S)
        self.server.start()

    def _kill_broker(self) -> None:
        self.broker.kill()
        time.sleep(AWAY_S)
        self.broker.start()


def runs(version: int) -> Callable[[Daemon], bool]:
    def arrived(daemon: Daemon) -> bool:
        if not daemon.control_socket.exists():
            return False
        model = daemon.status()["models"][0]
        return (model["version"], model["state"]) == (version, "ready")

    return arrived


def connected_again(daemon: Daemon) -> bool:
    return bool(daemon.status()["broker"]["connected"])


@contextlib.contextmanager
def fleet(count: int, interval_s: float) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        folder, data = stack.enter_context(short_folder()), stack.enter_context(short_folder())
        for part in ("mlflow", "broker"):
            (folder / part).mkdir()
        backend = stack.enter_context(running_postgres(data))
        server = stack.enter_context(running_mlflow_server(folder / "mlflow", backend=backend, workers=2))
        broker = stack.enter_context(running_broker(folder / "broker", persistence=True))
        for model in VERSIONS:
            publish_folder(model, name=SAMPLE, registry_uri=server.uri)
        MlflowClient(server.uri, server.uri).set_registered_model_alias(SAMPLE, "prod", "1")
        daemons = []
        for number in range(count):
            name = f"device-{number}"
            settings = settings_for(broker, server.uri, device=name, registry={"poll_interval_s": interval_s})
            place = folder / str(number)
            place.mkdir()
            daemon = Daemon(place, settings, before=AS_A_SERVICE)
            stack.callback(daemon.close)
            daemons.append(daemon)
        client = stack.enter_context(connected(broker, device="console"))
        yield Fleet(daemons, server, broker, client, interval_s)


def main() -> int:
    options = _options()
    failed = False
    with fleet(options.devices, options.interval) as made:
        print("| step | requests | most in a second | first device after s | last device after s |")
        print("|---|---|---|---|---|", flush=True)
        steps = list(made.steps())
        for step in steps[:1] if options.rollouts else steps:
            try:
                row = made.run(step)
            except NotInTime as error:
                print(f"FAIL {error}", flush=True)
                failed = True
                continue
            print(row, flush=True)
            if row.peak > MOST_PER_S:
                print(f"FAIL {step.name}: more than {MOST_PER_S} requests in a second", flush=True)
                failed = True
        failed |= not roll_out(made)
    return 1 if failed else 0


def roll_out(made: Fleet) -> bool:
    """What an operator does with waves, as a process. True if it all went as it must."""
    rollouts = Rollouts(
        made.server.folder,
        daemons=made.daemons,
        server=made.server,
        broker=made.broker,
        good=VERSIONS[1],
        bad=VERSIONS[0],
        requests=lambda before: Counter(_REQUEST.findall(made.server.log_text()[before:])),
    )
    try:
        for row in rollouts.rows():
            print(row, flush=True)
    except (Wrong, TimeoutError) as error:
        print(f"FAIL {error}", flush=True)
        return False
    return True


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=12)
    parser.add_argument("--interval", type=float, default=60.0, help="registry.poll_interval_s")
    parser.add_argument("--rollouts", action="store_true", help="only start the devices, and roll out")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
