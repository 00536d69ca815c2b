"""Prompts over the control socket: one stream for each client, one answer for each key, nothing for those who left."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.chat import clock, messages
from edge_agent.chat.fairness import HTTP, LOCAL
from edge_agent.chat.intake import Intake
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Prompt, Source, State
from edge_agent.errors import BadRequest, IdReused, JournalUnavailable, ModelFailed, PromptError
from edge_agent.transport import control_prompts
from edge_agent.transport.control import Call, ClientGone
from edge_agent.transport.control_prompts import MAX_KEY_CHARACTERS, ControlPrompts
from tests.support.processes import wait_until


class Model:
    """A model that is here, and its worker, which only notes what it is told."""

    available = True
    reason = ""
    service_s = 2.0

    def __init__(self) -> None:
        self.abandoned: list[int] = []

    def notify(self) -> None: ...

    def abandon(self, row: int) -> None:
        self.abandoned.append(row)


class Client:
    """One call and its thread. `events` is what came; a test answers by hand through `Device`."""

    def __init__(self, device: Device, **fields: Any) -> None:
        self.near, far = socket.socketpair()
        self.near.settimeout(60)
        self.error: BaseException | None = None
        self._call = Call(far, fields)
        self._device = device
        self._far = far
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        ask = self._device.prompts.probe if "text" in self._call.request else self._device.prompts.chat
        try:
            with self._far:
                ask(self._call, self._device.intake)
        except (PromptError, ClientGone) as error:
            self.error = error

    def leave(self) -> None:
        self.near.close()
        self._thread.join(60)

    def events(self) -> list[dict[str, Any]]:
        """Everything until the end."""
        data = b""
        while chunk := self.near.recv(1 << 16):
            data += chunk
        self.leave()
        return [json.loads(line) for line in data.splitlines()]


class Device:
    """The journal, the intake and the outlet of a daemon; a test does a dispatcher's work."""

    def __init__(self, folder: Path) -> None:
        self.model = Model()
        self.journal = Journal(folder / "journal.db", moment=clock.now())
        self.prompts = ControlPrompts(self.journal, flavor_of=lambda _: "onnx", max_payload_bytes=1000)
        self.intake = Intake(
            self.journal,
            models={"assistant": self.model},
            workers={"assistant": self.model},
            queue_depth=8,
            deadline_s=60,
            max_deadline_s=60,
            on_answer=lambda source, row: self.prompts.answered(row),
        )

    def chat(self, body: str = "", *, key: str | None = None, surface: str = "chat", **fields: Any) -> Client:
        body = body or json.dumps({"messages": [{"role": "user", "content": "Hello"}], **fields})
        return Client(self, body=body, key=key, surface=surface)

    def claim(self) -> Prompt:
        def claimed() -> Prompt | None:
            return self.journal.claim("assistant")

        found = wait_until(claimed, 60, "a prompt")
        assert found is not None
        return found

    def say(self, prompt: Prompt, text: str) -> None:
        document = messages.chunk(
            request_id=prompt.id, created_s=0, model="assistant", seq=0, text=text, finish_reason=None
        )
        self.prompts.chunk(prompt, document)

    def answer(self, prompt: Prompt, text: str = "Hi.") -> None:
        document = messages.completion(
            request_id=prompt.id,
            created_s=0,
            model="assistant",
            text=text,
            finish_reason="stop",
            usage={},
            timings={},
        )
        answer = Answer.of(document, Form.JSON, status=200, model="assistant", version="3")
        assert self.journal.answer(prompt.row, answer, moment=clock.now(), attempt=prompt.attempts)
        self.prompts.answered(prompt.row)

    def state(self, prompt: Prompt) -> State:
        found = self.journal.prompt(prompt.row)
        assert found is not None
        return found.state


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.journal.close()


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def test_whoever_waits_for_a_prompt_that_the_journal_lost_is_told_so(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold its place for an hour, and the gateway has 36 of them."""
    monkeypatch.setattr(control_prompts, "_LOST_S", 0.0)
    client = device.chat()
    prompt = device.claim()
    assert b"accepted" in client.near.recv(1 << 16)
    device.journal._file._db.execute("DELETE FROM prompts WHERE row=?", (prompt.row,))
    assert client.events() == []
    assert isinstance(client.error, ModelFailed)


def test_an_answer_that_nobody_told_of_is_found_in_the_journal(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a row that turned out damaged."""
    monkeypatch.setattr(control_prompts, "_LOST_S", 0.0)
    monkeypatch.setattr(device.prompts, "answered", lambda row: None)
    client = device.chat()
    device.answer(device.claim())
    assert kinds(client.events()) == ["accepted", "done"]


def test_a_chat_is_accepted_streamed_and_done(device: Device) -> None:
    client = device.chat(stream=True, stream_options={"include_usage": True})
    prompt = device.claim()
    device.say(prompt, "H")
    device.say(prompt, "")
    device.say(prompt, "i.")
    device.answer(prompt)
    accepted, *deltas, done = client.events()
    assert (prompt.client, prompt.source) == (HTTP, Source.CONTROL)
    assert accepted == {
        "event": "accepted",
        "id": prompt.id,
        "model": "assistant",
        "created": int(prompt.accepted_wall_s),
        "stream": True,
        "include_usage": True,
    }
    assert [delta["delta"] for delta in deltas] == [{"content": "H"}, {"content": "i."}]
    assert (done["event"], done["version"], done["flavor"]) == ("done", "3", "onnx")
    assert done["answer"]["choices"][0]["message"]["content"] == "Hi."
    assert device.state(prompt) is State.DELIVERED


def test_an_answer_that_cannot_be_noted_as_delivered_is_no_error(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = device.chat()
    prompt = device.claim()

    def fail(row: int) -> None:
        raise JournalUnavailable("the disk is full")

    monkeypatch.setattr(device.journal.deliveries, "delivered", fail)
    device.answer(prompt)
    assert kinds(client.events()) == ["accepted", "done"]
    assert client.error is None


def test_a_probe_is_another_client_and_gets_text(device: Device) -> None:
    client = Client(device, text="Hello")
    prompt = device.claim()
    device.say(prompt, "Hi.")
    device.answer(prompt)
    assert prompt.client == LOCAL
    assert [(event["event"], event.get("text")) for event in client.events()] == [
        ("delta", "Hi."),
        ("done", None),
    ]


@pytest.mark.parametrize("keyed", [False, True])
def test_a_prompt_whose_client_leaves_is_cancelled_unless_it_has_a_key(device: Device, keyed: bool) -> None:
    client = device.chat(key="k" if keyed else None)
    prompt = device.claim()
    client.leave()
    assert isinstance(client.error, ClientGone)
    assert device.model.abandoned == ([] if keyed else [prompt.row])
    if keyed:
        device.answer(prompt)
    assert device.state(prompt) is State.DELIVERED, "nothing waits in the outbox for nobody"


def test_a_repeat_with_a_key_gets_the_same_answer_whenever_it_comes(device: Device) -> None:
    first = device.chat(key="k")
    prompt = device.claim()
    during = device.chat(key="k")
    wait_until(lambda: len(device.prompts._waiters[prompt.row]) == 2, 60, "the repeat")
    device.say(prompt, "Hi")
    device.answer(prompt)
    answers = [each.events() for each in (first, during, device.chat(key="k"))]
    assert [kinds(events) for events in answers] == [
        ["accepted", "delta", "done"], ["accepted", "done"], ["accepted", "done"],
    ]  # fmt: skip
    assert [events[-1] for events in answers] == [answers[0][-1]] * 3
    assert device.journal.claim("assistant") is None
    assert device.state(prompt) is State.DELIVERED


def test_one_of_two_that_wait_may_leave(device: Device) -> None:
    first = device.chat(key="k")
    prompt = device.claim()
    second = device.chat(key="k")
    wait_until(lambda: len(device.prompts._waiters[prompt.row]) == 2, 60, "the repeat")
    first.leave()
    device.answer(prompt)
    assert kinds(second.events()) == ["accepted", "done"]


def test_a_key_with_another_body_or_for_another_surface_is_refused(device: Device) -> None:
    first = device.chat(key="k")
    device.answer(device.claim())
    first.events()
    for other in (
        device.chat(key="k", seed=1),
        device.chat('{"prompt": "a"}', key="k", surface="completion"),
    ):
        other.leave()
        assert isinstance(other.error, IdReused)
        assert "this Idempotency-Key" in str(other.error), "not an id that the client has never seen"


def test_the_answer_of_a_client_that_left_survives_the_daemon(device: Device) -> None:
    client = device.chat(key="k")
    prompt = device.claim()
    client.leave()
    device.journal.close()
    again = Device(device.journal.path.parent)
    taken = again.claim()
    assert taken.row == prompt.row
    again.answer(taken)
    assert kinds(again.chat(key="k").events()) == ["accepted", "done"]
    again.journal.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"body": {"messages": []}},
        {"body": None},
        {"key": "k" * (MAX_KEY_CHARACTERS + 1)},
        {"key": ""},
        {"key": 1},
        {"surface": "message?"},
        {"body": "plain text"},
        {"body": '{"messages": [{"role": "user", "content": "\ud800"}]}'},
    ],
)
def test_what_is_no_call_is_refused(device: Device, fields: dict[str, Any]) -> None:
    good = {"body": '{"messages": [{"role": "user", "content": "Hello"}]}', "surface": "chat"}
    client = Client(device, **{**good, **fields})
    client.leave()
    assert isinstance(client.error, BadRequest)
