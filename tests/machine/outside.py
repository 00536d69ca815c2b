"""What is seen of a device from outside of it, over MQTT: its status, its answers. Costs the machine nothing.

The broker and its client live on while a machine is restarted or cut off, so what the device had said before is known:
`forget` before a restart, and `wait_ready` after it waits for another daemon's word.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tests.machine.console import MachineError
from tests.machine.device import QUESTIONS
from tests.machine.schedule import Prompt
from tests.support.client import Client, Message, chat
from tests.support.processes import wait_until

ANSWER_TIMEOUT_S = 900.0
READY_TIMEOUT_S = 1200.0
_DEADLINE_MS = 3_500_000
_MOST_WAITING = 12
"""Fewer than the 32 that a device takes: a device that comes back gets them all at once."""


class Outside:
    """One device, as a client of its broker sees it. One thread."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._topic = f"{client.root}/status"
        self._known = ""
        client.subscribe(self._topic)

    def status(self) -> dict[str, Any]:
        """What the device said last; nothing before it has said anything."""
        said = [
            message for message in self._client.messages if message.topic == self._topic and message.payload
        ]
        return said[-1].json if said else {}

    def forget(self) -> None:
        """The daemon of now is going to end."""
        self._known = self.status().get("boot_id", self._known)

    def wait_ready(
        self, timeout_s: float = READY_TIMEOUT_S, *, seen: Callable[[], str] = str
    ) -> dict[str, Any]:
        """Waits for a daemon that was not forgotten, and whose models are ready; gives the status.

        Raises:
            MachineError: there is none in time; `seen` says more.
        """

        def ready() -> bool:
            status = self.status()
            return bool(status.get("boot_id", self._known) != self._known and status["state"] == "ready")

        try:
            wait_until(ready, timeout_s, "a device that is ready")
        except TimeoutError as error:
            raise MachineError(f"{error}; it said last: {self.status()}\n{seen()}") from error
        return self.status()

    def ask(self, questions: Sequence[str] = QUESTIONS) -> list[str]:
        """The answers, or what stands in their place."""
        sent = [self.send(question) for question in questions]
        return [self.answer(each) for each in sent]

    def send(self, question: str) -> bytes:
        return self._client.send(chat(question, deadline_ms=_DEADLINE_MS, temperature=0))

    def answer(self, sent: bytes) -> str:
        message = self._client.answer(sent, timeout_s=ANSWER_TIMEOUT_S)
        if message.status == 200:
            return message.text
        return f"{message.status} {message.json['error']['message']}"

    def answers(self, sent: bytes) -> list[Message]:
        return self._client.answers(sent)


class Prompts:
    """Prompts, one after the other, from `start` to `stop`; each with all that was answered.

    Args:
        pause_s: from one to the next.
        answer_s: what their answers may take after a boot.
    """

    def __init__(self, outside: Outside, *, pause_s: float, answer_s: float) -> None:
        self._outside = outside
        self._pause_s = pause_s
        self._answer_s = answer_s
        self._sent: list[bytes] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(120)

    @property
    def count(self) -> int:
        return len(self._sent)

    @property
    def waiting(self) -> int:
        return sum(not self._outside.answers(each) for each in self._sent)

    def take(self) -> list[Prompt]:
        """Those that were sent since the last time, once all are answered or the time is over."""
        sent, self._sent = self._sent, []
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: all(self._outside.answers(each) for each in sent), self._answer_s, "answers")
        return [
            Prompt(name=each.decode(), answers=[_outcome(came) for came in self._outside.answers(each)])
            for each in sent
        ]

    def _send(self) -> None:
        while not self._stop.wait(self._pause_s):
            if self.waiting < _MOST_WAITING:
                self._sent.append(self._outside.send(QUESTIONS[len(self._sent) % len(QUESTIONS)]))


def _outcome(message: Message) -> tuple[int, str]:
    """What must be the same however often an answer comes."""
    return message.status, message.payload.decode()
