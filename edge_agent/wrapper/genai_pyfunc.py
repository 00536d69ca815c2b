"""MLflow model code for onnxruntime-genai: the one Python file of a published package.

It is copied into every package byte for byte, and a device runs it because it knows its sha256. So it is
self-contained (mlflow, onnxruntime-genai, numpy, pandas, standard library), and works in any MLflow server.

It owns one loaded model and its generators: those in use, and those kept for later prompts with the same
beginning. It refuses invalid requests with `RequestError`, and those that the library cannot follow with
`GuidanceError`. It knows nothing of queues, deadlines or default system prompts.

Flow of a request:
    _rows, _Request  what arrived, checked field by field
    _Prompts         text to token ids; special tokens only where the template or a raw prompt has them
    _budget          prompt and new tokens against the context, before anything is allocated
    _Sessions        a kept generator rewound to the longest common prefix, or room for a new one
    _Lane            prefill in slices, decode; one step for each `next`

Greedy is greedy: the same request gets the same tokens, whatever was asked before or is asked beside it. So no prompt
token is ever run alone, and no two requests share a generator: both take another path through the arithmetic.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
LEAST_TOKENS = 2  # one prompt token alone takes another path through the arithmetic than two or more
ROUND_TOKENS = 256  # a kept generator takes memory in such steps, so that the next prompt fits in, too
COMMON_TOKENS = 16  # a shorter beginning of a chat is not worth another owner's generator
KV_ELEMENT_BYTES = 4  # the model builder's int4 models for the CPU keep keys and values in float32
DEFAULT_MAX_TOKENS = 256
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_RESPONSE_FORMAT_CHARACTERS = 32_768
MAX_ITEMS = 10_000  # minItems and maxItems of a schema together: its grammar has a rule for each item
ROLES = ("system", "developer", "user", "assistant")  # developer is a newer word for system
TEMPLATE_REFUSES = "the chat template refuses the messages"
NO_TEMPLATE = "this model has no chat template: send it a prompt"


class GenaiModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers chat or raw prompts with an ONNX folder made by the onnxruntime-genai model builder."""

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
            GuidanceError: the library cannot follow its response_format.
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
            llm/v1/chat chunk for each delta; the last one has the three. A delta is empty for a prefill slice and for
            a step that completes no text.

        Raises:
            RequestError: the request is at fault; raised before the first item with text.
            GuidanceError: the library cannot follow its response_format. What can be known of that before the
                first token is raised before it.
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
                are.
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
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last["finish_reason"]}
        return {**self._head(request, "chat.completion"), "choices": [choice], "usage": usage}

    def _chunks(self, request: _Request, items: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The items of a stream as chunks of a completion, such as MLflow's ChatModel gives."""
        head = self._head(request, "chat.completion.chunk")
        role = {"role": "assistant"}
        for item in items:
            text, end = (item, {}) if isinstance(item, str) else ("", dict(item))
            choice = {
                "index": 0,
                "delta": {**role, "content": text},
                "finish_reason": end.pop("finish_reason", None),
            }
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
    """The library cannot follow a right response_format; the request is not at fault. The message starts with the code.

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

    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    guidance: _Guidance | None = None
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
        return self.greedy and self.request.guidance is None

    def take(self, token: int, *, is_end: bool) -> Iterator[Any]:
        """Adds a token and yields its items: text, and at the end usage and finish_reason."""
        self.first_token = self.first_token or time.perf_counter()
        if not is_end:
            self.answer.append(token)
            yield self.stops.push(self.decoder.push(token))
        if is_end or self.stops.found:
            yield from self.end("stop")
        elif len(self.answer) >= self.max_new:
            yield from self.end("length")

    def end(self, finish_reason: str) -> Iterator[Any]:
        """Ends the answer and yields its last items."""
        self.finish_reason = finish_reason
        if not self.stops.found and (rest := self.stops.flush()):
            yield rest
        ended = time.perf_counter()
        yield {
            "finish_reason": finish_reason,
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
    """One loaded model; turns requests into lanes."""

    def __init__(self, folder: Path, options: _Options) -> None:
        self.options = options
        described = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        files = TokenizerFiles.read(folder / described.get("tokenizer_dir", ""))
        config = og.Config(str(folder))
        if options.threads:
            session_options = {"intra_op_num_threads": int(options.threads)}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._tokenizer = og.Tokenizer(config)
        self.prompts = _Prompts(self._tokenizer, files)
        # genai_config.json may name another end than the tokenizer, and the model was trained on the tokenizer's.
        configured = _ids(described.get("eos_token_id"))
        self.eos = files.end_ids | configured | _ids(self._tokenizer.eos_token_ids)
        end = self.prompts.turn_end if self.prompts.turn_end in self.eos else files.eos_id
        # Of several, guidance lets an answer end at the first one only (0.18).
        if end is not None and (end == self.prompts.turn_end or end not in configured):
            config.overlay(json.dumps({"model": {"eos_token_id": end}}))
        self._model = og.Model(config)
        self._vocabulary = int(described["vocab_size"])
        context_tokens = int(described["context_length"])
        self.context_tokens = min(context_tokens, options.context_tokens or context_tokens)
        kv_tokens = options.kv_bytes // _kv_token_bytes(described["decoder"])
        self.sessions = _Sessions(max(self.context_tokens, kv_tokens))

    def share(self, system: str) -> None:
        """See `GenaiModel.share`."""
        head = [{"role": "system", "content": system}] if system else []
        chats = ([*head, {"role": "user", "content": text}] for text in ("Hi", "?"))
        one, other = map(self.prompts.chat, chats)
        pairs = zip(one[:-LEAST_TOKENS], other, strict=False)
        common = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
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
        prompt = self.prompts.chat(request.messages) if request.messages else self.prompts.raw(request.prompt)
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
        if request.guidance is not None:
            generator_params.set_guidance("lark_grammar", request.guidance.grammar)
        return og.Generator(self._model, generator_params)

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
            GuidanceError: the library cannot follow its response_format.
        """
        try:
            return next(self._steps)
        except StopIteration:
            self.close()
            raise
        except Exception as error:
            self._session.reusable = False  # what the library left in it is unknown
            refusal = _refusal(error, self._job.request)
            self.close()
            if refusal:
                raise refusal from error
            raise

    def close(self) -> None:
        """Ends the lane at any point; may be called more than once."""
        self._steps.close()
        if not self._closed:
            self._closed = True
            if not self._job.answer and len(self._session.tokens) <= len(self._engine.sessions.common):
                self._session.reusable = False  # it ends within what is common as a whole or not at all
            self._engine.sessions.give_back(self._session)

    def _run(self) -> Generator[list[tuple[int, Any]], None, None]:
        job = self._job
        job.prefill_started = time.perf_counter()
        yield from self._prefill()
        job.decode_started = time.perf_counter()
        while not job.finish_reason:
            yield [(job.row, item) for item in self._decode()]

    def _prefill(self) -> Iterator[list[tuple[int, Any]]]:
        """Runs what the generator has not seen yet in slices, with a step after each."""
        session, job = self._session, self._job
        if session.generator is None:
            session.generator = self._engine.generator(job, session.max_length)
        for part in _slices(job.prompt[len(session.tokens) :]):
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
        if is_end and job.request.guidance is not None:
            job.request.guidance.check(self._engine.text(job.answer))
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


def _slices(tokens: Sequence[int]) -> Iterator[list[int]]:
    """A prompt in parts of `SLICE_TOKENS`; a last part of fewer than `LEAST_TOKENS` joins the one before it."""
    start = 0
    while start < len(tokens):
        end = start + SLICE_TOKENS
        if len(tokens) - end < LEAST_TOKENS:
            end = len(tokens)
        yield list(tokens[start:end])
        start = end


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
    """

    MARKERS: ClassVar = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters of Unicode: they mean nothing

    def __init__(self, tokenizer: Any, files: TokenizerFiles) -> None:
        self._tokenizer = tokenizer
        self._prefix = files.prefix
        self._template = _as_hugging_face_reads(files.template)
        frames = self._frames()
        special = {*files.special.values(), *_marks(frames, files)}
        self.turn_end = _turn_end(frames, files)
        self.control_ids = frozenset(token for token, text in files.added.items() if text in special)
        self._special = re.compile(f"(?={_any_of(special)})(.)", re.DOTALL)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """[tokens] ids of the messages in the model's own chat template, ready for the assistant's turn.

        Raises:
            RequestError: the template refuses them.
        """
        marker = self._marker(messages)
        safe = [{**message, "content": self._neutral(message["content"], marker)} for message in messages]
        first, *others = self._render(safe).split(marker)
        tokens = self._encode(first)
        for part in others:
            tokens += self._continuation(part)
        return self._not_empty(tokens, "messages")

    def raw(self, prompt: str) -> list[int]:
        """[tokens] ids of a prompt that contains its own control tokens.

        It begins with what Hugging Face's tokenizer puts there, once: a prompt that brings it gets no second one.
        """
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

    def _marker(self, messages: Sequence[Mapping[str, str]]) -> str:
        for marker in self.MARKERS:
            if not any(marker in message["content"] for message in messages):
                return marker
        raise RequestError("bad_request", "the messages contain every noncharacter from U+FDD0 to U+FDEF")

    def _neutral(self, content: str, marker: str) -> str:
        return self._special.sub(rf"\1{marker}", content)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        template = {} if self._template is None else {"template_str": self._template}
        try:
            text = self._tokenizer.apply_chat_template(
                json.dumps(messages), add_generation_prompt=True, **template
            )
        except RuntimeError as error:
            # Not passed on: its text quotes the template, and may quote the messages.
            missing = "Empty chat template" in str(error)
            raise RequestError("bad_request", NO_TEMPLATE if missing else TEMPLATE_REFUSES) from None
        return str(text)

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
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise RequestError("bad_request", f"{where} is not an object")
    if unknown := sorted(str(key) for key in message.keys() - {"role", "content", "name"}):
        raise RequestError("bad_request", f"unknown field {', '.join(unknown)} in {where}")
    if message.get("role") not in ROLES:
        raise RequestError("bad_request", f"role of {where} must be one of {', '.join(ROLES)}")
    if message.get("name") is not None:
        _text(message["name"], f"name of {where}")  # only checked: chat templates do not use it
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": _text(message.get("content"), f"content of {where}")}


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
    """

    grammar: str
    is_json: bool

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
        if _items(schema) > MAX_ITEMS:
            raise RequestError(
                "bad_request", f"minItems and maxItems in response_format are more than {MAX_ITEMS} together"
            )
        spacing = schema.get("x-guidance", {})
        if isinstance(spacing, Mapping):
            spacing = {**cls.SPACING, **spacing}
        try:
            text = json.dumps({**schema, "x-guidance": spacing}, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError("bad_request", "the schema of response_format is not JSON") from error
        return cls(grammar=f"{cls.HEAD}%json {_text(text, 'response_format')}", is_json=True)

    @classmethod
    def for_regex(cls, regex: str) -> _Guidance:
        """Text that a regular expression matches as a whole."""
        quoted = re.sub(
            r"\\?([/\n\r])|\\.", lambda match: cls.QUOTED.get(match[1], match[0]), regex, flags=re.DOTALL
        )
        return cls(grammar=f"{cls.HEAD}/{quoted}/", is_json=False)

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
    r"Invalid type|must be an? |invalid type|unknown field": "the schema is invalid",
}


def _refusal(error: Exception, request: _Request) -> RequestError | GuidanceError | None:
    """The error in the terms of the request that met it, judged by its text: the library has no error codes."""
    text = str(error)
    if request.guidance is not None and text.startswith("Error creating grammar: "):
        reason, _, _ = text.partition("\n   1 | ")  # then comes the grammar, with the schema in it
        return _grammar_refusal(reason)
    if "exceeds max length" in text or "cannot be greater than model context_length" in text:
        return RequestError("prompt_too_long", text)
    if request.guidance is None:
        return None
    if text.startswith("Error creating llg_tokenizer: "):
        return GuidanceError("this model's tokenizer does not support response_format")
    if text.startswith(("Error committing tokens: ", "Error computing mask: ")):
        return GuidanceError("response_format is too complex for this model's library")
    return None


def _grammar_refusal(reason: str) -> RequestError | GuidanceError:
    for pattern, words in _UNSUPPORTED.items():
        if found := re.search(pattern, reason):
            return GuidanceError(f"response_format: {words.format(*found.groups())}")
    for pattern, words in _WRONG.items():
        if re.search(pattern, reason):
            return RequestError("bad_request", f"response_format: {words}")
    return GuidanceError("response_format: this schema or regular expression is not supported")


# MLflow loads model code as a top-level module; an import from the edge_agent package must not set a model.
if "." not in __name__:
    mlflow.models.set_model(GenaiModel())
