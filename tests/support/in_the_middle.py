"""Prompts that all run on a runner that stands still, however fast: a try in which one has ended is made again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.support.client import Client
from tests.support.processes import Daemon, wait_until

_TRIES = 10
_QUIET_S = 0.5
"""Where the runner stands still and the daemon has sent nothing for so long, nothing is on its way."""


def stopped_in_the_middle(
    client: Client, daemon: Daemon, *requests: dict[str, Any]
) -> tuple[psutil.Process, list[bytes]]:
    """The runner, suspended, and the correlations of these requests, which stream and have no answer yet.

    The daemon has one runner, and room in it for all of them; nobody else asks.
    """
    (runner,) = wait_until(daemon.runners, 60, "the runner")  # before: a look takes its time
    for _ in range(_TRIES):
        wait_until(lambda: daemon.status()["queue_depth"] == 0, 60, "an empty queue")
        sent = [client.send(request) for request in requests]
        for correlation in sent:
            client.wait(lambda m, mine=correlation: m.correlation == mine)
        runner.suspend()
        try:
            _settle(client, sent)
            if daemon.status()["queue_depth"] == len(sent) and not any(map(client.answers, sent)):
                return runner, sent
        except BaseException:
            runner.resume()
            raise
        runner.resume()
        for correlation in sent:
            client.answer(correlation)
    raise AssertionError("a prompt had always ended before the runner stood still")


@contextlib.contextmanager
def in_the_middle(client: Client, daemon: Daemon, *requests: dict[str, Any]) -> Iterator[list[bytes]]:
    """The runner stands still in the block, and all these requests run on it; gives their correlations."""
    runner, sent = stopped_in_the_middle(client, daemon, *requests)
    try:
        yield sent
    finally:
        runner.resume()


def _settle(client: Client, sent: Sequence[bytes]) -> None:
    """Returns once the daemon has passed on what the runner had said before it stood still."""
    seen, since_s = 0, time.monotonic()

    def is_quiet() -> bool:
        nonlocal seen, since_s
        now_s, came = time.monotonic(), sum(message.correlation in sent for message in list(client.messages))
        if came != seen:
            seen, since_s = came, now_s
        return now_s - since_s > _QUIET_S

    wait_until(is_quiet, 60, "silence")
