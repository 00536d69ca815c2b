"""A trial of the package before it leaves this machine.

Checks that the package loads and answers, through plain `mlflow.pyfunc` or as devices load it, that its golden
prompts get the expected answers, and which conversations it takes (`prompting.py`). It runs in the publisher's
process, which has already imported all libraries.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import BadRequest, PromptTooLong, PublishError
from edge_agent.package import genai_options
from edge_agent.package.mlmodel import GOLDEN_TOKENS
from edge_agent.publishing import prompting
from edge_agent.runner import bounds

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
) -> list[str]:
    """Loads the package and asks it the example, the golden prompts, and what its chat template has to take.

    Returns:
        What limits it, one sentence each; see `prompting`.

    Raises:
        PublishError: it does not load, does not answer, or answers a golden prompt wrongly.
    """
    calm_libraries()
    try:
        with bounds.panics_caught():
            model = _through_mlflow(folder) if flavor == "onnx" else _as_on_a_device(folder)
            model.ask(example, EXAMPLE_TOKENS)
            answers = [model.ask(_input(entry), entry.get("max_tokens", GOLDEN_TOKENS)) for entry in golden]
            limits = prompting.of_template(model.count, chat="messages" in example)
    except PublishError:
        raise
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
    return limits


def compare_ends(source: Path) -> list[str]:
    """Says if a model builder's folder and its tokenizer do not agree on what ends an answer; see `prompting`."""
    from edge_agent.wrapper.genai_pyfunc import TokenizerFiles

    model = json.loads((source / genai_options.FILE_NAME).read_bytes()).get("model", {})
    files = TokenizerFiles.read(source / model.get("tokenizer_dir", ""))
    return prompting.of_end_tokens(model.get("eos_token_id"), files.end_ids)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """The package, loaded."""

    ask: Ask
    count: prompting.Count


def _input(entry: Mapping[str, Any]) -> dict[str, Any]:
    key = "messages" if "messages" in entry else "prompt"
    return {key: entry[key]}


def _through_mlflow(folder: Path) -> _Loaded:
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

    def count(messages: prompting.Messages) -> int:
        *_, last = model.unwrap_python_model().predict_stream(None, {"messages": messages}, {"max_tokens": 1})
        return int(last["usage"]["prompt_tokens"])

    return _Loaded(ask=ask, count=_counting(count))


def _as_on_a_device(folder: Path) -> _Loaded:
    """Asks as a device does: MLflow's pyfunc of the transformers flavor cannot decode greedily."""
    from edge_agent.runner import loader

    model = loader.load(folder, context_tokens=1 << 20, max_tokens=0, threads=0)

    def ask(row: Mapping[str, Any], max_tokens: int) -> str:
        return model.ask({**row, "max_tokens": max_tokens, "temperature": 0.0})[0]

    def count(messages: prompting.Messages) -> int:
        *_, end = model.stream({"messages": list(messages), "max_tokens": 1})
        return end.usage["prompt_tokens"] if isinstance(end, loader.End) else 0

    return _Loaded(ask=ask, count=_counting(count))


def _counting(prompt_tokens: prompting.Count) -> prompting.Count:
    """The same, with the refusals that `Count` has: the wrapper's and the runner's are told by their code."""

    def count(messages: prompting.Messages) -> int:
        try:
            return prompt_tokens(messages)
        except Exception as error:
            code = getattr(error, "code", "")
            if code == PromptTooLong.code:
                return 0
            if code == BadRequest.code:
                raise BadRequest(str(error).removeprefix(f"{code}: ")) from error
            raise

    return count
