"""What a dispatcher does with a prompt when the agent stops: a real journal, and a host that the test holds back."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_agent.chat import clock, messages
from edge_agent.chat.dispatcher import Dispatcher
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Arrival, Prompt, Source, State
from edge_agent.errors import RunnerError
from tests.support.processes import wait_until


class Runner:
    """Answers nothing; `die` ends it."""

    suspects: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._dead = False

    def die(self) -> None:
        self._dead = True
        self._theirs.send(b"x")  # wakes who waits for it

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def start(self, prompt_id: str, document: dict[str, Any], *, timeout_s: float) -> None:
        self.suspects = frozenset([prompt_id])

    def receive(self, timeout_s: float) -> None:
        if self._dead:
            raise RunnerError("runner died (exit code 0)")

    def cancel(self, prompt_id: str) -> None: ...


@dataclass
class Host:
    """Its model is loaded when the test says so."""

    runner: Runner = field(default_factory=Runner)
    version: int = 1
    parallel: int = 4
    blamed: list[frozenset[bytes]] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    loaded: threading.Event = field(default_factory=threading.Event)

    @property
    def blame(self) -> Callable[[frozenset[bytes]], None]:
        return self.blamed.append

    @contextlib.contextmanager
    def lease(self) -> Iterator[Host]:
        self.asked.set()
        assert self.loaded.wait(30)
        yield self

    def wait_for_change(self, timeout_s: float) -> None: ...

    def wanted_now(self) -> bool:
        return False

    def unload_when_idle(self) -> None: ...


class Outlet:
    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None: ...

    def answered(self, row: int) -> None: ...


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db", moment=clock.now())
    arrival = Arrival(
        id="r1",
        identity=b"i" * 32,
        body_sha256=b"b" * 32,
        source=Source.MQTT,
        model="assistant",
        document={"prompt": "x"},
        form=messages.Form.JSON,
        stream=False,
        answer_topic="replies/1",
        correlation=None,
        deadline_s=600.0,
    )
    opened.accept(arrival, moment=clock.now(), queue_depth=1, retry_after_ms=1)
    yield opened
    opened.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.runner.close()


@pytest.fixture
def dispatcher(journal: Journal, host: Host) -> Dispatcher:
    return Dispatcher(
        "assistant",
        host=host,
        journal=journal,
        outlets={Source.MQTT: Outlet()},
        defaults=lambda document: document,
        now=clock.now,
    )


def running(dispatcher: Dispatcher) -> threading.Thread:
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    return thread


def standing(journal: Journal) -> tuple[State, int]:
    """The prompt's state and attempts."""
    prompt = journal.prompt(1)
    assert prompt
    return prompt.state, prompt.attempts


def test_a_prompt_is_left_in_the_queue_when_the_stop_comes_while_its_model_loads(
    dispatcher: Dispatcher, host: Host, journal: Journal
) -> None:
    thread = running(dispatcher)
    assert host.asked.wait(30)
    dispatcher.drain(0.0)
    host.loaded.set()
    thread.join(30)
    assert not thread.is_alive()
    assert standing(journal) == (State.QUEUED, 0)


def test_a_prompt_whose_runner_ends_with_the_agent_goes_back_into_the_queue(
    dispatcher: Dispatcher, host: Host, journal: Journal
) -> None:
    host.loaded.set()
    thread = running(dispatcher)
    wait_until(lambda: bool(host.runner.suspects), 30, "the prompt to run")
    dispatcher.stop_claiming()
    host.runner.die()
    thread.join(30)
    assert not thread.is_alive()
    assert standing(journal) == (State.QUEUED, 0)
    assert host.blamed == []
