"""Several requests in one wrapper: lanes, kept prefixes and their memory, with the sample model."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing.package import build_package
from tests.support.wrapper import Answer, ask, forget, load, user

COUNTRIES = ("Spain", "Japan", "France", "Italy", "Nepal", "India", "Peru", "Chile")
QUESTIONS = [user(f"What is the capital of {country}?") for country in COUNTRIES]
COUNT = user("Count to one hundred")
TOKEN_BYTES = 2 * 4 * 4 * 4 * 32  # keys and values, layers, heads, head size, float32

Request = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "package"
    return build_package(sample_model, target, name="sample", signature="chat", options={}).folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder, kv_bytes=64 << 20)


@pytest.fixture
def model(loaded: Any) -> Any:
    forget(loaded)
    return loaded


def lanes_of(model: Any, requests: Sequence[Request]) -> list[Any]:
    lanes: list[Any] = model.unwrap_python_model().predict_streams(requests)
    return lanes


def in_turns(lanes: Sequence[Any], *, before: Sequence[tuple[int, Any]] = ()) -> dict[int, Answer]:
    """Steps every lane in turn to its end; answers by row, with what came `before`."""
    items: dict[int, list[Any]] = {row: [] for lane in lanes for row in lane.rows}
    for row, item in before:
        items.setdefault(row, []).append(item)
    live = list(lanes)
    while live:
        for lane in list(live):
            step = next(lane, None)
            if step is None:
                live.remove(lane)
                lane.close()
            for row, item in step or ():
                items[row].append(item)
    return {row: Answer(items[row]) for lane in lanes for row in lane.rows}


def in_use(model: Any) -> int:
    tokens: int = model.unwrap_python_model()._engine.sessions._in_use
    return tokens


def kept(model: Any) -> list[int]:
    """Room of every kept session."""
    return [session.max_length for session in model.unwrap_python_model()._engine.sessions._kept]


# --- Lanes ----------------------------------------------------------------------------------------------


def test_each_of_several_requests_has_a_lane_and_gets_what_it_gets_alone(model: Any) -> None:
    sampled = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "max_tokens": 20}
    grammar = {"type": "regex", "regex": "(Madrid|Paris), [0-9]{3}"}
    requests: list[Request] = [
        (QUESTIONS[0], {}),
        (COUNT, {"max_tokens": 9}),
        (QUESTIONS[1], {"stop": [" Tok"]}),
        (user("Say hello in Nepali."), {}),
        (COUNT, {**sampled, "seed": 1}),
        (COUNT, {**sampled, "seed": 2}),
        (QUESTIONS[0], {"response_format": grammar}),
        (COUNT, {**sampled, "seed": 1}),
        (user("What is the capital of Nepal? " * 80), {"max_tokens": 30}),
    ]
    lanes = lanes_of(model, requests)
    assert [lane.rows for lane in lanes] == [(number,) for number in range(len(requests))]
    answers = in_turns(lanes)
    assert in_use(model) == 0
    for number, (row, params) in enumerate(requests):
        forget(model)
        alone = ask(model, row, **params)
        assert answers[number].text == alone.text
        assert answers[number].finish_reason == alone.finish_reason
        assert answers[number].usage == {**alone.usage, "cached_tokens": 0}
    assert answers[2].text == "The capital of Japan is"
    assert answers[4].text == answers[7].text != answers[5].text
    assert re.fullmatch("(Madrid|Paris), [0-9]{3}", answers[6].text)


@pytest.fixture
def runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the model has run in each call: tokens of a prompt, or 0 for a token of an answer."""
    engine = model.unwrap_python_model()._engine
    runs: list[int] = []
    make = engine.generator

    class Watched:
        """A generator whose calls are written down."""

        def __init__(self, generator: Any) -> None:
            self._generator = generator

        def append_tokens(self, tokens: Any) -> None:
            runs.append(len(tokens))
            self._generator.append_tokens(tokens)

        def generate_next_token(self) -> None:
            runs.append(0)
            self._generator.generate_next_token()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._generator, name)

    monkeypatch.setattr(engine, "generator", lambda *given: Watched(make(*given)))
    return runs


def test_no_prompt_token_is_run_alone(model: Any, runs: list[int]) -> None:
    for words in range(40, 140):
        long = user("Nepal " * words)
        forget(model)
        for _ in range(2):  # the second time all but the least is known
            ask(model, long, max_tokens=2)
    parts = [tokens for tokens in runs if tokens]
    assert len(parts) >= 200
    assert min(parts) == 2
    assert max(parts) == 65, "a last part of one token joins the one before it"


@pytest.fixture
def answering(model: Any) -> Iterator[Callable[[int], list[Any]]]:
    """Opens so many lanes that are in the middle of a long answer."""
    open_lanes: list[Any] = []

    def begin(count: int) -> list[Any]:
        open_lanes.extend(lanes_of(model, [(COUNT, {"max_tokens": 200})] * count))
        for lane in open_lanes * 2:  # the prompt, then the first token
            next(lane)
        return open_lanes

    yield begin
    for lane in open_lanes:
        lane.close()


@pytest.mark.parametrize("count", [1, 3])
def test_a_long_prompt_holds_answers_up_by_eight_tokens_for_each(
    model: Any, runs: list[int], answering: Callable[[int], list[Any]], count: int
) -> None:
    others = answering(count)
    (long,) = lanes_of(model, [(user("What is the capital of Nepal? " * 60), {"max_tokens": 4})])
    with contextlib.closing(long):
        runs.clear()
        for lane in (long, *others) * 5:
            next(lane)
        assert runs == [8 * count, *[0] * count] * 5
        for lane in others:
            lane.close()
        next(long)
        assert runs[-1] == 64, "nobody is held up any longer"


def test_a_short_prompt_is_run_as_fast_as_alone(
    model: Any, runs: list[int], answering: Callable[[int], list[Any]]
) -> None:
    answering(1)
    (short,) = lanes_of(model, [(user("Nepal " * 80), {"max_tokens": 4})])
    with contextlib.closing(short):
        runs.clear()
        next(short)
        assert runs == [64]


def test_how_a_prompt_is_cut_changes_no_answer(model: Any, runs: list[int]) -> None:
    long = user("What is the capital of Nepal? " * 60)
    beside = in_turns(lanes_of(model, [(QUESTIONS[0], {}), (long, {"max_tokens": 30})]))[1]
    assert {8, 64} <= {*runs}
    forget(model)
    assert beside.text == ask(model, long, max_tokens=30).text


def test_a_request_at_fault_is_refused_alone(model: Any) -> None:
    refused, first, last = lanes_of(
        model, [(QUESTIONS[0], {}), (COUNT, {"max_tokens": 0}), (QUESTIONS[1], {})]
    )
    assert refused.rows == (1,)
    with pytest.raises(ValueError, match="bad_request: max_tokens"):
        next(refused)
    refused.close()
    assert in_turns([first, last])[2].text == "The capital of Japan is Tokyo."


# --- Stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_a_lane_that_is_closed_gives_its_memory_back_and_disturbs_nobody(model: Any, steps: int) -> None:
    sampled = {"temperature": 2.0, "seed": 3, "max_tokens": 25}
    lanes = lanes_of(model, [(QUESTIONS[0], {}), (COUNT, {}), (COUNT, sampled), (QUESTIONS[1], {})])
    assert len(lanes) == 4
    before = [pair for _ in range(steps) for lane in lanes for pair in next(lane)]
    lanes[0].close()
    lanes[0].close()
    answers = in_turns(lanes[1:], before=before)
    assert answers[3].text == "The capital of Japan is Tokyo."
    assert in_use(model) == 0
    forget(model)
    assert answers[2].text == ask(model, COUNT, **sampled).text


def test_a_prompt_that_was_stopped_in_its_prefill_goes_on_where_it_was(model: Any) -> None:
    long = user("What is the capital of Nepal? " * 60)
    (lane,) = lanes_of(model, [(long, {"max_tokens": 20})])
    for _ in range(4):
        assert next(lane) == []
    lane.close()
    again = ask(model, long, max_tokens=20)
    assert again.usage["cached_tokens"] == 4 * 64 - 1
    forget(model)
    assert again.text == ask(model, long, max_tokens=20).text


# --- Kept prefixes --------------------------------------------------------------------------------------


def test_chats_that_take_turns_keep_their_prefixes(model: Any) -> None:
    chats = [[{"role": "system", "content": f"You are helper {number}. " * 12}] for number in range(3)]
    for turn, country in enumerate(COUNTRIES[:4]):
        for messages in chats:
            messages.append({"role": "user", "content": f"What is the capital of {country}?"})
            answer = ask(model, {"messages": messages}, max_tokens=30)
            new_tokens = answer.usage["prompt_tokens"] - answer.usage["cached_tokens"]
            assert turn == 0 or new_tokens < 30
            messages.append({"role": "assistant", "content": answer.text})
    assert len(kept(model)) == 3


def test_a_fixed_system_prompt_is_prefilled_once(model: Any) -> None:
    system = {"role": "system", "content": "You are a helpful assistant of few words. " * 20}
    for number, question in enumerate(QUESTIONS):
        answer = ask(model, {"messages": [system, *question["messages"]]}, max_tokens=20)
        if number:
            assert answer.usage["cached_tokens"] > 150
            assert answer.usage["prompt_tokens"] - answer.usage["cached_tokens"] < 30


def test_a_few_common_tokens_do_not_cost_a_long_chat_its_prefix(model: Any) -> None:
    long = user("What is the capital of Nepal? " * 60)
    ask(model, long, max_tokens=5)
    ask(model, QUESTIONS[0])
    again = ask(model, long, max_tokens=5)
    assert again.usage["cached_tokens"] == again.usage["prompt_tokens"] - 2


def test_kept_prefixes_and_running_ones_share_a_bounded_memory(folder: Path) -> None:
    model = load(folder, kv_bytes=3000 * TOKEN_BYTES, context_tokens=1024)
    sessions = model.unwrap_python_model()._engine.sessions
    assert sessions.limit == 3000
    for number in range(30):
        ask(model, user(f"{number} is a number. " * (1 + number % 13 * 5)), max_tokens=16)
        assert sum(kept(model)) <= 3000
    assert len(kept(model)) > 2
    requests = [(user(f"{number} and more. " * 60), {"max_tokens": 100}) for number in range(8)]
    lanes = lanes_of(model, requests)
    started = len(lanes)
    assert 2 <= started < 8
    assert in_use(model) + sum(kept(model)) <= 3000
    assert lanes_of(model, requests[started:]) == []
    lanes[0].close()
    lanes.extend(lanes_of(model, requests[started:]))
    assert len(lanes) == started + 1
    for lane in lanes:
        lane.close()


def test_without_a_bound_of_its_own_one_context_is_the_bound(folder: Path) -> None:
    model = load(folder, context_tokens=512)
    assert model.unwrap_python_model()._engine.sessions.limit == 512
    for question in QUESTIONS:
        ask(model, question)
    assert sum(kept(model)) <= 512


# --- Features that have to hold together ----------------------------------------------------------------

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    {"enum": ["yes", "no", None]},
    {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "boolean"}}, "b": {"type": "number"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
]


def formats() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for number, schema in enumerate(SCHEMAS):
        for options in ({}, {"temperature": 2.0, "seed": number}):
            for max_tokens in (4, 300):
                yield schema, {**options, "max_tokens": max_tokens}


def test_a_guided_answer_parses_whenever_it_stopped_by_itself(model: Any) -> None:
    stopped = cut = 0
    for schema, options in formats():
        response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
        answer = ask(model, QUESTIONS[0], response_format=response_format, **options)
        if answer.finish_reason == "stop":
            stopped += 1
            json.loads(answer.text)
        else:
            cut += 1
            assert answer.usage["completion_tokens"] == options["max_tokens"]
    assert stopped >= 4
    assert cut >= 4


def test_a_small_top_p_is_greedy_and_options_left_open_are_the_packages(
    sample_model: Path, tmp_path: Path, model: Any
) -> None:
    greedy = ask(model, COUNT, max_tokens=20).text
    assert ask(model, COUNT, temperature=5.0, top_p=0.001, top_k=0, max_tokens=20).text == greedy
    options = {"temperature": 5.0, "top_k": 1}
    package = build_package(sample_model, tmp_path / "hot", name="hot", signature="chat", options=options)
    hot = load(package.folder)
    assert ask(hot, COUNT, max_tokens=20).text == greedy
    assert ask(hot, COUNT, temperature=0.0, max_tokens=20).text == greedy
    wild = {ask(hot, COUNT, top_k=1000, top_p=1.0, seed=seed, max_tokens=20).text for seed in range(3)}
    assert len(wild) > 1
    assert wild == {
        ask(hot, COUNT, top_k=1000, top_p=1.0, seed=seed, max_tokens=20).text for seed in range(3)
    }


def test_usage_counts_exactly_what_was_encoded_and_generated(model: Any) -> None:
    engine = model.unwrap_python_model()._engine
    for question in (*QUESTIONS[:3], COUNT):
        answer = ask(model, question)
        prompt = engine.prompts.chat(question["messages"])
        assert answer.usage["prompt_tokens"] == len(prompt)
        assert answer.usage["completion_tokens"] == len(engine._tokenizer.encode(answer.text))
        assert 0 <= answer.usage["cached_tokens"] < len(prompt)
        assert answer.usage["total_tokens"] == len(prompt) + answer.usage["completion_tokens"]
