"""What clients get: errors, completions and chunks in OpenAI's shapes. Pure.

The daemon's answer is the chat completion of docs/mqtt.md. What OpenAI's clients expect beside it is added here, and
`timings` stays. Source: OpenAI's API reference, Chat, Completions, Models, Errors; the `openai` package's types.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from edge_agent.chat.surfaces import Surface
from edge_agent.errors import BadRequest, DaemonNotRunning, EdgeAgentError, PromptError
from edge_agent.gateway.refusals import HttpRefusal
from edge_agent.transport import control

UNAVAILABLE_RETRY_MS = 2000
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What the daemon says of a prompt when it takes it."""

    id: str
    model: str
    created: int
    stream: bool
    include_usage: bool

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Accepted:
        names = ("id", "model", "created", "stream", "include_usage")
        return cls(**{name: event[name] for name in names})


# --- Errors ---------------------------------------------------------------------------------------------


def status_of(failure: EdgeAgentError) -> int:
    """HTTP's status for an error."""
    if isinstance(failure, PromptError | HttpRefusal):
        return failure.status
    return 503 if isinstance(failure, DaemonNotRunning) else 500


def error(failure: EdgeAgentError) -> JSONResponse:
    """The response for a request that gets no answer."""
    status, headers = status_of(failure), {}
    if (retry_ms := _retry_ms(failure, status)) is not None:
        headers = {"retry-after": str(max(1, math.ceil(retry_ms / 1000))), "retry-after-ms": str(retry_ms)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_document(failure), status, headers=headers)


def error_document(failure: EdgeAgentError) -> dict[str, Any]:
    status = status_of(failure)
    kind = _KINDS.get(status) or (
        "server_error" if status >= 499 or status == 408 else "invalid_request_error"
    )
    param = failure.param if isinstance(failure, BadRequest) else None
    return {"error": {"message": str(failure), "type": kind, "param": param, "code": failure.code}}


def reported(event: Mapping[str, Any]) -> EdgeAgentError:
    """The error in an event of the control socket, or in an answer."""
    failure = control.reported(event, among=(PromptError, DaemonNotRunning))
    if isinstance(failure, PromptError):
        failure.retry_after_ms = event.get("retry_after_ms")
    if isinstance(failure, BadRequest):
        failure.param = event.get("param")
    return failure


def _retry_ms(failure: EdgeAgentError, status: int) -> int | None:
    given = failure.retry_after_ms if isinstance(failure, PromptError) else None
    return UNAVAILABLE_RETRY_MS if given is None and status == 503 else given


# --- Answers --------------------------------------------------------------------------------------------


def whole(done: Mapping[str, Any], surface: Surface) -> dict[str, Any]:
    """The response of a request without `stream`.

    Args:
        done: the last event of the control socket, with a completion as `answer`.
    """
    answer = done["answer"]
    return {
        **answer,
        "id": _id(answer["id"], surface),
        "object": "chat.completion" if surface is Surface.CHAT else "text_completion",
        "choices": [_choice(choice, surface) for choice in answer["choices"]],
        "usage": _usage(answer["usage"]),
        "system_fingerprint": _fingerprint(done),
    }


def _choice(choice: Mapping[str, Any], surface: Surface) -> dict[str, Any]:
    message = choice["message"]
    if surface is Surface.CHAT:
        return {**choice, "message": {"refusal": None, **message}, "logprobs": None}
    end = {"finish_reason": choice["finish_reason"], "logprobs": None}
    return {"index": choice["index"], "text": message["content"], **end}


def _usage(usage: Mapping[str, int]) -> dict[str, Any]:
    counts = {key: usage.get(key, 0) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {**counts, "prompt_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)}}


def _fingerprint(done: Mapping[str, Any]) -> str:
    """Which weights have answered, in the field that OpenAI has for that."""
    return f"{done['answer']['model']}/{done.get('version')}"


def _id(prompt_id: str, surface: Surface) -> str:
    return f"{'chatcmpl' if surface is Surface.CHAT else 'cmpl'}-{prompt_id}"


class Stream:
    """The events of one streamed answer, as bytes of `text/event-stream`. Used by one task.

    Args:
        accepted: what the daemon says of the prompt.
    """

    def __init__(self, accepted: Accepted, surface: Surface) -> None:
        self._accepted = accepted
        self._chat = surface is Surface.CHAT
        self._head = {
            "id": _id(accepted.id, surface),
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": accepted.created,
            "model": accepted.model,
        }
        self._begun = False

    def delta(self, delta: Mapping[str, Any]) -> bytes:
        """More of the answer."""
        return b"".join(self._delta(delta))

    def end(self, done: Mapping[str, Any]) -> bytes:
        """The rest: all of the answer where nothing of it came before (a repeat), why it ended, its usage."""
        choice = done["answer"]["choices"][0]
        parts: list[bytes] = []
        if not self._begun:
            parts += self._delta({key: item for key, item in choice["message"].items() if key != "role"})
        parts.append(self._chunk({}, choice["finish_reason"], system_fingerprint=_fingerprint(done)))
        if self._accepted.include_usage:
            parts.append(self._event({"choices": [], "usage": _usage(done["answer"]["usage"])}))
        return b"".join([*parts, _DONE])

    def failed(self, failure: EdgeAgentError) -> bytes:
        """The end of an answer that does not become whole."""
        return _sse(error_document(failure)) + _DONE

    def _delta(self, delta: Mapping[str, Any]) -> Iterator[bytes]:
        if self._chat and not self._begun:
            yield self._chunk({"role": "assistant", "content": ""}, None)
        self._begun = True
        yield self._chunk(_numbered(delta), None)

    def _chunk(self, delta: Mapping[str, Any], reason: str | None, **more: Any) -> bytes:
        part = {"delta": delta} if self._chat else {"text": delta.get("content") or ""}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._accepted.include_usage else {}
        return self._event({"choices": [choice], **usage, **more})

    def _event(self, fields: Mapping[str, Any]) -> bytes:
        return _sse({**self._head, **fields})


_DONE = b"data: [DONE]\n\n"


def _numbered(delta: Mapping[str, Any]) -> dict[str, Any]:
    """Calls of tools have an `index` in chunks, and in whole answers none."""
    calls = delta.get("tool_calls")
    if not calls:
        return dict(delta)
    return {**delta, "tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]}


_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What Unicode calls the end of a line, and JSON does not escape: many clients cut a stream with their language's own
`splitlines`."""


def _sse(document: Mapping[str, Any]) -> bytes:
    """An event is one line, whatever a model says. Source: HTML Standard, 9.2.5."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


# --- Models ---------------------------------------------------------------------------------------------


def models(status: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The configured models, from the status topic's object. When one came to be is not known."""
    for model in status["models"]:
        yield {"id": model["name"], "object": "model", "created": 0, "owned_by": "edge-agent"}
