"""A real Prometheus that scrapes one address each second."""

from __future__ import annotations

import contextlib
import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.processes import free_port, is_healthy, serving


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    port: int

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        return list(self._get("query", query=expression)["result"])

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes, with the last scrape's error."""
        return list(self._get("targets")["activeTargets"])

    def _get(self, what: str, **fields: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]


@contextlib.contextmanager
def running_prometheus(folder: Path, target: str, *, token_file: Path | None = None) -> Iterator[Prometheus]:
    """One that scrapes `http://{target}/metrics`, from when it answers queries.

    Args:
        token_file: what it sends as Bearer.
    """
    program = shutil.which("prometheus")
    assert program, "./build.sh look-test fetches it"
    job: dict[str, Any] = {"job_name": "edge-agent", "static_configs": [{"targets": [target]}]}
    if token_file:
        job["authorization"] = {"credentials_file": str(token_file)}
    config = folder / "prometheus.yml"  # YAML has JSON in it
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    port = free_port()
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    ready = partial(is_healthy, port, "/-/ready")
    with serving(command, folder / "prometheus.log", ready=ready, what="Prometheus"):
        yield Prometheus(port=port)
