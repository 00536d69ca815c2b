"""The topics of the MQTT contract, and where answers may go. Pure."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from edge_agent.errors import BadRequest

MAX_LEVELS = 8
"""AWS IoT Core allows 7 slashes; `/stream` under an answer topic takes one of them."""
MAX_TOPIC_BYTES = 256

_AGENT_BRANCHES = ("req", "ctl", "status", "model", "metrics")


def can_be_published(topic: str) -> bool:
    """True for a topic, or the beginning of one, that a broker takes: no wildcard, and only characters of text.

    A broker may end the connection over a control character or a noncharacter, and must over NUL and a surrogate.
    Source: MQTT 5.0 §1.5.4 and §4.7, MQTT 3.1.1 §1.5.3.
    """
    return bool(topic) and not topic.startswith("$") and not any(map(_is_forbidden, topic))


def _is_forbidden(character: str) -> bool:
    code = ord(character)
    noncharacter = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    return noncharacter or character in "+#" or unicodedata.category(character) in ("Cc", "Cs")


@dataclass(frozen=True, kw_only=True)
class Topics:
    """All topics of one device.

    Args:
        prefix: `mqtt.prefix`.
        device_id: this device.
        reply_prefixes: `mqtt.reply_prefixes`.
    """

    prefix: str
    device_id: str
    reply_prefixes: tuple[str, ...]

    @property
    def root(self) -> str:
        return f"{self.prefix}/v1/{self.device_id}"

    @property
    def chat(self) -> str:
        return f"{self.root}/req/chat"

    @property
    def cancel(self) -> str:
        return f"{self.root}/ctl/cancel"

    @property
    def sync(self) -> str:
        return f"{self.root}/ctl/sync"

    @property
    def desired(self) -> str:
        return f"{self.root}/model/desired"

    @property
    def reported(self) -> str:
        return f"{self.root}/model/reported"

    @property
    def status(self) -> str:
        return f"{self.root}/status"

    @property
    def metrics(self) -> str:
        return f"{self.root}/metrics"

    def response(self, request_id: str) -> str:
        """Where the answer goes when the client says nothing."""
        return f"{self.root}/rsp/{request_id}"

    def stream(self, answer_topic: str) -> str:
        return f"{answer_topic}/stream"

    def check_answer_topic(self, topic: str) -> str:
        """Gives back a topic that a client named for its answer.

        Raises:
            BadRequest: not under a reply prefix, with wildcards or control characters, too long, or one that
                agents listen to.
        """
        if not can_be_published(topic):
            raise BadRequest(
                "the answer topic is empty, has wildcards or characters that are no text, or starts with '$'"
            )
        if len(self.stream(topic).encode()) > MAX_TOPIC_BYTES or self.stream(topic).count("/") >= MAX_LEVELS:
            raise BadRequest(f"the answer topic has more than {MAX_LEVELS - 2} slashes, or is too long")
        if not topic.startswith((*self.reply_prefixes, f"{self.root}/rsp/")):
            raise BadRequest("the answer topic is under none of this agent's reply prefixes")
        levels = topic.removeprefix(f"{self.prefix}/v1/").split("/")
        if topic.startswith(f"{self.prefix}/v1/") and len(levels) > 1 and levels[1] in _AGENT_BRANCHES:
            raise BadRequest("the answer topic is one that an agent listens to: the answer would loop")
        return topic
