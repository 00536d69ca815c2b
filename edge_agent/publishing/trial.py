"""One real answer before a package leaves this machine.

Owns the check that a package loads and answers through plain `mlflow.pyfunc`, and that its golden prompts
get the answers they expect. It runs in the publisher's process, which has imported everything already.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.errors import PublishError

EXAMPLE_TOKENS = 16
GOLDEN_TOKENS = 128
"""For a golden prompt that names none."""


def calm_libraries() -> None:
    """No telemetry and no look at a hub. The libraries read these when they are imported."""
    os.environ.update(ORT_DISABLE_TELEMETRY="1", MLFLOW_DISABLE_TELEMETRY="true", HF_HUB_OFFLINE="1")


def try_out(folder: Path, example: Mapping[str, Any], golden: Sequence[Mapping[str, Any]]) -> None:
    """Loads the package and lets it answer.

    Raises:
        PublishError: it does not load, does not answer, or answers a golden prompt wrongly.
    """
    calm_libraries()
    import mlflow.pyfunc

    try:
        model = mlflow.pyfunc.load_model(str(folder))
        _answer(model, example, EXAMPLE_TOKENS)
        answers = [_answer(model, _input(entry), entry.get("max_tokens", GOLDEN_TOKENS)) for entry in golden]
    except Exception as error:  # the library may raise anything
        text = " ".join(str(error).split())[:600]
        raise PublishError(f"the model cannot answer: {type(error).__name__}: {text}") from error
    del model
    gc.collect()  # its weights are not needed for the upload
    for number, (entry, answer) in enumerate(zip(golden, answers, strict=True), 1):
        if not re.search(entry["expect"], answer):
            raise PublishError(
                f"golden prompt {number} expects {entry['expect']!r} and the model answers {answer[:200]!r}"
            )


def _input(entry: Mapping[str, Any]) -> dict[str, Any]:
    key = "messages" if "messages" in entry else "prompt"
    return {key: entry[key]}


def _answer(model: Any, row: Mapping[str, Any], max_tokens: int) -> str:
    params = {"max_tokens": max_tokens, "temperature": 0.0}
    if set(row) <= set(model.metadata.get_input_schema().input_names()):
        answer = model.predict(dict(row), params=params)
    else:  # a form that the signature does not have: devices ask the wrapper itself, too
        answer = model.unwrap_python_model().predict(None, dict(row), params)
    return answer if isinstance(answer, str) else str(answer[0]["choices"][0]["message"]["content"])
