"""At temperature 0 the same request gets the same answer, whatever was asked before it or is asked beside it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.real.conftest import NEW_TOKENS
from tests.real.prompts import PROMPTS
from tests.support.client import Client, chat
from tests.support.processes import Daemon, standing_still
from tests.support.sample_device import wait_for_state
from tests.support.wrapper import ask, forget, user


class Alone:
    """The answers that each prompt gets alone, and what has been compared with them."""

    def __init__(self, answers: tuple[str, ...], figures: dict[str, str]) -> None:
        self.answers = answers
        self._figures = figures

    def assert_equals(self, way: str, answers: list[str]) -> None:
        """Each prompt's answer, got in another way, is the one that it gets alone."""
        different = [
            (prompt, answer, right)
            for prompt, answer, right in zip(PROMPTS, answers, self.answers, strict=True)
            if answer != right
        ]
        self._figures[f"equal answers: {way}"] = f"{len(PROMPTS) - len(different)} of {len(PROMPTS)}"
        assert different == []


@pytest.fixture
def right(alone: tuple[str, ...], figures: dict[str, str]) -> Alone:
    return Alone(alone, figures)


def short(prompt: str) -> dict[str, Any]:
    return chat(prompt, max_tokens=NEW_TOKENS)


def test_the_model_is_a_real_one(right: Alone) -> None:
    """Most of what it knows it says on any CPU. No single answer is asked for: for the capital of France its first two
    words are so close that the kernels of the CPU decide between them (docs/models.md)."""
    known = {
        "Who wrote Hamlet?": "Shakespeare",
        "What is the currency of Japan?": "yen",
        "What is the capital of Italy?": "Rome",
        "Who painted the Mona Lisa?": "Leonardo",
        "What is the chemical symbol for gold?": "Au",
    }
    answers = dict(zip(PROMPTS, right.answers, strict=True))
    right_ones = [word for prompt, word in known.items() if word in answers[prompt]]
    assert len(right_ones) >= 4, {prompt: answers[prompt] for prompt in known}
    assert len(set(right.answers)) == len(PROMPTS), "no two prompts have one answer"


def test_over_mqtt_behind_other_prompts(client: Client, right: Alone) -> None:
    right.assert_equals("behind other prompts", [client.ask(short(prompt)).text for prompt in PROMPTS])


def test_again(client: Client, right: Alone) -> None:
    twice = [[client.ask(short(prompt)) for _ in range(2)] for prompt in PROMPTS]
    for number in range(2):
        right.assert_equals(f"twice, time {number + 1}", [answers[number].text for answers in twice])
    again = [answers[1].json["usage"] for answers in twice]
    assert all(usage["cached_tokens"] == usage["prompt_tokens"] - 2 for usage in again), "it was reused"


def test_four_at_once(client: Client, right: Alone) -> None:
    answers: list[str] = []
    for start in range(0, len(PROMPTS), 4):
        sent = [client.send(short(prompt)) for prompt in PROMPTS[start : start + 4]]
        answers += [client.answer(correlation).text for correlation in sent]
    right.assert_equals("four at once", answers)


def test_after_a_cancel(client: Client, device: Daemon, right: Alone, figures: dict[str, str]) -> None:
    (runner,) = device.runners()
    answers, statuses = [], []
    for prompt in PROMPTS:
        cancelled = client.send({**chat(prompt, max_tokens=1500), "stream": True})
        client.wait(lambda m, mine=cancelled: m.topic == f"{client.replies}/stream" and m.correlation == mine)
        with standing_still(runner):
            client.publish(
                f"{client.root}/ctl/cancel", b"", ResponseTopic=client.replies, CorrelationData=cancelled
            )
            statuses.append(client.answer(cancelled).status)
        answers.append(client.ask(short(prompt)).text)
    figures["prompts cancelled in the middle"] = f"{statuses.count(499)} of {len(PROMPTS)}"
    assert statuses.count(499) > len(PROMPTS) / 2, "too few were cancelled in the middle"
    right.assert_equals("after a cancel", answers)


def test_after_a_restart(client: Client, device: Daemon, right: Alone) -> None:
    client.ask(short(PROMPTS[0]))
    device.restart()
    wait_for_state(device, "ready")
    first = client.ask(short(PROMPTS[0]))
    answers = [first.text, *(client.ask(short(prompt)).text for prompt in PROMPTS[1:])]
    usage = first.json["usage"]
    assert usage["cached_tokens"] < usage["prompt_tokens"] - 2, (
        "nothing of a client's text survives a restart"
    )
    right.assert_equals("after a restart", answers)


@pytest.mark.parametrize("slice_tokens", [37, 16, 8, 4096])
def test_in_other_slices(
    wrapper: Any, right: Alone, slice_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = wrapper.unwrap_python_model().predict.__globals__
    monkeypatch.setitem(code, "SLICE_TOKENS", slice_tokens)
    answers = []
    for prompt in PROMPTS:
        forget(wrapper)
        answers.append(ask(wrapper, user(prompt), max_tokens=NEW_TOKENS).text)
    right.assert_equals(f"in slices of {slice_tokens} tokens", answers)


def test_a_prompt_of_65_tokens_has_no_slice_of_one(wrapper: Any) -> None:
    engine = wrapper.unwrap_python_model()._engine
    words = next(n for n in range(1, 60) if len(engine.prompts.chat(user("river " * n)["messages"])) == 65)
    forget(wrapper)
    first = ask(wrapper, user("river " * words), max_tokens=NEW_TOKENS)
    assert first.usage["prompt_tokens"] == 65
    assert first.text == ask(wrapper, user("river " * words), max_tokens=NEW_TOKENS).text
