"""Python programs that run where no agent is installed around them: what MLflow alone does with a package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.processes import clean_environment


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
