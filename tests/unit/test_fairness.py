"""Whose prompt is next, and how much of the queue one client may have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.chat.fairness import HARD_LIMIT, MAX_CLIENTS, Turns, owner_names
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Answer, Arrival
from edge_agent.errors import QueueFull
from tests.unit.test_journal import START, arrival, reopened

DEPTH = 32


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db", moment=START)
    yield opened
    opened.close()


class Queue:
    """Prompts of clients, each with a number of its own."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._number = 0

    def add(self, client: str, count: int = 1, *, model: str = "assistant") -> list[int]:
        return [self._add(client, model) for _ in range(count)]

    def _add(self, client: str, model: str) -> int:
        self._number += 1
        asked: Arrival = replace(arrival(self._number), client=client, model=model)
        accepted = self.journal.accept(asked, moment=START, queue_depth=DEPTH, retry_after_ms=1)
        return accepted.row

    def fill(self, client: str) -> int:
        """As many as there is room for: their number."""
        count = 0
        while True:
            try:
                self._add(client, "assistant")
            except QueueFull:
                return count
            count += 1

    def run(self, count: int = 1, *, end: bool = True) -> list[str]:
        """Whose prompts run next, one after the other."""
        clients = []
        for _ in range(count):
            prompt = self.journal.claim("assistant")
            assert prompt is not None
            clients.append(prompt.client)
            if end:
                self.journal.answer(prompt.row, Answer(payload=b"{}", properties={}), moment=START)
        return clients


@pytest.fixture
def queue(journal: Journal) -> Queue:
    return Queue(journal)


# --- Order ---------------------------------------------------------------------------------------------


def test_a_client_waits_for_one_prompt_of_a_greedy_one_at_most(queue: Queue) -> None:
    queue.add("greedy", 12)
    queue.run(3)
    queue.add("polite", 2)
    assert "polite" in queue.run(2)
    assert sorted(queue.run(2)) == ["greedy", "polite"]
    assert queue.run(4) == ["greedy"] * 4


def test_while_a_greedy_one_has_prompts_running_another_is_next(queue: Queue) -> None:
    queue.add("greedy", 12)
    queue.run(3, end=False)
    queue.add("polite")
    assert queue.run() == ["polite"]


def test_clients_take_turns_and_each_ones_prompts_keep_their_order(queue: Queue, journal: Journal) -> None:
    rows = {client: queue.add(client, 3) for client in ("a", "b", "c")}
    claimed = [journal.claim("assistant") for _ in range(9)]
    assert [prompt.client for prompt in claimed if prompt] == ["a", "b", "c"] * 3
    for client, own in rows.items():
        assert [prompt.row for prompt in claimed if prompt and prompt.client == client] == own


def test_a_thousand_new_names_are_not_before_a_known_one(queue: Queue) -> None:
    queue.add("polite")
    queue.run()
    for number in range(DEPTH):
        queue.add(f"name-{number}")
    queue.add("polite")
    assert "polite" in queue.run(2)


def test_what_is_remembered_of_clients_is_bounded() -> None:
    turns = Turns()
    for number in range(2 * MAX_CLIENTS):
        turns.choose({f"name-{number}": number + 1}, {})
    assert len(turns._last) == MAX_CLIENTS


def test_a_prompt_that_was_put_back_is_its_clients_next(queue: Queue, journal: Journal) -> None:
    first, _ = queue.add("a", 2)
    prompt = journal.claim("assistant")
    assert prompt is not None
    journal.release(prompt.row)
    again = journal.claim("assistant")
    assert again is not None and again.row == first == prompt.row


def test_a_client_is_known_after_a_restart(queue: Queue, journal: Journal) -> None:
    queue.add("a")
    journal = reopened(journal, START)
    prompt = journal.claim("assistant")
    assert prompt is not None and prompt.client == "a"
    journal.close()


# --- Share ---------------------------------------------------------------------------------------------


def test_a_client_that_is_alone_may_have_the_whole_queue(queue: Queue) -> None:
    assert queue.fill("@anonymous") == DEPTH


def test_another_finds_room_in_a_queue_that_one_has_filled(queue: Queue) -> None:
    queue.fill("greedy")
    assert queue.fill("polite") == DEPTH // 2
    with pytest.raises(QueueFull, match="share of the queue is 16") as refused:
        queue.add("greedy")
    assert refused.value.retry_after_ms == 1


def test_beside_another_a_client_gets_its_share_and_no_more(queue: Queue) -> None:
    queue.add("polite")
    assert queue.fill("greedy") == DEPTH // 2
    queue.add("polite", 3)
    queue.add("third")


def test_the_queue_has_an_end_whoever_asks(queue: Queue, journal: Journal) -> None:
    queue.fill("greedy")
    for number in range(2 * HARD_LIMIT * DEPTH):
        try:
            queue.add(f"name-{number}")
        except QueueFull:
            break
    assert journal.depth() == HARD_LIMIT * DEPTH


def test_a_client_whose_prompts_are_answered_has_its_share_again(queue: Queue) -> None:
    queue.add("polite")
    queue.fill("greedy")
    queue.run(DEPTH // 2 + 1)
    assert queue.fill("greedy") == DEPTH


# --- Names for the model's process ---------------------------------------------------------------------


def test_a_runner_learns_no_clients_name_and_tells_one_from_another() -> None:
    first, second = owner_names(), owner_names()
    assert first("shop") == first("shop") != first("lab")
    assert first("shop") != second("shop"), "nor from one start to the next"
    assert "shop" not in first("shop")
