"""The topics of the MQTT contract, and the rules for answer topics. Pure."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from edge_agent.errors import BadRequest

MAX_LEVELS = 8
"""AWS IoT Core allows 7 slashes; `/stream` under an answer topic takes one of them."""
MAX_TOPIC_BYTES = 256

ANONYMOUS = "@anonymous"
"""The client of plain `req/chat`. A client with a name cannot have this one: it is no id."""

_AGENT_BRANCHES = ("req", "ctl", "status", "model", "metrics")


def can_be_published(topic: str) -> bool:
    """True if a broker accepts this topic, or beginning of one: no wildcards and no characters that are not text.

    A broker may close the connection over a control character or a noncharacter, and must over NUL or a surrogate.
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
    def chat_of_clients(self) -> str:
        """A filter: the last level is the client's name."""
        return f"{self.chat}/+"

    @property
    def cancel_of_clients(self) -> str:
        return f"{self.cancel}/+"

    @property
    def echo(self) -> str:
        """Where the device publishes to itself: `cancel_of_clients` matches it, and no client can have this name."""
        return f"{self.cancel}/@echo"

    @property
    def sync(self) -> str:
        return f"{self.root}/ctl/sync"

    @property
    def plan(self) -> str:
        return f"{self.root}/ctl/plan"

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

    def response(self, request_id: str, client: str = ANONYMOUS) -> str:
        """The answer topic of a request that names none."""
        own = "" if client == ANONYMOUS else f"{client}/"
        return f"{self.root}/rsp/{own}{request_id}"

    def stream(self, answer_topic: str) -> str:
        return f"{answer_topic}/stream"

    def check_answer_topic(self, topic: str, client: str = ANONYMOUS) -> str:
        """Checks a client's answer topic and returns it.

        Raises:
            BadRequest: the topic is under no reply prefix or, for a client with a name, not its own; it has wildcards
                or control characters, is too long, or is one that agents subscribe to.
        """
        if not can_be_published(topic):
            raise BadRequest(
                "the answer topic is empty, contains wildcards or characters that are not text, or starts with '$'"
            )
        if len(self.stream(topic).encode()) > MAX_TOPIC_BYTES or self.stream(topic).count("/") >= MAX_LEVELS:
            raise BadRequest(f"the answer topic has more than {MAX_LEVELS - 2} slashes, or is too long")
        if client != ANONYMOUS and not topic.startswith(self._own_prefixes(client)):
            own = " or ".join(repr(prefix) for prefix in self._own_prefixes(client))
            raise BadRequest(f"the answer topic of client {client!r} does not begin with {own}")
        if not topic.startswith((*self.reply_prefixes, f"{self.root}/rsp/")):
            raise BadRequest("the answer topic does not begin with one of this agent's reply prefixes")
        levels = topic.removeprefix(f"{self.prefix}/v1/").split("/")
        if topic.startswith(f"{self.prefix}/v1/") and len(levels) > 1 and levels[1] in _AGENT_BRANCHES:
            raise BadRequest("the answer topic is one that agents subscribe to: the answer would loop")
        return topic

    def _own_prefixes(self, client: str) -> tuple[str, ...]:
        """Where the answers of a client with a name may go. A reply prefix that ends within a level is not its own
        with any name behind it."""
        whole = (prefix for prefix in self.reply_prefixes if prefix.endswith("/"))
        return (*(f"{prefix}{client}/" for prefix in whole), f"{self.root}/rsp/{client}/")
