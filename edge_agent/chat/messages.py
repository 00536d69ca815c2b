"""Requests, completions, chunks and errors of the MQTT contract: parse and encode. Pure.

Owns the wire shapes (the seed's `llm/v1/chat` and prompt forms, plain text) and the rules for each field.
Refuses what it does not know, by name: an ignored field is a wrong answer later.

    payload bytes → `parse` → Request → `Request.document` → the runner
    runner's text and usage → `completion` → answer bytes
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from edge_agent.errors import BadRequest, PromptError, PromptTooLong

ID_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ROLES = ("system", "user", "assistant")

MAX_DEPTH = 64
MAX_MESSAGES = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOPIC_BYTES = 512
MAX_DEADLINE_MS = 7 * 86_400_000

_BLANK = b" \t\r\n"


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
        options: what the request fixes of temperature, max_tokens, stop, top_p, top_k, seed, response_format.
        model: configured name asked for, None for the default model.
        stream: chunks are wanted.
        id: the client's id, or None.
        reply_to: answer topic named in the body (clients without MQTT 5 properties), or None.
        deadline_ms: how long the client waits, or None.
    """

    form: Form
    content: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    id: str | None = None
    reply_to: str | None = None
    deadline_ms: int | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What the runner gets: content and options, nothing about the way it came."""
        return {**self.content, **self.options}


def parse(payload: bytes, *, limit_bytes: int) -> Request:
    """Reads a request; the first non-blank byte `{` means JSON, anything else is a plain-text prompt.

    Args:
        payload: the message's body as it arrived.
        limit_bytes: `limits.payload_bytes`.

    Raises:
        PromptTooLong: more than `limit_bytes`.
        BadRequest: not UTF-8, malformed JSON, or an unknown or invalid field, which is named.
    """
    if len(payload) > limit_bytes:
        raise PromptTooLong(f"the request has {len(payload)} bytes, at most {limit_bytes} are allowed")
    if not payload.strip(_BLANK):
        raise BadRequest("the request is empty")
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request is not UTF-8 (byte {error.start})") from error
    if payload.lstrip(_BLANK).startswith(b"{"):
        return _parse_object(_load_json(text))
    _check_text("the request", text)
    return Request(form=Form.TEXT, content={"messages": [{"role": "user", "content": text.strip()}]})


def parse_cancel(payload: bytes) -> tuple[str | None, str | None]:
    """Reads a cancel, `{"id": "…", "reply_to": "…"}`: (id, reply_to).

    Raises:
        BadRequest: it is not that.
    """
    try:
        document = _load_json(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest("the cancel is not UTF-8") from error
    if not set(document) <= {"id", "reply_to"}:
        raise BadRequest("a cancel has the fields id and reply_to")
    request_id, reply_to = document.get("id"), document.get("reply_to")
    return (
        _id("id", request_id) if request_id is not None else None,
        _topic("reply_to", reply_to) if reply_to is not None else None,
    )


def form_of(payload: bytes) -> Form:
    """The form in which an error about this payload is written, even when `parse` refuses it."""
    return Form.JSON if payload.lstrip(_BLANK).startswith(b"{") else Form.TEXT


def envelope_of(payload: bytes, *, limit_bytes: int) -> tuple[str | None, str | None]:
    """`id` and `reply_to` of a JSON request that `parse` may refuse for another reason, where they can be read."""
    if len(payload) > limit_bytes or form_of(payload) is Form.TEXT:
        return None, None
    try:
        document = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        return None, None
    request_id, reply_to = document.get("id"), document.get("reply_to")
    good_id = isinstance(request_id, str) and ID_PATTERN.fullmatch(request_id)
    return request_id if good_id else None, reply_to if isinstance(reply_to, str) else None


def completion(
    *,
    request_id: str,
    created_s: int,
    model: str,
    text: str,
    finish_reason: str,
    usage: dict[str, int],
    timings: dict[str, float],
) -> dict[str, Any]:
    """The seed's chat completion object, plus `timings`.

    Args:
        created_s: seconds since 1970.
        model: configured name.
        usage: prompt_tokens, completion_tokens, total_tokens, cached_tokens.
        timings: queue_ms, first_token_ms, total_ms, tokens_per_s.
    """
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created_s,
        "model": model,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        ],
        "usage": usage,
        "timings": timings,
    }


def chunk(
    *, request_id: str, created_s: int, model: str, seq: int, text: str, finish_reason: str | None
) -> dict[str, Any]:
    """One streamed part; `finish_reason` is set on the last one only."""
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": created_s,
        "model": model,
        "seq": seq,
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}],
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
            the moments here, between which a whole short answer may arrive at once.
    """
    decode_s = ended_s - first_s
    if "total_ms" in measured and "first_token_ms" in measured:
        decode_s = (measured["total_ms"] - measured["first_token_ms"]) / 1000
    return {
        "queue_ms": round(max(0.0, started_s - queued_s) * 1000, 1),
        "first_token_ms": round(max(0.0, first_s - queued_s) * 1000, 1),
        "total_ms": round(max(0.0, ended_s - queued_s) * 1000, 1),
        "tokens_per_s": round((tokens - 1) / decode_s, 1) if tokens > 1 and decode_s > 0 else 0.0,
    }


def with_system(document: dict[str, Any], system: str) -> dict[str, Any]:
    """Adds the configured system prompt to a chat that brings none; a raw prompt stays as it is."""
    chat = document.get("messages")
    if not system or not chat or chat[0]["role"] == "system":
        return document
    return {**document, "messages": [{"role": "system", "content": system}, *chat]}


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
    """An answer's bytes: the document, or only its text where the request was plain text."""
    if form is Form.JSON:
        return encode(document)
    if "error" in document:
        error = document["error"]
        return f"error {error['status']} {error['code']}: {error['message']}".encode("utf-8", "replace")
    text: str = document["choices"][0]["message"]["content"]
    return text.encode("utf-8", "replace")


# --- Parsing, field by field ---------------------------------------------------------------------------


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion: what is deep must not break who reads it later."""
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


def _load_json(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except BadRequest:
        raise
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRequest(f"the request is not JSON{where}") from error
    if not isinstance(document, dict):
        raise BadRequest("it is not a JSON object")
    if _depth(document) > MAX_DEPTH:
        raise BadRequest(f"the request is nested more than {MAX_DEPTH} levels deep")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise BadRequest("the request has a field twice")
    return document


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not JSON")


def _parse_object(document: dict[str, Any]) -> Request:
    unknown = sorted(set(document) - set(_FIELDS))
    if unknown:
        raise BadRequest(f"unknown field {', '.join(_shown(name) for name in unknown[:8])}")
    given = {name: _FIELDS[name](name, value) for name, value in document.items() if value is not None}
    if ("messages" in given) == ("prompt" in given):
        raise BadRequest("give either messages or prompt")
    content: dict[str, Any] = {name: given.pop(name) for name in ("messages", "prompt") if name in given}
    given.pop("n", None)
    envelope = {
        name: given.pop(name)
        for name in ("model", "stream", "id", "reply_to", "deadline_ms")
        if name in given
    }
    return Request(form=Form.JSON, content=content, options=given, **envelope)


def _messages(name: str, value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise BadRequest(f"{name} must be a list of 1 to {MAX_MESSAGES} messages")
    return [_message(f"{name}[{index}]", item) for index, item in enumerate(value)]


def _message(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object")
    unknown = sorted(set(value) - {"role", "content", "name"})
    if unknown:
        raise BadRequest(f"unknown field {name}.{_shown(unknown[0])}")
    if value.get("role") not in ROLES:
        raise BadRequest(f"{name}.role must be one of {', '.join(ROLES)}")
    message = {"role": value["role"], "content": _text(f"{name}.content", value.get("content"))}
    if value.get("name") is not None:
        message["name"] = _text(f"{name}.name", value["name"])
    return message


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string")
    _check_text(name, value)
    return value


def _check_text(name: str, value: str) -> None:
    """NUL cuts a prompt short in the tokenizer without a word; lone surrogates are no text."""
    if "\0" in value:
        raise BadRequest(f"{name} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} has a lone surrogate") from error


def _prompt(name: str, value: object) -> str:
    text = _text(name, value)
    if not text:
        raise BadRequest(f"{name} is empty")
    return text


def _stops(name: str, value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise BadRequest(f"{name} must be a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not 0 < len(_text(name, stop)) <= MAX_STOP_CHARACTERS:
            raise BadRequest(f"a string in {name} must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str, object], float]:
    def check(name: str, value: object) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):  # type: ignore[operator]
            raise BadRequest(f"{name} must be a number {'above' if above else 'from'} {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    return check


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadRequest(f"{name} must be a whole number from {low} to {high}")
        return value

    return check


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false")
    return value


def _one(name: str, value: object) -> int:
    if value != 1 or isinstance(value, bool | float):
        raise BadRequest(f"{name} must be 1: one answer for each prompt")
    return 1


def _id(name: str, value: object) -> str:
    if not isinstance(value, str) or not ID_PATTERN.fullmatch(value):
        raise BadRequest(f"{name} must be 1 to 64 letters, digits, '_', '.', '-'")
    return value


def _name(name: str, value: object) -> str:
    text = _text(name, value)
    if not 0 < len(text) <= 250:
        raise BadRequest(f"{name} must have 1 to 250 characters")
    return text


def _topic(name: str, value: object) -> str:
    text = _text(name, value)
    if not 0 < len(text.encode()) <= MAX_TOPIC_BYTES:
        raise BadRequest(f"{name} must have 1 to {MAX_TOPIC_BYTES} bytes")
    return text


def _response_format(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object")
    kind = value.get("type")
    keys = {"text": {"type"}, "json_schema": {"type", "json_schema"}, "regex": {"type", "regex"}}.get(
        kind if isinstance(kind, str) else ""
    )
    if keys is None:
        raise BadRequest(f"{name}.type must be text, json_schema or regex")
    if set(value) != keys:
        raise BadRequest(f"{name} of type {kind} has exactly the fields {', '.join(sorted(keys))}")
    if kind == "regex":
        _text(f"{name}.regex", value["regex"])
    if kind == "json_schema" and not isinstance(value["json_schema"], dict):
        raise BadRequest(f"{name}.json_schema must be an object")
    return value


def _shown(name: str) -> str:
    return json.dumps(name[:40])


_FIELDS: dict[str, Callable[[str, object], Any]] = {
    "messages": _messages,
    "prompt": _prompt,
    "temperature": _number(0, 2),
    "max_tokens": _integer(1, 1 << 20),
    "stop": _stops,
    "n": _one,
    "stream": _boolean,
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(1, 1 << 20),
    "seed": _integer(0, (1 << 31) - 1),
    "response_format": _response_format,
    "model": _name,
    "id": _id,
    "reply_to": _topic,
    "deadline_ms": _integer(1, MAX_DEADLINE_MS),
}
"""Every field of a request and its rule."""
