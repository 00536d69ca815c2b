"""Requests, completions, chunks and errors of the MQTT contract: read and encoded. Pure.

Owns the wire shapes (the seed's `llm/v1/chat` and prompt forms, plain text); the rule of each field is in `fields.py`.
Refuses what it does not know, by name: a field that is ignored today is a wrong answer tomorrow.

    payload bytes → `read` → Body → `Body.request` → Request → `Request.document` → the runner
    the runner's text and usage → `completion` → answer bytes
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edge_agent.chat import tools
from edge_agent.chat.fields import check_id, check_topic
from edge_agent.chat.surfaces import WITHOUT_EFFECT, Surface, fields_of
from edge_agent.chat.values import check_text, printable_name, shown
from edge_agent.errors import BadRequest, PromptError, PromptTooLong
from edge_agent.topics import ID_PATTERN

MAX_DEPTH = 64

_BLANK = b" \t\r\n"
_MICROSECOND = 1e-6


class Form(StrEnum):
    """How a request was written, and so how its answer is."""

    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, checked.

    Attributes:
        form: JSON or plain text.
        content: `{"messages": […]}` or `{"prompt": "…"}`.
        options: what the request fixes of temperature, max_tokens, stop, top_p, top_k, repetition_penalty, seed,
            response_format, tools, tool_choice, parallel_tool_calls.
        model: configured name asked for, None for the default model.
        stream: chunks are wanted.
        include_usage: of OpenAI's clients: the stream ends with a chunk that has the usage.
        id: the client's id, or None.
        reply_to: answer topic named in the body (clients without MQTT 5 properties), or None.
        deadline_ms: how long the client waits, or None.
    """

    form: Form
    content: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    id: str | None = None
    reply_to: str | None = None
    deadline_ms: int | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What the runner gets: content and options, nothing about the way it came."""
        return {**self.content, **self.options}


@dataclass(frozen=True, kw_only=True)
class Body:
    """The body of a message, decoded once. What it asks may be refused; how and where to say so is known all the same.

    Attributes:
        form: JSON or plain text, of a refusal as well.
        content: the JSON object, the text, or why it can be neither.
        id: what a JSON body says, where it can be read and could be an id.
        reply_to: what a JSON body says, where it can be read; not checked.
    """

    form: Form
    content: dict[str, Any] | str | PromptError
    id: str | None = None
    reply_to: str | None = None

    def request(self, surface: Surface = Surface.MESSAGE) -> Request:
        """What it asks.

        Args:
            surface: where it came in. Only a message may be plain text.

        Raises:
            PromptTooLong: more bytes than allowed.
            BadRequest: not UTF-8, malformed JSON, or an unknown or invalid field, which is named.
        """
        if isinstance(self.content, PromptError):
            raise self.content
        if isinstance(self.content, dict):
            return _parse_object(self.content, surface)
        if surface is not Surface.MESSAGE:
            raise BadRequest("the request is not a JSON object")
        check_text("the request", self.content)
        chat = [{"role": "user", "content": self.content.strip()}]
        return Request(form=self.form, content={"messages": chat})


def read(payload: bytes, *, limit_bytes: int) -> Body:
    """Decodes a body. One whose first non-blank byte is `{` is JSON; anything else is a plain-text prompt.

    Args:
        payload: as it arrived. A byte order mark in front is no part of the body: editors and shells add it unasked.
        limit_bytes: `limits.payload_bytes`.
    """
    begin = payload.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    form = Form.JSON if begin.startswith(b"{") else Form.TEXT
    try:
        text = _decode(payload, limit_bytes)
    except PromptError as error:
        return Body(form=form, content=error)
    if form is Form.TEXT:
        return Body(form=form, content=text)
    document, problem = _load_json(text)
    given_id, reply_to = document.get("id"), document.get("reply_to")
    return Body(
        form=form,
        content=problem or document,
        id=given_id if isinstance(given_id, str) and ID_PATTERN.fullmatch(given_id) else None,
        reply_to=reply_to if isinstance(reply_to, str) else None,
    )


def parse(payload: bytes, *, limit_bytes: int, surface: Surface = Surface.MESSAGE) -> Request:
    """The request of a body; raises as `Body.request` does."""
    return read(payload, limit_bytes=limit_bytes).request(surface)


def parse_cancel(payload: bytes) -> tuple[str | None, str | None]:
    """Reads a cancel, `{"id": "…", "reply_to": "…"}`: (id, reply_to).

    Raises:
        BadRequest: it is not that.
    """
    try:
        document, problem = _load_json(payload.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRequest("the cancel is not UTF-8") from error
    if problem is not None:
        raise problem
    if not set(document) <= {"id", "reply_to"}:
        raise BadRequest("a cancel has the fields id and reply_to")
    request_id, reply_to = document.get("id"), document.get("reply_to")
    return (
        check_id("id", request_id) if request_id is not None else None,
        check_topic("reply_to", reply_to) if reply_to is not None else None,
    )


def completion(
    *,
    request_id: str,
    created_s: int,
    model: str,
    text: str,
    finish_reason: str,
    usage: dict[str, int],
    timings: dict[str, float],
    tool_calls: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The seed's chat completion object, plus `timings`.

    Args:
        created_s: seconds since 1970.
        model: configured name.
        usage: prompt_tokens, completion_tokens, total_tokens, cached_tokens.
        timings: queue_ms, first_token_ms, total_ms, tokens_per_s.
        tool_calls: see `tools.with_ids`. Beside them there need be no text.
    """
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool_calls:
        message |= {"content": text or None, "tool_calls": tool_calls}
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created_s,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": usage,
        "timings": timings,
    }


def chunk(
    *,
    request_id: str,
    created_s: int,
    model: str,
    seq: int,
    text: str,
    finish_reason: str | None,
    tool_calls: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """One streamed part; `finish_reason` is set on the last one only. Calls are streamed when they are complete."""
    delta: dict[str, Any] = {"content": text}
    if tool_calls:
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(tool_calls)]
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": created_s,
        "model": model,
        "seq": seq,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def timings(
    *,
    queued_s: float,
    started_s: float,
    first_s: float,
    ended_s: float,
    tokens: int,
    measured: Mapping[str, float],
) -> dict[str, float]:
    """The `timings` of a completion, from moments in seconds on one clock.

    Args:
        queued_s, started_s, first_s, ended_s: prompt accepted, taken up, first text, end.
        tokens: completion tokens; the rate leaves the first one out, it is prefill's.
        measured: the model's own times in milliseconds; `total_ms` and `first_token_ms` give a better rate than
            the moments here, between which a whole short answer may arrive at once. A model may say anything: a
            shorter time than a clock shows gives no rate.
    """
    each_s = per_token_s(decode_s=ended_s - first_s, tokens=tokens, measured=measured)
    return {
        "queue_ms": round(max(0.0, started_s - queued_s) * 1000, 1),
        "first_token_ms": round(max(0.0, first_s - queued_s) * 1000, 1),
        "total_ms": round(max(0.0, ended_s - queued_s) * 1000, 1),
        "tokens_per_s": round(1 / each_s, 1) if each_s else 0.0,
    }


def per_token_s(*, decode_s: float, tokens: int, measured: Mapping[str, float]) -> float | None:
    """Seconds for each token after the first one; None where there is none, or no time for it. See `timings`.

    Args:
        decode_s: from the first text to the end.
    """
    if "total_ms" in measured and "first_token_ms" in measured:
        decode_s = (measured["total_ms"] - measured["first_token_ms"]) / 1000
    return decode_s / (tokens - 1) if tokens > 1 and decode_s >= _MICROSECOND else None


def error_document(request_id: str | None, error: PromptError) -> dict[str, Any]:
    """`{"id", "error": {"status", "code", "message", "retry_after_ms"?}}`."""
    body: dict[str, Any] = {"status": error.status, "code": error.code, "message": str(error)}
    if error.retry_after_ms is not None:
        body["retry_after_ms"] = error.retry_after_ms
    return {"id": request_id, "error": body}


def encode(document: dict[str, Any]) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "replace"
    )


def encode_answer(document: dict[str, Any], form: Form) -> bytes:
    """An answer's bytes: the document, or only its text where the request was plain text.

    Plain text has no field for it, so an answer that was cut says so in a last line.
    """
    if form is Form.JSON:
        return encode(document)
    if "error" in document:
        error = document["error"]
        return f"error {error['status']} {error['code']}: {error['message']}".encode("utf-8", "replace")
    choice = document["choices"][0]
    note = cut_note(choice["finish_reason"], document["usage"])
    text: str = choice["message"]["content"]  # tools can be asked for in JSON only
    return (f"{text}\n\n[{note}]" if note else text).encode("utf-8", "replace")


def result(question: str, answer: Mapping[str, Any], *, version: int, flavor: str) -> dict[str, Any]:
    """What `probe --json` and `demo --json` print of an answer."""
    (choice,), timings = answer["choices"], answer["timings"]
    return {
        "question": question,
        "answer": choice["message"]["content"],
        "model": answer["model"],
        "version": version,
        "flavor": flavor,
        "finish_reason": choice["finish_reason"],
        "usage": answer["usage"],
        "queue_ms": timings.get("queue_ms", 0.0),
        "first_token_ms": timings["first_token_ms"],
        "tokens_per_s": timings["tokens_per_s"],
    }


def cut_note(finish_reason: str, usage: Mapping[str, int]) -> str:
    """What to tell a person whose answer ended at its limit; empty for one that is whole."""
    if finish_reason != "length":
        return ""
    tokens = usage.get("completion_tokens", 0)  # 0: the model does not count
    return f"cut at {tokens} tokens" if tokens else "cut at its limit of tokens"


# --- Reading JSON -------------------------------------------------------------------------------------------


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion: a deep document must not break those who read it later."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return depth


def _decode(payload: bytes, limit_bytes: int) -> str:
    if len(payload) > limit_bytes:
        raise PromptTooLong(f"the request has {len(payload)} bytes, at most {limit_bytes} are allowed")
    try:
        text = payload.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request is not UTF-8 (byte {error.start})") from error
    if not text.strip():  # of any kind: a no-break space says nothing either
        raise BadRequest("the request is empty")
    return text


def _load_json(text: str) -> tuple[dict[str, Any], BadRequest | None]:
    """The document, and the first thing that is wrong with it as JSON; empty where it could not be read at all."""
    problems: list[str] = []

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            problems.append("the request has a field twice")
        return document

    def no_constant(name: str) -> None:
        problems.append(f"{name} is not JSON")

    document: Any = None
    try:
        document = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        problems.append(f"the request is not JSON{where}")
    if not isinstance(document, dict):
        problems.append("it is not a JSON object")
        document = {}
    elif _depth(document) > MAX_DEPTH:
        problems.append(f"the request is nested more than {MAX_DEPTH} levels deep")
    return document, BadRequest(problems[0]) if problems else None


def _parse_object(document: dict[str, Any], surface: Surface) -> Request:
    unknown = sorted(set(document) - set(fields_of(surface)))
    if unknown:
        names = ", ".join(shown(name) for name in unknown[:8])
        raise BadRequest(f"unknown field {names}", param=printable_name(unknown[0]))
    given = _checked(document, surface)
    _use_one_name(given)
    tools.check(given)
    if ("messages" in given) == ("prompt" in given):
        wanted = {Surface.CHAT: "messages", Surface.COMPLETION: "prompt"}.get(surface)
        raise BadRequest(f"{wanted} is missing" if wanted else "give either messages or prompt", param=wanted)
    content: dict[str, Any] = {name: given.pop(name) for name in ("messages", "prompt") if name in given}
    envelope = {
        name: given.pop(name)
        for name in ("model", "stream", "id", "reply_to", "deadline_ms")
        if name in given
    }
    options = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
    include_usage = given.get("stream_options", {}).get("include_usage", False)
    return Request(form=Form.JSON, content=content, options=options, include_usage=include_usage, **envelope)


def _checked(document: dict[str, Any], surface: Surface) -> dict[str, Any]:
    """What each field says by its rule; a null says nothing."""
    rules, given = fields_of(surface), {}
    for name, value in document.items():
        if value is not None:
            try:
                given[name] = rules[name](name, value)
            except BadRequest as error:
                error.param = name
                raise
    return given


def _use_one_name(given: dict[str, Any]) -> None:
    """`max_completion_tokens` is a newer word for `max_tokens`; a client that says both must mean the same."""
    newer = given.pop("max_completion_tokens", None)
    if newer is not None and given.setdefault("max_tokens", newer) != newer:
        raise BadRequest(
            "max_tokens and max_completion_tokens differ: give one of them", param="max_completion_tokens"
        )
