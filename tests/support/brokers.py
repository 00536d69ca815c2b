"""Brokers of other makers on a free loopback port, as Debian's packages have them, with one face for all.

`./build.sh broker-test` unpacks them into `.tools`; nothing is installed. RabbitMQ's Erlang is started by its own
loader, with a name server (epmd) of its own on a port of its own, so that nothing is left behind and nothing is shared.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Protocol

from tests.support import mosquitto
from tests.support.processes import Child, accepts, free_port, wait_until

_START_TIMEOUT_S = 90
KINDS = ("mosquitto", "rabbitmq", "nats")


class ContractBroker(Protocol):
    """What the tests of the contract need of a broker.

    Attributes:
        kind: one of `KINDS`.
        version: its own.
        version5: it speaks MQTT 5.
        takes_dots: a dot in a topic is a character like others.
        wildcard_retained: a subscription with a wildcard gets retained messages.
    """

    kind: str
    version: str
    version5: bool
    takes_dots: bool
    wildcard_retained: bool

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    def start(self) -> None: ...

    def stop(self) -> None:
        """SIGTERM, and its end."""

    def kill(self) -> None:
        """SIGKILL, and its end."""

    def save(self) -> None:
        """Returns when all that it has acknowledged so far survives `kill`."""


class Mosquitto(mosquitto.Broker):
    """With the persistence that docs/broker.md advises."""

    kind = "mosquitto"
    version5 = takes_dots = wildcard_retained = True

    def __init__(self, folder: Path) -> None:
        self.version = _version_of("mosquitto", "-h")
        port = free_port()
        super().__init__(folder, mosquitto._config(folder, "", True, True, port), port)

    def save(self) -> None:
        """By its signal for that. Source: mosquitto(8), "Signals"."""
        database = self.folder / "mosquitto.db"
        before = _written(database)
        os.kill(self.pid, signal.SIGUSR1)
        wait_until(lambda: _written(database) != before, 60, "mosquitto's database")


class _Program:
    """A broker that is one process with one port."""

    host = "127.0.0.1"
    version5 = takes_dots = False
    wildcard_retained = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._child: Child | None = None

    def _command(self) -> tuple[list[str], dict[str, str]]:
        raise NotImplementedError

    def start(self) -> None:
        """Starts it and waits until it accepts connections."""
        command, env = self._command()
        child = self._child = Child(command, self.folder / "broker.log", env=env)
        wait_until(lambda: not child.running or accepts(self.port), _START_TIMEOUT_S, f"port {self.port}")
        assert child.running, f"{command[0]} ended:\n{child.log_text()[-4000:]}"

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop(60)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def save(self) -> None:
        """What it acknowledges is written before."""


class Nats(_Program):
    """With JetStream, which MQTT sessions and retained messages need.

    Every message is on the disk at once, but for those that it acknowledges in the milliseconds after a SIGTERM.
    """

    kind = "nats"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.version = _version_of("nats-server", "--version")
        (folder / "nats.conf").write_text(
            f'server_name: test\nport: {free_port()}\nhost: "127.0.0.1"\n'
            f'jetstream {{ store_dir: "{folder}/store" }}\nmqtt {{ host: "127.0.0.1", port: {self.port} }}\n'
        )

    def _command(self) -> tuple[list[str], dict[str, str]]:
        return [mosquitto.tool("nats-server"), "-c", str(self.folder / "nats.conf")], {}


class RabbitMQ(_Program):
    """With its MQTT plugin, and sessions that last a day."""

    kind = "rabbitmq"
    wildcard_retained = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._epmd: Child | None = None
        self._epmd_port, self._dist_port = free_port(), free_port()
        root = _rabbitmq_root()
        self._erlang = root / "usr" / "lib" / "erlang"
        (self._erts,) = self._erlang.glob("erts-*/bin")
        (self._home,) = root.glob("usr/lib/rabbitmq/lib/rabbitmq_server-*")
        self.version = self._home.name.rpartition("-")[2]
        (folder / "enabled_plugins").write_text("[rabbitmq_mqtt].")
        (folder / "rabbitmq.conf").write_text(
            "\n".join(
                [
                    f"listeners.tcp.default = 127.0.0.1:{free_port()}",
                    f"mqtt.listeners.tcp.default = 127.0.0.1:{self.port}",
                    "mqtt.allow_anonymous = true",
                    "mqtt.default_user = guest",
                    "mqtt.default_pass = guest",
                    "mqtt.subscription_ttl = 86400000",
                ]
            )
        )

    def start(self) -> None:
        env = self._command()[1]
        self._epmd = Child([str(self._erts / "epmd")], self.folder / "epmd.log", env=env)
        wait_until(lambda: accepts(self._epmd_port), 30, "epmd")
        super().start()

    def stop(self) -> None:
        super().stop()
        self._stop_epmd()

    def kill(self) -> None:
        super().kill()
        self._stop_epmd()

    def _stop_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.kill()

    def _command(self) -> tuple[list[str], dict[str, str]]:
        folder = self.folder
        env = {
            "ROOTDIR": str(self._erlang),
            "BINDIR": str(self._erts),
            "EMU": "beam",
            "PROGNAME": "erl",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_LIBS": str(self._home / "plugins"),
            "RABBITMQ_HOME": str(self._home),
            "RABBITMQ_NODENAME": f"t{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_PID_FILE": str(folder / "pid"),
        }
        boot = ["-noshell", "-noinput", "-s", "rabbit", "boot", "-boot", "start_sasl", "+W", "w"]
        kernel = [
            "-syslog", "logger", "[]", "-syslog", "syslog_error_logger", "false",
            "-kernel", "prevent_overlapping_partitions", "false",
            "-kernel", "inet_dist_use_interface", "{127,0,0,1}",
        ]  # fmt: skip
        return [str(self._erts / "erlexec"), "-pa", str(self._home / "ebin"), *boot, *kernel], env


def _rabbitmq_root() -> Path:
    """Where its packages are unpacked: beside the folder that `epmd` was found in, or where a system has them."""
    unpacked = Path(mosquitto.tool("epmd")).parent.parent / "rabbitmq" / "root"
    return unpacked if unpacked.exists() else Path("/")


def _version_of(program: str, option: str) -> str:
    """The first number with dots that it says of itself."""
    said = subprocess.run([mosquitto.tool(program), option], capture_output=True, text=True, check=False)
    (found,) = re.findall(r"\d+\.\d+\.\d+", said.stdout)[:1]
    return str(found)


def _written(file: Path) -> tuple[int, int]:
    """Another one after each time that a file is replaced, even within one tick of the clock."""
    status = file.stat() if file.exists() else None
    return (status.st_ino, status.st_mtime_ns) if status else (0, 0)


def make(kind: str, folder: Path) -> ContractBroker:
    """A broker of one of `KINDS`, not started."""
    classes: dict[str, type[Mosquitto | Nats | RabbitMQ]] = {
        "mosquitto": Mosquitto,
        "nats": Nats,
        "rabbitmq": RabbitMQ,
    }
    return classes[kind](folder)
