"""Prompts over the control socket: the same intake, journal and dispatcher as over MQTT, streamed to one client.

Owns the clients that wait. When a client leaves, its prompt is cancelled: nobody would read the answer. A prompt with a
key is not: whoever sent it may ask again with that key, and gets its answer then.

    probe  a command's question or chat           → delta … done
    chat   a body of OpenAI's, as it came         → accepted, delta … done
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.chat import clock, messages
from edge_agent.chat.fairness import HTTP, LOCAL
from edge_agent.chat.intake import Intake, make_id
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Acceptance, Prompt, Source
from edge_agent.chat.rows import FINISHED
from edge_agent.chat.surfaces import Surface
from edge_agent.errors import BadRequest, Cancelled, IdReused, JournalUnavailable, ModelFailed
from edge_agent.transport.control import Call, ClientGone

log = logging.getLogger(__name__)

MAX_KEY_CHARACTERS = 255
_LOOK_S = 0.25
_LOST_S = 5.0
"""So often whoever waits looks whether the journal still has the prompt."""
_ANSWERED = None
_Event = Mapping[str, Any] | None


@dataclass(kw_only=True, eq=False)
class _Waiter:
    """Attributes:
    streams: it was there from the first piece of the answer on. One that asked for it again gets the answer whole.
    """

    events: queue.SimpleQueue[_Event]
    streams: bool = True


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a client wants: see `Intake.take`."""

    request: messages.Request
    body: bytes
    client: str
    correlation: bytes | None = None


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
        self._waiters: defaultdict[int, list[_Waiter]] = defaultdict(list)

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        """More of an answer. What waits for a client is bounded by the answer itself."""
        self._tell(prompt.row, document["choices"][0]["delta"])

    def answered(self, row: int) -> None:
        if not self._tell(row, _ANSWERED):
            self._note_delivered(row)  # nobody waits; a repeat of the request gets it

    def probe(self, call: Call, intake: Intake) -> None:
        """Runs a command's prompt, `text` or `messages`: `delta` events, then `done` with the answer document.

        Raises:
            PromptError: refused.
            ClientGone: the client left; its prompt was cancelled.
        """
        fields = call.request
        document = {
            "messages": fields.get("messages", [{"role": "user", "content": fields.get("text")}]),
            "model": fields.get("model"),
            "deadline_ms": fields.get("deadline_ms"),
            "stream": True,
        }
        body = messages.encode(document)
        request = messages.parse(body, limit_bytes=self._max_payload_bytes)
        waiter, row = self._accept(intake, _Asked(request=request, body=body, client=LOCAL))
        with self._waiting(intake, waiter, row, keep=False):
            self._stream(call, waiter, row)
            self._finish(call, row)

    def chat(self, call: Call, intake: Intake) -> None:
        """Runs a body of OpenAI's: `accepted`, `delta` events if it asks for a stream, then `done`.

        The request has `body`, the text as it came; `surface`, how it is written; and `key`, what makes a repeat
        recognisable, or nothing.

        Raises:
            PromptError: refused.
            ClientGone: the client left; its prompt was cancelled, unless it has a key or somebody else waits for it.
        """
        asked = self._asked(call.request)
        try:
            waiter, row = self._accept(intake, asked)
        except IdReused as error:  # its message names an id that was made here
            raise IdReused("this Idempotency-Key was used for another request") from error
        with self._waiting(intake, waiter, row, keep=asked.correlation is not None):
            prompt = self._journal.prompt(row)
            if prompt is not None:
                call.send(
                    "accepted",
                    id=prompt.id,
                    model=prompt.model,
                    created=int(prompt.accepted_wall_s),
                    stream=asked.request.stream,
                    include_usage=asked.request.include_usage,
                )
            self._stream(call, waiter, row)
            self._finish(call, row)

    def _asked(self, fields: Mapping[str, Any]) -> _Asked:
        text, key = fields.get("body"), fields.get("key")
        if not isinstance(text, str):
            raise BadRequest("body must be a text")
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= MAX_KEY_CHARACTERS):
            raise BadRequest(f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} characters")
        try:
            surface = Surface(str(fields.get("surface")))
        except ValueError as error:
            raise BadRequest("surface is unknown") from error
        body = text.encode("utf-8", "surrogatepass")
        return _Asked(
            request=messages.parse(body, limit_bytes=self._max_payload_bytes, surface=surface),
            body=f"{surface}\0".encode() + body,
            client=HTTP,
            correlation=hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() if key else None,
        )

    def _accept(self, intake: Intake, asked: _Asked) -> tuple[_Waiter, int]:
        waiter, request_id = _Waiter(events=queue.SimpleQueue()), make_id()
        with self._lock:  # so that the first chunk finds its waiter
            acceptance = intake.take(
                asked.request,
                request_id=request_id,
                body=asked.body,
                source=Source.CONTROL,
                client=asked.client,
                answer_topic="control",
                correlation=asked.correlation,
                expiry_s=None,
                topic_made=False,
                delivery=None,
                moment=clock.now(),
            )
            self._join(waiter, acceptance)
        log.info(
            "prompt %s request=%s row=%d",
            "accepted" if acceptance.new else "repeated", request_id, acceptance.row,
        )  # fmt: skip
        return waiter, acceptance.row

    def _join(self, waiter: _Waiter, acceptance: Acceptance) -> None:
        waiter.streams = acceptance.new
        if acceptance.answered:
            waiter.events.put(_ANSWERED)
        self._waiters[acceptance.row].append(waiter)

    @contextlib.contextmanager
    def _waiting(self, intake: Intake, waiter: _Waiter, row: int, *, keep: bool) -> Iterator[None]:
        """While a client gets its answer.

        Args:
            keep: a client that leaves may come back for it; else its prompt is cancelled.
        """
        try:
            yield
        except ClientGone:
            if not keep:
                intake.settle(row, Cancelled("the client left"), moment=clock.now())
            raise
        finally:
            if self._leave(waiter, row):
                self._note_delivered(row)

    def _note_delivered(self, row: int) -> None:
        with contextlib.suppress(JournalUnavailable):  # then it stays in the outbox until it is too old
            self._journal.deliveries.delivered(row)

    def _leave(self, waiter: _Waiter, row: int) -> bool:
        """True when nobody waits for this prompt any more."""
        with self._lock:
            waiters = self._waiters[row]
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[row]
            return not waiters

    def _stream(self, call: Call, waiter: _Waiter, row: int) -> None:
        looked_s, over = time.monotonic(), False
        while True:
            try:
                delta = waiter.events.get(timeout=_LOOK_S)
            except queue.Empty:
                if over:  # the last pieces of an answer come before it is noted: they were here
                    return
                call.check()
                if time.monotonic() - looked_s > _LOST_S:
                    looked_s = time.monotonic()
                    over = self._is_over(row)
                continue
            if delta is _ANSWERED:
                return
            if any(delta.values()):
                call.send("delta", text=delta.get("content") or "", delta=delta)

    def _finish(self, call: Call, row: int) -> None:
        outgoing = self._journal.deliveries.of(row)
        if outgoing is None:
            raise ModelFailed("what was noted of this prompt is lost with the journal")
        answer, properties = json.loads(outgoing.answer.payload), outgoing.answer.properties
        flavor = self._flavor_of(properties["model"]) if "model" in properties else None
        call.send("done", answer=answer, version=properties.get("version"), flavor=flavor)

    def _is_over(self, row: int) -> bool:
        """Whether nobody will say that it is answered: its row is gone, or was answered in the journal alone."""
        with contextlib.suppress(JournalUnavailable):
            prompt = self._journal.prompt(row)
            return prompt is None or prompt.state in FINISHED
        return False

    def _tell(self, row: int, event: _Event) -> bool:
        """False where nobody waits for this prompt."""
        with self._lock:
            waiters = self._waiters.get(row, ())
            for waiter in waiters:
                if waiter.streams or event is _ANSWERED:
                    waiter.events.put(event)
            return bool(waiters)
