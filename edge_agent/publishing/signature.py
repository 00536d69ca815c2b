"""The MLflow signatures: inputs and outputs of the chat form (llm/v1/chat) and the prompt form.

MLflow drops what a signature does not declare, with a line in its log. So every field of a request is an optional
input, and options are params, too: docs/adr/0001-request-options-as-mlflow-params.md.
This module imports MLflow, so import it only where a model is saved.
"""

from __future__ import annotations

from mlflow.models import ModelSignature
from mlflow.types import DataType
from mlflow.types.schema import AnyType, Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema

_STRING, _LONG, _DOUBLE = DataType.string, DataType.long, DataType.double

TAKEN = (
    *(
        "top_p",
        "top_k",
        "repetition_penalty",
        "seed",
        "response_format",
        "max_completion_tokens",
        "model",
        "id",
    ),
    *("user", "stream_options", "logprobs", "frequency_penalty", "presence_penalty"),
    *("tools", "tool_choice", "parallel_tool_calls"),
)
"""What the wrapper takes beside the inputs of the chat form."""
REFUSED = (
    *("reply_to", "deadline_ms"),
    *(
        "functions",
        "function_call",
        "logit_bias",
        "top_logprobs",
        "reasoning_effort",
        "min_p",
    ),
)
"""Fields that would change an answer, and that the wrapper does not know: it has to see them to refuse them."""


def model_signature(kind: str) -> ModelSignature:
    """The signature of a `chat` or a `prompt` package with the agent's wrapper."""
    declared = _chat(_message_with_tools()) if kind == "chat" else seed_signature(kind)
    given = {column.name for column in declared.inputs}
    options = [column for column in _chat_options() if column.name not in given]
    # The wrapper checks them better than MLflow, which takes no null for a number.
    anything = [ColSpec(AnyType(), name, required=False) for name in (*TAKEN, *REFUSED)]
    inputs = Schema([*declared.inputs, *options, *anything])
    return ModelSignature(inputs=inputs, outputs=declared.outputs, params=_params())


def seed_signature(kind: str) -> ModelSignature:
    """The bare form: MLflow's transformers flavor would pass each other input and param to the library."""
    if kind == "chat":
        return _chat(_message())
    return ModelSignature(inputs=Schema([ColSpec(_STRING, "prompt")]), outputs=Schema([ColSpec(_STRING)]))


def _chat(message: Object) -> ModelSignature:
    inputs = Schema([ColSpec(Array(message), "messages"), *_chat_options()])
    return ModelSignature(inputs=inputs, outputs=_chat_outputs(message))


def _params() -> ParamSchema:
    """Every option of a request; None, an empty list and the form `text` mean not given."""
    # Of any type: of a text MLflow makes a series to check it, even of the default, so each load would import pandas.
    form = Object(
        [Property(name, AnyType(), required=False) for name in ("type", "json_schema", "schema", "regex")]
    )
    return ParamSchema(
        [
            ParamSpec("temperature", _DOUBLE, None),
            ParamSpec("max_tokens", _LONG, None),
            ParamSpec("stop", _STRING, [], shape=(-1,)),
            ParamSpec("top_p", _DOUBLE, None),
            ParamSpec("top_k", _LONG, None),
            ParamSpec("repetition_penalty", _DOUBLE, None),
            ParamSpec("seed", _LONG, None),
            ParamSpec("response_format", form, {"type": "text"}),
        ]
    )


def _chat_options() -> list[ColSpec]:
    return [
        ColSpec(_DOUBLE, "temperature", required=False),
        ColSpec(_LONG, "max_tokens", required=False),
        ColSpec(Array(_STRING), "stop", required=False),
        ColSpec(_LONG, "n", required=False),
        ColSpec(DataType.boolean, "stream", required=False),
    ]


def _chat_outputs(message: Object) -> Schema:
    choice = Object(
        [Property("index", _LONG), Property("finish_reason", _STRING), Property("message", message)]
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


def _message() -> Object:
    return Object(
        [
            Property("role", _STRING),
            Property("content", _STRING),
            Property("name", _STRING, required=False),
        ]
    )


def _message_with_tools() -> Object:
    """Beside calls there need be no text."""
    return Object(
        [
            Property("role", _STRING),
            *(Property(name, _STRING, required=False) for name in ("content", "name", "tool_call_id")),
            Property("tool_calls", AnyType(), required=False),
        ]
    )
