"""Whose turn it is: rules of the scheduler, with a model whose lanes say what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from edge_agent.runner.model import End, Lane, Model, Step
from edge_agent.runner.protocol import Delta, Done, Generate, Refused
from edge_agent.runner.scheduler import Scheduler

Steps = Callable[[dict[str, Any]], Iterator[str | End]]


def end(tokens: int = 0) -> End:
    return End(finish_reason="stop", usage={"completion_tokens": tokens})


class Script(Model):
    """Each document is `{"text": …, "prefill": slices, "share": bool}`; shared ones get one lane together.

    Args:
        memory: documents that run at once, at most.
    """

    def __init__(self, memory: int = 100) -> None:
        self.memory = memory
        self.open = 0
        self.starts: list[list[str]] = []

    def stream(self, document: dict[str, Any]) -> Any:
        raise NotImplementedError

    def start(self, documents: Sequence[dict[str, Any]]) -> list[Lane]:
        taken = list(documents[: self.memory - self.open])
        self.open += len(taken)
        self.starts.append([document["text"] for document in taken])
        shared = [row for row, document in enumerate(taken) if document.get("share")]
        groups = [[row] for row in range(len(taken)) if row not in shared]
        return [self._lane(rows, taken) for rows in [shared, *groups] if rows]

    def _lane(self, rows: list[int], documents: list[dict[str, Any]]) -> Lane:
        closed: list[bool] = []

        def close() -> None:
            if not closed:
                closed.append(True)
                self.open -= len(rows)

        return Lane(rows, self._steps(rows, documents), close)

    @staticmethod
    def _steps(rows: list[int], documents: list[dict[str, Any]]) -> Iterator[Step]:
        for _ in range(max(documents[row].get("prefill", 1) for row in rows)):
            yield []
        longest = max(len(documents[row]["text"]) for row in rows)
        for place in range(longest + 1):
            step: Step = []
            for row in rows:
                text = documents[row]["text"]
                if text[place : place + 1] == "!":
                    raise ZeroDivisionError
                if place <= len(text):
                    step.append((row, text[place] if place < len(text) else end(len(text))))
            yield step


class Bench:
    """A scheduler, what it sent, and whose turns it announced."""

    def __init__(self, model: Model, limit: int = 8) -> None:
        self.frames: list[Delta | Done | Refused] = []
        self.turns: list[list[str]] = []
        self.scheduler = Scheduler(
            model, limit=limit, send=self.frames.append, announce=lambda ids: self.turns.append(list(ids))
        )

    def add(self, *ids: str, **document: Any) -> None:
        for name in ids:
            self.scheduler.add(Generate(id=name, document={"text": f"{name}{name}{name}", **document}))

    def run(self, steps: int = 1000) -> None:
        for _ in range(steps):
            if self.scheduler.idle:
                return
            self.scheduler.step()

    def text(self, name: str) -> str:
        return "".join(frame.text for frame in self.frames if isinstance(frame, Delta) and frame.id == name)

    def ends(self) -> list[tuple[str, str]]:
        return [(frame.id, frame.type) for frame in self.frames if not isinstance(frame, Delta)]


def test_prompts_take_turns_and_each_gets_its_own_text() -> None:
    bench = Bench(Script())
    bench.add("a", "b", "c")
    bench.run()
    assert [bench.text(name) for name in "abc"] == ["aaa", "bbb", "ccc"]
    order = "".join(frame.text for frame in bench.frames if isinstance(frame, Delta))
    assert order == "abcabcabc"
    assert bench.scheduler.idle


def test_a_newcomer_has_the_next_turn_and_one_in_each_round() -> None:
    bench = Bench(Script())
    bench.add("a", "b", text="x" * 50)
    bench.run(20)
    bench.turns.clear()
    bench.add("n")
    bench.run(9)
    assert bench.turns[0] == ["n"]
    assert all(["n"] in bench.turns[start : start + 3] for start in range(0, 9, 3))


def test_who_comes_together_shares_a_lane_and_a_turn() -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", "b", "c", share=True)
    bench.run()
    assert [bench.text(name) for name in "abc"] == ["aaa", "bbb", "ccc"]
    assert all(turn == ["a", "b", "c"] for turn in bench.turns)
    assert model.open == 0


def test_a_prompt_that_has_only_just_begun_starts_again_with_who_comes_then_but_once() -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", share=True, prefill=3)
    bench.run(1)
    bench.add("b", share=True, prefill=3)
    bench.run(1)
    bench.add("c", share=True)
    bench.run()
    assert model.starts == [["aaa"], ["aaa", "bbb"], ["ccc"]]
    assert [bench.text(name) for name in "abc"] == ["aaa", "bbb", "ccc"]


def test_a_prompt_with_a_part_of_its_answer_never_starts_again() -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", prefill=0)
    bench.run(1)
    bench.add("b")
    bench.run()
    assert model.starts == [["aaa"], ["bbb"]]


def test_memory_goes_in_the_order_in_which_prompts_came() -> None:
    model = Script(memory=2)
    bench = Bench(model)
    bench.add("a", "b", "c", "d", "e")
    bench.run()
    assert [name for name, _ in bench.ends()] == ["a", "b", "c", "d", "e"]
    assert model.open == 0


def test_no_more_than_the_limit_runs_at_once() -> None:
    model = Script()
    bench = Bench(model, limit=1)
    bench.add("a", "b")
    bench.run()
    assert model.starts == [["aaa"], ["bbb"]]
    assert bench.ends() == [("a", "done"), ("b", "done")]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_prompt_is_answered_at_once_and_its_companions_go_on(steps: int) -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", "b", share=True)
    bench.add("c")
    bench.run(steps)
    bench.scheduler.cancel("a")
    assert bench.ends() == [("a", "refused")]
    bench.scheduler.cancel("a")
    bench.scheduler.cancel("nobody")
    bench.run()
    assert sorted(bench.ends()[1:]) == [("b", "done"), ("c", "done")]
    assert (bench.text("b"), bench.text("c")) == ("bbb", "ccc")
    assert model.open == 0


def test_a_lane_that_fails_costs_its_own_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", "b", text="x!", share=True)
    bench.add("c")
    bench.run()
    refused = [frame for frame in bench.frames if isinstance(frame, Refused)]
    assert [(frame.id, frame.code) for frame in refused] == [("a", "model_failed"), ("b", "model_failed")]
    assert bench.text("c") == "ccc"
    assert model.open == 0
    assert "request=a,b ZeroDivisionError" in capsys.readouterr().err


def test_whose_turn_it_is_is_said_before_the_model_is_asked() -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", text="!")
    bench.add("b")
    bench.run(1)
    assert bench.turns[0] == ["a", "b"], "a start may kill as well"
    bench.run()
    assert ["a"] in bench.turns
