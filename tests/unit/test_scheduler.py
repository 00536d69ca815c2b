"""Whose turn it is: rules of the scheduler, with a model whose lanes say what the test wants."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from edge_agent.runner.model import End, Lane, Model, ToolCall
from edge_agent.runner.protocol import MAX_DELTA_CHARACTERS, Called, Delta, Done, Generate, Refused
from edge_agent.runner.scheduler import TEXT_INTERVAL_S, Scheduler, refusal_of

Steps = Callable[[dict[str, Any]], Iterator[str | End]]


def end(tokens: int = 0) -> End:
    return End(finish_reason="stop", usage={"completion_tokens": tokens})


class Script(Model):
    """Each document is `{"text": …, "prefill": slices}`; `!` in a text is where the model fails.

    Args:
        memory: documents that run at once, at most.

    Attributes:
        still_computes: it goes on with what was cancelled.
    """

    def __init__(self, memory: int = 100) -> None:
        self.memory = memory
        self.open = 0
        self.still_computes = False
        self.starts: list[list[str]] = []

    def stream(self, document: dict[str, Any]) -> Any:
        raise NotImplementedError

    def start(self, document: dict[str, Any], owner: str) -> Lane | None:
        if self.open >= self.memory:
            return None
        self.open += 1
        self.starts.append([document["text"]])
        return self._lane(document)

    def stopped(self, timeout_s: float) -> bool:
        return not self.still_computes

    def _lane(self, document: dict[str, Any]) -> Lane:
        closed: list[bool] = []

        def close() -> None:
            if not closed:
                closed.append(True)
                self.open -= 1

        return Lane(self._steps(document), close)

    @staticmethod
    def _steps(document: dict[str, Any]) -> Iterator[Sequence[str | End]]:
        for _ in range(document.get("prefill", 1)):
            yield []
        for character in document["text"]:
            if character == "!":
                raise document.get("error", ZeroDivisionError)
            yield [character]
        yield [end(len(document["text"]))]


class Bench:
    """A scheduler, what it sent, and whose turns it announced.

    Args:
        step_s: that each look at the clock takes.
    """

    def __init__(self, model: Model, limit: int = 8, step_s: float = 1.0) -> None:
        clock = itertools.count()
        self.frames: list[Delta | Called | Done | Refused] = []
        self.turns: list[list[str]] = []
        self.scheduler = Scheduler(
            model,
            limit=limit,
            send=self.frames.append,
            announce=lambda ids: self.turns.append(list(ids)),
            now=lambda: next(clock) * step_s,
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


def test_who_comes_with_a_prompt_that_ends_the_process_is_no_suspect() -> None:
    """Reading a prompt may do that already."""
    model = Script()
    bench = Bench(model)
    suspects: dict[str, list[str]] = {}
    start = model.start

    def watched(document: dict[str, Any], owner: str) -> Lane | None:
        suspects[document["text"]] = bench.turns[-1]
        return start(document, owner)

    model.start = watched  # type: ignore[method-assign]
    bench.add("a", "b", "c")
    bench.run()
    assert suspects == {"aaa": ["a"], "bbb": ["b"], "ccc": ["c"]}
    assert [bench.text(name) for name in "abc"] == ["aaa", "bbb", "ccc"]


def test_a_text_that_is_too_long_for_a_frame_comes_in_several() -> None:
    class Whole(Script):
        @staticmethod
        def _steps(document: dict[str, Any]) -> Iterator[Sequence[str | End]]:
            yield ["x" * MAX_DELTA_CHARACTERS + "y", end()]

    bench = Bench(Whole())
    bench.add("a")
    bench.run()
    texts = [frame.text for frame in bench.frames if isinstance(frame, Delta)]
    assert texts == ["x" * MAX_DELTA_CHARACTERS, "y"]
    assert bench.ends() == [("a", "done")]


def test_the_first_text_comes_at_once_and_later_text_in_few_frames() -> None:
    bench = Bench(Script(), step_s=TEXT_INTERVAL_S / 4)
    bench.add("a", text="abcdefghij")
    bench.run(2)
    assert bench.text("a") == "a"
    bench.run()
    texts = [frame.text for frame in bench.frames if isinstance(frame, Delta)]
    assert texts == ["a", "bcde", "fghi", "j"]
    assert bench.ends() == [("a", "done")]


def test_text_waits_for_nobody_elses_turn() -> None:
    bench = Bench(Script(), step_s=0.0)
    bench.add("a", text="abcdef")
    bench.run(4)
    assert bench.text("a") == "a"
    bench.add("b", text="xyz")
    assert bench.text("a") == "abc", "before the newcomer is read"
    bench.run(3)
    assert bench.text("a") == "abcd", "and with each of its own turns, while there are others"


def test_what_an_answer_had_comes_before_its_refusal() -> None:
    bench = Bench(Script(), step_s=0.0)
    bench.add("a", text="abc!")
    bench.run()
    assert [frame.type for frame in bench.frames] == ["delta", "delta", "refused"]
    assert bench.text("a") == "abc"


def test_what_an_answer_had_when_it_was_cancelled_is_not_lost() -> None:
    bench = Bench(Script(), step_s=0.0)
    bench.add("a", text="abcdef")
    bench.run(4)
    assert bench.text("a") == "a"
    bench.scheduler.cancel("a")
    assert [frame.type for frame in bench.frames] == ["delta", "delta", "refused"]
    assert bench.text("a") == "abc"


def test_calls_come_before_the_end_and_long_arguments_in_several_frames() -> None:
    long = "x" * MAX_DELTA_CHARACTERS

    class Calling(Script):
        @staticmethod
        def _steps(document: dict[str, Any]) -> Iterator[Sequence[str | End]]:
            calls = (ToolCall(name="a", arguments="{}"), ToolCall(name="b", arguments=long + "y"))
            yield ["text", End(finish_reason="tool_calls", usage={}, tool_calls=calls)]

    bench = Bench(Calling())
    bench.add("p")
    bench.run()
    calls = [frame for frame in bench.frames if isinstance(frame, Called)]
    assert [(call.index, call.name, call.arguments) for call in calls] == [
        (0, "a", "{}"),
        (1, "b", long),
        (1, "b", "y"),
    ]
    assert [frame.type for frame in bench.frames] == ["delta", "called", "called", "called", "done"]


def test_a_newcomer_has_the_next_turn_and_one_in_each_round() -> None:
    bench = Bench(Script())
    bench.add("a", "b", text="x" * 50)
    bench.run(20)
    bench.turns.clear()
    bench.add("n")
    bench.run(9)
    assert bench.turns[0] == ["n"]
    assert all(["n"] in bench.turns[start : start + 3] for start in range(0, 9, 3))


def test_a_prompt_that_has_begun_never_starts_again() -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", prefill=3)
    bench.run(1)
    bench.add("b", prefill=3)
    bench.run(1)
    bench.add("c")
    bench.run()
    assert model.starts == [["aaa"], ["bbb"], ["ccc"]]
    assert [bench.text(name) for name in "abc"] == ["aaa", "bbb", "ccc"]


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
def test_a_cancelled_prompt_is_answered_at_once_and_the_others_go_on(steps: int) -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", "b", "c")
    bench.run(steps)
    bench.scheduler.cancel("a")
    assert bench.ends() == [("a", "refused")]
    bench.scheduler.cancel("a")
    bench.scheduler.cancel("nobody")
    bench.run()
    assert sorted(bench.ends()[1:]) == [("b", "done"), ("c", "done")]
    assert (bench.text("b"), bench.text("c")) == ("bbb", "ccc")
    assert model.open == 0


def test_a_cancelled_prompt_has_ended_when_the_model_has_stopped_and_nobody_has_a_turn_before() -> None:
    """Until then it is the one to blame, and the daemon sees that the runner does not do what it was told."""
    model = Script()
    bench = Bench(model, limit=1)
    bench.add("a", "b")
    bench.run(2)
    model.still_computes = True
    bench.scheduler.cancel("a")
    bench.run(5)
    assert bench.ends() == []
    assert bench.turns[-1] == ["a"]
    assert not bench.scheduler.idle
    assert model.open == 0, "it was told"
    model.still_computes = False
    bench.run()
    assert bench.ends() == [("a", "refused"), ("b", "done")]
    assert bench.text("b") == "bbb"


def test_a_prompt_that_waits_behind_one_that_does_not_stop_can_be_cancelled() -> None:
    model = Script()
    bench = Bench(model, limit=1)
    bench.add("a", "b")
    bench.run(2)
    model.still_computes = True
    bench.scheduler.cancel("a")
    bench.scheduler.cancel("b")
    assert bench.ends() == [("b", "refused")]


class PanicException(BaseException):
    """As pyo3 raises it where Rust code panics: a tokenizer's, for one, on a regular expression without an end."""


def shown(error: type[BaseException]) -> str:
    return error.__name__ if issubclass(error, Exception) else "Panic"


@pytest.mark.parametrize("error", [ZeroDivisionError, PanicException, SystemExit, GeneratorExit])
def test_a_lane_that_fails_costs_its_own_prompt(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", text="x!", error=error)
    bench.add("c")
    bench.run()
    refused = [frame for frame in bench.frames if isinstance(frame, Refused)]
    assert [(frame.id, frame.code) for frame in refused] == [("a", "model_failed")]
    assert bench.text("c") == "ccc"
    assert model.open == 0
    assert f"request=a {shown(error)}\n" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["bad_request", "prompt_too_long", "model_failed"])
def test_what_the_wrapper_says_of_a_request_is_its_answer(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError(f"{code}: the reason")
    error.code = code  # type: ignore[attr-defined]
    refusal = refusal_of(error, ["a"])
    assert (refusal.code, refusal.message) == (code, "the reason")
    assert capsys.readouterr().err == "", "nothing of it is in the log"


def test_an_error_with_a_code_that_is_not_the_models_to_give_says_nothing() -> None:
    error = RuntimeError("queue_full: a prompt")
    error.code = "queue_full"  # type: ignore[attr-defined]
    assert refusal_of(error, ["a"]).message == "the model raised RuntimeError"


def test_whose_turn_it_is_is_said_before_the_model_is_asked() -> None:
    model = Script()
    bench = Bench(model)
    bench.add("a", text="!")
    bench.add("b")
    bench.run(1)
    assert bench.turns[:2] == [["a"], ["b"]], "a start may kill as well"
    bench.run()
    assert ["a"] in bench.turns


@pytest.mark.parametrize("error", [OverflowError, PanicException, SystemExit])
def test_a_start_that_fails_costs_the_prompts_in_it_and_no_others(
    error: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Script()
    bench = Bench(model)
    start = model.start

    def failing(document: Any, owner: Any) -> Any:
        monkeypatch.setattr(model, "start", start)
        raise error("int too large")

    monkeypatch.setattr(model, "start", failing)
    bench.add("a")
    bench.run()
    bench.add("b")
    bench.run()
    refused = [frame for frame in bench.frames if isinstance(frame, Refused)]
    assert [(frame.id, frame.code) for frame in refused] == [("a", "model_failed")]
    assert bench.text("b") == "bbb"
    assert f"request=a {shown(error)}\n" in capsys.readouterr().err
