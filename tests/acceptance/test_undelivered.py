"""Answers that a broker does not take, over a real connection: it refuses them, says goodbye at them, or hangs up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.chat.prompt import State
from edge_agent.transport import outbox, retries, suspicion
from tests.support.client import Client, connected
from tests.support.doorkeeper import Doorkeeper
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
    with Doorkeeper(strict_broker, FORBIDDEN, GOODBYES[request.param]) as keeper:
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
    monkeypatch.setattr(retries, "RETRY_WAITS_S", WAITS_S)
    monkeypatch.setattr(suspicion, "LAST_WAIT_S", WAITS_S[0])
    monkeypatch.setattr(outbox, "_PATIENCE_S", 60.0)  # on a slow machine a PUBACK may take as long
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
            assert keeper.ended <= TRIES + 2, (
                "an end counts for nobody before anything worked, and beside others"
            )
        last = agent.accept(client.replies)
        agent.answer(last, b"last")
        client.wait(lambda message: message.payload == b"last")
