"""Clients without a session come and go while the broker restarts and the daemon dies: no answer is lost.

Such a client knows of its prompts only what it has heard. So it does what docs/mqtt.md tells it: it comes back with the
same answer topic, and sends again what has no answer yet. Some send again what has one. Whether the broker has lost the
prompt, or the answer came while nobody listened, each prompt ends with one answer and is computed once.
"""

from __future__ import annotations

import concurrent.futures
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TypeVar

import pytest

from tests.support.brokers import ContractBroker, make
from tests.support.caller import Caller
from tests.support.processes import Daemon, short_folder, wait_until
from tests.support.sample_device import running_device, settings_for

T = TypeVar("T")
SEED = 15
QUESTION = "What is the capital of Spain?"
SEND_AGAIN_S = 5.0
"""A client that hears nothing for so long sends its prompt again."""
PATIENCE_S, LIMIT_S = 120.0, 480.0


class Way(StrEnum):
    """How a visit ends."""

    VANISH = "vanished before its answers"
    LEAVE = "left before its answers"
    ANSWERED = "left after its answers"
    RESEND = "sent an answered prompt again"


class Fault(StrEnum):
    RESTART = "broker restarted"
    CRASH = "broker killed"
    KILL = "daemon killed"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much happens: faults fall evenly into the prompts."""

    clients: int
    prompts_each: int
    faults: Sequence[Fault]

    @property
    def prompts(self) -> int:
        return self.clients * self.prompts_each


SHORT = Plan(clients=4, prompts_each=6, faults=(Fault.RESTART,))
LONG = Plan(clients=8, prompts_each=40, faults=(Fault.RESTART, Fault.CRASH, Fault.KILL) * 3)


@dataclass
class Passer:
    """One client without a session. Its thread's, but for `ids`, which the test reads.

    Args:
        connect: gives its caller, connected.
    """

    connect: Callable[[], Caller]
    rng: random.Random
    count: int
    ids: list[str] = field(default_factory=list)
    visits: Counter[Way] = field(default_factory=Counter)
    caller: Caller = field(init=False)

    def run(self) -> None:
        """Comes and goes until it has sent all its prompts, and stays the last time until it has all answers."""
        self.caller = self.connect()
        while len(self.ids) < self.count:
            self._visit(self.rng.choice(list(Way)))
            _persist(self.caller.connect)
        self._answered(self.ids)
        self.caller.leave()

    def _visit(self, way: Way) -> None:
        for request_id in self._unanswered(self.ids):
            self.caller.send_again(request_id)
        batch = min(self.rng.randint(1, 3), self.count - len(self.ids))
        sent = [self.caller.send(QUESTION, max_tokens=200) for _ in range(batch)]
        self.ids += sent
        if way in (Way.ANSWERED, Way.RESEND):
            self._answered(sent)
        if way is Way.RESEND:
            self.caller.send_again(self.rng.choice(self.ids))
        self.visits[way] += 1
        (self.caller.vanish if way is Way.VANISH else self.caller.leave)()

    def _answered(self, ids: Sequence[str]) -> None:
        """Waits for these answers, and asks again: the broker may have restarted, and knows nothing of this client."""
        until_s = time.monotonic() + PATIENCE_S
        while left := self._unanswered(ids):
            assert time.monotonic() < until_s, f"no answer to {left}"
            for request_id in left:
                self.caller.send_again(request_id)
            try:
                self.caller.wait_answers(left, SEND_AGAIN_S)
            except TimeoutError:
                continue

    def _unanswered(self, ids: Sequence[str]) -> list[str]:
        return [request_id for request_id in ids if not self.caller.answers(request_id)]


def _persist(connect: Callable[[], T]) -> T:
    """Connects, and tries again while the broker is away."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return connect()
        except OSError:
            assert time.monotonic() < until_s, "the broker is back"
            time.sleep(0.2)


@contextmanager
def stage(agent: Daemon, plan: Plan) -> Iterator[tuple[ContractBroker, Daemon]]:
    """A broker and a device that takes all prompts of the plan, even at once: a refusal would count as an answer."""
    limits = {"queue_depth": plan.prompts, "deadline_s": LIMIT_S + PATIENCE_S}
    with short_folder() as folder:
        broker = make("mosquitto", folder)
        broker.start()
        try:
            settings = settings_for(broker, "", device="passed", limits=limits)
            with running_device(agent, settings) as daemon:
                yield broker, daemon
        finally:
            broker.stop()


def strike(fault: Fault, broker: ContractBroker, daemon: Daemon) -> None:
    if fault is Fault.KILL:
        daemon.kill()
        daemon.start(ready=False)
    else:
        (broker.stop if fault is Fault.RESTART else broker.kill)()
        broker.start()


def _wait_until_sent(
    count: int, passers: Sequence[Passer], running: Sequence[concurrent.futures.Future[None]]
) -> None:
    """Waits until so many prompts have been sent, or a client has failed."""

    def reached() -> bool:
        failed = any(each.done() and each.exception() for each in running)
        return failed or sum(len(passer.ids) for passer in passers) >= count

    wait_until(reached, LIMIT_S, f"{count} prompts")


@pytest.mark.parametrize("plan", [SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["short", "long"])
def test_clients_without_a_session_that_come_and_go_get_one_answer_to_each_prompt(
    agent: Daemon, plan: Plan
) -> None:
    begun_s = time.monotonic()
    with (
        stage(agent, plan) as (broker, daemon),
        concurrent.futures.ThreadPoolExecutor(plan.clients) as threads,
    ):
        passers = [
            Passer(
                # Every other one speaks MQTT 3.1.1.
                partial(_persist, partial(Caller, broker, "passed", version5=bool(number % 2), clean=True)),
                random.Random(SEED + number),
                plan.prompts_each,
            )
            for number in range(plan.clients)
        ]
        running = [threads.submit(passer.run) for passer in passers]
        for number, fault in enumerate(plan.faults, 1):
            _wait_until_sent(plan.prompts * number // (len(plan.faults) + 1), passers, running)
            strike(fault, broker, daemon)
        for each in running:
            each.result(LIMIT_S)
        log = daemon.log
    answers = {
        request_id: [json.dumps(answer) for answer in passer.caller.answers(request_id)]
        for passer in passers
        for request_id in passer.ids
    }
    visits = sum((passer.visits for passer in passers), Counter())
    print(
        f"\n{len(answers)} prompts of {plan.clients} clients; {len(plan.faults)} faults; "
        + "; ".join(f"{way} {visits[way]}" for way in Way)
        + f"; came again {sum(len(came) - 1 for came in answers.values())}; "
        + f"unheard {log.count('answer unheard')}; {time.monotonic() - begun_s:.0f} s"
    )
    assert len(answers) == plan.prompts
    assert not [request_id for request_id, came in answers.items() if not came], "lost"
    assert not [request_id for request_id, came in answers.items() if len(set(came)) > 1], "two answers"
    assert not [each for each, (first, *_) in answers.items() if "error" in json.loads(first)], "errors"
    computed = {each: log.count(f"prompt answered request={each} ") for each in answers}
    assert max(computed.values()) == 1, f"computed again: {[e for e, count in computed.items() if count > 1]}"
