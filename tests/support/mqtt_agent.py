"""The agent's MQTT side without a daemon around it, for tests of brokers and connections."""

from __future__ import annotations

import hashlib
import threading
import uuid
from pathlib import Path
from typing import Any

from edge_agent.chat import clock
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Arrival, Prompt, Source
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.topics import Topics
from edge_agent.transport.credentials import read_password
from edge_agent.transport.inbound import Handler, Inbound
from edge_agent.transport.mqtt import MqttTransport
from tests.support.processes import wait_until


class Agent:
    """The agent's MQTT side alone: the real transport and journal, with handlers of the test."""

    def __init__(
        self, folder: Path, handlers: dict[str, Handler], *, device: str = "bare", **settings: Any
    ) -> None:
        self.settings = MqttSettings(**settings)
        self.topics = Topics(prefix="edge", device_id=device, reply_prefixes=("replies/",))
        self.journal = Journal(folder / "journal.db", moment=clock.now())
        self.transport = MqttTransport(
            self.settings,
            topics=self.topics,
            journal=self.journal,
            password=lambda: read_password(self.settings, None),
            handlers={f"{self.topics.root}/{name}": handler for name, handler in handlers.items()},
            will=lambda: b'{"state":"offline"}',
            max_payload_bytes=102_400,
        )
        self._thread = threading.Thread(target=self.transport.run, name=f"agent-{device}", daemon=True)

    def __enter__(self) -> Agent:
        self.transport.set_retained(self.topics.status, b'{"state":"ready"}')
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.journal.close()

    def wait_connected(self, timeout_s: float = 60) -> None:
        """Returns when the broker knows what it is subscribed to."""

        def is_subscribed() -> bool:
            connection = self.transport._connection
            return self.transport.connected and connection is not None and connection.subscribing_s is None

        wait_until(is_subscribed, timeout_s, "a connection to the broker")
        assert self._thread.is_alive()

    def accept(self, topic: str, **changes: Any) -> Prompt:
        """A prompt in the journal, running, whose answer goes to `topic`."""
        arrival = Arrival(
            **{
                "id": uuid.uuid4().hex,
                "identity": None,
                "body_sha256": hashlib.sha256(topic.encode()).digest(),
                "source": Source.MQTT,
                "model": "m",
                "document": {"prompt": "x"},
                "form": Form.JSON,
                "stream": True,
                "answer_topic": topic,
                "correlation": b"c",
                "deadline_s": 60,
                **changes,
            }
        )
        self.journal.accept(arrival, moment=clock.now(), queue_depth=10_000, retry_after_ms=100)
        prompt = self.journal.claim("m")
        assert prompt is not None
        return prompt

    def answer(self, prompt: Prompt, payload: bytes) -> None:
        self.journal.answer(
            prompt.row, Answer(payload=payload, properties={"status": "200"}), moment=clock.now()
        )
        self.transport.answered(prompt.row)


class Recorder:
    """A handler that keeps what came, and fails at what is poison."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def __call__(self, message: Inbound) -> None:
        self.seen.append(message.payload)
        if message.payload.startswith(b"poison"):
            raise RecursionError("no handler foresees this")
