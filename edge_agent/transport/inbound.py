"""Messages from the broker, for those who handle them. Knows nothing of paho."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edge_agent.chat.prompt import Delivery


@dataclass(frozen=True, kw_only=True)
class Inbound:
    """A message as it came.

    Attributes:
        expiry_s: what is left of its expiry interval, or None.
        delivery: how the broker would name it if it delivered it again; None for QoS 0.
    """

    topic: str
    payload: bytes
    retained: bool
    response_topic: str | None
    correlation: bytes | None
    expiry_s: float | None
    delivery: Delivery | None


class Handler(Protocol):
    """What the agent does with a message; called in the network thread.

    The message is acked once the handler returns or, if the handler refuses it, once the broker has the refusal.
    """

    def __call__(self, message: Inbound) -> None: ...
