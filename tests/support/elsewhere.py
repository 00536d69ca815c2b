"""Python programs that run where no agent is installed around them: what MLflow alone does with a package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import clean_environment

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
    answer |= {"stream": "".join(deltas), "last": last}
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
