"""What the agent costs while nobody asks it anything: memory, processor time and wake-ups.

    python -m tests.benchmarks.idle [--side NAME=PYTHON]… [--starts 3] [--minutes 10]

A real mosquitto and a real MLflow server; a daemon with the sample model, its runner, and the OpenAI interface. A side
is an interpreter in which an edge-agent is installed, by default this one: two sides are measured beside each other, in
one run and at the same time. A development environment has libraries that a device has not, so an interpreter with
`.ci/locks/device.txt` and nothing else tells more.

Memory: the median of all starts, a while after the start. RSS is what `edge-agent bench` and the goals mean. PSS shares
out the pages that several processes have, and USS leaves them out.

Processor and wake-ups: of the last start, over the whole time, from /proc/PID/task/*/{schedstat,status}; a wake-up is a
voluntary context switch. `core` is a share of one core. Polls of the registry are in it, with the processes that make
them. Threads are named as the agent names them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.demo import SAMPLE_MODEL
from edge_agent.publishing import publish_folder
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import Broker, running_broker
from tests.support.processes import Child, Daemon, free_port, is_healthy, serving, short_folder
from tests.support.sample_device import SAMPLE, settings_for, wait_for_state

SETTLED_S = 20.0
"""After a start: the first check of the registry is over, and what it took is given back."""
MEMORY = ("Rss", "Pss", "Uss")
POLL_INTERVAL_S = 300


@dataclass(frozen=True, kw_only=True)
class Device:
    """One side's processes."""

    daemon: Daemon
    gateway: Child

    @property
    def pids(self) -> dict[str, int]:
        return {
            "daemon": self.daemon.pid,
            "runner": self.daemon.runners()[0].pid,
            "gateway": self.gateway.pid,
        }


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a thread has used since its start."""

    cpu_s: float
    wakeups: int


@contextmanager
def running_device(name: str, python: str, broker: Broker, server: Server) -> Iterator[Device]:
    """A daemon that is ready, and its gateway, from outside of any source tree."""
    port = free_port()
    with short_folder() as folder, ExitStack() as stack:
        config = settings_for(
            broker,
            server.uri,
            device=name,
            registry={"poll_interval_s": POLL_INTERVAL_S},
            http={"listen": f"127.0.0.1:{port}", "socket": str(folder / "http.sock")},
        )
        daemon = Daemon(folder, config, before=("env", "-C", str(folder)))
        daemon.python = python
        stack.callback(daemon.close)
        daemon.start()
        wait_for_state(daemon, "ready")
        command = [*daemon.before, python, "-m", "edge_agent", "--config", str(daemon.config_file), "serve"]
        gateway = stack.enter_context(
            serving(
                command,
                folder / "gateway.log",
                ready=lambda: is_healthy(port, "/healthz"),
                what="the gateway",
            )
        )
        yield Device(daemon=daemon, gateway=gateway)


def memory_mb(pid: int) -> dict[str, float]:
    """Source: proc(5), smaps_rollup; MB are 10^6 bytes."""
    found: dict[str, float] = defaultdict(float)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        found[key] = int(value.split()[0]) * 1024 / 1e6
    return {"Rss": found["Rss"], "Pss": found["Pss"], "Uss": found["Private_Clean"] + found["Private_Dirty"]}


def spent_by(pid: int) -> dict[str, Spent]:
    """By thread. Those that have ended since are missing, and count in `whole_cpu_s` only."""
    found: dict[str, Spent] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            name = "main" if task.name == str(pid) else (task / "comm").read_text().strip()
            cpu_ns = int((task / "schedstat").read_text().split()[0])
            status = (task / "status").read_text()
            wakeups = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
            found[f"{name} {task.name}"] = Spent(cpu_s=cpu_ns / 1e9, wakeups=wakeups)
    return found


def whole_cpu_s(pid: int) -> float:
    """Of a process with all threads and all children that it has waited for. Source: proc(5), stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measure_memory(sides: dict[str, str], broker: Broker, server: Server, starts: int) -> None:
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for _ in range(starts):
        for name, python in sides.items():
            with running_device(name, python, broker, server) as device:
                time.sleep(SETTLED_S)
                for process, pid in device.pids.items():
                    found[process, name].append(memory_mb(pid))
    print(
        f"\n{'memory [MB], median of ' + str(starts):40}" + "".join(f"{kind.upper():>8}" for kind in MEMORY)
    )
    for (process, name), each in sorted(found.items()):
        figures = (statistics.median(one[kind] for one in each) for kind in MEMORY)
        print(f"{process + ', ' + name:40}" + "".join(f"{figure:8.1f}" for figure in figures), flush=True)


def measure_idle(sides: dict[str, str], broker: Broker, server: Server, seconds: float) -> None:
    with ExitStack() as stack:
        devices = {
            name: stack.enter_context(running_device(name, python, broker, server))
            for name, python in sides.items()
        }
        time.sleep(SETTLED_S)
        pids = {(process, name): pid for name, each in devices.items() for process, pid in each.pids.items()}
        threads = {key: spent_by(pid) for key, pid in pids.items()}
        whole = {key: whole_cpu_s(pid) for key, pid in pids.items()}
        time.sleep(seconds)
        print(f"\n{f'idle for {seconds:.0f} s':40}{'core':>9}{'ms/min':>9}{'wake-ups/s':>12}")
        for key, pid in sorted(pids.items()):
            _report_process(
                ", ".join(key), threads[key], spent_by(pid), whole_cpu_s(pid) - whole[key], seconds
            )


def _report_process(
    name: str, before: dict[str, Spent], after: dict[str, Spent], whole_s: float, seconds: float
) -> None:
    rows = []
    for thread, spent in after.items():
        earlier = before.get(thread, Spent(cpu_s=0, wakeups=0))
        rows.append((spent.wakeups - earlier.wakeups, spent.cpu_s - earlier.cpu_s, thread.rpartition(" ")[0]))
    _row(name, whole_s, sum(row[0] for row in rows), seconds)
    for wakeups, cpu_s, thread in sorted(rows, reverse=True):
        if wakeups:
            _row(f"    {thread}", cpu_s, wakeups, seconds)


def _row(name: str, cpu_s: float, wakeups: int, seconds: float) -> None:
    figures = f"{cpu_s / seconds:9.3%}{cpu_s * 1000 * 60 / seconds:9.1f}{wakeups / seconds:12.2f}"
    print(f"{name:40}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", action="append", metavar="NAME=PYTHON", default=[])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    sides = dict(side.split("=", 1) for side in arguments.side) or {"this": sys.executable}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "registry").mkdir()
        with running_broker(folder) as broker, running_mlflow_server(folder / "registry") as server:
            publish_folder(SAMPLE_MODEL, name=SAMPLE, registry_uri=server.uri, alias="prod")
            if arguments.starts:
                measure_memory(sides, broker, server, arguments.starts)
            if arguments.minutes:
                measure_idle(sides, broker, server, arguments.minutes * 60)


if __name__ == "__main__":
    main()
