"""The values of a prompt on its way through the agent: as it arrives, waits, and is answered. All are frozen.

The journal turns them into rows and back; transports and dispatchers pass them on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edge_agent.chat import messages
from edge_agent.errors import PromptError
from edge_agent.metrics.measurements import OK
from edge_agent.topics import ANONYMOUS


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    ANSWERED = "answered"
    DELIVERED = "delivered"
    UNDELIVERED = "undelivered"
    """The broker does not take this answer, and was asked often enough."""


class Source(StrEnum):
    """The way a prompt came in, and so the way its answer goes out."""

    MQTT = "mqtt"
    CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A broker's delivery of one message: what identifies the message when it is delivered again."""

    session: str
    mid: int
    redelivered: bool


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a client asked, and where the answer goes.

    Attributes:
        id: the client's, or one that the agent made.
        model: configured name.
        document: what the runner gets.
        form: how the request was written, and so how its answer is.
        client: who asked, as far as anybody knows.
    """

    id: str
    source: Source
    model: str
    document: dict[str, Any]
    form: messages.Form
    stream: bool
    answer_topic: str
    correlation: bytes | None
    client: str = ANONYMOUS


@dataclass(frozen=True, kw_only=True)
class Arrival(Submission):
    """A checked prompt on its way into the journal.

    Attributes:
        identity: see `intake.identity`; None where the client gave neither Correlation Data nor an id.
        body_sha256: of what a repeat has to have in common: the message's body as it came.
        deadline_s: seconds from now.
        topic_made: the client named no answer topic, so a redelivery comes with a different one.
    """

    identity: bytes | None
    body_sha256: bytes
    deadline_s: float
    delivery: Delivery | None = None
    topic_made: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt(Submission):
    """A prompt in the journal, as the rest of the agent sees it."""

    row: int
    state: State
    attempts: int
    accepted_wall_s: float
    accepted_boot_s: float
    deadline_boot_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A terminal answer: its exact bytes, and the user properties that go with them.

    Attributes:
        code: that of an error, for the metrics; the journal does not keep it.
    """

    payload: bytes
    properties: dict[str, str]
    code: str = field(default=OK, compare=False)

    @classmethod
    def of(
        cls, document: dict[str, Any], form: messages.Form, *, status: int, code: str = OK, **properties: str
    ) -> Answer:
        """An answer document in the form in which the request was written."""
        return cls(
            payload=messages.encode_answer(document, form),
            properties={"status": str(status), **properties},
            code=code,
        )

    @classmethod
    def of_error(cls, prompt_id: str, form: messages.Form, error: PromptError, **properties: str) -> Answer:
        document = messages.error_document(prompt_id, error)
        return cls.of(document, form, status=error.status, code=error.code, **properties)


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """An answer that waits for its PUBACK.

    Attributes:
        tries: how often the broker has refused it.
        unheard: how often nobody had subscribed to its topic.
    """

    row: int
    id: str
    topic: str
    correlation: bytes | None
    form: messages.Form
    answer: Answer
    tries: int = 0
    unheard: int = 0


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What became of an arrival: a new row, or the row of the prompt that it repeats."""

    row: int
    new: bool
    state: State

    @property
    def answered(self) -> bool:
        """It has its answer already."""
        return self.state not in (State.QUEUED, State.RUNNING)
