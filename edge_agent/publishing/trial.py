"""A trial of the package before it leaves this machine.

Checks that the package loads and answers, through plain `mlflow.pyfunc` or as devices load it, that its golden
prompts get the expected answers, and which conversations it takes (`prompting.py`). The model came from elsewhere: it
is loaded in a process of its own, behind a runner's walls (`trial_child.py`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.errors import PublishError
from edge_agent.package import genai_options
from edge_agent.publishing import prompting
from edge_agent.runner.process import child_environment
from edge_agent.runner.scratch import scratch_folder

_TIMEOUT_S = 3_600.0
"""A large model on a slow machine, with all its golden prompts."""


def calm_libraries() -> None:
    """Turns off telemetry and access to model hubs. The libraries read these variables when they are imported."""
    os.environ.update(ORT_DISABLE_TELEMETRY="1", MLFLOW_DISABLE_TELEMETRY="true", HF_HUB_OFFLINE="1")


def need_transformers() -> None:
    """Checks for the libraries that the trial of a transformers package needs.

    Raises:
        PublishError: one is missing.
    """
    if missing := [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]:
        raise PublishError(
            f"publishing the transformers flavor needs {' and '.join(missing)} to try the model",
            remedy="install edge-agent[transformers]",
        )


def try_out(
    folder: Path, example: Mapping[str, Any], golden: Sequence[Mapping[str, Any]], *, flavor: str = "onnx"
) -> list[str]:
    """Has the package asked the example, the golden prompts, and what its chat template has to take.

    Returns:
        What limits it, one sentence each; see `prompting`.

    Raises:
        PublishError: it does not load, does not answer, or answers a golden prompt wrongly.
    """
    question = {"folder": str(folder.resolve()), "flavor": flavor, "example": example, "golden": list(golden)}
    with scratch_folder() as scratch:
        if scratch is None:
            raise PublishError("the model cannot be tried: there is no room for temporary files")
        try:
            result = subprocess.run(
                [sys.executable, "-m", "edge_agent.publishing.trial_child", str(scratch)],
                input=json.dumps(question).encode(),
                stdout=subprocess.PIPE,
                timeout=_TIMEOUT_S,
                check=False,
                cwd="/",
                env={**child_environment(scratch), "TMPDIR": str(scratch)},
            )
        except subprocess.TimeoutExpired as error:
            raise PublishError(f"the model's trial took more than {_TIMEOUT_S:.0f} s") from error
    if result.returncode != 0:
        how = f"signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
        raise PublishError(f"the model cannot answer: its trial ended with {how}")
    try:
        answer = json.loads(result.stdout)
        if "limits" in answer:
            return [str(limit) for limit in answer["limits"]]
        message, remedy = str(answer["message"]), str(answer["remedy"])
    except (ValueError, TypeError, KeyError) as error:
        raise PublishError("the model cannot answer: its trial gave no result") from error
    raise PublishError(message, remedy=remedy)


def compare_ends(source: Path) -> list[str]:
    """Says if a model builder's folder and its tokenizer do not agree on what ends an answer; see `prompting`."""
    from edge_agent.wrapper.genai_pyfunc import TokenizerFiles

    model = json.loads((source / genai_options.FILE_NAME).read_bytes()).get("model", {})
    files = TokenizerFiles.read(source / model.get("tokenizer_dir", ""))
    return prompting.of_end_tokens(model.get("eos_token_id"), files.end_ids)
