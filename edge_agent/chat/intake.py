"""What becomes of an arriving prompt, whichever way it came: accepted, recognised as a repeat, or refused.

Owns the order of the checks. A refusal (`PromptError`) is not remembered: the same id may try again.

    Request → which model → is it here → identity → journal.accept (committed) → the dispatcher is told
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable
from typing import Protocol

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Request
from edge_agent.chat.prompt import Acceptance, Answer, Arrival, Delivery, Source
from edge_agent.errors import BadRequest, Cancelled, DeadlineExceeded, NoModel, PromptError, UnknownModel
from edge_agent.metrics.measurements import Measurements
from edge_agent.topics import ANONYMOUS

log = logging.getLogger(__name__)


class ModelView(Protocol):
    """What intake has to know of one model."""

    @property
    def available(self) -> bool: ...

    @property
    def reason(self) -> str: ...


class Worker(Protocol):
    """What intake tells a model's dispatcher."""

    service_s: float

    def notify(self) -> None: ...

    def abandon(self, row: int) -> None: ...


class Intake:
    """Accepts prompts for all models. Any thread may call it; the journal orders them.

    Args:
        models: by configured name, the default one first.
        workers: a dispatcher for each model.
        deadline_s: for prompts without one.
        max_deadline_s: the longest that a client may ask for.
        on_answer: told when a row gets its answer here (cancelled, or too late).
        on_accepted: told of each new prompt: `expire` is due at its deadline.
        measurements: where such an answer is counted; one of its own where nobody looks.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        models: dict[str, ModelView],
        workers: dict[str, Worker],
        queue_depth: int,
        deadline_s: float,
        max_deadline_s: float,
        on_answer: Callable[[Source, int], None],
        on_accepted: Callable[[], None] = lambda: None,
        measurements: Measurements | None = None,
    ) -> None:
        self._journal = journal
        self._models = models
        self._workers = workers
        self._queue_depth = queue_depth
        self._deadline_s = deadline_s
        self._max_deadline_s = max_deadline_s
        self._on_answer = on_answer
        self._on_accepted = on_accepted
        self._measurements = measurements or Measurements(models)

    def take(
        self,
        request: Request,
        *,
        request_id: str,
        body: bytes,
        source: Source,
        client: str,
        answer_topic: str,
        correlation: bytes | None,
        expiry_s: float | None,
        topic_made: bool,
        delivery: Delivery | None,
        moment: Moment,
    ) -> Acceptance:
        """Commits a prompt.

        Args:
            request_id: the client's id or one that was made for it.
            body: the message as it came: a repeat must be equal to it.
            client: who asks.
            correlation: the client's Correlation Data, or None.
            topic_made: the client named no answer topic.
            expiry_s: what is left of the message's expiry interval, or None.

        Raises:
            PromptError: refused; nothing is remembered.
        """
        model, refusal = self._model(request.model)
        # A client with a name has one name space for all its answer topics.
        where = f"{answer_topic}\0".encode() if client != ANONYMOUS and not topic_made else b""
        acceptance = self._journal.accept(
            Arrival(
                id=request_id,
                identity=identity(answer_topic, correlation, request.id, client),
                body_sha256=hashlib.sha256(where + body).digest(),
                source=source,
                client=client,
                model=model,
                document=request.document,
                form=request.form,
                stream=request.stream,
                answer_topic=answer_topic,
                correlation=correlation,
                deadline_s=self._deadline(request, expiry_s),
                delivery=delivery,
                topic_made=topic_made,
            ),
            moment=moment,
            queue_depth=self._queue_depth,
            retry_after_ms=self._retry_after_ms(model),
            refusal=refusal,
        )
        if acceptance.new:
            self._workers[model].notify()
            self._on_accepted()
        return acceptance

    def cancel(self, wanted: bytes, *, moment: Moment) -> bool:
        """Answers the prompt of an identity with 499, waiting or running. False when there is none to cancel."""
        prompt = self._journal.find(wanted)
        return prompt is not None and self.settle(
            prompt.row, Cancelled("cancelled by the client"), moment=moment
        )

    def expire(self, moment: Moment) -> None:
        """Answers every prompt whose deadline has passed with 408, waiting or running."""
        for prompt in self._journal.overdue(moment):
            self.settle(
                prompt.row, DeadlineExceeded("the deadline passed before the answer was whole"), moment=moment
            )

    def settle(self, row: int, error: PromptError, *, moment: Moment) -> bool:
        """Answers a prompt with an error now, and stops it if it runs. False when it has an answer already."""
        prompt = self._journal.prompt(row)
        if prompt is None:
            return False
        answer = Answer.of_error(prompt.id, prompt.form, error)
        if not self._journal.answer(row, answer, moment=moment):
            return False
        self._measurements.note_answer(prompt.model, error.code)
        log.info("prompt ended code=%s request=%s row=%d", error.code, prompt.id, row)
        if prompt.model in self._workers:
            self._workers[prompt.model].abandon(row)
        self._on_answer(prompt.source, row)
        return True

    def _model(self, asked: str | None) -> tuple[str, NoModel | None]:
        """The configured name, and why it cannot take anything new now."""
        name = asked if asked is not None else next(iter(self._models), None)
        if name is None:
            raise NoModel("no model is configured", remedy="add a [models.NAME] table to the settings")
        view = self._models.get(name)
        if view is None:
            raise UnknownModel(f"no model is called {name!r} here; there are {', '.join(self._models)}")
        if not view.available:
            return name, NoModel(
                f"model {name!r} cannot answer now: {view.reason or 'no version is in the cache'}"
            )
        return name, None

    def _deadline(self, request: Request, expiry_s: float | None) -> float:
        """Seconds that a prompt may take.

        Raises:
            BadRequest: the client wants more than anybody may have.
        """
        asked_s = [expiry_s, request.deadline_ms / 1000 if request.deadline_ms is not None else None]
        deadline_s = min((given for given in asked_s if given is not None), default=self._deadline_s)
        longest_s = max(self._max_deadline_s, self._deadline_s)
        if deadline_s > longest_s:
            raise BadRequest(
                f"the deadline is {deadline_s:.0f} s away; limits.max_deadline_s allows {longest_s:.0f} s"
            )
        return deadline_s

    def _retry_after_ms(self, model: str) -> int:
        """Roughly when a place in the queue will be free: the measured time of one prompt."""
        return max(100, round(self._workers[model].service_s * 1000))


def identity(
    answer_topic: str, correlation: bytes | None, request_id: str | None, client: str = ANONYMOUS
) -> bytes | None:
    """Digest of (client, Correlation Data or id), and for `ANONYMOUS`, which may be many, of (answer topic, Correlation
    Data or id); None for a request that has neither of the last two.

    Both share one name space, so that a client without MQTT 5 properties can cancel by `id` what was sent
    with equal Correlation Data.
    """
    key = correlation if correlation is not None else request_id.encode() if request_id is not None else None
    if key is None:
        return None
    # No text begins with this byte, so no answer topic is taken for a client.
    whose = answer_topic.encode() if client == ANONYMOUS else b"\xff" + client.encode()
    return hashlib.sha256(whose + b"\0" + key).digest()


def make_id() -> str:
    """An id for a request that brings none."""
    return uuid.uuid4().hex
