"""A device that serves the sample model: its settings, its state, and a second one with the same cache."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.brokers import ContractBroker
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, short_folder, wait_until

SAMPLE = "sample"


def settings_for(
    broker: ContractBroker | Broker, registry_uri: str, *, device: str = "dev", **more: Any
) -> dict[str, Any]:
    """Settings of a device that serves the sample model."""
    settings: dict[str, Any] = {
        "device_id": device,
        "registry": {"uri": registry_uri, "poll_interval_s": 3600},
        "models": {"assistant": {"uri": f"models:/{SAMPLE}@prod"}},
        "mqtt": {"host": broker.host, "port": broker.port},
    }
    for section, values in more.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    return settings


def wait_for_state(daemon: Daemon, state: str, timeout_s: float = 180) -> None:
    def reached() -> bool:
        status = daemon.status()
        return bool(status["state"] == state and status["broker"]["connected"])

    try:
        wait_until(reached, timeout_s, f"state {state}")
    except TimeoutError as error:
        raise AssertionError(f"{error}; status {daemon.status()}; log:\n{daemon.log}") from error


def copy_cache(source: Daemon, state_dir: Path) -> None:
    """Gives another device the models that one has pulled already."""
    shutil.copytree(source.state_dir, state_dir, ignore=shutil.ignore_patterns("journal*", "*.sock", "*.tmp"))


@contextlib.contextmanager
def running_device(source: Daemon, config: dict[str, Any], *, ready: bool = True) -> Iterator[Daemon]:
    """A daemon with the models of `source` and no registry; with `ready`, once it answers."""
    with short_folder() as folder:
        copy_cache(source, folder / "state")
        with running_daemon(config, folder=folder) as daemon:
            if ready:
                wait_for_state(daemon, "ready")
            yield daemon
