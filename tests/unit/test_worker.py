"""Model code in a thread of its own: what it puts is read, what nobody reads any longer ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edge_agent.runner.worker import Abandoned, Job, Worker

LIMIT_S = 60.0


def items(stream: Iterator[object]) -> list[object]:
    """Without the ticks."""
    return [item for item in stream if item is not None]


def test_items_come_in_their_order_and_an_error_after_them() -> None:
    def work(job: Job) -> None:
        for number in range(200):  # more than wait unread
            job.put(number)
        raise ZeroDivisionError

    found = []
    with pytest.raises(ZeroDivisionError):
        for item in Worker().stream(work):
            found += [] if item is None else [item]
    assert found == list(range(200))


def test_work_that_only_checks_ends_at_its_next_check_after_it_was_closed() -> None:
    worker, begun, closed, checks = Worker(), threading.Event(), threading.Event(), []

    def work(job: Job) -> None:
        job.check()
        begun.set()
        assert closed.wait(LIMIT_S)
        for number in range(1000):
            checks.append(number)
            job.check()

    stream = worker.stream(work)
    while not begun.is_set():
        next(stream)
    assert not worker.ended(0)
    stream.close()
    assert not worker.ended(0), "it has not looked yet"
    closed.set()
    assert worker.ended(LIMIT_S)
    assert checks == [0]
    assert items(worker.stream(lambda job: job.put("next"))) == ["next"]


def test_work_that_was_closed_before_its_turn_is_never_begun() -> None:
    worker, go = Worker(), threading.Event()
    begun: list[str] = []

    def wait(_: Job) -> None:
        assert go.wait(LIMIT_S)

    first, second = worker.stream(wait), worker.stream(lambda _: begun.append("second"))
    next(first)
    next(second)
    second.close()
    go.set()
    assert worker.ended(LIMIT_S)
    assert items(first) == []
    assert begun == []


def test_a_worker_that_never_began_has_ended() -> None:
    assert Worker().ended(0)


def test_a_put_that_waits_for_a_reader_ends_when_the_reader_goes() -> None:
    worker, ends = Worker(), []

    def work(job: Job) -> None:
        try:
            while True:
                job.put("x")
        except Abandoned as error:
            ends.append(error)
            raise

    stream = worker.stream(work)
    while next(stream) is None:
        pass
    stream.close()
    assert worker.ended(LIMIT_S)
    assert len(ends) == 1
