"""A trial's main: `python -m edge_agent.publishing.trial_child SCRATCH`, a question on stdin, the answer on stdout.

    {"folder", "flavor", "example", "golden"}  →  {"limits": […]}  or  {"message", "remedy"}

It builds the walls of a runner around itself, loads the package through plain `mlflow.pyfunc` or as devices load it,
and asks it. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import BadRequest, PromptTooLong, PublishError
from edge_agent.host.confinement import Confinement, confine
from edge_agent.package.mlmodel import GOLDEN_TOKENS
from edge_agent.publishing import prompting
from edge_agent.runner import bounds

Ask = Callable[[Mapping[str, Any], int], str]
"""(messages or prompt, most new tokens) → the answer's text."""

EXAMPLE_TOKENS = 16


def main() -> None:
    """See the module."""
    question = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    folder, scratch = Path(question["folder"]), Path(sys.argv[1])
    confine(Confinement(read=(folder,), write=(scratch,), keep=(answers.fileno(),)))
    answer: dict[str, Any]
    try:
        limits = try_out(folder, question["example"], question["golden"], flavor=question["flavor"])
        answer = {"limits": limits}
    except PublishError as error:
        answer = {"message": error.message, "remedy": error.remedy}
    with answers:
        json.dump(answer, answers)


def try_out(
    folder: Path, example: Mapping[str, Any], golden: Sequence[Mapping[str, Any]], *, flavor: str
) -> list[str]:
    """Loads the package and asks it the example, the golden prompts, and what its chat template has to take.

    Returns:
        What limits it, one sentence each; see `prompting`.

    Raises:
        PublishError: it does not load, does not answer, or answers a golden prompt wrongly.
    """
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
    for number, (entry, answer) in enumerate(zip(golden, answers, strict=True), 1):
        if not re.search(entry["expect"], answer):
            raise PublishError(
                f"golden prompt {number} expects {entry['expect']!r} and the model answers {answer[:200]!r}"
            )
    return limits


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


if __name__ == "__main__":
    main()
