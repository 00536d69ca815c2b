"""What many devices cost: their polls of one MLflow server, and an operator's look at all of them.

    python -m tests.benchmarks.fleet [--devices 1000] [--workers 2] [--only polls|status]

Polls: as MLflow's client asks and as the agent does, in one run. The server is a real `mlflow server` on PostgreSQL, on
this machine. What a poll of an unchanged version asks for is recorded from a real sync, once with MLflow's client for
everything and once as it is, and so is the CPU time of that sync's process. Then the polls of all devices, each on a
connection of its own, are asked at once, by `--at-once` threads. The two ways take turns, `--rounds` times. Prints
medians.

Status: a real mosquitto with TLS and the rules of docs/broker.md, word for word. Each device connects with a
certificate of its own and retains its status and its report, a few of them rubbish; then `edge-agent fleet status` runs
as a process with the operator's certificate, `--rounds` times. Prints the median from its start to its end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from edge_agent.sync import process as sync_process
from edge_agent.sync.protocol import SyncJob
from tests.support import scripted_fleet as simulated
from tests.support.device import Device
from tests.support.documented_broker import Application, documented_broker, tls_settings
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.postgres import running_postgres
from tests.support.processes import short_folder, to_toml

_LIMIT_S = 600
_CPU_RUNS = 5
_GET = re.compile(r'"GET (\S+) HTTP')
AS_IT_IS = "from edge_agent.sync import child"
BY_MLFLOW = f"""{AS_IT_IS}, bring
from edge_agent.sync.registry import plain
plain.knows_how_to_ask = lambda uri: False
bring.already_here = lambda job, version: None"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an unchanged version is found out.

    Attributes:
        paths: what one poll asks for, in order.
        cpu_s: of the sync's process.
    """

    name: str
    paths: tuple[str, ...]
    cpu_s: float


def recorded(name: str, program: str, job: SyncJob, server: Server) -> Way:
    """A real poll, several times."""
    seconds = []
    for _ in range(_CPU_RUNS):
        before_bytes = len(server.log_text())
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{program}\nsys.argv = ['sync']\nsys.exit(child.main())"],
            input=job.encode(),
            env=sync_process.child_environment(),
            capture_output=True,
            timeout=_LIMIT_S,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        last = json.loads(done.stdout.splitlines()[-1])
        assert (last["event"], last["new"]) == ("done", False), last
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    paths = tuple(_GET.findall(server.log_text()[before_bytes:]))
    assert paths, "the server logged no request"
    return Way(name=name, paths=paths, cpu_s=statistics.median(seconds))


def drain(way: Way, server: Server, *, devices: int, at_once: int) -> float:
    """All devices poll at once. Returns the seconds until the last one has its answers."""
    failures: list[str] = []
    lock = threading.Lock()

    def poll(_: int) -> None:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=_LIMIT_S)
        try:
            for path in way.paths:
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    with lock:
                        failures.append(f"{answer.status} for {path}")
        finally:
            connection.close()

    began_s = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(poll, range(devices)))
    assert not failures, failures[:3]
    return time.monotonic() - began_s


def measure(server: Server, device: Device, options: argparse.Namespace) -> None:
    device.publish()
    job = replace(device.job(timeout_s=60), check_host=True)
    job = replace(job, running=device.sync(job).key)
    ways = (
        recorded("MLflow's client", BY_MLFLOW, job, server),
        recorded("one plain request", AS_IT_IS, job, server),
    )
    took: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            took[way.name].append(drain(way, server, devices=options.devices, at_once=options.at_once))
    show(ways, took, options.devices)


def show(ways: Sequence[Way], took: dict[str, list[float]], devices: int) -> None:
    print(f"| way | requests | CPU of the device | polls/s of one server | {devices} at once |")
    print("|---|---|---|---|---|")
    rates = []
    for way in ways:
        seconds = statistics.median(took[way.name])
        rates.append(devices / seconds)
        print(f"| {way.name} | {len(way.paths)} | {way.cpu_s:.2f} s | {rates[-1]:.1f} | {seconds:.1f} s |")
    print(f"polls/s: {rates[1] / rates[0]:.1f} times as many")


def measure_status(count: int, rounds: int) -> None:
    """`edge-agent fleet status`, in a terminal's form and as JSON."""
    with documented_broker() as (broker, authority), short_folder() as folder:
        for number in range(count):
            documents = simulated.device(f"dev-{number:05}", "ready" if number % 20 else "offline")
            with Application(broker, authority, f"dev-{number:05}") as one:
                for topic, body in documents.items():
                    one.publish(topic, b"rubbish" if number % 100 == 99 else body, retain=True)
        operators = {
            "mqtt": {
                "host": broker.host,
                "port": broker.port,
                **tls_settings(authority, authority.client("console")),
            }
        }
        (folder / "operator.toml").write_text(to_toml(operators))
        command = [
            sys.executable,
            "-m",
            "edge_agent",
            "--config",
            str(folder / "operator.toml"),
            "fleet",
            "status",
        ]
        print(f"| `fleet status` of {count} devices | seconds |")
        print("|---|---|")
        for arguments in ([], ["--json"]):
            seconds = []
            for _ in range(rounds):
                began_s = time.monotonic()
                done = subprocess.run(
                    [*command, *arguments], capture_output=True, check=True, timeout=_LIMIT_S
                )
                seconds.append(time.monotonic() - began_s)
            if arguments:
                assert len(json.loads(done.stdout)["devices"]) == count
            print(f"| {' '.join(arguments) or 'for people'} | {statistics.median(seconds):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("devices", 1_000), ("workers", 2), ("rounds", 3), ("at-once", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("polls", "status"))
    options = parser.parse_args()
    if options.only != "polls":
        measure_status(options.devices, options.rounds)
    if options.only != "status":
        measure_polls(options)


def measure_polls(options: argparse.Namespace) -> None:
    with (
        short_folder() as folder,
        short_folder() as data,
        running_postgres(data) as backend,
        running_mlflow_server(folder, backend=backend, workers=options.workers) as server,
    ):
        measure(server, Device(server.uri, folder / "device"), options)


if __name__ == "__main__":
    main()
