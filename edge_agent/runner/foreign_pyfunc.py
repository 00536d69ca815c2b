"""MLflow pyfuncs that this agent did not make: any language model with a chat or a prompt signature.

Owns the translation between such a package and the runner's stream. What the package may return is open: a
string, a completion object, a list or a table with one of them; and, where it has `predict_stream`, pieces of
these. Options reach it as far as its signature declares them; stop strings are applied here.

    document → the signature's inputs and params → `predict` or `predict_stream` in a thread → text → stop → End
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_agent.errors import BadRequest, ModelFailed, RunnerError
from edge_agent.runner.model import OPTIONS, End, Model, refuse_tools
from edge_agent.runner.stop import StopFilter
from edge_agent.runner.worker import Job, Worker

USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_TEXT_KEYS = (
    "content",
    "text",
    "generated_text",
    "response",
    "answer",
    "output",
    "prediction",
    "predictions",
)
_MAX_NESTING = 8
_REMEDY = "this agent serves language models: messages (llm/v1/chat), or one text"


@dataclass(kw_only=True)
class Piece:
    """What was found in a result, or in one item of a stream.

    Attributes:
        text: of the answer.
        finish_reason: empty where nothing was said.
        usage: token counts, empty where the package does not count.
    """

    text: str = ""
    finish_reason: str = ""
    usage: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """How a package wants to be asked.

    Attributes:
        form: `chat` or `prompt`.
        text_input: name of the prompt's input, None when it has none.
        inputs, params: names that the package takes.
        objects: those of the params that are objects.
    """

    form: str
    text_input: str | None
    inputs: frozenset[str]
    params: frozenset[str]
    objects: frozenset[str] = frozenset()


def signature_of(metadata: Any) -> Signature:
    """Reads a package's signature.

    Args:
        metadata: MLflow's `Model`.

    Raises:
        RunnerError: it is none of a language model; the reason names what it is.
    """
    schema = metadata.get_input_schema()
    if schema is None:
        raise RunnerError("the model has no signature", remedy=_REMEDY)
    params_schema = metadata.get_params_schema()
    declared = params_schema.params if params_schema else []
    params = frozenset(param.name for param in declared)
    objects = frozenset(param.name for param in declared if hasattr(param.dtype, "properties"))
    columns = [] if schema.is_tensor_spec() else list(schema.inputs)
    names = {str(column.name) for column in columns if column.name is not None}
    text = _text_column(columns)
    if "messages" in names or text is not None:
        return Signature(
            form="chat" if "messages" in names else "prompt",
            text_input=None if text is None else text.name,
            inputs=frozenset(names),
            params=params,
            objects=objects,
        )
    shown = ", ".join(str(column) for column in schema.inputs)[:200]
    raise RunnerError(f"the model's inputs are those of no language model ({shown})", remedy=_REMEDY)


def _text_column(columns: Sequence[Any]) -> Any:
    """The column that takes the prompt: the only one, or `prompt` where all others are optional; else None."""
    if len(columns) > 1:
        columns = [column for column in columns if column.required or column.name == "prompt"]
        if [column.name for column in columns] != ["prompt"]:
            return None
    return next((column for column in columns if str(column.type) == "DataType.string"), None)


class ForeignModel(Model):
    """One loaded package; one prompt at a time.

    Args:
        pyfunc: what `mlflow.pyfunc.load_model` gave.
        streams: whether it has a `predict_stream`.
    """

    def __init__(self, pyfunc: Any, *, flavor: str, signature: Signature, streams: bool, golden: Any) -> None:
        self.flavor = flavor
        self.signature = signature.form
        self.golden = golden
        self._pyfunc = pyfunc
        self._wants = signature
        self._streams = streams
        self._worker = Worker()

    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """See `Model.stream`.

        Raises:
            BadRequest: the package's signature has no place for what is asked.
            ModelFailed: what the package returned is no answer.
        """
        refuse_tools(document, "this package has code of its own, which nothing holds to a tool's schema")
        data, params = self._inputs(document), self._params(document)
        stop = document.get("stop") or ()
        stops = StopFilter([stop] if isinstance(stop, str) else stop)

        def predict(job: Job) -> None:
            if not self._streams:
                job.put(self._pyfunc.predict(data, params=params))
                return
            items = self._pyfunc.predict_stream(data, params=params)
            try:
                for item in items:
                    job.put(item)
            finally:
                items.close()

        finish_reason, usage = "", dict.fromkeys(USAGE, 0)
        items = self._worker.stream(predict)
        try:
            for item in items:
                if item is None:
                    yield ""
                    continue
                piece = piece_of(item)
                usage |= piece.usage
                finish_reason = piece.finish_reason or finish_reason
                yield stops.push(piece.text)
                if stops.found:
                    break
        finally:
            items.close()
        if rest := stops.flush():
            yield rest
        yield End(finish_reason="stop" if stops.found else finish_reason or "stop", usage=usage)

    def _inputs(self, document: Mapping[str, Any]) -> Any:
        """What `predict` gets: the form that the signature has, and the options among its inputs."""
        wants = self._wants
        options = {name: document[name] for name in OPTIONS if name in document and name in wants.inputs}
        if wants.form == "prompt":
            text = _as_prompt(document)
            return [text] if wants.text_input is None else {wants.text_input: text, **options}
        if "messages" not in document:
            raise BadRequest("this model takes messages, not a prompt")
        return {"messages": document["messages"], **options}

    def _params(self, document: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the signature declares as params. An answer's form is refused where it would be dropped."""
        wants = self._wants
        if "response_format" in document and "response_format" not in wants.params | wants.inputs:
            raise BadRequest("this model's signature has no response_format")
        given = {name: document[name] for name in OPTIONS if name in document and name in wants.params}
        if isinstance(shape := given.get("response_format"), dict) and "response_format" not in wants.objects:
            given["response_format"] = json.dumps(shape)  # most of MLflow's params are scalars and lists
        return given or None


def piece_of(value: Any, nesting: int = 0) -> Piece:
    """Finds the text in whatever a package returned.

    Raises:
        ModelFailed: there is none, or there are several.
    """
    if isinstance(value, str):
        return Piece(text=value)
    if nesting > _MAX_NESTING:
        raise ModelFailed("the model's answer is nested too deeply")
    value = _plain(value)
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ModelFailed(f"the model gave {len(value)} answers to one prompt")
        return piece_of(value[0], nesting + 1)
    if isinstance(value, Mapping):
        return _piece_of_object(value, nesting)
    raise ModelFailed(f"the model answered with {type(value).__name__}, not with text")


def _piece_of_object(value: Mapping[str, Any], nesting: int) -> Piece:
    choices = _plain(value.get("choices"))
    if isinstance(choices, list | tuple) and choices:
        piece = _piece_of_choice(_plain(choices[0]), nesting)
    elif value.keys() & {"choices", "usage", "finish_reason"}:
        text = value.get("text", value.get("content"))
        piece = Piece(text=text if isinstance(text, str) else "")
    else:
        keys = [key for key in _TEXT_KEYS if key in value] or list(value)
        if not keys or (len(keys) > 1 and keys[0] not in _TEXT_KEYS):
            raise ModelFailed(f"the model answered with an object of {len(value)} fields and no text")
        return piece_of(value[keys[0]], nesting + 1)
    if isinstance(reason := value.get("finish_reason"), str):
        piece.finish_reason = reason
    piece.usage = _usage(_plain(value.get("usage")))
    return piece


def _piece_of_choice(choice: Any, nesting: int) -> Piece:
    """One choice of a completion, or of a chunk of one."""
    if not isinstance(choice, Mapping):
        raise ModelFailed("the model's choices are no objects")
    message = next((_plain(choice[key]) for key in ("delta", "message") if choice.get(key) is not None), None)
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    reason = choice.get("finish_reason")
    return Piece(
        text="" if text is None else piece_of(text, nesting + 1).text,
        finish_reason=reason if isinstance(reason, str) else "",
    )


def _usage(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        return {}
    counts = {key: value.get(key) for key in (*USAGE, "cached_tokens")}
    return {key: int(n) for key, n in counts.items() if isinstance(n, int | float) and 0 <= n < 1 << 31}


def _plain(value: Any) -> Any:
    """Tables, columns, arrays and MLflow's own classes as lists and mappings."""
    if hasattr(value, "columns") and hasattr(value, "to_dict"):
        return value.to_dict(orient="records")
    for method in ("model_dump", "to_dict", "tolist"):
        if not isinstance(value, Mapping | list | tuple | str) and hasattr(value, method):
            if method == "to_dict" and hasattr(value, "tolist"):
                continue  # a column: its index is no answer
            return getattr(value, method)()
    return value


def _as_prompt(document: Mapping[str, Any]) -> str:
    """The text for a model that takes a prompt: as it stands, or a chat's only message.

    Raises:
        BadRequest: a chat of several messages: nobody knows this model's chat template.
    """
    if "prompt" in document:
        return str(document["prompt"])
    messages = document["messages"]
    if len(messages) != 1:
        raise BadRequest("this model takes one text: send it a prompt, or a single message")
    return str(messages[0]["content"])
