"""The questions to each side and the measurements of its answers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.bench import over_http
from edge_agent.bench.peers import LlamaCppSide
from edge_agent.bench.sides import ANSWER_TIMEOUT_S, LineSide, MqttSide, Side
from edge_agent.bench.timing import Timing
from edge_agent.host import memory

LENGTHS = (32, 256, 1024)
"""Prompt tokens."""
ROUNDS = {32: 5, 256: 2, 1024: 1}
"""Prompts of each length in one launch."""
AT_ONCE = (1, 2, 4, 8)
PEER_AT_ONCE = 4
"""One of `AT_ONCE`: a peer gets the same prompts."""
NEWCOMERS = 3
OVER_HTTP = 10
PREFIX_TOKENS = 1000
_LATER_QUESTION = "And after that, what is the capital of Nepal?"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Texts that are made once, so that every side and every launch gets the same ones. No two begin alike.

    Attributes:
        by_length: `ROUNDS` texts for each length that fits into the context.
        short: texts of 32 tokens, for prompts at once.
        prefix: a long text; None if it does not fit into the context.
    """

    by_length: Mapping[int, Sequence[str]]
    short: Sequence[str]
    prefix: str | None

    @classmethod
    def made_by(cls, bare: LineSide, *, context_tokens: int, new_tokens: int) -> Prompts:
        lengths = [length for length in LENGTHS if length + new_tokens <= context_tokens]
        needed = sum(AT_ONCE) + max(AT_ONCE) + NEWCOMERS * 4 + 2 * OVER_HTTP
        has_room = PREFIX_TOKENS + 64 + new_tokens <= context_tokens
        return cls(
            by_length={n: [bare.prompt(n) for _ in range(ROUNDS[n])] for n in lengths},
            short=[bare.prompt(LENGTHS[0]) for _ in range(needed)],
            prefix=bare.prompt(PREFIX_TOKENS) if has_room else None,
        )

    def at_once(self, count: int) -> Sequence[str]:
        """Those that are sent together, so many of them."""
        begin = sum(AT_ONCE[: AT_ONCE.index(count)])
        return self.short[begin : begin + count]


@dataclass(kw_only=True)
class Measured:
    """The measurements of one side in all launches."""

    timings: dict[int, list[Timing]] = field(default_factory=dict)
    load_ms: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Together:
    """Measurements of the whole agent only: several prompts at once, a newcomer, a known prefix."""

    tokens_per_s: dict[int, list[float]] = field(default_factory=dict)
    first_token_ms: dict[int, list[float]] = field(default_factory=dict)
    in_turn_tokens_per_s: list[float] = field(default_factory=list)
    newcomer_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    known_ms: list[float] = field(default_factory=list)
    daemon_bytes: list[int] = field(default_factory=list)
    control_ms: list[float] = field(default_factory=list)
    http_ms: list[float] = field(default_factory=list)
    gateway_bytes: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class PeerTogether:
    """Measurements of a peer that answers several prompts at once.

    Attributes:
        equal: for each answer, whether it is the text that the same server gives to the same prompt alone.
    """

    tokens_per_s: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)


def measure(side: Side, prompts: Prompts, new_tokens: int, measured: Measured) -> None:
    """Measures first token and decode at each length, and the side's memory.

    Resident memory is read after one short prompt, and so shows what the side itself needs. The peak includes the
    longer prompts; the agent keeps the keys and values of some of them for later prompts, the bare library does not.
    """
    side.ask(prompts.short[0], 4)  # warms up the library
    measured.resident_bytes.append(memory.resident_bytes(side.pid))
    for length, texts in prompts.by_length.items():
        measured.timings.setdefault(length, []).extend(side.ask(text, new_tokens) for text in texts)
    measured.load_ms.append(side.load_ms)
    measured.peak_bytes.append(memory.peak_bytes(side.pid))


def measure_together(side: MqttSide, prompts: Prompts, new_tokens: int, together: Together) -> None:
    """Measures prompts at once, prompts one after the other, a newcomer, and a question after a known prefix."""
    fresh = iter(prompts.short[sum(AT_ONCE) :])
    for count in AT_ONCE:
        _at_once(side, prompts.at_once(count), new_tokens, together)
    started = time.perf_counter()
    answers = [side.ask(next(fresh), new_tokens) for _ in range(4)]
    together.in_turn_tokens_per_s.append(_rate(answers, started))
    for _ in range(NEWCOMERS):
        _newcomer(side, [next(fresh) for _ in range(4)], new_tokens, together)
    if prompts.prefix is not None:
        together.cold_ms.append(side.ask(prompts.prefix, new_tokens).first_token_ms)
        later = f"{prompts.prefix} {_LATER_QUESTION}"
        together.known_ms.append(side.ask(later, new_tokens).first_token_ms)
    if over_http.installed():
        _over_http(side, [next(fresh) for _ in range(2 * OVER_HTTP)], new_tokens, together)
    together.daemon_bytes.append(memory.resident_bytes(side.daemon_pid))


def measure_peer_together(
    side: LlamaCppSide, prompts: Prompts, new_tokens: int, together: PeerTogether
) -> None:
    """Measures the prompts at once that the agent is sent at once. They come one after the other first, which warms
    up every slot, and shows what the answers are alone."""
    texts = prompts.at_once(PEER_AT_ONCE)
    alone = [side.answer(text, new_tokens).text for text in texts]
    started = time.perf_counter()
    answers = side.answer_at_once(texts, new_tokens)
    together.tokens_per_s.append(_rate([answer.timing for answer in answers], started))
    together.first_token_ms.extend(answer.timing.first_token_ms for answer in answers)
    together.equal.extend(answer.text == text for answer, text in zip(answers, alone, strict=True))


def _over_http(side: MqttSide, texts: Sequence[str], new_tokens: int, together: Together) -> None:
    """Measures the first token over the control socket and over HTTP, in turn."""
    with side.gateway() as gateway:
        for directly, through in zip(texts[::2], texts[1::2], strict=True):
            together.control_ms.append(gateway.over_control_ms(directly, new_tokens))
            together.http_ms.append(gateway.over_http_ms(through, new_tokens))
        together.gateway_bytes.append(memory.resident_bytes(gateway.pid))


def _at_once(side: MqttSide, texts: Sequence[str], new_tokens: int, together: Together) -> None:
    started = time.perf_counter()
    keys = [side.client.send(text, new_tokens) for text in texts]
    answers = side.client.wait_all(keys, timeout_s=ANSWER_TIMEOUT_S)
    together.tokens_per_s.setdefault(len(texts), []).append(_rate(answers, started))
    firsts = [answer.first_token_ms for answer in answers]
    together.first_token_ms.setdefault(len(texts), []).extend(firsts)


def _newcomer(side: MqttSide, texts: Sequence[str], new_tokens: int, together: Together) -> None:
    """Starts three prompts, and at a random time a fourth, which is measured."""
    keys = [side.client.send(text, new_tokens) for text in texts[:3]]
    side.client.wait_first(keys[0], timeout_s=ANSWER_TIMEOUT_S)
    time.sleep(random.uniform(0.0, 0.2))
    newcomer = side.client.send(texts[3], new_tokens)
    together.newcomer_ms.append(side.client.wait(newcomer, timeout_s=ANSWER_TIMEOUT_S).first_token_ms)
    side.client.wait_all(keys, timeout_s=ANSWER_TIMEOUT_S)


def _rate(answers: Sequence[Timing], started: float) -> float:
    tokens = sum(answer.completion_tokens for answer in answers)
    return tokens / (time.perf_counter() - started)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
