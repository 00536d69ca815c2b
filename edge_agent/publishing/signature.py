"""The MLflow signatures: inputs and outputs of the chat form (llm/v1/chat) and the prompt form; options are params.

docs/adr/0001-request-options-as-mlflow-params.md says why options that the two forms lack are params.
This module imports MLflow, so import it only where a model is saved.
"""

from __future__ import annotations

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types import DataType
from mlflow.types.schema import Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema

_STRING, _LONG, _DOUBLE = DataType.string, DataType.long, DataType.double


def model_signature(kind: str) -> ModelSignature:
    """The signature of a `chat` or a `prompt` package."""
    if kind == "chat":
        return ModelSignature(inputs=_chat_inputs(), outputs=_chat_outputs(), params=_params())
    return ModelSignature(
        inputs=Schema([ColSpec(_STRING, "prompt")]), outputs=Schema([ColSpec(_STRING)]), params=_params()
    )


def seed_signature(kind: str) -> ModelSignature:
    """The same without params: MLflow's transformers flavor would pass each of them to the library."""
    declared = model_signature(kind)
    return ModelSignature(inputs=declared.inputs, outputs=declared.outputs)


def _params() -> ParamSchema:
    """Every option of a request; None or an empty list means not given."""
    return ParamSchema(
        [
            ParamSpec("temperature", _DOUBLE, None),
            ParamSpec("max_tokens", _LONG, None),
            ParamSpec("stop", _STRING, [], shape=(-1,)),
            ParamSpec("top_p", _DOUBLE, None),
            ParamSpec("top_k", _LONG, None),
            ParamSpec("repetition_penalty", _DOUBLE, None),
            ParamSpec("seed", _LONG, None),
            ParamSpec("response_format", _STRING, None),
        ]
    )


def _chat_inputs() -> Schema:
    return Schema(
        [
            ColSpec(Array(_message()), "messages"),
            ColSpec(_DOUBLE, "temperature", required=False),
            ColSpec(_LONG, "max_tokens", required=False),
            ColSpec(Array(_STRING), "stop", required=False),
            ColSpec(_LONG, "n", required=False),
            ColSpec(DataType.boolean, "stream", required=False),
        ]
    )


def _chat_outputs() -> Schema:
    choice = Object(
        [Property("index", _LONG), Property("finish_reason", _STRING), Property("message", _message())]
    )
    usage = Object(
        [
            Property("prompt_tokens", _LONG),
            Property("completion_tokens", _LONG),
            Property("total_tokens", _LONG),
        ]
    )
    return Schema(
        [
            ColSpec(_STRING, "id"),
            ColSpec(_STRING, "object"),
            ColSpec(_LONG, "created"),
            ColSpec(_STRING, "model"),
            ColSpec(Array(choice), "choices"),
            ColSpec(usage, "usage"),
        ]
    )


def _message() -> Any:
    return Object(
        [
            Property("role", _STRING),
            Property("content", _STRING),
            Property("name", _STRING, required=False),
        ]
    )
