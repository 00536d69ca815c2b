"""A prompt's values on its way through the agent: as it arrives, waits, and is answered. Frozen.

The journal makes rows of them and gives them back; transports and dispatchers pass them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from edge_agent.chat import messages
from edge_agent.errors import PromptError


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    ANSWERED = "answered"
    DELIVERED = "delivered"


class Source(StrEnum):
    """The way a prompt came in, and so the way its answer goes out."""

    MQTT = "mqtt"
    CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A broker's delivery of one message: what recognises it when it is delivered again."""

    session: str
    mid: int
    redelivered: bool


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A checked prompt on its way into the journal.

    Attributes:
        id: the client's, or one that the agent made.
        identity: digest of (answer topic, correlation or id), None where the client gave neither.
        body_sha256: of the message's body as it came.
        document: what the runner gets.
        deadline_s: seconds from now.
        topic_made: the client named no answer topic; a redelivery then comes with another made one.
    """

    id: str
    identity: bytes | None
    body_sha256: bytes
    source: Source
    model: str
    document: dict[str, Any]
    form: messages.Form
    stream: bool
    answer_topic: str
    correlation: bytes | None
    deadline_s: float
    delivery: Delivery | None = None
    topic_made: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row as the rest of the agent sees it."""

    row: int
    id: str
    source: Source
    model: str
    document: dict[str, Any]
    form: messages.Form
    stream: bool
    answer_topic: str
    correlation: bytes | None
    state: State
    attempts: int
    accepted_wall_s: float
    accepted_boot_s: float
    deadline_boot_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A terminal answer: its exact bytes, and the user properties that go with them."""

    payload: bytes
    properties: dict[str, str]

    @classmethod
    def of_error(cls, prompt_id: str, form: messages.Form, error: PromptError) -> Answer:
        document = messages.error_document(prompt_id, error)
        return cls(payload=messages.encode_answer(document, form), properties={"status": str(error.status)})


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """An answer that waits for its PUBACK."""

    row: int
    id: str
    topic: str
    correlation: bytes | None
    form: messages.Form
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What became of an arrival: a new row, or the one that it repeats."""

    row: int
    new: bool
    state: State
