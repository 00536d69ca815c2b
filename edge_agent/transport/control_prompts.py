"""Prompts over the control socket: the same intake, journal and dispatcher as over MQTT, streamed to one client.

Owns the clients that wait. When a client leaves, its prompt is cancelled: nobody would read the answer.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.chat import clock, messages
from edge_agent.chat.fairness import LOCAL
from edge_agent.chat.intake import Intake, make_id
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Prompt, Source
from edge_agent.errors import Cancelled
from edge_agent.transport.control import Call, ClientGone

log = logging.getLogger(__name__)

_LOOK_S = 0.25
_ANSWERED = None


@dataclass(kw_only=True)
class _Waiter:
    events: queue.SimpleQueue[str | None]


class ControlPrompts:
    """The outlet of prompts that came over the control socket. Any thread may tell it.

    Args:
        flavor_of: of a model, by its configured name.
        max_payload_bytes: of a prompt.
    """

    def __init__(
        self, journal: Journal, *, flavor_of: Callable[[str], str | None], max_payload_bytes: int
    ) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._journal = journal
        self._flavor_of = flavor_of
        self._lock = threading.Lock()
        self._waiters: dict[int, _Waiter] = {}

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        """More text of an answer. What waits for a client is bounded by the answer itself."""
        self._tell(prompt.row, document["choices"][0]["delta"]["content"])

    def answered(self, row: int) -> None:
        self._tell(row, _ANSWERED)

    def answer(self, call: Call, intake: Intake) -> None:
        """Runs a client's prompt, `text` or `messages`: `delta` events, then `done` with the answer document.

        Raises:
            PromptError: refused.
            ClientGone: the client left; its prompt was cancelled.
        """
        request = self._request(call.request)
        waiter, request_id = _Waiter(events=queue.SimpleQueue()), make_id()
        with self._lock:  # so that the first chunk finds its waiter
            acceptance = intake.take(
                request,
                request_id=request_id,
                body=messages.encode(request.document),
                source=Source.CONTROL,
                client=LOCAL,
                answer_topic="control",
                correlation=None,
                expiry_s=None,
                topic_made=False,
                delivery=None,
                moment=clock.now(),
            )
            self._waiters[acceptance.row] = waiter
        log.info("prompt accepted request=%s row=%d", request_id, acceptance.row)
        try:
            self._stream(call, waiter)
            self._finish(call, acceptance.row)
        except ClientGone:
            intake.settle(acceptance.row, Cancelled("the client left"), moment=clock.now())
            raise
        finally:
            with self._lock:
                del self._waiters[acceptance.row]
            self._journal.deliveries.delivered(acceptance.row)

    def _request(self, fields: Mapping[str, Any]) -> messages.Request:
        document = {
            "messages": fields.get("messages", [{"role": "user", "content": fields.get("text")}]),
            "model": fields.get("model"),
            "deadline_ms": fields.get("deadline_ms"),
            "stream": True,
        }
        return messages.parse(messages.encode(document), limit_bytes=self._max_payload_bytes)

    def _stream(self, call: Call, waiter: _Waiter) -> None:
        while True:
            try:
                text = waiter.events.get(timeout=_LOOK_S)
            except queue.Empty:
                call.check()
                continue
            if text is _ANSWERED:
                return
            if text:
                call.send("delta", text=text)

    def _finish(self, call: Call, row: int) -> None:
        outgoing = self._journal.deliveries.of(row)
        if outgoing is not None:
            answer, properties = json.loads(outgoing.answer.payload), outgoing.answer.properties
            flavor = self._flavor_of(properties["model"]) if "model" in properties else None
            call.send("done", answer=answer, version=properties.get("version"), flavor=flavor)

    def _tell(self, row: int, event: str | None) -> None:
        with self._lock:
            waiter = self._waiters.get(row)
        if waiter is not None:
            waiter.events.put(event)
