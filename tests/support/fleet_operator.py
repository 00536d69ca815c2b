"""An operator: one settings file with a broker and a registry, and `edge-agent fleet rollout …` as a process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.mosquitto import Broker
from tests.support.processes import Child, clean_environment, to_toml, wait_until

MODEL = "assistant"
"""The model's name in the settings of the devices."""


class Operator:
    """
    Args:
        folder: for the settings file and the logs of commands.
    """

    def __init__(self, folder: Path, broker: Broker, registry_uri: str, *, prefix: str = "edge") -> None:
        self.file = folder / "operator.toml"
        self._folder = folder
        self._count = 0
        settings = {
            "mqtt": {"host": broker.host, "port": broker.port, "prefix": prefix},
            "registry": {"uri": registry_uri},
        }
        self.file.write_text(to_toml(settings))

    def rollout(self, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            self._command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=clean_environment({"HOME": str(self._folder)}),
            check=False,
        )

    def status(self) -> dict[str, Any]:
        """`rollout status --json`; empty while there is none."""
        done = self.rollout("status", MODEL, "--json")
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Child]:
        """A command that goes on while the block runs; killed at its end."""
        self._count += 1
        child = Child(
            self._command(*arguments),
            self._folder / f"console-{self._count}.log",
            {"HOME": str(self._folder)},
        )
        try:
            yield child
        finally:
            child.kill()

    def wait_for(self, **fields: Any) -> dict[str, Any]:
        """Waits until the status has these values, and gives it."""

        def reached() -> dict[str, Any]:
            found = self.status()
            return found if fields.items() <= found.items() else {}

        return wait_until(reached, 240, f"a rollout with {fields}")

    def _command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "edge_agent",
            "--config",
            str(self.file),
            "fleet",
            "rollout",
            *arguments,
        ]
