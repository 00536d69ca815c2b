"""The MLflow model code over onnxruntime-genai: the one Python file of a published package.

It is copied into every package byte for byte, and a device runs it because its sha256 is known: so it is
self-contained (mlflow, onnxruntime-genai, numpy, pandas, standard library) and answers in any MLflow server.

It owns one loaded model and at most one kept generator. It refuses what a request may not ask for, with
`RequestError`. It decides nothing about queues, deadlines or default system prompts.

Flow of a request:
    _rows, _Request  what arrived, checked field by field
    _Prompts         text to token ids; control tokens only where the template or a raw prompt has them
    _budget          prompt and new tokens against the context, before anything is allocated
    _session         the kept generator rewound to the longest common prefix, or a new one
    _generate        prefill in slices, decode; one item out after each slice and each step
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import mlflow
import numpy as np
import onnxruntime_genai as og
import pandas as pd

ARTIFACT = "onnx"
SLICE_TOKENS = 64  # a cancel is seen between two slices; smaller ones prefill slower
ROUND_TOKENS = 256  # a kept generator takes memory in such steps, so that the next prompt fits in, too
DEFAULT_MAX_TOKENS = 256
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_RESPONSE_FORMAT_CHARACTERS = 32_768
ROLES = ("system", "user", "assistant")


class RequestError(ValueError):
    """The request is at fault, not the model; the text starts with the code.

    Attributes:
        code: `bad_request` or `prompt_too_long`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The package's `model_config`; 0 means not given.

    Attributes:
        model: name that a completion carries.
        max_length: cap on prompt and new tokens together.
        max_tokens: new tokens for a request that names none, as far as they fit.
        context_tokens: a smaller context than the model's own, to save memory.
        threads: of one operator.
    """

    model: str = ""
    max_length: int = 0
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    context_tokens: int = 0
    threads: int = 0

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> _Options:
        given = {key: value for key, value in config.items() if value is not None}
        return cls(**{key: value for key, value in given.items() if key in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One request, checked. None means not given."""

    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    guidance: tuple[str, str] | None = None

    CHAT_INPUTS: ClassVar = frozenset({"messages", "temperature", "max_tokens", "stop", "n", "stream"})
    PROMPT_INPUTS: ClassVar = frozenset({"prompt"})
    PARAMS: ClassVar = frozenset(
        {"temperature", "max_tokens", "stop", "top_p", "top_k", "seed", "response_format"}
    )

    @classmethod
    def parse(cls, row: Mapping[str, Any], params: Mapping[str, Any] | None) -> _Request:
        """Checks every field; a field that is absent, None, NaN or an empty list is not given.

        Both forms are read here, whatever the package's signature: MLflow lets only the signature's own
        through, an agent that calls the model itself may send either.

        Args:
            row: the inputs of one form; they are stronger than `params` of the same name.

        Raises:
            RequestError: a field is unknown or invalid; it is named.
        """
        is_chat = "prompt" not in row
        inputs = cls.CHAT_INPUTS if is_chat else cls.PROMPT_INPUTS
        given = {**_known(params or {}, cls.PARAMS), **_known(row, inputs)}
        if _integer(given, "n", 1, 1 << 31) not in (None, 1):
            raise RequestError("bad_request", "n must be 1")
        return cls(
            messages=_messages(given) if is_chat else (),
            prompt=_text(given.get("prompt"), "prompt") if not is_chat else "",
            max_tokens=_integer(given, "max_tokens", 1, 1 << 31),
            temperature=_number(given, "temperature", 0.0, 100.0),
            top_p=_number(given, "top_p", 0.0, 1.0),
            top_k=_integer(given, "top_k", 0, 1 << 31),
            seed=_integer(given, "seed", -(1 << 63), 1 << 63),
            stop=_stops(given),
            guidance=_guidance(given),
        )


@dataclass
class _Session:
    """A generator and the tokens that it has seen; one request at a time owns it."""

    generator: Any
    max_length: int
    reusable: bool
    tokens: list[int] = field(default_factory=list)

    def shared(self, prompt: Sequence[int]) -> int:
        """Length of the longest common prefix that can be gone back to.

        One token less than both have: the last one's logits are needed again, and the last generated token
        was never run.
        """
        count = 0
        for old, new in zip(self.tokens[:-1], prompt[:-1], strict=False):
            if old != new:
                break
            count += 1
        return count

    def rewind(self, count: int) -> None:
        """Goes back to the first `count` tokens."""
        self.generator.rewind_to(count)
        del self.tokens[count:]


class GenaiModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers chat or raw prompts with an ONNX folder made by the onnxruntime-genai model builder."""

    def load_context(self, context: Any) -> None:
        """Opens the model, the tokenizer and the generation defaults."""
        folder = Path(context.artifacts[ARTIFACT])
        self._options = _Options.parse(context.model_config or {})
        described = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        config = og.Config(str(folder))
        if self._options.threads:
            session_options = {"intra_op_num_threads": int(self._options.threads)}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        self._prompts = _Prompts(self._tokenizer, folder)
        self._eos = frozenset(int(token) for token in self._tokenizer.eos_token_ids)
        self._vocabulary = int(described["vocab_size"])
        context_tokens = int(described["context_length"])
        self._context_tokens = min(context_tokens, self._options.context_tokens or context_tokens)
        self._kept: _Session | None = None

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Answers whole.

        Args:
            model_input: a row for each request, with the signature's columns; a dict or a list of dicts, too.
                (MLflow warns about any other type hint: it would infer a signature from it.)
            params: see `_Request.PARAMS`.

        Returns:
            For messages a list with one llm/v1/chat completion for each row; for a prompt the answer's text
            (a list of texts for several rows).

        Raises:
            RequestError: the request is at fault.
        """
        answers: list[Any] = []
        for row in _rows(model_input):
            *deltas, last = self._answer(row, params)
            text = "".join(deltas)
            answers.append(text if "prompt" in row else self._completion(text, last))
        return answers[0] if len(answers) == 1 and isinstance(answers[0], str) else answers

    def predict_stream(
        self, context: Any, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[str | dict[str, Any]]:
        """Answers piece by piece; closing the iterator stops within one slice or one decode step.

        Yields:
            Text deltas (empty between prefill slices and for steps that complete no text), then one dict
            `{finish_reason, usage, timings}`.

        Raises:
            RequestError: the request is at fault; raised before the first item.
        """
        rows = _rows(model_input)
        if len(rows) != 1:
            raise RequestError("bad_request", f"a stream answers one row, not {len(rows)}")
        yield from self._answer(rows[0], params)

    def _answer(self, row: Mapping[str, Any], params: Mapping[str, Any] | None) -> Iterator[Any]:
        started = time.perf_counter()
        request = _Request.parse(row, params)
        prompt = (
            self._prompts.chat(request.messages) if request.messages else self._prompts.raw(request.prompt)
        )
        max_new = self._budget(len(prompt), request.max_tokens)
        session: _Session | None = None
        try:
            session, cached = self._session(request, prompt, max_new)
            yield from self._generate(session, request, prompt, cached, max_new, started)
        except Exception as error:
            session = None  # what the library left in it is unknown
            if refusal := _refusal(error, request):
                raise refusal from error
            raise
        finally:
            if session is not None and session.reusable:
                self._kept = session

    def _budget(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many new tokens a request gets, at least 1."""
        options, limit = self._options, self._context_tokens
        wanted = max_tokens or 1
        if prompt_tokens + wanted > limit:
            parts = f"{prompt_tokens} of the prompt and {wanted} new"
            raise RequestError("prompt_too_long", f"{parts} are more than the context of {limit} tokens")
        if options.max_length:
            limit = min(limit, options.max_length)
        left = limit - prompt_tokens
        if left < 1:
            raise RequestError(
                "prompt_too_long", f"{prompt_tokens} tokens leave nothing of the package's max_length {limit}"
            )
        open_end = left if options.max_length and not options.max_tokens else DEFAULT_MAX_TOKENS
        return min(left, max_tokens or options.max_tokens or open_end)

    def _session(self, request: _Request, prompt: Sequence[int], max_new: int) -> tuple[_Session, int]:
        """A generator for this request, and how many prompt tokens it has already.

        Search options are fixed when a generator is made, and a sampler's state cannot be rewound: only
        greedy generation without a grammar goes on in the kept generator. Taking it out leaves nothing for a
        second thread to share.
        """
        kept, self._kept = self._kept, None
        temperature = self._options.temperature if request.temperature is None else request.temperature
        greedy = temperature == 0
        reusable = greedy and request.guidance is None
        needed = len(prompt) + max_new
        shared = kept.shared(prompt) if kept is not None and reusable else 0
        if kept is not None and shared and needed <= kept.max_length:
            kept.rewind(shared)
            return kept, shared
        kept = None  # frees its memory before the next one takes its own
        room = needed * 2 if shared else needed  # a chat that outgrew its generator will grow on
        rounded = math.ceil(room / ROUND_TOKENS) * ROUND_TOKENS
        max_length = min(self._context_tokens, rounded) if reusable else needed
        search: dict[str, Any] = {"max_length": max_length, "num_beams": 1, "num_return_sequences": 1}
        search["do_sample"] = not greedy
        if self._options.repetition_penalty is not None:
            search["repetition_penalty"] = self._options.repetition_penalty
        if not greedy:
            search |= self._sampling(request, temperature)
        generator_params = og.GeneratorParams(self._model)
        generator_params.set_search_options(**search)
        if request.guidance is not None:
            generator_params.set_guidance(*request.guidance)
        generator = og.Generator(self._model, generator_params)
        return _Session(generator=generator, max_length=max_length, reusable=reusable), 0

    def _sampling(self, request: _Request, temperature: float) -> dict[str, Any]:
        sampling: dict[str, Any] = {"temperature": temperature}
        top_p = self._options.top_p if request.top_p is None else request.top_p
        top_k = self._options.top_k if request.top_k is None else request.top_k
        if top_p is not None:
            sampling["top_p"] = top_p
        if top_k is not None:
            sampling["top_k"] = min(top_k, self._vocabulary)
        if request.seed is not None:
            # The library takes a C int, in which -1 means no seed.
            sampling["random_seed"] = request.seed & 0x7FFF_FFFF
        return sampling

    def _generate(
        self,
        session: _Session,
        request: _Request,
        prompt: Sequence[int],
        cached: int,
        max_new: int,
        started: float,
    ) -> Iterator[Any]:
        generator, decoder = session.generator, _Decoder(self._tokenizer, self._prompts.control_ids)
        stops = _StopFilter(request.stop)
        prefill_started = time.perf_counter()
        for start in range(cached, len(prompt), SLICE_TOKENS):
            part = prompt[start : start + SLICE_TOKENS]
            generator.append_tokens(np.array(part, dtype=np.int32))
            session.tokens += part
            yield ""
        decode_started = time.perf_counter()
        first_token = decode_started
        new_tokens, finish_reason = 0, "length"
        while new_tokens < max_new:
            if generator.is_done():
                finish_reason = "stop"
                break
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if not new_tokens:
                first_token = time.perf_counter()
            if token in self._eos:
                finish_reason = "stop"
                break
            session.tokens.append(token)
            new_tokens += 1
            delta = stops.push(decoder.push(token))
            if stops.found:
                finish_reason = "stop"
                yield delta
                break
            yield delta
        if not stops.found and (rest := stops.flush()):
            yield rest
        ended = time.perf_counter()
        yield {
            "finish_reason": finish_reason,
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": new_tokens,
                "total_tokens": len(prompt) + new_tokens,
                "cached_tokens": cached,
            },
            "timings": {
                "first_token_ms": (first_token - started) * 1000,
                "prefill_ms": (decode_started - prefill_started) * 1000,
                "decode_ms": (ended - decode_started) * 1000,
                "total_ms": (ended - started) * 1000,
            },
        }

    def _completion(self, text: str, last: Mapping[str, Any]) -> dict[str, Any]:
        """The seed's completion object: exactly its fields, so `cached_tokens` stays in the stream."""
        usage = {key: last["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        message = {"role": "assistant", "content": text}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._options.model,
            "choices": [{"index": 0, "message": message, "finish_reason": last["finish_reason"]}],
            "usage": usage,
        }


class _Prompts:
    """Text to token ids.

    A literal control token in a message stays text: a marker (a code point that no text may contain) goes
    behind the first character of each one before the template is rendered, and the parts between markers are
    encoded one by one, so that no part holds a whole control token. The model reads the characters as they
    were sent. A raw prompt is encoded as it stands.
    """

    MARKER = "\ufdd0"
    # Beside what the tokenizer's files list: the usual form of a control token.
    USUAL = r"<\|[^<>|\s]{1,64}\|>"

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer = tokenizer
        added = _added_tokens(folder)
        self.control_ids = frozenset(identifier for identifier, _, special in added if special)
        texts = sorted({text for _, text, special in added if len(text) > 1 and (special or text[0] in "<[")})
        self._control = re.compile(f"(?={'|'.join([*map(re.escape, texts), self.USUAL])})(.)", re.DOTALL)
        self._bos = self._encode("")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """[tokens] ids of the messages in the model's own chat template, ready for the assistant's turn.

        Raises:
            RequestError: the template refuses them.
        """
        safe = [{**message, "content": self._neutral(message["content"])} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(safe), add_generation_prompt=True)
        except RuntimeError as error:
            raise RequestError("bad_request", f"the chat template refuses the messages: {error}") from error
        first, *others = text.split(self.MARKER)
        tokens = self._encode(first)
        for part in others:
            ids = self._encode(part)
            tokens += ids[len(self._bos) :] if ids[: len(self._bos)] == self._bos else ids
        return self._not_empty(tokens, "messages")

    def raw(self, prompt: str) -> list[int]:
        """[tokens] ids of a prompt that brings its own control tokens."""
        return self._not_empty(self._encode(prompt), "prompt")

    def _neutral(self, content: str) -> str:
        return self._control.sub(rf"\1{self.MARKER}", content.replace(self.MARKER, ""))

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    @staticmethod
    def _not_empty(tokens: list[int], what: str) -> list[int]:
        if not tokens:
            raise RequestError("bad_request", f"{what} has no text")
        return tokens


class _Decoder:
    """Token ids of one answer to text; a character that is not complete waits for its other tokens.

    The library's `TokenizerStream` loses the token behind an invalid byte, and its `decode` ends with U+FFFD
    at the first byte that is not (yet) UTF-8, whatever follows. So the ids since the last complete character
    are decoded behind the group before them (some tokenizers strip a sequence's first space); what can no
    longer become a character is U+FFFD as soon as a complete one follows.
    """

    BROKEN = "\ufffd"
    MAX_PENDING = 4  # a character has at most four bytes, and each token at least one

    def __init__(self, tokenizer: Any, control_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._control_ids = control_ids
        self._before: list[int] = []
        self._before_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Text that is complete with this token, often empty."""
        if token in self._control_ids:
            return ""
        self._pending.append(token)
        for start in range(len(self._pending)):
            broken, group = self._pending[:start], self._pending[start:]
            text = self._text(group)
            if not text.endswith(self.BROKEN):
                text = (self._text(broken) if broken else "") + text
                if text:
                    self._before, self._before_text = group, self._decode(group)
                self._pending = []
                return text
        if len(self._pending) > self.MAX_PENDING:
            return self._text([self._pending.pop(0)])
        return ""

    def _text(self, group: list[int]) -> str:
        return self._decode(self._before + group).removeprefix(self._before_text)

    def _decode(self, group: list[int]) -> str:
        return str(self._tokenizer.decode(np.array(group, np.int32)))


class _StopFilter:
    """Holds back what could be the beginning of a stop string, and ends the text before one.

    Attributes:
        found: a stop string came; nothing behind its beginning gets out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is safe to show now."""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        end = len(self._held) - self._possible()
        safe, self._held = self._held[:end], self._held[end:]
        return safe

    def flush(self) -> str:
        """What was held back when the answer ended otherwise."""
        rest, self._held = self._held, ""
        return rest

    def _possible(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def _rows(model_input: Any) -> list[Mapping[str, Any]]:
    rows = model_input.to_dict(orient="records") if hasattr(model_input, "to_dict") else model_input
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise RequestError("bad_request", "the input is not a table, an object or a list of objects")
    return rows


def _known(given: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    if unknown := sorted(str(key) for key in given.keys() - known):
        raise RequestError("bad_request", f"unknown field {', '.join(unknown)}")
    return {key: value for key, value in given.items() if not _absent(value)}


def _absent(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)  # an optional column that another row has
    return value is None or (isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0)


def _messages(given: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    messages = given.get("messages")
    if not isinstance(messages, (list, tuple, np.ndarray)):
        raise RequestError("bad_request", "messages must be a list with at least one message")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise RequestError("bad_request", f"{where} is not an object")
    if unknown := sorted(str(key) for key in message.keys() - {"role", "content", "name"}):
        raise RequestError("bad_request", f"unknown field {', '.join(unknown)} in {where}")
    if message.get("role") not in ROLES:
        raise RequestError("bad_request", f"role of {where} must be one of {', '.join(ROLES)}")
    if message.get("name") is not None:
        _text(message["name"], f"name of {where}")  # checked only: chat templates have no place for it
    return {"role": message["role"], "content": _text(message.get("content"), f"content of {where}")}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RequestError("bad_request", f"{what} must be a string")
    if "\0" in value:
        raise RequestError("bad_request", f"{what} has a NUL character")  # the library cuts the text there
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError("bad_request", f"{what} has a lone surrogate")
    return value


def _integer(given: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise RequestError("bad_request", f"{key} must be an integer")
    if not math.isfinite(value) or value != int(value) or not least <= value <= most:
        raise RequestError("bad_request", f"{key} must be an integer from {least} to {most}")
    return int(value)


def _number(given: Mapping[str, Any], key: str, least: float, most: float) -> float | None:
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise RequestError("bad_request", f"{key} must be a number")
    if not least <= value <= most:
        raise RequestError("bad_request", f"{key} must be from {least:g} to {most:g}")
    return float(value)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop", ())
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple, np.ndarray)) or len(stops) > MAX_STOPS:
        raise RequestError("bad_request", f"stop must be a string or a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                "bad_request", f"each stop must be a string of 1 to {MAX_STOP_CHARACTERS} characters"
            )
    return tuple(stops)


def _guidance(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """`response_format` (an object, or its JSON) to what the library's `set_guidance` takes."""
    value = given.get("response_format")
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if len(value) > MAX_RESPONSE_FORMAT_CHARACTERS:
            raise RequestError(
                "bad_request", f"response_format has more than {MAX_RESPONSE_FORMAT_CHARACTERS} characters"
            )
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError("bad_request", "response_format is not JSON") from error
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "regex" and isinstance(value.get("regex"), str) and value["regex"]:
        return "regex", _text(value["regex"], "regex of response_format")
    if kind == "json_schema":
        nested = value.get("json_schema")
        schema = nested.get("schema") if isinstance(nested, Mapping) else value.get("schema")
        if isinstance(schema, Mapping):
            return "json_schema", json.dumps(schema)
    raise RequestError(
        "bad_request",
        'response_format must be {"type": "json_schema", "json_schema": {"schema": …}} or '
        '{"type": "regex", "regex": …}',
    )


def _refusal(error: Exception, request: _Request) -> RequestError | None:
    """The library tells its faults apart by text only; this finds the ones that the request caused."""
    text = str(error)
    if "exceeds max length" in text or "cannot be greater than model context_length" in text:
        return RequestError("prompt_too_long", text)
    if request.guidance is not None and re.search(r"Error (creating grammar|committing tokens)", text):
        return RequestError("bad_request", f"this model cannot follow response_format: {text[:300]}")
    return None


def _added_tokens(folder: Path) -> list[tuple[int, str, bool]]:
    """(id, text, special) of the tokens that the tokenizer matches before anything else."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return []
    added = json.loads(path.read_text("utf-8")).get("added_tokens", [])
    return [(int(token["id"]), str(token["content"]), bool(token.get("special"))) for token in added]


# Model code is loaded as a top-level module; imported as part of a package, this file only defines.
if "." not in __name__:
    mlflow.models.set_model(GenaiModel())
