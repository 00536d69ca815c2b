"""`ctl/plan`: an operator asks what a version would take of this device.

    message → fields and answer topic, or an error that is answered where a topic is known → `ask` → its answer

Runs in the network thread, and waits for nothing: whoever answers does so from a thread of its own. Refuses answer
topics that are not allowed, as for prompts. Contract: docs/mqtt.md.
"""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edge_agent.chat import messages
from edge_agent.chat.intake import make_id
from edge_agent.chat.prompt import Answer
from edge_agent.errors import BadRequest, EdgeAgentError
from edge_agent.topics import ID_PATTERN, Topics
from edge_agent.transport.inbound import Inbound

log = logging.getLogger(__name__)

MAX_BYTES = 4096
MAX_CORRELATION_BYTES = 64
_FIELDS = {"id", "reply_to", "model", "version"}
_NOTHING_KNOWN = {"missing_bytes": None, "free_bytes": None, "fits": None, "would_start_at": None}


class Replies(Protocol):
    """The way back to who asked."""

    counters: collections.Counter[str]

    def reply(self, *, topic: str, correlation: bytes | None, answer: Answer) -> None: ...


class Planned(Protocol):
    """What is known of a version."""

    def document(self) -> Mapping[str, Any]: ...


Ask = Callable[[str, int, Callable[[Planned], None]], None]
"""Takes a model's name in the settings, a version, and who hears of it; raises `EdgeAgentError` if it takes none."""


@dataclass(frozen=True, kw_only=True)
class _Asker:
    """Where the answer goes."""

    id: str
    topic: str
    correlation: bytes | None


class PlanRequests:
    """Handles what comes on `ctl/plan`."""

    def __init__(self, *, topics: Topics, replies: Replies, ask: Ask) -> None:
        self._topics = topics
        self._replies = replies
        self._ask = ask

    def on_plan(self, message: Inbound) -> None:
        """A question: passed on, or refused with an answer that says why."""
        counters = self._replies.counters
        if message.retained:
            counters["retained_requests"] += 1
            log.warning("retained request dropped code=retained_request topic=%s", message.topic)
            return
        document = _object(message.payload)
        asker = self._asker(message, document)
        if asker is None:
            counters["plans_malformed"] += 1
            log.info("plan not understood: nobody to answer code=bad_request bytes=%d", len(message.payload))
            return
        try:
            name, version = _question(message, document)
            self._ask(name, version, lambda plan: self._answer(asker, plan.document()))
        except EdgeAgentError as error:
            counters["plans_malformed" if isinstance(error, BadRequest) else "plans_refused"] += 1
            log.info("plan refused code=%s request=%s", error.code, asker.id)
            self._answer(asker, {**_NOTHING_KNOWN, "code": error.code, "reason": str(error)})

    def _answer(self, asker: _Asker, plan: Mapping[str, Any]) -> None:
        answer = Answer(payload=messages.encode({"id": asker.id, **plan}), properties={})
        self._replies.reply(topic=asker.topic, correlation=asker.correlation, answer=answer)

    def _asker(self, message: Inbound, document: Mapping[str, Any]) -> _Asker | None:
        """Who asked, and where he wants his answer; None where no topic is known that is allowed."""
        given = document.get("id")
        known = isinstance(given, str) and ID_PATTERN.fullmatch(given) is not None
        request_id = str(given) if known else make_id()
        named = message.response_topic if message.response_topic is not None else document.get("reply_to")
        if named is None:
            if not known:
                return None
            named = self._topics.response(request_id)
        correlation = message.correlation
        if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
            correlation = None
        try:
            topic = self._topics.check_answer_topic(named) if isinstance(named, str) else None
        except BadRequest:
            topic = None
        return _Asker(id=request_id, topic=topic, correlation=correlation) if topic else None


def _object(payload: bytes) -> Mapping[str, Any]:
    """A JSON object; empty for anything else."""
    if len(payload) > MAX_BYTES:
        return {}
    try:
        document = json.loads(payload.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _question(message: Inbound, document: Mapping[str, Any]) -> tuple[str, int]:
    """Which model, and which version.

    Raises:
        BadRequest: it is something else.
    """
    if not document:
        raise BadRequest(f"the question is no JSON object of at most {MAX_BYTES} bytes")
    if unknown := sorted(set(document) - _FIELDS):
        raise BadRequest(f"unknown field {unknown[0][:80]!r}")
    if "id" in document and not (isinstance(document["id"], str) and ID_PATTERN.fullmatch(document["id"])):
        raise BadRequest("id is 1 to 64 letters, digits, '_', '.' and '-'")
    if message.correlation is not None and len(message.correlation) > MAX_CORRELATION_BYTES:
        raise BadRequest(f"Correlation Data has more than {MAX_CORRELATION_BYTES} bytes")
    name, version = document.get("model"), document.get("version")
    if not isinstance(name, str):
        raise BadRequest("model is the name of a model in the settings")
    if not isinstance(version, int) or isinstance(version, bool) or not 0 < version < 10**18:
        raise BadRequest("version is a whole number from 1")
    return name, version
