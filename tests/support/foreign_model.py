"""Language models as other people write them: models-from-code, one behaviour for each `kind` of the config.

No weights: each says what it was asked. Logged by the tests with MLflow alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import mlflow
import pandas as pd

SLOW_S = 30.0
FINISHED = "FOREIGN_FINISHED"


def completion(text: str, key: str = "message") -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "foreign",
        "choices": [
            {"index": 0, key: {"role": "assistant", "content": text}, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def asked(model_input: Any) -> str:
    """What it was asked, in whatever form MLflow hands it over."""
    if isinstance(model_input, pd.DataFrame):
        model_input = model_input.to_dict(orient="records")
    if isinstance(model_input, list):
        model_input = model_input[0]
    if isinstance(model_input, str):
        return model_input
    if "messages" in model_input:
        options = {key: value for key, value in sorted(model_input.items()) if key != "messages"}
        return f"{model_input['messages'][-1]['content']} {options}"
    return str(next(iter(model_input.values())))


class Foreign(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
        text = f"heard {asked(model_input)} {params or ''}".strip()
        answers: dict[str, Any] = {
            "text": text,
            "list": [text],
            "table": pd.DataFrame({"answer": [text]}),
            "column": pd.Series([text], index=[7]),
            "object": {"generated_text": text},
            "objects": [{"generated_text": text}],
            "completion": completion(text),
            "completions": [completion(text)],
            "number": [0.5],
            "several": [text, text],
            "nothing": [],
            "fields": {"label": "cat", "score": "high"},
        }
        if self.kind == "slow":
            threading.Event().wait(SLOW_S)
            os.environ[FINISHED] = "yes"
        if self.kind == "raises":
            raise ValueError("a reason with the prompt in it")
        return answers[self.kind]


class Streaming(Foreign):
    def predict_stream(self, context: Any, model_input: Any, params: Any = None) -> Iterator[Any]:
        words = ["heard ", asked(model_input), " and", " more"]
        if self.kind == "chunks":
            for word in words:
                yield completion(word, "delta") | {"usage": None}
            yield {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}
        elif self.kind == "own":
            yield from words
            yield {"finish_reason": "length", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        else:
            yield from words


kind = str(mlflow.models.ModelConfig(development_config={"kind": "text"}).get("kind"))
streams = kind in ("words", "chunks", "own")
mlflow.models.set_model(Streaming(kind) if streams else Foreign(kind))
