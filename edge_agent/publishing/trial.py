"""A trial of the package before it leaves this machine.

Checks that the package loads and answers, through plain `mlflow.pyfunc` or as devices load it, and that its golden
prompts get the expected answers. It runs in the publisher's process, which has already imported all libraries.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.errors import PublishError
from edge_agent.package.mlmodel import GOLDEN_TOKENS

Ask = Callable[[Mapping[str, Any], int], str]
"""(messages or prompt, most new tokens) → the answer's text."""

EXAMPLE_TOKENS = 16


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
) -> None:
    """Loads the package and asks it the example and the golden prompts.

    Raises:
        PublishError: it does not load, does not answer, or answers a golden prompt wrongly.
    """
    calm_libraries()
    try:
        ask = _through_mlflow(folder) if flavor == "onnx" else _as_on_a_device(folder)
        ask(example, EXAMPLE_TOKENS)
        answers = [ask(_input(entry), entry.get("max_tokens", GOLDEN_TOKENS)) for entry in golden]
    except Exception as error:  # the library may raise anything
        text = " ".join(str(error).split())[:600]
        raise PublishError(f"the model cannot answer: {type(error).__name__}: {text}") from error
    del ask
    gc.collect()  # its weights are not needed for the upload
    for number, (entry, answer) in enumerate(zip(golden, answers, strict=True), 1):
        if not re.search(entry["expect"], answer):
            raise PublishError(
                f"golden prompt {number} expects {entry['expect']!r} and the model answers {answer[:200]!r}"
            )


def _input(entry: Mapping[str, Any]) -> dict[str, Any]:
    key = "messages" if "messages" in entry else "prompt"
    return {key: entry[key]}


def _through_mlflow(folder: Path) -> Ask:
    """Asks through plain MLflow, as an MLflow server does."""
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(folder))

    def ask(row: Mapping[str, Any], max_tokens: int) -> str:
        params = {"max_tokens": max_tokens, "temperature": 0.0}
        if set(row) <= set(model.metadata.get_input_schema().input_names()):
            answer = model.predict(dict(row), params=params)
        else:  # the signature lacks this form; devices also call the wrapper directly
            answer = model.unwrap_python_model().predict(None, dict(row), params)
        return answer if isinstance(answer, str) else str(answer[0]["choices"][0]["message"]["content"])

    return ask


def _as_on_a_device(folder: Path) -> Ask:
    """Asks as a device does: MLflow's pyfunc of the transformers flavor cannot decode greedily."""
    from edge_agent.runner import loader

    model = loader.load(folder, context_tokens=1 << 20, max_tokens=0, threads=0)

    def ask(row: Mapping[str, Any], max_tokens: int) -> str:
        return model.ask({**row, "max_tokens": max_tokens, "temperature": 0.0})[0]

    return ask
