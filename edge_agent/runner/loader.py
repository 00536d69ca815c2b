"""Loads an MLflow model for a runner and gives it one shape: `Model.stream`.

Imported by the runner only: it brings MLflow and, through the package's wrapper, onnxruntime-genai.
Flow: `mlflow.pyfunc.load_model` → which signature, whose wrapper → `stream(document)` → deltas and one `End`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import onnxruntime_genai  # noqa: F401 - before the runner stops trusting bytecode

from edge_agent.errors import RunnerError

PARAMS = ("temperature", "max_tokens", "stop", "top_p", "top_k", "seed", "response_format")
"""Request options that reach a package as MLflow params when its signature declares them."""


@dataclass(frozen=True, kw_only=True)
class End:
    """The last item of a stream."""

    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float] = field(default_factory=dict)


class Model:
    """One loaded package.

    Attributes:
        flavor: what runs it, with its library's version, for status.
        signature: `chat` or `prompt`.
    """

    def __init__(self, pyfunc: Any, *, flavor: str, signature: str) -> None:
        self._pyfunc = pyfunc
        self._wrapper = pyfunc.unwrap_python_model()
        self.flavor = flavor
        self.signature = signature

    @property
    def golden(self) -> Any:
        """The package's golden prompts as they stand in its metadata; None when it has none."""
        return (self._pyfunc.metadata.metadata or {}).get("edge_agent.golden")

    def ask(self, document: dict[str, Any]) -> tuple[str, int]:
        """Answers one document whole: (text, completion tokens)."""
        texts: list[str] = []
        for item in self.stream(document):
            if isinstance(item, End):
                return "".join(texts), item.usage.get("completion_tokens", 0)
            texts.append(item)
        raise RunnerError("the model's stream ended without usage and finish_reason")

    def warm_up(self) -> None:
        """Generates one token, so that the first prompt does not pay for what the library does only once."""
        document = (
            {"messages": [{"role": "user", "content": "Hi"}]}
            if self.signature == "chat"
            else {"prompt": "Hi"}
        )
        for _ in self.stream({**document, "max_tokens": 1}):
            pass

    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """Text deltas (empty ones are chances to stop), then one `End`.

        Closing the iterator stops the generation.
        """
        key = "messages" if "messages" in document else "prompt"
        params = {name: _param(document[name]) for name in PARAMS if name in document}
        if key == ("messages" if self.signature == "chat" else "prompt"):
            items = self._pyfunc.predict_stream({key: document[key]}, params=params)
        else:
            # MLflow's schema admits one form only; the wrapper itself answers both.
            items = self._wrapper.predict_stream(None, {key: document[key]}, params)
        try:
            for item in items:
                yield item if isinstance(item, str) else _end(item)
        finally:
            items.close()


def load(folder: Path, *, context_tokens: int, max_tokens: int, threads: int) -> Model:
    """Loads the package in `folder`.

    Args:
        context_tokens: prompt and answer together, at most.
        max_tokens: of an answer, when a request names none.
        threads: for one operation; 0 leaves it to the library.

    Raises:
        RunnerError: its signature is none that this agent serves.
        Exception: whatever MLflow, the wrapper or the library raises; the runner reports it.
    """
    config = {
        "context_tokens": context_tokens,
        "max_tokens": max_tokens,
        **({"threads": threads} if threads else {}),
    }
    pyfunc = mlflow.pyfunc.load_model(str(folder), model_config=config)
    return Model(pyfunc, flavor=_flavor(), signature=_signature(pyfunc))


def _flavor() -> str:
    return f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}"


def _signature(pyfunc: Any) -> str:
    schema = pyfunc.metadata.get_input_schema()
    names = set(schema.input_names()) if schema is not None else set()
    if "messages" in names:
        return "chat"
    if names == {"prompt"}:
        return "prompt"
    raise RunnerError(
        f"the model's signature has the inputs {sorted(map(str, names))}",
        remedy="this agent serves language models: messages (llm/v1/chat) or prompt",
    )


def _param(value: Any) -> Any:
    """MLflow's params are scalars and lists: an object travels as JSON."""
    return json.dumps(value) if isinstance(value, dict) else value


def _end(item: Any) -> End:
    return End(
        finish_reason=item["finish_reason"], usage=dict(item["usage"]), timings=dict(item.get("timings", {}))
    )
