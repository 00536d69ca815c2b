"""MLflow model code for onnxruntime-genai: the one Python file of a published package.

It is copied into every package byte for byte, and a device runs it because it knows its sha256. So it is
self-contained (mlflow, onnxruntime-genai, numpy, pandas, standard library), and works in any MLflow server.

It owns one loaded model and its generators: those in use, and those kept for later prompts with the same
beginning. It refuses invalid requests with `RequestError`, and those that the library cannot follow with
`GuidanceError`. It knows nothing of queues, deadlines or default system prompts.

Flow of a request:
    _rows, _Request  what arrived, checked field by field
    _Prompts         text to token ids; special tokens only where the template or a raw prompt has them
    _CallForm        how this model is shown tools and writes calls; a grammar holds it to their schemas
    _budget          prompt and new tokens against the context, before anything is allocated
    _Sessions        a kept generator rewound to the longest common prefix, or room for a new one
    _Lane            prefill in slices (small ones of a long prompt beside answers), decode; one step for each `next`

Greedy is greedy: the same request gets the same tokens, whatever was asked before or is asked beside it. So no prompt
token is ever run alone, and no two requests share a generator: both take another path through the arithmetic.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import mlflow
import numpy as np
import onnxruntime_genai as og
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

ARTIFACT = "onnx"
SLICE_TOKENS = 64  # a cancel is seen between two slices; smaller ones prefill slower
LONG_TOKENS = 128  # more to prefill than this is done in smaller slices while others are answered
BESIDE_TOKENS = 8  # of such a slice for each of those answers: it stops them for about two of their tokens
LEAST_TOKENS = 2  # one prompt token alone takes another path through the arithmetic than two or more
ROUND_TOKENS = 256  # a kept generator takes memory in such steps, so that the next prompt fits in, too
COMMON_TOKENS = 16  # a shorter beginning of a chat is not worth another owner's generator
KV_ELEMENT_BYTES = 4  # the model builder's int4 models for the CPU keep keys and values in float32
DEFAULT_MAX_TOKENS = 256
PIECE_CHARACTERS = 4096  # the tokenizer's time grows with the square of a word's length
PIECE_EXTRA_TOKENS = 16  # a text has at most so many fewer than its pieces, for each of them
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_RESPONSE_FORMAT_CHARACTERS = 32_768
MAX_ITEMS = 10_000  # minItems and maxItems of a schema together: its grammar has a rule for each item
MAX_TOOLS, MAX_TOOLS_CHARACTERS = 128, 65_536
MAX_CALLS = 4  # in one answer: small models repeat a call until their last token
MAX_CALL_FORM_CHARACTERS = 64
ROLES = ("system", "developer", "user", "assistant", "tool")  # developer is a newer word for system
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
TEMPLATE_REFUSES = "the chat template refuses the messages"
NO_TEMPLATE = "this model has no chat template: send it a prompt"
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
FRAMES_WITH_SYSTEM = 5  # what stands around four messages, the first of which is the system's


class GenaiModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers chat or raw prompts with an ONNX folder made by the onnxruntime-genai model builder.

    Attributes:
        takes_tools: an agent asks: earlier wrappers know no tools.
    """

    takes_tools: ClassVar = True

    def load_context(self, context: Any) -> None:
        """Loads the model, the tokenizer and the generation defaults."""
        options = _Options.parse(context.model_config or {})
        self._engine = _Engine(Path(context.artifacts[ARTIFACT]), options)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Returns whole answers.

        Args:
            model_input: a row for each request, with the signature's columns. A dict or a list of dicts also works,
                but is not in the type hint: MLflow would infer a signature from it, and warn.
            params: see `_Request.PARAMS`.

        Returns:
            For messages, a list with one llm/v1/chat completion for each row; for a prompt, the answer's text, or
            a list of texts for several rows.

        Raises:
            RequestError: the request is at fault. One that asks for a stream is: there is none here.
            GuidanceError: the library cannot follow its response_format or its tools.
        """
        rows = _rows(model_input)
        jobs = [self._engine.read(row, params, number) for number, row in enumerate(rows)]
        if any(job.request.stream for job in jobs):
            raise RequestError("bad_request", "stream must be false: only predict_stream gives pieces")
        answers: list[Any] = []
        for row, job in zip(rows, jobs, strict=True):
            *deltas, last = self._answer(job)
            text = "".join(deltas)
            answers.append(text if "prompt" in row else self._completion(job.request, text, last))
        return answers[0] if len(answers) == 1 and isinstance(answers[0], str) else answers

    def predict_stream(
        self, context: Any, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[str | dict[str, Any]]:
        """Yields one answer in pieces. Closing the iterator stops it within one slice or one decode step.

        Yields:
            For a prompt, text deltas, then one dict `{finish_reason, usage, timings}`. For messages, an
            llm/v1/chat chunk for each delta; the last one has the three, and before it calls of tools have a chunk. A
            delta is empty for a prefill slice and for a step that completes no text.

        Raises:
            RequestError: the request is at fault; raised before the first item with text.
            GuidanceError: the library cannot follow its response_format or its tools. What can be known of that before
                the first token is raised before it.
        """
        rows = _rows(model_input)
        if len(rows) != 1:
            raise RequestError("bad_request", f"a stream answers one row, not {len(rows)}")
        job = self._engine.read(rows[0], params, 0)
        with contextlib.closing(self._answer(job)) as items:
            yield from items if "prompt" in rows[0] else self._chunks(job.request, items)

    def predict_streams(
        self, requests: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]], owner: str = ""
    ) -> list[_Lane | _Refused]:
        """Starts several requests, for a caller that steps through their lanes in turn.

        Each lane is an iterator of steps and has to be closed; all of them belong to one thread.

        Args:
            requests: pairs of row and params, as in `predict_stream`. Their items are those of a prompt, whatever they
                are; where tools are called, the last one has `tool_calls`, a list of `{name, arguments}`, the
                arguments being the text of a JSON object.
            owner: whose they are. What is kept of another owner's requests serves them only as far as `share` says.

        Returns:
            Lanes; `rows` says whom each one answers, a tuple of one. Requests that none of them answers, always the
            last ones, found no memory: they can be brought again when a lane is closed. Where none is open, one is
            found.
        """
        jobs: list[_Job] = []
        refused: list[_Refused] = []
        for number, (row, params) in enumerate(requests):
            try:
                jobs.append(self._engine.read(row, params, number, owner))
            except RequestError as error:
                refused.append(_Refused(number, error))
        return [*refused, *self._engine.lanes(jobs)]

    def share(self, system: str) -> None:
        """Lets owners share the beginning of chats with this system prompt, or of those without one where it is empty:
        what they have in common before the user's words."""
        self._engine.share(system)

    def _answer(self, job: _Job) -> Generator[Any, None, None]:
        (lane,) = self._engine.lanes([job], beyond=True)
        try:
            for step in lane:
                yield from (item for _, item in step) if step else ("",)
        finally:
            lane.close()

    def _completion(self, request: _Request, text: str, last: Mapping[str, Any]) -> dict[str, Any]:
        """The completion object of the signature's schema, which has no field for `cached_tokens`."""
        usage = {key: last["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        head = self._head(request, "chat.completion")
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls := _tool_calls(last, head["id"]):
            message |= {"content": text or None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": last["finish_reason"]}
        return {**head, "choices": [choice], "usage": usage}

    def _chunks(self, request: _Request, items: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The items of a stream as chunks of a completion, such as MLflow's ChatModel gives."""
        head = self._head(request, "chat.completion.chunk")
        role = {"role": "assistant"}
        for item in items:
            text, end = (item, {}) if isinstance(item, str) else ("", dict(item))
            if calls := _tool_calls(end, head["id"]):
                called = {"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]}
                yield {
                    **head,
                    "choices": [{"index": 0, "delta": {**role, **called}, "finish_reason": None}],
                }
                role = {}
            choice = {
                "index": 0,
                "delta": {**role, "content": text},
                "finish_reason": end.pop("finish_reason", None),
            }
            end.pop("tool_calls", None)
            yield {**head, "choices": [choice], **end}
            role = {}

    def _head(self, request: _Request, kind: str) -> dict[str, Any]:
        return {
            "id": request.id or f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._engine.options.model,
        }


class RequestError(MlflowException, ValueError):  # type: ignore[misc]
    """The request is invalid; the model is not at fault. The message starts with the code. MLflow's scoring server
    shows the message of its own exceptions only.

    Attributes:
        code: `bad_request` or `prompt_too_long`.
    """

    def __init__(self, code: str, message: str) -> None:
        MlflowException.__init__(self, f"{code}: {message}", error_code=INVALID_PARAMETER_VALUE)
        self.code = code


class GuidanceError(MlflowException, RuntimeError):  # type: ignore[misc]
    """The library cannot follow a right response_format, or a right tool; the request is not at fault. The message
    starts with the code.

    Attributes:
        code: `model_failed`.
    """

    code = "model_failed"

    def __init__(self, message: str) -> None:
        super().__init__(f"{self.code}: {message}")


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The package's `model_config`; 0 means not given.

    Attributes:
        model: the model's name in a completion.
        max_length: limit for prompt and new tokens together.
        max_tokens: new tokens for a request without `max_tokens`, as far as they fit.
        context_tokens: a smaller context than the model's own, to save memory.
        threads: threads of one operator.
        kv_bytes: memory for the keys and values of all generators together; always at least one context.
        repetition_penalty: 1 is off; not given, the folder's own holds.
    """

    model: str = ""
    max_length: int = 0
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 0.0
    context_tokens: int = 0
    threads: int = 0
    kv_bytes: int = 0

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> _Options:
        given = {key: value for key, value in config.items() if value is not None}
        return cls(**{key: value for key, value in given.items() if key in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One request, checked. None means not given."""

    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    guidance: _Guidance | None = None
    tools: _Tools | None = None
    stream: bool = False
    id: str = ""

    PARAMS: ClassVar = frozenset(
        {
            *("temperature", "max_tokens", "stop", "top_p", "top_k", "repetition_penalty", "seed"),
            "response_format",
        }
    )
    INPUTS: ClassVar = PARAMS | {
        *("max_completion_tokens", "n", "stream", "model", "id"),
        *("user", "stream_options", "logprobs", "frequency_penalty", "presence_penalty"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    }
    ID: ClassVar = re.compile(r"[A-Za-z0-9_.-]{1,64}")

    @classmethod
    def parse(cls, row: Mapping[str, Any], params: Mapping[str, Any] | None) -> _Request:
        """Checks every field. None, NaN or an empty list means not given.

        It takes what a device takes over MQTT, and what OpenAI's clients send by habit as far as it asks for nothing.
        Everything else is refused; of `reply_to` and `deadline_ms`, which only a device can keep, nothing is known.
        It accepts both forms, whatever the package's signature is: MLflow passes only the signature's own form, but
        an agent that calls the model directly may send either.

        Args:
            row: the inputs of one form; they override `params` of the same name.

        Raises:
            RequestError: a field is unknown or invalid; the message names it.
        """
        is_chat = "prompt" not in row
        inputs = cls.INPUTS | {"messages" if is_chat else "prompt"}
        given = {**_known(params or {}, cls.PARAMS), **_known(row, inputs)}
        if _integer(given, "n", 1, 1 << 31) not in (None, 1):
            raise RequestError("bad_request", "n must be 1")
        if not cls.ID.fullmatch(_text(given.get("id", "none"), "id")):
            raise RequestError("bad_request", "id must be 1 to 64 letters, digits, '_', '.', '-'")
        _check_habits(given)
        return cls(
            messages=_messages(given) if is_chat else (),
            prompt=_text(given.get("prompt"), "prompt") if not is_chat else "",
            max_tokens=_max_tokens(given),
            temperature=_number(given, "temperature", 0.0, 100.0),
            top_p=_number(given, "top_p", 0.0, 1.0),
            top_k=_integer(given, "top_k", 0, 1 << 31),
            repetition_penalty=_number(given, "repetition_penalty", 0.01, 100.0),
            seed=_integer(given, "seed", -(1 << 63), 1 << 63),
            stop=_stops(given),
            guidance=_Guidance.parse(given),
            tools=_Tools.parse(given),
            stream=_boolean(given, "stream"),
            id=given.get("id", ""),
        )


@dataclass(kw_only=True)
class _Job:
    """One request in progress, with its answer so far.

    Attributes:
        row: its place in the call that brought it.
        prompt: [tokens] ids.
        answer: [tokens] ids, without an end token.
        max_new: most tokens of the answer.
        greedy: no sampling.
        penalty: for tokens that came before; 1 is none, 0 leaves it to the folder.
        owner: whose request it is.
        guidance: what the answer must look like; None if it is free.
        calls: tells calls of tools from text; None if there are no tools.
        cached: tokens of the prompt that did not have to be prefilled.
        finish_reason: empty until the answer is complete.
    """

    row: int
    request: _Request
    prompt: list[int]
    max_new: int
    greedy: bool
    penalty: float
    owner: str
    decoder: _Decoder
    stops: _StopFilter
    started: float
    guidance: _Guidance | None = None
    calls: _CallFilter | None = None
    answer: list[int] = field(default_factory=list)
    cached: int = 0
    finish_reason: str = ""
    prefill_started: float = 0.0
    decode_started: float = 0.0
    first_token: float = 0.0

    @property
    def length(self) -> int:
        """Most tokens of prompt and answer together."""
        return len(self.prompt) + self.max_new

    @property
    def plain(self) -> bool:
        """True if its generator can serve other requests of the same penalty, too. A generator's search options are
        fixed, and the state of a sampler or a grammar cannot be rewound (library limitation)."""
        return self.greedy and self.guidance is None

    def take(self, token: int, *, is_end: bool) -> Iterator[Any]:
        """Adds a token and yields its items: text, and at the end usage and finish_reason."""
        self.first_token = self.first_token or time.perf_counter()
        if not is_end:
            self.answer.append(token)
            text = self.decoder.push(token)
            yield self.stops.push(self.calls.push(token, text) if self.calls else text)
        if is_end or self.stops.found:
            yield from self.end("stop")
        elif len(self.answer) >= self.max_new:
            yield from self.end("length")

    def end(self, finish_reason: str) -> Iterator[Any]:
        """Ends the answer and yields its last items.

        Raises:
            GuidanceError: it ended in the middle of a call.
        """
        called: list[dict[str, str]] = []
        if self.calls and not self.stops.found:
            yield self.stops.push(self.calls.flush())
            called = self.calls.whole()
            finish_reason = "tool_calls" if called else "stop" if self.stops.found else finish_reason
            if self.calls.began and finish_reason == "stop":
                raise GuidanceError("the answer ended before its call was whole")
        self.finish_reason = finish_reason
        if not self.stops.found and (rest := self.stops.flush()):
            yield rest
        ended = time.perf_counter()
        yield {
            "finish_reason": finish_reason,
            **({"tool_calls": called} if called else {}),
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": len(self.answer),
                "total_tokens": len(self.prompt) + len(self.answer),
                "cached_tokens": self.cached,
            },
            "timings": {
                "first_token_ms": ((self.first_token or ended) - self.started) * 1000,
                "prefill_ms": (self.decode_started - self.prefill_started) * 1000,
                "decode_ms": (ended - self.decode_started) * 1000,
                "total_ms": (ended - self.started) * 1000,
            },
        }


@dataclass(kw_only=True)
class _Session:
    """A generator with its reserved memory and the tokens that it has processed. One lane at a time owns it.

    Attributes:
        max_length: tokens that it takes memory for.
        reusable: it may serve another request.
        penalty: of its generator.
        owner: whose tokens it has seen.
        generator: None until its lane starts.
        tokens: [tokens] ids that it has seen.
    """

    max_length: int
    reusable: bool
    penalty: float
    owner: str
    generator: Any = None
    tokens: list[int] = field(default_factory=list)

    def shared(self, prompt: Sequence[int]) -> int:
        """Length of the longest common prefix that the generator can be rewound to.

        One token less than it has seen: the last generated token was never run. `LEAST_TOKENS` less than the
        prompt has: so many have to be run again.
        """
        count = 0
        for old, new in zip(self.tokens[:-1], prompt[:-LEAST_TOKENS], strict=False):
            if old != new:
                break
            count += 1
        return count

    def rewind(self, count: int) -> None:
        """Rewinds the generator to the first `count` tokens."""
        self.generator.rewind_to(count)
        del self.tokens[count:]


class _Sessions:
    """The memory of all generators: those in use, and those kept for their prefix.

    Together they use memory for at most `limit` tokens. Kept sessions are dropped, least recently used first, when
    the memory is needed or there are more than `MAX_KEPT`. Thread-safe, because a model server has several threads.

    Attributes:
        common: [tokens] ids that a session serves other owners for. As a whole or not at all, even within one owner:
            else the length of a match would tell a client how the system prompt begins, which it need not know.
    """

    MAX_KEPT = 8
    WORTH = 3  # a kept session is resumed if the common prefix is at least one third of it

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.common: list[int] = []
        self._lock = threading.Lock()
        self._kept: list[_Session] = []
        self._in_use = 0

    def resume(self, job: _Job) -> tuple[_Session | None, bool]:
        """The kept session with the longest common prefix, rewound to it; None if no session is worth it.

        A session that is too small for this request is dropped: it would be too small for the chat's next one, too.

        Returns:
            The session, and whether there was one, be it too small.
        """
        with self._lock:
            best, shared = self._best(job)
            if best is None:
                return None, False
            self._kept.remove(best)
            if best.max_length < job.length:
                return None, True
            self._in_use += best.max_length
        best.owner = job.owner
        best.rewind(shared)
        return best, True

    def reserve(self, tokens: int, *, beyond: bool) -> bool:
        """Reserves memory for a new session, and drops kept ones if necessary.

        Args:
            beyond: reserve it even if the sessions in use leave too little.
        """
        with self._lock:
            if self._in_use + tokens > self.limit and not beyond:
                return False
            while self._kept and self._in_use + self._kept_tokens() + tokens > self.limit:
                del self._kept[0]
            self._in_use += tokens
            return True

    def give_back(self, session: _Session) -> None:
        """Takes a session back from its lane, and keeps it if it can serve another request."""
        with self._lock:
            self._in_use -= session.max_length
            if session.reusable and session.tokens:
                self._kept.append(session)
                del self._kept[: -self.MAX_KEPT]

    def forget(self) -> None:
        """Drops every kept session."""
        with self._lock:
            self._kept.clear()

    def _kept_tokens(self) -> int:
        return sum(kept.max_length for kept in self._kept)

    def _best(self, job: _Job) -> tuple[_Session | None, int]:
        """The session to go on from, and how far: one of the owner's, else the one that was used least recently."""
        best: tuple[_Session | None, int] = (None, 0)
        common = len(self.common)
        whole, others, has_own = job.prompt[:common] == self.common, None, False
        for kept in self._kept:
            if kept.penalty != job.penalty or (kept.tokens[:common] == self.common) != whole:
                continue
            shared = kept.shared(job.prompt)
            if kept.owner != job.owner:
                fits = whole and shared >= common > 0 and kept.max_length >= job.length
                others = others or (kept if fits else None)
                continue
            has_own = True
            if shared > best[1] and shared * self.WORTH >= len(kept.tokens):
                best = (kept, shared)
        return (others, common) if others and not has_own else best


class _Engine:
    """One loaded model; turns requests into lanes.

    Attributes:
        answering: lanes whose prompts are through: what a slice of another prompt holds up.
    """

    def __init__(self, folder: Path, options: _Options) -> None:
        self.options = options
        described = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        files = TokenizerFiles.read(folder / described.get("tokenizer_dir", ""))
        config = og.Config(str(folder))
        if options.threads:
            session_options = {"intra_op_num_threads": int(options.threads)}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._tokenizer = og.Tokenizer(config)
        context_tokens = int(described["context_length"])
        self.context_tokens = min(context_tokens, options.context_tokens or context_tokens)
        self.prompts = _Prompts(self._tokenizer, files, context_tokens=self.context_tokens)
        # genai_config.json may name another end than the tokenizer, and the model was trained on the tokenizer's.
        configured = _ids(described.get("eos_token_id"))
        self.eos = files.end_ids | configured | _ids(self._tokenizer.eos_token_ids)
        end = self.prompts.turn_end if self.prompts.turn_end in self.eos else files.eos_id
        # Of several, guidance lets an answer end at the first one only (0.18).
        if end is not None and (end == self.prompts.turn_end or end not in configured):
            config.overlay(json.dumps({"model": {"eos_token_id": end}}))
        self._model = og.Model(config)
        self._vocabulary = int(described["vocab_size"])
        kv_tokens = options.kv_bytes // _kv_token_bytes(described["decoder"])
        self.sessions = _Sessions(max(self.context_tokens, kv_tokens))
        self.answering: set[_Lane] = set()

    def share(self, system: str) -> None:
        """See `GenaiModel.share`."""
        head = [{"role": "system", "content": system}] if system else []
        chats = ([*head, {"role": "user", "content": text}] for text in ("Hi", "?"))
        one, other = map(self.prompts.chat, chats)
        common = list(_common(one[:-LEAST_TOKENS], other))
        self.sessions.common = common if len(common) >= COMMON_TOKENS else []

    def read(
        self, row: Mapping[str, Any], params: Mapping[str, Any] | None, number: int, owner: str = ""
    ) -> _Job:
        """Checks and encodes one request.

        Raises:
            RequestError: the request is invalid.
        """
        started = time.perf_counter()
        request = _Request.parse(row, params)
        prompts, tools = self.prompts, request.tools
        prompt = prompts.chat(request.messages, tools) if request.messages else prompts.raw(request.prompt)
        return _Job(
            row=number,
            request=request,
            prompt=prompt,
            max_new=self._budget(len(prompt), request.max_tokens),
            greedy=self._temperature(request) == 0,
            penalty=request.repetition_penalty or self.options.repetition_penalty,
            owner=owner,
            decoder=_Decoder(self._tokenizer, self.prompts.control_ids),
            stops=_StopFilter(request.stop),
            started=started,
            guidance=prompts.calls.guidance(tools) if tools else request.guidance,
            calls=_CallFilter(prompts.calls) if tools else None,
        )

    def lanes(self, jobs: Sequence[_Job], *, beyond: bool = False) -> Iterator[_Lane]:
        """Yields lanes for the jobs in their order, as long as there is memory for them.

        Args:
            beyond: start them even if memory is short.
        """
        for job in jobs:
            session = self._session(job, beyond=beyond)
            if session is None:
                return
            job.cached = len(session.tokens)
            yield _Lane(self, job, session)

    def _session(self, job: _Job, *, beyond: bool) -> _Session | None:
        """A kept session that goes on for a job, or room for a new one; None when there is not enough."""
        length = job.length
        if job.plain:
            kept, outgrown = self.sessions.resume(job)
            if kept:
                return kept
            wanted = length * 2 if outgrown else length  # such a chat will probably keep growing
            length = min(self.context_tokens, math.ceil(wanted / ROUND_TOKENS) * ROUND_TOKENS)
        if not self.sessions.reserve(length, beyond=beyond):
            return None
        return _Session(max_length=length, reusable=job.plain, penalty=job.penalty, owner=job.owner)

    def generator(self, job: _Job, max_length: int) -> Any:
        """A new generator with the job's options."""
        request, greedy = job.request, job.greedy
        search: dict[str, Any] = {"max_length": max_length, "num_beams": 1, "num_return_sequences": 1}
        search |= {"batch_size": 1, "do_sample": not greedy}
        if job.penalty:
            search["repetition_penalty"] = job.penalty
        if not greedy:
            search |= self._sampling(request)
        generator_params = og.GeneratorParams(self._model)
        generator_params.set_search_options(**search)
        if job.guidance is not None:
            generator_params.set_guidance("lark_grammar", job.guidance.grammar)
        return og.Generator(self._model, generator_params)

    def slices(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """What is to be prefilled, in parts as large as those who are answered in that moment bear.

        A last part of fewer than `LEAST_TOKENS` joins the one before it.
        """
        start = 0
        while start < len(tokens):
            answers = len(self.answering) if len(tokens) > LONG_TOKENS else 0
            end = start + (min(SLICE_TOKENS, BESIDE_TOKENS * answers) or SLICE_TOKENS)
            if len(tokens) - end < LEAST_TOKENS:
                end = len(tokens)
            yield list(tokens[start:end])
            start = end

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a whole answer."""
        return str(self._tokenizer.decode(np.array(tokens, np.int32)))

    def _budget(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The number of new tokens for a request, at least 1."""
        options, limit = self.options, self.context_tokens
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

    def _temperature(self, request: _Request) -> float:
        return self.options.temperature if request.temperature is None else request.temperature

    def _sampling(self, request: _Request) -> dict[str, Any]:
        sampling: dict[str, Any] = {"temperature": self._temperature(request)}
        top_p = self.options.top_p if request.top_p is None else request.top_p
        top_k = self.options.top_k if request.top_k is None else request.top_k
        if top_p is not None:
            sampling["top_p"] = top_p
        if top_k is not None:
            # With 0 (no limit) the library would apply top_p before the temperature.
            sampling["top_k"] = min(top_k or self._vocabulary, self._vocabulary)
        if request.seed is not None:
            # The library takes a C int, and -1 means no seed.
            sampling["random_seed"] = request.seed & 0x7FFF_FFFF
        return sampling


class _Lane:
    """A generator and the job that it answers. An iterator of steps.

    Attributes:
        rows: which request it answers, by its place in the call that opened it; of one.
    """

    def __init__(self, engine: _Engine, job: _Job, session: _Session) -> None:
        self.rows = (job.row,)
        self._engine = engine
        self._job = job
        self._session = session
        self._closed = False
        self._steps = self._run()

    def __iter__(self) -> _Lane:
        return self

    def __next__(self) -> list[tuple[int, Any]]:
        """One prefill slice, or one token: pairs of row and item, the items of `predict_stream`.

        Raises:
            RequestError: the request is at fault.
            GuidanceError: the library cannot follow its response_format or its tools.
        """
        try:
            return next(self._steps)
        except StopIteration:
            self.close()
            raise
        except Exception as error:
            self._session.reusable = False  # what the library left in it is unknown
            refusal = _refusal(error, self._job.guidance)
            self.close()
            if refusal:
                raise refusal from error
            raise

    def close(self) -> None:
        """Ends the lane at any point; may be called more than once."""
        self._steps.close()
        if not self._closed:
            self._closed = True
            self._engine.answering.discard(self)
            if not self._job.answer and len(self._session.tokens) <= len(self._engine.sessions.common):
                self._session.reusable = False  # it ends within what is common as a whole or not at all
            self._engine.sessions.give_back(self._session)

    def _run(self) -> Generator[list[tuple[int, Any]], None, None]:
        job = self._job
        job.prefill_started = time.perf_counter()
        yield from self._prefill()
        job.decode_started = time.perf_counter()
        self._engine.answering.add(self)
        while not job.finish_reason:
            yield [(job.row, item) for item in self._decode()]

    def _prefill(self) -> Iterator[list[tuple[int, Any]]]:
        """Runs what the generator has not seen yet in slices, with a step after each."""
        session, job = self._session, self._job
        if session.generator is None:
            session.generator = self._engine.generator(job, session.max_length)
        for part in self._engine.slices(job.prompt[len(session.tokens) :]):
            session.generator.append_tokens(np.array(part, dtype=np.int32))
            session.tokens += part
            yield []

    def _decode(self) -> Iterator[Any]:
        session, job = self._session, self._job
        if session.generator.is_done():
            yield from job.end("stop")
            return
        session.generator.generate_next_token()
        token = int(session.generator.get_next_tokens()[0])
        is_end = token in self._engine.eos
        if is_end and job.guidance is not None:
            job.guidance.check(self._engine.text(job.answer))
        if session.reusable and not is_end:
            session.tokens.append(token)
        yield from job.take(token, is_end=is_end)


class _Refused:
    """The lane of an invalid request."""

    def __init__(self, row: int, error: RequestError) -> None:
        self.rows = (row,)
        self._error = error

    def __iter__(self) -> _Refused:
        return self

    def __next__(self) -> list[tuple[int, Any]]:
        raise self._error

    def close(self) -> None:
        """Does nothing."""


def _common(one: Sequence[Any], other: Sequence[Any]) -> Iterator[Any]:
    """What two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return (item for item, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _kv_token_bytes(decoder: Mapping[str, Any]) -> int:
    """Bytes for the keys and values of one token, at least 1."""
    sizes = (decoder.get(key, 0) for key in ("num_hidden_layers", "num_key_value_heads", "head_size"))
    return max(1, 2 * KV_ELEMENT_BYTES * math.prod(int(size) for size in sizes))


class _Prompts:
    """Encodes text as token ids, as Hugging Face's tokenizer and chat template do.

    A literal special token in a message stays text. Before the template is rendered, a marker (a code point that the
    messages do not contain) is put behind the first character of each one; then the parts between markers are encoded
    separately, so that no part contains a whole special token. The model reads the characters as they were sent, and
    the template reads everything else as it was sent. A raw prompt is encoded unchanged.

    Args:
        context_tokens: a longer text is refused before it is encoded as a whole, which could take minutes.
    """

    MARKERS: ClassVar = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters of Unicode: they mean nothing

    def __init__(self, tokenizer: Any, files: TokenizerFiles, *, context_tokens: int = 1 << 20) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._prefix = files.prefix
        self._template = _as_hugging_face_reads(files.template)
        frames = self._frames()
        special = {*files.special.values(), *_marks(frames, files)}
        self.turn_end = _turn_end(frames, files)
        self.control_ids = frozenset(token for token, text in files.added.items() if text in special)
        self._special = re.compile(f"(?={_any_of(special)})(.)", re.DOTALL)
        added = [text for text in files.added.values() if text.strip() and not text.isalnum()]
        self._added = re.compile(f"(?={_any_of([*added, *special])})(.)", re.DOTALL)
        control = {text: token for token, text in files.added.items() if token in self.control_ids}
        system = len(frames) == FRAMES_WITH_SYSTEM
        self.calls = self._own_call_form(files) or _CallForm(takes_system=system)
        self.calls = replace(self.calls, control=control)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: _Tools | None = None) -> list[int]:
        """[tokens] ids of the messages in the model's own chat template, ready for the assistant's turn.

        Raises:
            RequestError: the template refuses them, or they are too long.
        """
        functions = tools.functions if tools else ()
        marker = self._marker(messages, functions)
        safe = [self._safe(message, marker) for message in messages]
        shown = [self._inert(function, marker) for function in functions]
        own = self.calls.own
        rendered = self._render(safe, shown) if own else self._render(self.calls.as_text(safe, shown))
        self._check_length(rendered.replace(marker, ""))
        first, *others = rendered.split(marker)
        tokens = self._encode(first)
        for part in others:
            tokens += self._continuation(part)
        return self._not_empty(tokens, "messages")

    def raw(self, prompt: str) -> list[int]:
        """[tokens] ids of a prompt that contains its own control tokens.

        It begins with what Hugging Face's tokenizer puts there, once: a prompt that brings it gets no second one.

        Raises:
            RequestError: it is empty, or too long.
        """
        self._check_length(prompt)
        tokens = self._not_empty(self._encode(prompt), "prompt")
        return tokens if tokens[: len(self._prefix)] == self._prefix else self._prefix + tokens

    def _frames(self) -> list[str]:
        """What the template writes before, between and behind the messages of a chat; nothing if it takes none."""
        content = self.MARKERS[0]
        for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
            try:
                rendered = self._render([{"role": role, "content": content} for role in roles])
            except RequestError:
                continue
            return rendered.split(content)
        return []

    def _own_call_form(self, files: TokenizerFiles) -> _CallForm | None:
        """How the template itself shows tools and writes calls; None where it does not, or writes them as no JSON.

        It is read off a conversation with calls, beside the same one with a text in their place.
        """
        if self.turn_end is None:
            return None
        question, mark, name = {"role": "user", "content": "?"}, self.MARKERS[0], "probe_of_tools"
        arguments = {"key": "value"}
        tool = {"name": name, "description": "?", "parameters": NO_PARAMETERS}

        def calling(count: int) -> str:
            calls = [_call_of(identity, name, arguments) for identity in ("call00001", "call00002")[:count]]
            results = [
                {"role": "tool", "tool_call_id": call["id"], "name": name, "content": mark} for call in calls
            ]
            answer = {"role": "assistant", "content": "", "tool_calls": calls}
            return self._render([question, answer, *results, question], [tool])

        try:
            text = self._render([question, {"role": "assistant", "content": mark}, question], [tool])
            one = calling(1)
        except RequestError:
            return None
        begin = sum(1 for _ in _common(text.partition(mark)[0], one))
        found = re.compile(
            rf'\{{"name": "{name}", "(arguments|parameters)": {re.escape(json.dumps(arguments))}'
        )
        first = found.search(one, begin)
        if name not in text or one.count(mark) != 1 or not first:
            return None
        try:
            _, end = json.JSONDecoder().raw_decode(one, first.start())
        except ValueError:
            return None
        closing, ended, _ = one[end:].partition(files.added[self.turn_end])
        between = ""
        with contextlib.suppress(RequestError):  # one call at a time
            two = calling(2)
            second = found.search(two, end)
            between = two[end : second.start()] if second and two[:end] == one[:end] else ""
        form = _CallForm(
            own=True,
            opening=one[begin : first.start()].lstrip(),
            between=between,
            closing=closing,
            arguments=first[1],
        )
        longest = max(map(len, (form.opening, between, closing)))
        return form if ended and longest <= MAX_CALL_FORM_CHARACTERS else None

    def _marker(self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]) -> str:
        text = json.dumps([messages, functions], ensure_ascii=False)
        for marker in self.MARKERS:
            if marker not in text:
                return marker
        raise RequestError("bad_request", "the messages contain every noncharacter from U+FDD0 to U+FDEF")

    def _safe(self, message: Mapping[str, Any], marker: str) -> dict[str, Any]:
        """A message whose texts become no special token; what a tool says becomes no token that was added at all, so
        that it cannot end its own frame."""
        if message["role"] == "tool":
            data = {key: self._inert(message[key], marker) for key in ("content", "tool_call_id")}
            return {**message, **data}
        safe = {**message, "content": self._special.sub(rf"\1{marker}", message["content"])}
        if "tool_calls" in message:
            safe["tool_calls"] = self._inert(message["tool_calls"], marker)
        return safe

    def _inert(self, value: Any, marker: str) -> Any:
        """Data, in whose texts no token that was added to the tokenizer is left."""
        if isinstance(value, str):
            return self._added.sub(rf"\1{marker}", value)
        if isinstance(value, Mapping):
            return {self._inert(key, marker): self._inert(part, marker) for key, part in value.items()}
        if isinstance(value, list):
            return [self._inert(part, marker) for part in value]
        return value

    def _render(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        given = {} if self._template is None else {"template_str": self._template}
        if functions:
            given["tools"] = json.dumps([{"type": "function", "function": each} for each in functions])
        try:
            text = self._tokenizer.apply_chat_template(
                json.dumps(messages), add_generation_prompt=True, **given
            )
        except RuntimeError as error:
            # Not passed on: its text quotes the template, and may quote the messages.
            missing = "Empty chat template" in str(error)
            raise RequestError("bad_request", NO_TEMPLATE if missing else TEMPLATE_REFUSES) from None
        return str(text)

    def _check_length(self, text: str) -> None:
        """
        Raises:
            RequestError: the text certainly has more tokens than the context, going by its pieces.
        """
        if len(text) <= PIECE_CHARACTERS:
            return
        least_tokens = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            tokens = len(self._encode(text[start : start + PIECE_CHARACTERS]))
            least_tokens += max(0, tokens - PIECE_EXTRA_TOKENS)
            if least_tokens > self._context_tokens:
                raise RequestError(
                    "prompt_too_long",
                    f"{least_tokens} or more of the prompt are more than the context of {self._context_tokens} tokens",
                )

    def _continuation(self, part: str) -> list[int]:
        """Ids of a text that continues another one: some tokenizers put a space before the first word of a text."""
        before, both = self._encode("\n"), self._encode(f"\n{part}")
        return both[len(before) :] if both[: len(before)] == before else self._encode(part)

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    @staticmethod
    def _not_empty(tokens: list[int], what: str) -> list[int]:
        if not tokens:
            raise RequestError("bad_request", f"{what} has no text")
        return tokens


def _marks(frames: Sequence[str], files: TokenizerFiles) -> Iterator[str]:
    """Added tokens that begin a turn, though the tokenizer does not call them special: a message that brought one would
    begin a turn, too. What only opens or closes something within one, as `</think>`, has a partner.

    Args:
        frames: see `_Prompts._frames`.
    """
    others = set(files.added.values()) - set(files.special.values())
    tokens = re.compile(_any_of(files.added.values()))
    for part in " ".join(frames[:-1]).split():
        run = re.match(f"(?:{tokens.pattern})+", part)
        first = next((token for token in tokens.findall(run[0]) if token in others), "") if run else ""
        if first and not others & {first.replace("<", "</", 1), first.replace("</", "<", 1)} - {first}:
            yield first


def _turn_end(frames: Sequence[str], files: TokenizerFiles) -> int | None:
    """The token that the template writes behind an assistant's message.

    Args:
        frames: see `_Prompts._frames`.
    """
    behind = frames[-2:-1]  # what stands before the last user's
    found = re.match(rf"\s*({_any_of(files.added.values())})", behind[0]) if behind else None
    ids = {text: token for token, text in files.added.items()}
    return ids[found[1]] if found else None


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a tokenizer's files say and the library does not tell or does not heed.

    Attributes:
        added: id → text of the tokens that are found in a text before it is split into others.
        special: those of them that are no text: they frame prompts, and never reach a client.
        eos_id: of `eos_token`; None if there is none.
        end_ids: tokens that end an answer.
        prefix: [tokens] ids that a raw prompt begins with, usually one for the beginning of a text, or none.
        template: the chat template; None if there is none.
    """

    added: Mapping[int, str]
    special: Mapping[int, str]
    eos_id: int | None
    end_ids: frozenset[int]
    prefix: list[int]
    template: str | None

    NAMED: ClassVar = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and
        chat_template.jinja; each may be missing."""
        tokenizer = _json_object(folder / "tokenizer.json")
        config = {
            **_json_object(folder / "special_tokens_map.json"),
            **_json_object(folder / "tokenizer_config.json"),
        }
        added = {str(token["content"]): token for token in tokenizer.get("added_tokens", [])}
        listed = config.get("added_tokens_decoder", {}).values()
        named = {_content(config.get(key)) for key in cls.NAMED}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            others = config.get(key) or ()
            named |= {_content(other) for other in (others.values() if isinstance(others, dict) else others)}
        named |= {_content(token) for token in listed if token.get("special")}
        special = {
            int(token["id"]): text for text, token in added.items() if token.get("special") or text in named
        }
        end_ids = _ids(_json_object(folder / "generation_config.json").get("eos_token_id"))
        end = _content(config.get("eos_token"))
        eos_id = int(added[end]["id"]) if end in added else None
        return cls(
            added={int(token["id"]): text for text, token in added.items()},
            special=special,
            eos_id=eos_id,
            end_ids=end_ids | _ids(eos_id),
            prefix=_prefix(tokenizer.get("post_processor") or {}),
            template=_template(folder, config.get("chat_template")),
        )


def _json_object(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _ids(tokens: Any) -> frozenset[int]:
    """Token ids that are given as one, as several or not at all."""
    several = tokens if isinstance(tokens, (list, np.ndarray)) else [] if tokens is None else [tokens]
    return frozenset(int(token) for token in several)


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for each of some texts, the longest first; it matches nothing if there are none."""
    return (
        "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if len(text) > 1) or "(?!)"
    )


def _content(token: Any) -> str:
    """The text of a token that is given as text or as an object; empty if it is not given."""
    return str(token.get("content", "") if isinstance(token, Mapping) else token or "")


def _prefix(processor: Mapping[str, Any]) -> list[int]:
    """[tokens] ids that a post-processor of tokenizer.json puts before a text. The library has no post-processors."""
    kind = processor.get("type")
    if kind == "Sequence":
        return [token for step in reversed(processor["processors"]) for token in _prefix(step)]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [int(processor["cls"][1])]
    tokens: list[int] = []
    for piece in processor.get("single", ()) if kind == "TemplateProcessing" else ():
        if "SpecialToken" not in piece:
            break
        tokens += map(int, processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return tokens


def _template(folder: Path, configured: Any) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    if isinstance(configured, list):  # several, each with a name
        configured = {entry["name"]: entry["template"] for entry in configured}.get("default")
    return configured if isinstance(configured, str) else None


_STRING = r"'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\""
_OPENING = re.compile(r"\{[{%#]")
_TAGS = {
    "{#": re.compile(r"\{#.*?#\}", re.DOTALL),
    "{%": re.compile(rf"(\{{%[-+]?)((?:{_STRING}|[^'\"])*?)([-+]?%\}})", re.DOTALL),
    "{{": re.compile(rf"(\{{\{{[-+]?)((?:{_STRING}|[^'\"])*?)([-+]?\}}\}})", re.DOTALL),
}
_CODE = re.compile(rf"{_STRING}|\w+|\s+|[=!<>]=|.", re.DOTALL)
_AROUND_IN = re.compile(r"and|or|not|if|elif|else|in|for|set|[=!<>]=|[=<>,:]")
_MAX_OPERAND_CHARACTERS = 1000


def _as_hugging_face_reads(template: str | None) -> str | None:
    """The template, changed where the library's engine would read it in another way without a word.

    Hugging Face's engine drops the indentation and the newline of a line that only has a block, and knows `in` for
    text; the library's (0.18) keeps all space, and its `in` knows lists and objects only.
    """
    if template is None:
        return None
    source = template.replace("\r\n", "\n").replace("\r", "\n")
    parts, at, line_begins = [], 0, True
    while opening := _OPENING.search(source, at):
        tag = _TAGS[opening[0]].match(source, opening.start())
        if tag is None:  # it never ends: the engine says so
            break
        text, at = source[at : tag.start()], tag.end()
        if opening[0] == "{{":
            line_begins = False
        else:
            start = text.rfind("\n") + 1
            if (start or line_begins) and not text[start:].strip(" \t") and tag[0][2] != "+":
                text = text[:start]
            line_begins = source.startswith("\n", at) and tag[0][-3] != "+"
            at += line_begins
        parts += [text, *((tag[1], _with_in_for_text(tag[2]), tag[3]) if tag.lastindex else (tag[0],))]
    return "".join([*parts, source[at:]])


def _with_in_for_text(code: str) -> str:
    """The code of one tag, with `in` for text wherever it stands."""
    levels: list[list[str]] = [[]]  # what the brackets that are open hold so far
    for piece in _CODE.findall(code):
        if piece in ("(", "[", "{"):
            levels.append([piece])
        elif piece in (")", "]", "}") and len(levels) > 1:
            first, *inner = levels.pop()
            levels[-1].append(f"{first}{_comparisons(inner)}{piece}")
        else:
            levels[-1].append(piece)
    return _comparisons(levels[0]) if len(levels) == 1 else code


def _comparisons(pieces: Sequence[str]) -> str:
    """Code in pieces, a bracket with what it holds being one, with `in` for text."""
    is_loop = next((piece for piece in pieces if not piece.isspace()), "") == "for"
    done: list[str] = []
    place = 0
    while place < len(pieces):
        piece, place = pieces[place], place + 1
        if piece != "in" or is_loop:
            is_loop = is_loop and piece != "in"  # its first one
            done.append(piece)
            continue
        end = place
        while end < len(pieces) and not _AROUND_IN.fullmatch(pieces[end]):
            end += 1
        last = len(done)
        while last and done[last - 1].isspace():
            last -= 1
        negated = last > 0 and done[last - 1] == "not"
        start = last = last - negated
        while start and not _AROUND_IN.fullmatch(done[start - 1]):
            start -= 1
        while start < last and done[start].isspace():
            start += 1
        compared = _contains(_operand(done[start:last]), _operand(pieces[place:end]))
        if compared is None:
            done.append(piece)
            continue
        space = " " if pieces[end - 1].isspace() else ""
        done[start:] = [f"(not {compared})" if negated else compared, space]
        place = end
    return "".join(done)


def _operand(pieces: Sequence[str]) -> str:
    """Code that may stand before a dot; empty if there is none."""
    text = "".join(pieces).strip()
    words = [piece for piece in pieces if not piece.isspace()]
    simple = len(words) == 1 or all(word == "." or word[0] in "[(" or word.isidentifier() for word in words)
    return text if simple or not text else f"({text})"


def _contains(part: str, whole: str) -> str | None:
    """`part in whole` for lists, objects and text; None if it has to stay as it is."""
    if not part or whole[:1] in ("", "[", "{") or len(part) + len(whole) > _MAX_OPERAND_CHARACTERS:
        return None
    if len(part) > 2 and re.fullmatch(_STRING, part, re.DOTALL):
        return f"({part} in {whole} or ({whole} is string and ({whole}.split({part}) | length > 1)))"
    # Splitting at nothing would take all memory.
    is_part = f"{part} == '' or ({whole}.split({part}) | length > 1)"
    return f"({part} in {whole} or ({part} is string and {whole} is string and ({is_part})))"


class _Decoder:
    """Decodes the tokens of one answer; an incomplete character waits for its remaining tokens.

    The library's `TokenizerStream` loses the token after an invalid byte, and its `decode` stops with U+FFFD at the
    first byte that is not (yet) UTF-8, whatever follows. So the ids since the last complete character are decoded
    together with the group before them, because some tokenizers strip a sequence's first space. Bytes that cannot
    become a character turn into U+FFFD as soon as a complete character follows.
    """

    BROKEN = "\ufffd"
    MAX_PENDING = 4  # a character has at most four bytes, and each token at least one

    def __init__(self, tokenizer: Any, control_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._control_ids = control_ids
        self._before: list[int] = []
        self._before_text = ""
        self._pending: list[int] = []
        self._shown = 0  # characters of what waits: a token may end one character and begin another
        self._limit = self.MAX_PENDING

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        if token in self._control_ids:
            return ""
        self._pending.append(token)
        for start in range(len(self._pending)):
            broken, group = self._pending[:start], self._pending[start:]
            text = self._text(group)
            if not text.endswith(self.BROKEN):
                text = ((self._text(broken) if broken else "") + text)[self._shown :]
                if text:
                    self._before, self._before_text = group, self._decode(group)
                self._pending, self._shown, self._limit = [], 0, self.MAX_PENDING
                return text
        if len(self._pending) > self._limit:
            new = self._text([self._pending.pop(0)])[self._shown :]
            self._shown = 0
            return new
        complete = self._text(self._pending).rstrip(self.BROKEN)
        new, self._shown = complete[self._shown :], max(self._shown, len(complete))
        if new:  # what follows is the beginning of the next one
            self._limit = len(self._pending) + self.MAX_PENDING
        return new

    def _text(self, group: list[int]) -> str:
        return self._decode(self._before + group).removeprefix(self._before_text)

    def _decode(self, group: list[int]) -> str:
        return str(self._tokenizer.decode(np.array(group, np.int32)))


class _StopFilter:
    """Ends the text before a stop string, and holds back text that could be the beginning of one.

    Attributes:
        found: a stop string came, and the text ended before it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Adds text and returns as much as can be shown now."""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        end = len(self._held) - self._possible()
        safe, self._held = self._held[:end], self._held[end:]
        return safe

    def flush(self) -> str:
        """Returns the text that was held back, when the answer ended for another reason."""
        rest, self._held = self._held, ""
        return rest

    def _possible(self) -> int:
        """Length of the longest suffix of the text that is the beginning of a stop string."""
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
        return math.isnan(value)  # an optional column that only other rows fill
    return value is None or (isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0)


def _messages(given: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    messages = given.get("messages")
    if not isinstance(messages, (list, tuple, np.ndarray)):
        raise RequestError("bad_request", "messages must be a list with at least one message")
    read = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    called: dict[str, str] = {}
    for index, message in enumerate(read):
        called |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool":
            if message["tool_call_id"] not in called:
                raise RequestError(
                    "bad_request", f"tool_call_id of messages[{index}] answers no call before it"
                )
            message["name"] = called[message["tool_call_id"]]  # some templates show it
    return read


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError("bad_request", f"{where} is not an object")
    if message.get("role") not in ROLES:
        raise RequestError("bad_request", f"role of {where} must be one of {', '.join(ROLES)}")
    role = "system" if message["role"] == "developer" else str(message["role"])
    more = {"assistant": "tool_calls", "tool": "tool_call_id"}.get(role)
    given = {key: value for key, value in message.items() if not _absent(value)}
    if unknown := sorted(str(key) for key in given.keys() - {"role", "content", "name", more}):
        raise RequestError("bad_request", f"unknown field {', '.join(unknown)} in {where}")
    if "name" in given:
        _text(given["name"], f"name of {where}")  # only checked: chat templates do not use it
    read: dict[str, Any] = {"role": role}
    if "tool_calls" in given:
        read |= {"content": "", "tool_calls": _calls(given["tool_calls"], f"tool_calls of {where}")}
    if "tool_calls" not in given or "content" in given:
        read["content"] = _text(given.get("content"), f"content of {where}")
    if role == "tool":
        read["tool_call_id"] = _text(given.get("tool_call_id"), f"tool_call_id of {where}")
    return read


def _calls(value: Any, what: str) -> list[dict[str, Any]]:
    """The calls of an earlier answer, with their arguments as objects: templates write them as JSON."""
    if not isinstance(value, (list, tuple, np.ndarray)) or not 0 < len(value) <= MAX_TOOLS:
        raise RequestError("bad_request", f"{what} must be a list of 1 to {MAX_TOOLS} calls")
    read = []
    for call in value:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type") != "function":
            raise RequestError(
                "bad_request",
                f'{what} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}',
            )
        name, text = (
            _tool_name(function.get("name"), what),
            _text(function.get("arguments"), f"arguments in {what}"),
        )
        try:
            arguments = json.loads(text or "{}", parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError("bad_request", f"arguments in {what} are not JSON") from error
        if not isinstance(arguments, dict):
            raise RequestError("bad_request", f"arguments in {what} are no JSON object")
        read.append(_call_of(_text(call.get("id"), f"id in {what}"), name, arguments))
    return read


def _call_of(identity: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tool_name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not TOOL_NAME.fullmatch(value):
        raise RequestError("bad_request", f"a name in {what} must be 1 to 64 letters, digits, '_', '-'")
    return value


def _tool_calls(last: Mapping[str, Any], answer: str) -> list[dict[str, Any]]:
    """The calls of a last item as a completion has them: nine letters and digits are an id that every template takes.

    Args:
        answer: id of the completion.
    """
    ids = (hashlib.sha256(f"{answer}.{index}".encode()).hexdigest()[:9] for index in range(MAX_CALLS))
    calls = last.get("tool_calls", ())
    return [
        {"id": identity, "type": "function", "function": call}
        for identity, call in zip(ids, calls, strict=False)
    ]


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
    if not least <= value <= most or value != int(value):
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


def _boolean(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, (bool, np.bool_)):
        raise RequestError("bad_request", f"{key} must be true or false")
    return bool(value)


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    """`max_completion_tokens` is a newer word for `max_tokens`; a client that says both must mean the same."""
    old, new = (_integer(given, key, 1, 1 << 31) for key in ("max_tokens", "max_completion_tokens"))
    if None not in (old, new) and old != new:
        raise RequestError("bad_request", "max_tokens and max_completion_tokens differ: give one of them")
    return new if old is None else old


def _check_habits(given: Mapping[str, Any]) -> None:
    """Refuses what OpenAI's clients send by habit where it asks for something."""
    for key in ("user", "model"):
        _text(given.get(key, ""), key)  # one model is here, whatever a client calls it
    for key in ("frequency_penalty", "presence_penalty"):
        if _number(given, key, -100.0, 100.0):
            raise RequestError("bad_request", f"{key} must be 0: use repetition_penalty instead")
    if _boolean(given, "logprobs"):
        raise RequestError("bad_request", "logprobs must be false: an answer has no log probabilities")
    options = given.get("stream_options", {})
    good = isinstance(options, Mapping) and options.keys() <= {"include_usage"}
    if not good or options.get("include_usage") not in (None, False, True):
        raise RequestError("bad_request", "stream_options may have include_usage only, true or false")


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


@dataclass(frozen=True, kw_only=True)
class _Guidance:
    """What an answer must look like.

    The library's own `json_schema` and `regex` are written as a grammar here, because only a grammar can say
    `no_forcing`: the model chooses the tokens of literal text, too. Else the library encodes that text, and the rest of
    a character whose first byte is decided becomes U+FFFD. White space is compact unless a schema says otherwise in
    `x-guidance`: small models write line breaks until their last token.

    Attributes:
        grammar: for the library, in its variant of Lark.
        is_json: a finished answer is JSON.
        asked_by: the field of the request.
        parts: line of the grammar → what of the field stands there, for an error.
    """

    grammar: str
    is_json: bool
    asked_by: str = "response_format"
    parts: Mapping[int, str] = field(default_factory=dict)

    HEAD: ClassVar = '%llguidance {"no_forcing": true}\nstart: '
    SPACING: ClassVar = {"whitespace_flexible": False}
    QUOTED: ClassVar = {"/": r"\/", "\n": r"\n", "\r": r"\r"}

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> _Guidance | None:
        """Reads the field `response_format` (an object, or its JSON); None if the answer is free.

        Raises:
            RequestError: it is invalid.
        """
        value = given.get("response_format")
        if value is None or value == "":
            return None
        if isinstance(value, str):
            value = _response_format(value)
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return cls.for_schema({"type": "object"})
        if kind == "regex" and isinstance(value.get("regex"), str) and value["regex"]:
            return cls.for_regex(_text(value["regex"], "regex of response_format"))
        if kind == "json_schema":
            nested = value.get("json_schema")
            schema = nested.get("schema") if isinstance(nested, Mapping) else value.get("schema")
            if isinstance(schema, Mapping):
                return cls.for_schema(schema)
        raise RequestError(
            "bad_request",
            'response_format must be {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": …}} '
            'or {"type": "regex", "regex": …}',
        )

    @classmethod
    def for_schema(cls, schema: Mapping[str, Any]) -> _Guidance:
        """JSON that a schema admits."""
        spacing = schema.get("x-guidance", {})
        if isinstance(spacing, Mapping):
            schema = {**schema, "x-guidance": {**cls.SPACING, **spacing}}
        return cls(grammar=cls.HEAD + cls.of_json(schema, "response_format"), is_json=True)

    @staticmethod
    def of_json(schema: Mapping[str, Any], what: str) -> str:
        """A part of a grammar: JSON that a schema admits.

        Raises:
            RequestError: it is no schema, or too large a one.
        """
        if _items(schema) > MAX_ITEMS:
            raise RequestError(
                "bad_request", f"minItems and maxItems in {what} are more than {MAX_ITEMS} together"
            )
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError("bad_request", f"the schema of {what} is not JSON") from error
        return f"%json {_text(text, what)}"

    @classmethod
    def for_regex(cls, regex: str) -> _Guidance:
        """Text that a regular expression matches as a whole."""
        return cls(grammar=cls.HEAD + cls.of_regex(regex), is_json=False)

    @classmethod
    def of_regex(cls, regex: str) -> str:
        """A part of a grammar: the literal of a regular expression."""
        quoted = re.sub(
            r"\\?([/\n\r])|\\.", lambda match: cls.QUOTED.get(match[1], match[0]), regex, flags=re.DOTALL
        )
        return f"/{quoted}/"

    def check(self, text: str) -> None:
        """Checks a finished answer: the library stops anywhere in a schema that has no finite answer.

        Raises:
            GuidanceError: it is not what it should be.
        """
        if not self.is_json:
            return
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GuidanceError("the answer ended before it was what response_format asks for") from error


@dataclass(frozen=True, kw_only=True)
class _Tools:
    """The tools of a request that may be called.

    Attributes:
        functions: name, perhaps a description, and parameters: a schema of an object.
        named: the one that must be called; empty for any.
        required: one must be called.
        most: calls in one answer.
    """

    functions: tuple[dict[str, Any], ...]
    named: str = ""
    required: bool = False
    most: int = MAX_CALLS

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> _Tools | None:
        """Reads `tools`, `tool_choice` and `parallel_tool_calls`; None where no tool may be called: it is not shown.

        Raises:
            RequestError: they are invalid.
        """
        tools, choice = given.get("tools"), given.get("tool_choice", "auto")
        several = _boolean({"parallel_tool_calls": True, **given}, "parallel_tool_calls")
        if tools is None:
            if alone := sorted(given.keys() & {"tool_choice", "parallel_tool_calls"}):
                raise RequestError("bad_request", f"{alone[0]} without tools")
            return None
        if not isinstance(tools, (list, tuple, np.ndarray)) or len(tools) > MAX_TOOLS:
            raise RequestError("bad_request", f"tools must be a list of 1 to {MAX_TOOLS} functions")
        functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(tools))
        names = [function["name"] for function in functions]
        if len(set(names)) < len(names):
            raise RequestError("bad_request", "tools has a name twice")
        if len(json.dumps(functions)) > MAX_TOOLS_CHARACTERS:
            raise RequestError("bad_request", f"tools has more than {MAX_TOOLS_CHARACTERS} characters")
        if _items([function["parameters"] for function in functions]) > MAX_ITEMS:
            raise RequestError(
                "bad_request", f"minItems and maxItems in tools are more than {MAX_ITEMS} together"
            )
        named = _choice(choice, names)
        if "prompt" in given:
            raise RequestError("bad_request", "tools need messages, not a prompt")
        if choice == "none":
            return None
        if _Guidance.parse(given) is not None:
            raise RequestError("bad_request", "tools and response_format exclude each other")
        most = MAX_CALLS if several and not named else 1
        return cls(functions=functions, named=named, required=bool(named) or choice == "required", most=most)


def _function(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise RequestError(
            "bad_request", f'{where} must be {{"type": "function", "function": {{"name", …}}}}'
        )
    if unknown := sorted(
        str(key) for key in function.keys() - {"name", "description", "parameters", "strict"}
    ):
        raise RequestError("bad_request", f"unknown field {', '.join(unknown)} in {where}.function")
    read: dict[str, Any] = {"name": _tool_name(function.get("name"), f"{where}.function")}
    if function.get("description") is not None:
        read["description"] = _text(function["description"], f"description of {where}.function")
    parameters = function.get("parameters")
    parameters = NO_PARAMETERS if parameters is None else parameters
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError("bad_request", f"parameters of {where}.function must be a schema of an object")
    try:
        text = json.dumps(parameters, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError("bad_request", f"parameters of {where}.function are not JSON") from error
    _text(text, f"parameters of {where}.function")
    return {**read, "parameters": {"type": "object", **parameters}}


def _choice(choice: Any, names: Sequence[str]) -> str:
    """The name of the tool that must be called; empty where none is named."""
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return ""
    function = (
        choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    )
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        words = '"auto", "none", "required" or {"type": "function", "function": {"name": …}}'
        raise RequestError("bad_request", f"tool_choice must be {words}")
    if name not in names:
        raise RequestError("bad_request", "tool_choice names no function of tools")
    return str(name)


@dataclass(frozen=True, kw_only=True)
class _CallForm:
    """How a model is shown tools, and how it writes calls: `{"name": …, "arguments": …}`, framed. The values here are
    the form for templates that have none of their own.

    Attributes:
        own: the template shows tools, calls and results by itself.
        opening, between, closing: what stands before, between and behind calls; no `between` means one at most.
        arguments: the key of the arguments.
        takes_system: the template shows a system message.
        control: the special tokens, which are no text for the library.
    """

    own: bool = False
    opening: str = "<tool_call>\n"
    between: str = "\n</tool_call>\n<tool_call>\n"
    closing: str = "\n</tool_call>"
    arguments: str = "arguments"
    takes_system: bool = True
    control: Mapping[str, int] = field(default_factory=dict)

    INSTRUCTIONS: ClassVar = (
        "You can call functions. Each line between <tools> and </tools> describes one:\n"
        "<tools>\n{functions}\n</tools>\n"
        "To call a function, answer with its name and its arguments as JSON, and nothing else:\n"
        '<tool_call>\n{{"name": "NAME", "arguments": {{…}}}}\n</tool_call>'
    )
    SPACING: ClassVar = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    TEXT: ClassVar = "/(?s:.+)/"
    LEAST_MARK: ClassVar = 3  # characters: a shorter one begins many texts

    @property
    def mark(self) -> str:
        """What tells a call from text wherever it stands; empty if only the beginning of an answer does."""
        if special := max(filter(self.opening.startswith, self.control), key=len, default=""):
            return special
        word = next(iter(self.opening.split()), "")
        return word if len(word) >= self.LEAST_MARK else ""

    @property
    def beginning(self) -> str:
        """What an answer that calls begins with."""
        return f'{self.opening}{{"name": "'

    def head(self, name: str) -> str:
        """What stands before the arguments of a call."""
        return f'{{"name": "{name}", "{self.arguments}": '

    def write(self, call: Mapping[str, Any]) -> str:
        function = call["function"]
        return f"{self.head(function['name'])}{json.dumps(function['arguments'], ensure_ascii=False)}}}"

    def as_text(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, str]]:
        """A chat for a template that knows no tools: they stand in the system message, and results are the user's."""
        chat: list[dict[str, str]] = []
        answered = False
        for message in messages:
            role, content = message["role"], message["content"]
            if calls := message.get("tool_calls"):
                space = "\n" if content else ""
                written = self.between.join(map(self.write, calls))
                content = f"{content}{space}{self.opening}{written}{self.closing}"
            if role == "tool":
                role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if answered and role == "user":  # templates may insist on turns
                chat[-1]["content"] += f"\n{content}"
            else:
                chat.append({"role": role, "content": content})
            answered = message["role"] == "tool"
        if functions:
            self._instruct(chat, functions)
        return chat

    def _instruct(self, chat: list[dict[str, str]], functions: Sequence[Mapping[str, Any]]) -> None:
        lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        text = self.INSTRUCTIONS.format(functions=lines)
        first = chat[0] if chat else {}
        if first.get("role") == "system":
            first["content"] += f"\n\n{text}"
        elif self.takes_system:
            chat.insert(0, {"role": "system", "content": text})
        elif user := next((message for message in chat if message["role"] == "user"), None):
            user["content"] = f"{text}\n\n{user['content']}"

    def guidance(self, tools: _Tools) -> _Guidance:
        """Text or calls, or calls alone, as a grammar. A text has nothing in it that opens a call."""
        lines, parts = self._start(tools), dict[int, str]()
        several = f" ({self._symbols(self.between)} call){{0,{tools.most - 1}}}" if self.between else ""
        lines.append(f"calls: {self._symbols(self.opening)} rest")
        lines.append(f"rest: call{several if tools.most > 1 else ''} {self._symbols(self.closing)}")
        wanted = {
            index: function
            for index, function in enumerate(tools.functions)
            if tools.named in ("", function["name"])
        }
        lines.append(f"call: {' | '.join(f'call_{index}' for index in wanted)}")
        for index, function in wanted.items():
            what = f"tools[{index}].function.parameters"
            try:
                schema = {**_ending(function["parameters"]), "x-guidance": self.SPACING}
            except RecursionError as error:
                raise RequestError("bad_request", f"{what} is nested too deeply") from error
            lines.append(f'call_{index}: {_literal(self.head(function["name"]))} arguments_{index} "}}"')
            lines.append(f"arguments_{index}: {_Guidance.of_json(schema, what)}")
            parts[len(lines) + 1] = what
        return _Guidance(
            grammar=_Guidance.HEAD + "\n".join(lines), is_json=False, asked_by="tools", parts=parts
        )

    def _start(self, tools: _Tools) -> list[str]:
        """The first rule, and what it needs. A mark that is text ends the text before it, at once; one that is a token
        is no text."""
        if tools.required:
            return ["calls"]
        mark = self.mark
        if not mark:
            begins = f"{re.escape(self.beginning)}(?s:.*)"
            return ["TEXT? | calls", f"TEXT: {self.TEXT} & ~{_Guidance.of_regex(begins)}"]
        ends = f"(?s:.*){re.escape(mark)}"
        text = f"TEXT: {self.TEXT} & ~{_Guidance.of_regex(f'{ends}(?s:.*)')}"
        if mark in self.control:
            return ["TEXT? calls?", text]
        behind = self._symbols(self.opening.removeprefix(mark))
        return [f"TEXT? | marked {behind} rest", text, f"marked[lazy]: {_Guidance.of_regex(ends)}"]

    def _symbols(self, text: str) -> str:
        """A text as symbols of a grammar; special tokens in it are tokens."""
        parts = re.split(f"({_any_of(self.control)})", text)
        return " ".join(
            f"<[{self.control[part]}]>" if part in self.control else _literal(part) for part in parts if part
        )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _CallFilter:
    """Tells the calls of an answer from its text, and holds back what could be the beginning of one.

    Attributes:
        began: a call was opened; nothing behind that is text.
    """

    def __init__(self, form: _CallForm) -> None:
        self._form = form
        self._tokens = {token: text for text, token in form.control.items()}
        self._mark = form.mark
        self._held = ""
        self._shown = False
        self.began = False

    def push(self, token: int, text: str) -> str:
        """Adds a token and its text, and returns as much text as can be shown now."""
        special = self._tokens.get(token, "")
        is_mark = bool(special) and special == self._mark
        start = len(self._held) if is_mark else -1
        self._held += special if is_mark or (special and self.began) else text
        if self.began:
            return ""
        if start < 0:
            start = self._opened()
        self.began = start >= 0
        end = start if self.began else len(self._held) - self._possible()
        shown = self._held[:end].rstrip()  # nobody needs the space between a text and a call
        self._held = self._held[start if self.began else len(shown) :]
        self._shown = self._shown or bool(shown)
        return shown

    def flush(self) -> str:
        """Returns the text that was held back, when the answer ended."""
        return "" if self.began else self._held

    def whole(self) -> list[dict[str, str]]:
        """Name and arguments, as text, of each call; none where they are not complete."""
        form, text, calls = self._form, self._held, list[dict[str, str]]()
        at = len(form.opening) if self.began and text.startswith(form.opening) else len(text)
        while True:
            try:
                call, end = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError):
                return []
            head = form.head(call["name"])
            calls.append({"name": call["name"], "arguments": text[at + len(head) : end - 1]})
            if not form.between or not text.startswith(form.between, end):
                return calls if text[end:] == form.closing else []
            at = end + len(form.between)

    def _opened(self) -> int:
        """Where a call begins; -1 if none does."""
        if self._mark:
            return -1 if self._mark in self._form.control else self._held.find(self._mark)
        return 0 if not self._shown and self._held.startswith(self._form.beginning) else -1

    def _possible(self) -> int:
        """How many characters at the end may be the beginning of a call."""
        if not self._mark:
            return 0 if self._shown or not self._form.beginning.startswith(self._held) else len(self._held)
        return max((n for n in range(1, len(self._mark)) if self._held.endswith(self._mark[:n])), default=0)


# A schema may leave open how much comes; small models write until their last token then.
_OPEN_CHARACTERS, _OPEN_ITEMS, _OPEN_PROPERTIES = 256, 16, 8
_OPEN_NUMBER, _OPEN_STEP = 10**12, 0.000001
_OPEN_NAMES = "^[A-Za-z0-9_. -]{1,64}$"
_SCALARS: Mapping[str, Any] = {"type": ["string", "number", "boolean", "null"]}
_SAYS_NOTHING = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$comment", "$defs", "definitions", "x-guidance"),
    }
)
_KEYWORDS: Mapping[str, frozenset[str]] = {
    "object": frozenset(
        {
            *("properties", "required", "additionalProperties", "patternProperties"),
            *("minProperties", "maxProperties"),
        }
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
}


def _ending(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of which each answer comes to an end: it admits less than `parameters`, and nothing else.

    Schemas that combine others stay as they are: to narrow a part of a combination may widen the whole.
    """
    if _combines(parameters):
        return dict(parameters)
    if not parameters.get("properties") and parameters.keys() - _SAYS_NOTHING <= {"type", "properties"}:
        return {**parameters, "additionalProperties": False}  # no arguments, in everybody's use
    return dict(_narrowed(parameters))


def _combines(schema: Any) -> bool:
    """True if an answer must fit several schemas in it, or must not fit one."""
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, Mapping):
        return False
    says = schema.keys() - _SAYS_NOTHING
    either = [key for key, kind in (("$ref", str), ("anyOf", list)) if isinstance(schema.get(key), kind)]
    several = any(isinstance(schema.get(key), list) for key in ("oneOf", "allOf"))
    return several or (bool(either) and len(says) > 1) or any(map(_combines, schema.values()))


def _narrowed(schema: Any) -> Any:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        return schema
    says, narrow = schema.keys() - _SAYS_NOTHING, dict(schema)
    for key in ("$defs", "definitions"):
        if isinstance(schema.get(key), Mapping):
            narrow[key] = _each_narrowed(schema[key])
    if says == {"anyOf"} and isinstance(schema["anyOf"], list):
        return {**narrow, "anyOf": [_narrowed(part) for part in schema["anyOf"]]}
    if not says:
        narrow |= _SCALARS
    elif not says <= {"type", *itertools.chain(*_KEYWORDS.values())}:
        return narrow
    elif "type" not in says:
        narrow["type"] = next(kind for kind, keywords in _KEYWORDS.items() if keywords & says)
    kinds = narrow["type"] if isinstance(narrow["type"], list) else [narrow["type"]]
    if "string" in kinds:
        narrow.setdefault("maxLength", max(_OPEN_CHARACTERS, _count(schema, "minLength")))
    if "number" in kinds or "integer" in kinds:
        _narrow_number(narrow, whole="number" not in kinds)
    if "array" in kinds:
        _narrow_array(narrow)
    if "object" in kinds:
        _narrow_object(narrow)
    return narrow


def _each_narrowed(schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _narrowed(part) for name, part in schemas.items()}


def _count(schema: Mapping[str, Any], key: str) -> int:
    value = schema.get(key)
    return value if isinstance(value, int) else 0


def _narrow_number(narrow: dict[str, Any], *, whole: bool) -> None:
    bounds = {
        key: narrow[key]
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        if key in narrow
    }
    if not all(isinstance(bound, (int, float)) and abs(bound) <= _OPEN_NUMBER for bound in bounds.values()):
        return
    least = max((bounds[key] for key in bounds if "inimum" in key), default=None)
    most = min((bounds[key] for key in bounds if "aximum" in key), default=None)
    if least is None:
        least = narrow["minimum"] = -_OPEN_NUMBER if most is None else most - _OPEN_NUMBER
    if most is None:
        most = narrow["maximum"] = max(0, least) + _OPEN_NUMBER
    if not whole and most - least >= 1:  # between two that are closer there may be no step
        narrow.setdefault("multipleOf", _OPEN_STEP)


def _narrow_array(narrow: dict[str, Any]) -> None:
    first = narrow.get("prefixItems")
    if isinstance(first, list):
        narrow["prefixItems"] = [_narrowed(part) for part in first]
    narrow["items"] = _narrowed(narrow.get("items", True))
    most = len(first) if isinstance(first, list) else _OPEN_ITEMS
    narrow.setdefault("maxItems", max(most, _count(narrow, "minItems")))


def _narrow_object(narrow: dict[str, Any]) -> None:
    more = _narrowed(narrow.get("additionalProperties", True))
    properties, patterns = narrow.get("properties"), narrow.get("patternProperties")
    for key, parts in (("properties", properties), ("patternProperties", patterns)):
        if isinstance(parts, Mapping):
            narrow[key] = _each_narrowed(parts)
    required, named = narrow.get("required"), narrow.get("properties", {})
    names = required if isinstance(required, list) and all(isinstance(name, str) for name in required) else []
    if names and not patterns and isinstance(named, Mapping):  # what is no schema is the library's to refuse
        properties = narrow["properties"] = {**named, **{name: more for name in names if name not in named}}
    if properties or patterns:
        narrow["additionalProperties"] = (
            more if "additionalProperties" in narrow and narrow["additionalProperties"] is not True else False
        )
    elif more is not False:
        narrow |= {"patternProperties": {_OPEN_NAMES: more}, "additionalProperties": False}
        narrow.setdefault("maxProperties", max(_OPEN_PROPERTIES, _count(narrow, "minProperties")))


def _response_format(value: str) -> Any:
    """The JSON text of a response_format, parsed: 0.1.0's packages have it as text among MLflow's params."""
    if len(value) > MAX_RESPONSE_FORMAT_CHARACTERS:
        raise RequestError(
            "bad_request", f"response_format has more than {MAX_RESPONSE_FORMAT_CHARACTERS} characters"
        )
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError("bad_request", "response_format is not JSON") from error


def _items(schema: Any) -> float:
    """The sum of every `minItems` and `maxItems` in a schema; each counts as `MAX_ITEMS` + 1 at most."""
    total, rest = 0.0, [schema]
    while rest:
        part = rest.pop()
        if isinstance(part, Mapping):
            counts = (part.get("minItems"), part.get("maxItems"))
            total += sum(max(0, min(MAX_ITEMS + 1, n)) for n in counts if isinstance(n, (int, float)))
            rest += part.values()
        elif isinstance(part, list):
            rest += part
    return total


# What the library says of a grammar that it does not take, and what we say of it.
_UNSUPPORTED = {
    r'Unimplemented keys: \[([\w", $-]+)\]': "{} in a schema is not supported",
    r"Unknown format: ([\w-]{1,40})": "the string format {} is not supported",
    r"oneOf constraints": "oneOf is not supported where several of its schemas may fit one value",
    r"min/maxProperties only": "minProperties and maxProperties are not supported beside properties that are optional",
    r"look-?around": "look-around and word boundaries in a regular expression are not supported",
    r"backreferences": "back-references in a regular expression are not supported",
    r"not present in a registry": "a $ref to another document is not supported",
    r"recursion limit": "the schema is nested too deeply",
}
_WRONG = {
    r"Unsatisfiable schema": "no answer can satisfy the schema",
    r"Pointer .* does not exist": "a $ref points to nothing",
    r"regex parse error|invalid regex|lexer error": "a regular expression is invalid",
    r"Invalid type|must be an? |invalid type|unknown field|Expected [a-z0-9 ]+ for '|invalid multiple of": (
        "the schema is invalid"
    ),
}


def _refusal(error: Exception, guidance: _Guidance | None) -> RequestError | GuidanceError | None:
    """The error in the terms of the request that met it, judged by its text: the library has no error codes."""
    text = str(error)
    if guidance is not None and text.startswith("Error creating grammar: "):
        reason, _, _ = text.partition("\n   1 | ")  # then comes the grammar, with the schema in it
        line = re.search(r"\b(\d+)\(\d+\): ", reason)
        return _grammar_refusal(reason, guidance.parts.get(int(line[1]) if line else 0, guidance.asked_by))
    if "exceeds max length" in text or "cannot be greater than model context_length" in text:
        return RequestError("prompt_too_long", text)
    if guidance is None:
        return None
    if text.startswith("Error creating llg_tokenizer: "):
        return GuidanceError(f"this model's tokenizer does not support {guidance.asked_by}")
    if text.startswith(("Error committing tokens: ", "Error computing mask: ")):
        return GuidanceError(f"{guidance.asked_by} is too complex for this model's library")
    return None


def _grammar_refusal(reason: str, what: str) -> RequestError | GuidanceError:
    for pattern, words in _UNSUPPORTED.items():
        if found := re.search(pattern, reason):
            return GuidanceError(f"{what}: {words.format(*found.groups())}")
    for pattern, words in _WRONG.items():
        if re.search(pattern, reason):
            return RequestError("bad_request", f"{what}: {words}")
    return GuidanceError(f"{what}: this schema or regular expression is not supported")


# MLflow loads model code as a top-level module; an import from the edge_agent package must not set a model.
if "." not in __name__:
    mlflow.models.set_model(GenaiModel())
