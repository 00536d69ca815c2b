"""Answers that a broker does not take, over a real connection: it refuses them, says goodbye at them, or hangs up."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.chat.prompt import State
from edge_agent.transport import outbox, suspicion
from tests.support.client import Client, connected
from tests.support.mosquitto import Broker, running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import short_folder, wait_until

FORBIDDEN = "replies/forbidden/1"
WAITS_S = (0.1, 0.1, 0.1, 0.1)
TRIES = 1 + len(WAITS_S)
GOODBYES = {
    "not authorized": b"\xe0\x02\x87\x00",
    "packet too large": b"\xe0\x02\x95\x00",
    "without a word": b"",
}


class Doorkeeper:
    """A TCP door before a broker that ends a connection over anything about a forbidden topic.

    Attributes:
        ended: how many connections it has ended.
    """

    def __init__(self, broker: Broker, goodbye: bytes) -> None:
        self.ended = 0
        self._broker = broker
        self._goodbye = goodbye
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="door", daemon=True)

    def __enter__(self) -> Doorkeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(60)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._broker.host, self._broker.port))
                self._sockets += [client, server]
                for source, target, watched in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(source, target, watched), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, watched: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if watched and FORBIDDEN.encode() in data:
                    self.ended += 1
                    source.sendall(self._goodbye)
                    break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def strict_broker() -> Iterator[Broker]:
    """It refuses forbidden topics by itself (PUBACK, Not authorized)."""
    with short_folder() as folder:
        acl = folder / "acl"
        acl.write_text("topic readwrite edge/#\ntopic readwrite replies/+\n")  # FORBIDDEN has a level more
        acl.chmod(0o600)
        with running_broker(folder, extra_config=f"acl_file {acl}") as running:
            yield running


@pytest.fixture(params=["refuses", *GOODBYES])
def door(strict_broker: Broker, request: pytest.FixtureRequest) -> Iterator[tuple[int, Doorkeeper | None]]:
    """The port of a broker that does not take forbidden topics in one way or the other."""
    if request.param == "refuses":
        yield strict_broker.port, None
        return
    with Doorkeeper(strict_broker, GOODBYES[request.param]) as keeper:
        yield keeper.port, keeper


@pytest.fixture
def client(strict_broker: Broker) -> Iterator[Client]:
    with connected(strict_broker, device="strict") as made:
        yield made


def state_of(agent: Agent, row: int) -> str:
    with agent.journal._file.transaction() as db:
        return str(db.execute("SELECT state FROM prompts WHERE row=?", (row,)).fetchone()["state"])


def test_what_a_broker_does_not_take_is_given_up_and_everybody_else_is_answered(
    short_dir: Path,
    client: Client,
    door: tuple[int, Doorkeeper | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "RETRY_WAITS_S", WAITS_S)
    monkeypatch.setattr(suspicion, "LAST_WAIT_S", WAITS_S[0])
    port, keeper = door
    with Agent(short_dir, {"req/chat": Recorder()}, device="strict", host="127.0.0.1", port=port) as agent:
        agent.wait_connected()
        forbidden = agent.accept(FORBIDDEN)
        others = [agent.accept(client.replies) for _ in range(5)]
        for prompt in (others[0], forbidden, *others[1:]):
            agent.answer(prompt, str(prompt.row).encode())
        for prompt in others:
            client.wait(lambda message, row=prompt.row: message.payload == str(row).encode())
        wait_until(lambda: state_of(agent, forbidden.row) == State.UNDELIVERED, 120, "the end of its tries")
        assert [state_of(agent, prompt.row) for prompt in others] == [State.DELIVERED] * 5
        assert agent.transport.status()["answers_undelivered"] == 1
        if keeper is not None:
            assert keeper.ended <= TRIES + 1, "what was under way beside others counts for nobody"
        last = agent.accept(client.replies)
        agent.answer(last, b"last")
        client.wait(lambda message: message.payload == b"last")
