"""What MQTT messages ask of the agent: a prompt, a cancel, a look for updates, a desired state.

Owns the way from a message to its acceptance or its refusal: whose it is, which id it has, where its answer goes. Every
method runs in the network thread. Refuses answer topics that are not allowed, and retained requests. Contract:
docs/mqtt.md.

    message → body, id, answer topic → intake.take (committed) → ack, or a refusal that says why
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Protocol

from edge_agent.chat import messages
from edge_agent.chat.clock import Moment
from edge_agent.chat.intake import Intake, identity, make_id
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Acceptance, Answer, Delivery, Source
from edge_agent.errors import BadRequest, ModelFailed, PromptError, UnknownModel
from edge_agent.topics import ANONYMOUS, ID_PATTERN, Topics
from edge_agent.transport.inbound import Handler, Inbound

log = logging.getLogger(__name__)

MAX_CORRELATION_BYTES = 64
MAX_CANCEL_BYTES = 4096


class Replies(Protocol):
    """The way back to who asked."""

    counters: collections.Counter[str]

    def answered(self, row: int) -> None: ...

    def refuse(
        self, *, topic: str, correlation: bytes | None, form: Form, answer: Answer, delivery: Delivery | None
    ) -> None: ...


class Requests:
    """Handles what comes over MQTT.

    Args:
        max_payload_bytes: of a prompt.
        check_updates: looks for new versions when the request says so.
        desire: obeys a desired state, or reports why not.
        now: the clock.
        note_refusal: told the code of each request that is not accepted.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        intake: Intake,
        replies: Replies,
        max_payload_bytes: int,
        check_updates: Callable[[bytes], None],
        desire: Callable[[bytes], None],
        now: Callable[[], Moment],
        note_refusal: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._topics = topics
        self._intake = intake
        self._replies = replies
        self._max_payload_bytes = max_payload_bytes
        self._check_updates = check_updates
        self._desire = desire
        self._now = now
        self._note_refusal = note_refusal

    def handlers(self) -> dict[str, Handler]:
        """What handles a message, by its topic."""
        return {
            self._topics.chat: self.on_chat,
            self._topics.chat_of_clients: self.on_chat,
            self._topics.cancel: self.on_cancel,
            self._topics.cancel_of_clients: self.on_cancel,
            self._topics.sync: self.on_sync,
            self._topics.desired: self.on_desired,
        }

    def on_chat(self, message: Inbound) -> None:
        """A prompt: committed, recognised as a repeat, or refused with an answer that says why."""
        counters = self._replies.counters
        if message.retained:
            counters["retained_requests"] += 1
            log.warning("retained request dropped code=retained_request topic=%s", message.topic)
            return
        client = self._client(message.topic, self._topics.chat)
        if client is None:
            return
        body = messages.read(message.payload, limit_bytes=self._max_payload_bytes)
        request_id = body.id or _id_from(message.correlation) or make_id()
        made = self._topics.response(request_id, client)
        topic, problem = self._answer_topic(message, body, made, client)
        try:
            if problem is not None:
                raise problem
            acceptance = self._take(
                message, body, request_id, topic, client=client, topic_made=topic == made and body.id is None
            )
        except PromptError as error:
            counters[f"refused_{error.status}"] += 1
            # What a client got wrong is named to the client: its words may be a prompt's.
            reason = "" if isinstance(error, BadRequest | UnknownModel) else error.message
            log.info("prompt refused request=%s code=%s reason=%r", request_id, error.code, reason)
            self._refuse(message, body.form, request_id, topic, error)
            return
        except Exception:
            log.exception(
                "prompt failed code=model_failed request=%s bytes=%d", request_id, len(message.payload)
            )
            failed = ModelFailed("the agent failed on this request")
            self._refuse(message, body.form, request_id, topic, failed)
            return
        if acceptance.new:
            log.info("prompt accepted request=%s row=%d client=%s", request_id, acceptance.row, client)
        else:
            log.info("prompt repeated request=%s row=%d", request_id, acceptance.row)
            counters["repeated"] += 1
            self._replies.answered(acceptance.row)

    def on_cancel(self, message: Inbound) -> None:
        """Cancels by (answer topic, or the client's name; Correlation Data or id). What it does not find, it counts."""
        if message.retained:
            return
        client = self._client(message.topic, self._topics.cancel)
        wanted = self._cancelled(message, client) if client is not None else None
        if wanted is None or not self._intake.cancel(wanted, moment=self._now()):
            self._replies.counters["cancels_unknown"] += 1

    def on_sync(self, message: Inbound) -> None:
        if not message.retained:
            self._check_updates(message.payload)

    def on_desired(self, message: Inbound) -> None:
        """What a fleet's operator wants here; retained, so it comes again with each connection."""
        self._desire(message.payload)

    def _client(self, topic: str, plain: str) -> str | None:
        """Whose message it is: the last level of its topic. None for a name that is none.

        Args:
            plain: the topic without a name.
        """
        if topic == plain:
            return ANONYMOUS
        name = topic.removeprefix(f"{plain}/")
        if ID_PATTERN.fullmatch(name):
            return name
        self._replies.counters["unknown_topic"] += 1
        log.warning(
            "message dropped: its client's name is no id code=client_invalid bytes=%d", len(name.encode())
        )
        return None

    def _answer_topic(
        self, message: Inbound, body: messages.Body, made: str, client: str
    ) -> tuple[str, BadRequest | None]:
        """Where the answer goes, be it a refusal; and why that is not where the client wants it.

        Args:
            made: the topic of a client that names none, or none that is allowed.
        """
        named = message.response_topic if message.response_topic is not None else body.reply_to
        if named is None:
            return made, None
        try:
            return self._topics.check_answer_topic(named, client), None
        except BadRequest as error:
            return made, error

    def _take(
        self,
        message: Inbound,
        body: messages.Body,
        request_id: str,
        topic: str,
        *,
        client: str,
        topic_made: bool,
    ) -> Acceptance:
        """Commits the prompt.

        Raises:
            PromptError: it is refused.
        """
        if message.correlation is not None and len(message.correlation) > MAX_CORRELATION_BYTES:
            raise BadRequest(f"Correlation Data has more than {MAX_CORRELATION_BYTES} bytes")
        return self._intake.take(
            body.request(),
            request_id=request_id,
            body=message.payload,
            source=Source.MQTT,
            client=client,
            answer_topic=topic,
            correlation=message.correlation,
            expiry_s=message.expiry_s,
            topic_made=topic_made,
            delivery=message.delivery,
            moment=self._now(),
        )

    def _refuse(self, message: Inbound, form: Form, request_id: str, topic: str, error: PromptError) -> None:
        self._note_refusal(error.code)
        correlation = message.correlation
        if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
            correlation = None
        self._replies.refuse(
            topic=topic,
            correlation=correlation,
            form=form,
            answer=Answer.of_error(request_id, form, error),
            delivery=message.delivery,
        )

    def _cancelled(self, message: Inbound, client: str) -> bytes | None:
        """The identity of the prompt that a cancel means: always one of its own client."""
        topic, correlation, request_id = message.response_topic, message.correlation, None
        if message.payload.strip() and len(message.payload) <= MAX_CANCEL_BYTES:
            try:
                request_id, reply_to = messages.parse_cancel(message.payload)
            except BadRequest as error:
                log.info("cancel not understood code=%s reason=%r", error.code, str(error))
                return None
            topic = topic or reply_to or (self._topics.response(request_id) if request_id else None)
        if client != ANONYMOUS:
            return identity("", correlation, request_id, client)
        return identity(topic, correlation, request_id) if topic else None


def _id_from(correlation: bytes | None) -> str | None:
    """Correlation Data that reads as an id is a better name in answers and logs than one that is made up."""
    try:
        text = correlation.decode("ascii") if correlation else ""
    except UnicodeDecodeError:
        return None
    return text if ID_PATTERN.fullmatch(text) else None
