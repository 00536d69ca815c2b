"""Prompts while everything around them breaks: the promise of the contract's *Delivery*, counted.

Four clients with persistent sessions ask in bursts. Into each burst falls a fault: the daemon is SIGKILLed,
the broker restarted, the path between the two cut or slowed. In the end every prompt that the broker took has
one answer, and nearly all of them say what the bare library says.

    plan and seed → prompts and faults drawn → burst, fault, burst, fault, … → all answered → the table

A short run belongs to the tests; `CHAOS_PLAN=long` makes the long one (`./build.sh chaos`). What happens is
drawn from `CHAOS_SEED`, which the table shows; when it happens depends on the machine, too.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import multiprocessing
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.publishing.register import Published
from edge_agent.transport.reconnect import TAKEN_OVER_S
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker, running_broker
from tests.support.processes import Daemon, running_daemon, short_folder, wait_until
from tests.support.proxy import Proxy, running_proxy
from tests.support.sample_device import settings_for, wait_for_state
from tools.make_sample_model import Pair, pairs

DEVICE = "chaos"
CLIENTS = 4
MAX_TOKENS = 400
DEADLINE_S = 300
RESENT_SHARE = 0.2
LONG_SHARE = 0.5
LONG_ANSWER_CHARACTERS = 300

PATIENCE_S = 1.5 * TAKEN_OVER_S + 60
"""Longer than the agent's longest wait before it connects again: without a sign of life that long, it is over."""
RETRY_MAX_S = 3.0


class Fault(StrEnum):
    KILL = "daemon SIGKILLed"
    RESTART = "broker restarted"
    CUT = "path cut"
    SLOW = "path slowed"


class Resend(StrEnum):
    """When a prompt is sent a second time, with the same Correlation Data and body."""

    AT_ONCE = "at once"
    AFTER_FAULT = "after the fault"
    ANSWERED = "when it is answered"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much happens, at least."""

    prompts: int
    faults: dict[Fault, int]

    @property
    def burst(self) -> int:
        """Prompts for each fault; some are left for the end."""
        return self.prompts // (sum(self.faults.values()) + 3)


PLANS = {
    "short": Plan(prompts=100, faults={Fault.KILL: 5, Fault.RESTART: 2, Fault.CUT: 3, Fault.SLOW: 2}),
    "long": Plan(prompts=1000, faults={Fault.KILL: 20, Fault.RESTART: 5, Fault.CUT: 12, Fault.SLOW: 8}),
}


@dataclass(eq=False, kw_only=True)
class Asked:
    """One prompt and what came of it. Owned by the test's thread."""

    id: str
    client: int
    pair: Pair
    resend: Resend | None
    acked: bool = False
    answers: list[bytes] = field(default_factory=list)
    """Every terminal answer that came, repeats too; 429 is none."""
    retry_at_s: float | None = None
    expected: int = 1
    """How many answers have to come at least: one more for each time that it was sent with an answer there."""

    @property
    def body(self) -> bytes:
        document = {"messages": chat_of(self.pair), "temperature": 0, "max_tokens": MAX_TOKENS}
        return json.dumps({**document, "deadline_ms": DEADLINE_S * 1000}).encode()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the answers and the log say."""

    equal: int
    completions: int
    errors: dict[int, int]
    duplicates: int
    lost: list[str]
    unrepeated: list[str]
    contradictory: list[str]
    second_generations: list[str]
    unexplained: list[str]


# --- The tests ----------------------------------------------------------------------------------------


def test_every_acked_prompt_gets_one_answer_whatever_breaks(
    mlflow_server: Server, published: Published, sample_model: Path
) -> None:
    plan = PLANS[os.environ.get("CHAOS_PLAN", "short")]
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(1 << 31))
    print(f"\nchaos: CHAOS_SEED={seed}", flush=True)
    rng = random.Random(seed)
    prompts = drawn_prompts(plan.prompts, rng)
    reference = reference_answers(sample_model, [prompt.pair for prompt in prompts])
    started_s = time.monotonic()
    with stage(mlflow_server, plan) as (broker, proxy, daemon), connected_clients(broker) as clients:
        chaos = Chaos(broker, proxy, daemon, clients, prompts, rng)
        for fault in drawn_faults(plan, rng):
            chaos.strike(fault, burst=plan.burst)
        chaos.finish()
        log = daemon.log
    verdict = judged(prompts, reference, log)
    table = table_of(chaos, verdict, seconds=time.monotonic() - started_s, seed=seed)
    print(table, flush=True)
    assert all(chaos.fired[fault] >= count for fault, count in plan.faults.items()), table
    assert chaos.unheard == 0, f"the broker had nobody to give a prompt to\n{table}"
    assert not verdict.lost, f"without an answer: {story_of(verdict.lost, log)}\n{table}"
    assert not verdict.unrepeated, f"not answered again: {story_of(verdict.unrepeated, log)}\n{table}"
    assert not verdict.contradictory, f"two answers: {story_of(verdict.contradictory, log)}\n{table}"
    assert not verdict.second_generations, f"{story_of(verdict.second_generations, log)}\n{table}"
    assert all(prompt.acked for prompt in prompts), f"the broker did not take every prompt\n{table}"
    assert verdict.equal == verdict.completions, f"a completion says something else\n{table}"
    assert not verdict.unexplained, f"{story_of(verdict.unexplained, log)}\n{table}"
    assert verdict.completions > len(prompts) / 2, table


def test_the_judge_sees_what_is_lost_contradictory_wrong_or_made_twice() -> None:
    prompts = drawn_prompts(6, random.Random(1))
    reference = {prompt.pair: prompt.pair.answer for prompt in prompts}
    for prompt in prompts:
        prompt.acked, prompt.answers = True, [_completion(prompt.pair.answer)]
    lost, twice, wrong, failed, again, repeated = prompts
    lost.answers = []
    twice.answers.append(_completion("Something else."))
    wrong.answers = [_completion("Something else.")]
    failed.answers, failed.expected = [b'{"error":{"status":500}}'], 2
    repeated.answers *= 3
    log = "".join(
        f"INFO prompt {what} model=assistant\n"
        for what in (
            f"starts request={repeated.id}",
            f"starts request={repeated.id}",
            f"answered request={repeated.id}",
            f"starts request={again.id}",
            f"answered request={again.id}",
            f"starts request={again.id}",
        )
    )
    assert judged(prompts, reference, log) == Verdict(
        equal=3,
        completions=4,
        errors={500: 1},
        duplicates=2,
        lost=[lost.id],
        unrepeated=[failed.id],
        contradictory=[twice.id],
        second_generations=[again.id],
        unexplained=[failed.id],
    )


def _completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()


# --- What is drawn, and what is right -----------------------------------------------------------------


def drawn_prompts(count: int, rng: random.Random) -> list[Asked]:
    """Questions that the sample model knows, many with a long answer, some to be sent twice."""
    known = pairs()
    long = [pair for pair in known if len(pair.answer) >= LONG_ANSWER_CHARACTERS]
    run = rng.randrange(1 << 32)
    return [
        Asked(
            id=f"{run:08x}-{number:04d}",
            client=number % CLIENTS,
            pair=rng.choice(long if rng.random() < LONG_SHARE else known),
            resend=rng.choice(list(Resend)) if rng.random() < RESENT_SHARE else None,
        )
        for number in range(count)
    ]


def drawn_faults(plan: Plan, rng: random.Random) -> list[Fault]:
    """One kill in each round, the others dealt out evenly: a young daemon has short waits to reconnect."""
    rounds = [[Fault.KILL] for _ in range(plan.faults[Fault.KILL])]
    others = [fault for fault, count in plan.faults.items() if fault is not Fault.KILL for _ in range(count)]
    rng.shuffle(others)
    for position, fault in enumerate(others):
        rounds[position % len(rounds)].append(fault)
    for faults in rounds:
        rng.shuffle(faults)
    return [fault for faults in rounds for fault in faults]


def reference_answers(folder: Path, asked: Sequence[Pair]) -> dict[Pair, str]:
    """What the bare library answers, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(bare_answers, folder, list(dict.fromkeys(asked))).result(300)


def bare_answers(folder: Path, asked: Sequence[Pair]) -> dict[Pair, str]:
    """Greedy answers by onnxruntime-genai alone: nothing of edge-agent but the questions."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    ends = {int(token) for token in tokenizer.eos_token_ids}
    answers = {}
    for pair in asked:
        chat = tokenizer.apply_chat_template(json.dumps(chat_of(pair)), add_generation_prompt=True)
        prompt = [int(token) for token in tokenizer.encode(chat)]
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + MAX_TOKENS)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < MAX_TOKENS:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        spoken = np.array([token for token in tokens if token not in ends], dtype=np.int32)
        answers[pair] = str(tokenizer.decode(spoken))
    return answers


def chat_of(pair: Pair) -> list[dict[str, str]]:
    system = [{"role": "system", "content": pair.system}] if pair.system is not None else []
    return [*system, {"role": "user", "content": pair.question}]


# --- Clients ------------------------------------------------------------------------------------------


class PersistentClient:
    """A client that outlives its broker: it connects and subscribes again, and its session is kept.

    `publish` and the two queues, `pubacks` and `came`, belong to the test's thread; paho's thread fills them.
    """

    def __init__(self, broker: Broker, number: int) -> None:
        self.replies = f"replies/{DEVICE}-{number}"
        self.pubacks: collections.deque[tuple[int, bool]] = collections.deque()
        """(mid, somebody was there to get it)"""
        self.came: collections.deque[tuple[str, bytes]] = collections.deque()
        """(Correlation Data, payload)"""
        self.subscribed = False
        self._paho = Paho(CallbackAPIVersion.VERSION2, client_id=f"{DEVICE}-{number}", protocol=MQTTv5)
        self._paho.on_connect = self._on_connect
        self._paho.on_subscribe = self._on_subscribe
        self._paho.on_publish = self._on_publish
        self._paho.on_message = self._on_message
        self._paho.reconnect_delay_set(1, 2)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600
        self._paho.connect(broker.host, broker.port, clean_start=False, properties=properties)
        self._paho.loop_start()

    def close(self) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()

    def publish(self, body: bytes, correlation: str) -> int:
        """Gives the mid; paho sends it again until its PUBACK has come."""
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = self.replies
        properties.CorrelationData = correlation.encode()
        return self._paho.publish(f"edge/v1/{DEVICE}/req/chat", body, qos=1, properties=properties).mid

    def _on_connect(self, client: Paho, *_: object) -> None:
        client.subscribe(self.replies, qos=1)

    def _on_subscribe(self, *_: object) -> None:
        self.subscribed = True

    def _on_publish(self, _client: Paho, _userdata: object, mid: int, code: ReasonCode, _: object) -> None:
        self.pubacks.append((mid, code.value == 0))

    def _on_message(self, _client: Paho, _userdata: object, message: MQTTMessage) -> None:
        correlation: bytes = getattr(message.properties, "CorrelationData", b"")
        self.came.append((correlation.decode(), bytes(message.payload)))


@contextmanager
def connected_clients(broker: Broker) -> Iterator[list[PersistentClient]]:
    with ExitStack() as stack:
        clients = []
        for number in range(CLIENTS):
            clients.append(PersistentClient(broker, number))
            stack.callback(clients[-1].close)
        wait_until(lambda: all(client.subscribed for client in clients), 60, "the clients' subscriptions")
        yield clients


@contextmanager
def stage(registry: Server, plan: Plan) -> Iterator[tuple[Broker, Proxy, Daemon]]:
    """A broker that keeps what it has, as an operator would set it up, a bad network, and a device."""
    with (
        short_folder() as folder,
        # Past its limit a broker says that it took a message, and drops it.
        running_broker(folder, persistence=True, extra_config="max_queued_messages 0") as broker,
        running_proxy(broker.host, broker.port) as proxy,
    ):
        settings = settings_for(
            broker,
            registry.uri,
            device=DEVICE,
            mqtt={"host": proxy.host, "port": proxy.port},
            limits={"queue_depth": plan.burst * 2 // 3},
        )
        with running_daemon(settings) as daemon:
            wait_for_state(daemon, "ready")
            yield broker, proxy, daemon


# --- The run ------------------------------------------------------------------------------------------


class Chaos:
    """Sends the prompts in bursts and lets a fault fall into each. Owned by the test's thread.

    Attributes:
        fired: faults that hit something.
        killed_while_running: kills that hit a daemon whose model was answering.
        resends, retries, unheard: second sendings, sendings after a 429, prompts that the broker had no
            subscriber for.
    """

    def __init__(
        self,
        broker: Broker,
        proxy: Proxy,
        daemon: Daemon,
        clients: Sequence[PersistentClient],
        prompts: Sequence[Asked],
        rng: random.Random,
    ) -> None:
        self.fired: collections.Counter[Fault] = collections.Counter()
        self.killed_while_running = 0
        self.resends = self.retries = self.unheard = 0
        self._broker = broker
        self._proxy = proxy
        self._daemon = daemon
        self._clients = clients
        self._rng = rng
        self.prompts = prompts
        self._unsent = collections.deque(prompts)
        self._asked: dict[str, Asked] = {}
        self._mids: list[dict[int, Asked]] = [{} for _ in clients]
        self._progress = 0
        self._lived = 0  # characters of the log that earlier daemons wrote

    def strike(self, fault: Fault, *, burst: int) -> None:
        """One burst and one fault, at a drawn moment while prompts are in flight, some of them just sent."""
        sent = self._send(burst // 2)
        answers = self._rng.randint(0, len(sent))
        self._until(
            lambda: sum(bool(prompt.answers) for prompt in sent) >= answers,
            f"{answers} answers of a burst",
        )
        self._send(burst - len(sent))
        while not self._hit(fault):
            assert self._unsent, f"everything was answered before a fault ({fault}) hit something"
        self._resend(Resend.AFTER_FAULT)

    def _hit(self, fault: Fault) -> bool:
        """The fault, now; whether something was in flight that it could hit."""
        if fault in (Fault.CUT, Fault.SLOW):
            self._until(lambda: self._proxy.connections() > 0, "the daemon's connection")
        self._have_in_flight()
        self._pass(self._rng.uniform(0, 0.1))
        has_target = self._have_in_flight()
        has_fired = {
            Fault.KILL: self._kill,
            Fault.RESTART: self._restart_broker,
            Fault.CUT: self._cut,
            Fault.SLOW: self._slow,
        }[fault]()
        hit = has_target and has_fired
        self.fired[fault] += hit
        return hit

    def finish(self) -> None:
        """The rest of the prompts; then, when each has its answer, a last word for each client.

        What the broker still held for the daemon has been handled when that one is answered.
        """
        self._send(len(self._unsent) - CLIENTS)
        if self._settled():
            self._send(CLIENTS)
            self._settled()

    # --- Faults: each says whether it hit something ----------------------------------------------------

    def _kill(self) -> bool:
        assert self._daemon.running, f"the daemon ended by itself:\n{self._daemon.log[-5000:]}"
        self._daemon.kill()
        log = self._daemon.log
        self.killed_while_running += bool(running_at_the_end(log[self._lived :]))
        self._lived = len(log)
        self._daemon.start(ready=False)
        if self._rng.random() < 0.5:  # otherwise the next burst meets a daemon that is still starting
            self._until(lambda: self._daemon.notify.got("READY=1"), "the daemon after a kill")
        return True

    def _restart_broker(self) -> bool:
        self._broker.stop()
        self._pass(self._rng.uniform(0, 1))
        self._broker.start()
        return True

    def _cut(self) -> bool:
        cut = self._proxy.cut(refuse=True)
        self._pass(self._rng.uniform(0, 1))
        self._proxy.restore()
        return cut > 0

    def _slow(self) -> bool:
        """A trickle, with more prompts in it; in half of the cases it then breaks, often in a packet's middle."""
        before = self._proxy.slowed_bytes
        self._proxy.slow(self._rng.uniform(200, 2000))
        self._send(CLIENTS)
        self._pass(self._rng.uniform(0.5, 2))
        slowed = self._proxy.slowed_bytes - before
        if self._rng.random() < 0.5:
            self._proxy.cut()
        self._proxy.restore()
        return slowed > 0

    # --- What clients do -------------------------------------------------------------------------------

    def _send(self, count: int) -> list[Asked]:
        burst = [self._unsent.popleft() for _ in range(min(count, len(self._unsent)))]
        for prompt in burst:
            self._asked[prompt.id] = prompt
            self._publish(prompt)
        self._resend(Resend.AT_ONCE)
        return burst

    def _resend(self, moment: Resend) -> None:
        """Once for each prompt that has been sent and that this is the moment for."""
        for prompt in self._asked.values():
            if prompt.resend is moment and (prompt.answers or moment is not Resend.ANSWERED):
                prompt.expected = len(prompt.answers) + 1
                prompt.resend = None
                self._publish(prompt)
                self.resends += 1

    def _publish(self, prompt: Asked) -> None:
        mid = self._clients[prompt.client].publish(prompt.body, prompt.id)
        self._mids[prompt.client][mid] = prompt

    def _turn(self) -> None:
        """Takes what has come; sends again what was refused for a full queue, and what is to be resent now."""
        for client, mids in zip(self._clients, self._mids, strict=True):
            while client.pubacks:
                mid, heard = client.pubacks.popleft()
                mids.pop(mid).acked = True
                self.unheard += not heard
                self._progress += 1
            while client.came:
                self._take(*client.came.popleft())
        now_s = time.monotonic()
        for prompt in self._asked.values():
            if prompt.retry_at_s is not None and now_s >= prompt.retry_at_s:
                prompt.retry_at_s = None
                if not prompt.answers:
                    self._publish(prompt)
                    self.retries += 1
        self._resend(Resend.ANSWERED)

    def _take(self, correlation: str, payload: bytes) -> None:
        assert correlation in self._asked, (
            f"an answer to nothing that was asked: correlation {correlation!r}, {payload[:300]!r}\n"
            f"{self._daemon.log[-5000:]}"
        )
        prompt = self._asked[correlation]
        error = json.loads(payload).get("error") or {}
        if error.get("status") == 429:
            prompt.retry_at_s = time.monotonic() + min(RETRY_MAX_S, error["retry_after_ms"] / 1000)
        else:
            prompt.answers.append(payload)
            self._progress += 1

    # --- Waiting ---------------------------------------------------------------------------------------

    def _have_in_flight(self) -> bool:
        """Sends more when all was answered faster than it was watched. False if all was even so."""
        for _ in range(5):
            self._until(lambda: all(prompt.acked for prompt in self._asked.values()), "the PUBACKs")
            if self._in_flight():
                return True
            self._send(CLIENTS)
        return False

    def _in_flight(self) -> int:
        """Prompts that the broker has taken and that have no answer."""
        self._turn()
        return sum(prompt.acked and not prompt.answers for prompt in self._asked.values())

    def _settled(self) -> bool:
        """Waits until nothing is under way. False when something is, and nothing has moved for a long time."""
        seen, until_s = self._progress, time.monotonic() + PATIENCE_S

        def under_way() -> bool:
            self._turn()
            waiting = any(len(prompt.answers) < prompt.expected for prompt in self._asked.values())
            return waiting or any(self._mids)

        def over() -> bool:
            nonlocal seen, until_s
            if self._progress > seen:
                seen, until_s = self._progress, time.monotonic() + PATIENCE_S
            return not under_way() or time.monotonic() >= until_s

        wait_until(over, 3600, "quiet")
        return not under_way()

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        def reached() -> bool:
            self._turn()
            return condition()

        try:
            wait_until(reached, PATIENCE_S, what)
        except TimeoutError as error:
            raise AssertionError(
                f"{error}; the daemon's log ends with:\n{self._daemon.log[-5000:]}"
            ) from error

    def _pass(self, seconds: float) -> None:
        """Lets time go by while the clients go on."""
        limit_s = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= limit_s, "time to pass")


# --- The judgement ------------------------------------------------------------------------------------

_STEP = re.compile(r"prompt (starts|answered|given up|abandoned) request=(\S+)")


def judged(prompts: Sequence[Asked], reference: dict[Pair, str], log: str) -> Verdict:
    documents = [(prompt, json.loads(prompt.answers[0])) for prompt in prompts if prompt.answers]
    completed = [(prompt, document) for prompt, document in documents if "error" not in document]
    return Verdict(
        completions=len(completed),
        equal=sum(
            document["choices"][0]["message"]["content"] == reference[prompt.pair]
            for prompt, document in completed
        ),
        errors=dict(
            collections.Counter(
                int(document["error"]["status"]) for _, document in documents if "error" in document
            )
        ),
        duplicates=sum(len(prompt.answers) - len(set(prompt.answers)) for prompt in prompts),
        lost=[prompt.id for prompt in prompts if prompt.acked and not prompt.answers],
        unrepeated=[prompt.id for prompt in prompts if 0 < len(prompt.answers) < prompt.expected],
        contradictory=[prompt.id for prompt in prompts if len(set(prompt.answers)) > 1],
        second_generations=second_generations(log),
        unexplained=[
            prompt.id
            for prompt, document in documents
            if "error" in document and not given_up(prompt.id, document, log)
        ],
    )


def given_up(request_id: str, document: dict[str, Any], log: str) -> bool:
    """Whether an error is the one that the contract has: 500 for a prompt that was running at two daemon deaths."""
    return (
        int(document["error"]["status"]) == 500
        and f"prompt starts request={request_id} " in log
        and f"prompt given up request={request_id} " in log
    )


def second_generations(log: str) -> list[str]:
    """Prompts that started, or were answered, once more after their answer had been committed."""
    finished: set[str] = set()
    again = []
    for step, request_id in _STEP.findall(log):
        if request_id in finished and step in ("starts", "answered"):
            again.append(request_id)
        if step in ("answered", "given up"):
            finished.add(request_id)
    return again


def running_at_the_end(log: str) -> set[str]:
    """Prompts that one daemon started and did not answer."""
    running: set[str] = set()
    for step, request_id in _STEP.findall(log):
        if step == "starts":
            running.add(request_id)
        else:
            running.discard(request_id)
    return running


def story_of(ids: Sequence[str], log: str) -> str:
    """What the log says of the first few."""
    lines = [line for line in log.splitlines() if any(name in line for name in ids[:3])]
    return "\n".join([", ".join(ids[:20]), *lines[:60]])


def table_of(chaos: Chaos, verdict: Verdict, *, seconds: float, seed: int) -> str:
    prompts = chaos.prompts
    rows: list[tuple[str, object]] = [
        *((str(fault), chaos.fired[fault]) for fault in Fault),
        ("… while the model was answering", chaos.killed_while_running),
        ("prompts", len(prompts)),
        ("acked by the broker", sum(prompt.acked for prompt in prompts)),
        ("resends", chaos.resends),
        ("429 retries", chaos.retries),
        ("completions", verdict.completions),
        ("equal to the reference", verdict.equal),
        ("errors by status", json.dumps(verdict.errors)),
        ("duplicates", verdict.duplicates),
        ("lost", len(verdict.lost)),
        ("not answered again", len(verdict.unrepeated)),
        ("contradictory", len(verdict.contradictory)),
        ("second generations", len(verdict.second_generations)),
        ("errors without two daemon deaths", len(verdict.unexplained)),
        ("duration", f"{seconds:.0f} s"),
        ("seed", seed),
    ]
    return "\n".join(f"{name:<32} {value:>12}" for name, value in rows)
