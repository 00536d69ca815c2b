"""How many threads a version runs on: what is measured, how, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import DeadlineExceeded
from edge_agent.runner.protocol import Delta, Done
from edge_agent.serving.learned import Learned
from edge_agent.serving.threads import LIMIT_S, MOST_PROMPTS, ThreadChoice, fastest, measure

DIGEST = "d" * 64


class Decoder:
    """Answers with as many tokens as it is asked for, at most `most`; says how long it took, or lets `now_s` run."""

    def __init__(self, *, rate: float = 100.0, most: int = 1 << 20, says_how_long: bool = True) -> None:
        self.rate, self.most, self.says_how_long = rate, most, says_how_long
        self.now_s = 0.0
        self.documents: list[dict[str, Any]] = []
        self.timeouts_s: list[float] = []

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]:
        self.documents.append(document)
        self.timeouts_s.append(timeout_s)
        tokens = min(self.most, document["max_tokens"])
        seconds = tokens / self.rate
        self.now_s += seconds
        yield Delta(id=prompt_id, text="x")
        yield Done(
            id=prompt_id,
            finish_reason="length",
            usage={"completion_tokens": tokens},
            timings={"decode_ms": seconds * 1000} if self.says_how_long else {},
        )


def asked_for(decoder: Decoder) -> list[int]:
    return [document["max_tokens"] for document in decoder.documents]


def test_more_threads_are_taken_only_when_they_are_clearly_faster() -> None:
    assert fastest({2: 10.0, 4: 10.3}) == 2
    assert fastest({4: 18.0, 2: 10.0}) == 4
    assert fastest({4: 9.0, 8: 20.0, 2: 10.0}) == 8


def test_a_runner_decodes_for_about_a_second_after_a_first_guess() -> None:
    decoder = Decoder(rate=100.0)
    assert measure(decoder, signature="chat") == pytest.approx(100.0)
    assert asked_for(decoder) == [8, 100]
    assert all("messages" in document for document in decoder.documents)


def test_a_fast_runner_and_a_slow_one_decode_a_bounded_number_of_tokens() -> None:
    fast, slow = Decoder(rate=1e6), Decoder(rate=0.5)
    measure(fast, signature="prompt")
    measure(slow, signature="prompt")
    assert (asked_for(fast), asked_for(slow)) == ([8, 512], [8, 8])


def test_short_answers_are_asked_for_again_until_there_are_enough_tokens() -> None:
    decoder = Decoder(rate=8.0, most=5)
    assert measure(decoder, signature="prompt") == pytest.approx(8.0)
    assert asked_for(decoder) == [8, 3, 8, 3]


def test_a_runner_that_does_not_say_how_long_it_decoded_is_timed() -> None:
    decoder = Decoder(rate=50.0, says_how_long=False)
    assert measure(decoder, signature="chat", clock=lambda: decoder.now_s) == pytest.approx(50.0)


def test_a_model_that_says_nothing_is_asked_twice_and_no_more() -> None:
    decoder = Decoder(most=0)
    assert measure(decoder, signature="chat") == 0.0
    assert asked_for(decoder) == [8, 8]


@pytest.mark.parametrize("tokens", [-1, -(10**9)])
def test_a_runner_that_takes_tokens_back_is_not_asked_for_ever(tokens: int) -> None:
    decoder = Decoder(most=tokens)
    assert measure(decoder, signature="chat") == 0.0
    assert asked_for(decoder) == [8, 8]


def test_a_runner_that_says_more_tokens_than_it_was_asked_for_is_not_that_much_faster() -> None:
    class Boaster(Decoder):
        def generate(
            self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
        ) -> Iterator[Delta | Done]:
            for item in super().generate(prompt_id, document, timeout_s=timeout_s):
                yield replace(item, usage={"completion_tokens": 10**9}) if isinstance(item, Done) else item

    assert measure(Boaster(rate=100.0), signature="chat") == pytest.approx(100.0)


def test_answers_of_one_token_are_asked_for_a_bounded_number_of_times() -> None:
    decoder = Decoder(rate=1e6, most=1)
    measure(decoder, signature="prompt")
    assert len(asked_for(decoder)) == 8 + MOST_PROMPTS


def test_a_measurement_ends_at_its_limit_of_time() -> None:
    decoder = Decoder(rate=0.01, most=1)  # 100 s for a token
    with pytest.raises(DeadlineExceeded):
        measure(decoder, signature="chat", clock=lambda: decoder.now_s)
    assert decoder.timeouts_s == [LIMIT_S, LIMIT_S - 100, LIMIT_S - 200]


def test_what_was_chosen_is_not_measured_again(tmp_path: Path) -> None:
    choice = ThreadChoice(0, learned=Learned(tmp_path / "learned.json"), measurable=(4, 2))
    assert choice.candidates(DIGEST) == (4, 2)
    assert choice.choose(DIGEST, {4: 10.0, 2: 20.0}) == 2
    assert choice.candidates(DIGEST) == (2,)
    assert choice.candidates("e" * 64) == (4, 2), "another version is measured itself"


def test_a_number_that_could_not_be_measured_leaves_the_first_guess_and_nothing_is_remembered(
    tmp_path: Path,
) -> None:
    choice = ThreadChoice(0, learned=Learned(tmp_path / "learned.json"), measurable=(4, 2))
    assert choice.choose(DIGEST, {4: 0.0, 2: 20.0}) == 4
    assert choice.candidates(DIGEST) == (4, 2)


def test_a_configured_number_is_never_measured(tmp_path: Path) -> None:
    assert ThreadChoice(3, learned=Learned(tmp_path / "learned.json"), measurable=(4, 2)).candidates(
        DIGEST
    ) == (3,)
