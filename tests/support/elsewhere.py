"""Python programs that run where no agent is installed around them: what MLflow alone does with a package."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.processes import clean_environment, free_port, is_healthy, serving

_START_TIMEOUT_S = 120
_PREDICT = """
import importlib.abc, json, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "edge_agent":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
try:
    import edge_agent
except ModuleNotFoundError:
    pass
else:
    sys.exit("edge_agent can be imported")
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
row = json.loads(sys.argv[2])
answer = {"whole": model.predict(row)}
if sys.argv[3] == "stream":
    *deltas, last = model.predict_stream(row)
    texts = [item if isinstance(item, str) else item["choices"][0]["delta"]["content"] for item in deltas]
    answer |= {"stream": "".join(texts), "last": last}
print("\\n" + json.dumps(answer), end="")
"""


def run_elsewhere(*arguments: str, folder: Path, timeout_s: float = 300) -> str:
    """Runs this Python with `folder` as its home and working directory, with nothing of this process's environment
    that matters and no model hub; gives what it printed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=folder,
        env=clean_environment({"HOME": str(folder), "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def ask_elsewhere(package: Path, row: Any, *, folder: Path, stream: bool = True) -> dict[str, Any]:
    """Loads a package where no agent is installed and asks it once.

    Returns:
        `whole`, what `predict` gave; with `stream`, its deltas in one string and its `last` item, too.
    """
    folder.mkdir(exist_ok=True)
    how = "stream" if stream else "whole"
    printed = run_elsewhere("-c", _PREDICT, str(package), json.dumps(row), how, folder=folder)
    answer: dict[str, Any] = json.loads(printed.rpartition("\n")[2])
    return answer


class ScoringServer:
    """`mlflow models serve` with a package, on a free loopback port.

    Args:
        config: overrides of the package's `model_config`.
    """

    def __init__(self, package: Path, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._port = free_port()
        self._log = folder / "serve.log"
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        uvicorn = programs / "uvicorn"  # MLflow looks for it on the PATH, and any Python's may be there
        uvicorn.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uvicorn "$@"\n')
        uvicorn.chmod(0o755)
        self._environment = {
            "HOME": str(folder),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "ORT_DISABLE_TELEMETRY": "1",
            "SERVING_MODEL_CONFIG": json.dumps(dict(config or {})),
        }
        self._command = [
            *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(package)),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"),
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[ScoringServer]:
        with serving(
            self._command,
            self._log,
            ready=lambda: is_healthy(self._port, "/ping"),
            what="mlflow models serve",
            env=self._environment,
            timeout_s=_START_TIMEOUT_S,
        ):
            yield self

    def post(self, document: Mapping[str, Any]) -> tuple[int, Any]:
        """Asks `/invocations`: the status, and what came back."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            body = json.dumps(document).encode()
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()
