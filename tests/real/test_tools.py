"""Calls of tools with a real vocabulary and a small model: what is called fits, whatever the model would say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from edge_agent.wrapper.genai_pyfunc import _CallForm, _Engine
from tests.real.prompts import PROMPTS
from tests.real.tools import COUNT, every
from tests.support.client import Client, chat
from tests.support.processes import wait_until

AT_ONCE = 4
QUESTIONS = sorted(PROMPTS, key=len)[:10]
MAX_TOKENS = 40
_BARE = _CallForm(own=True, opening="", between="", closing="", arguments="parameters")
_TOKEN = _CallForm(own=True, opening="<jupyter_code>[", between=", ", closing="]")
FORMS = (_CallForm(), *[_BARE] * 7, _TOKEN, *[_BARE] * 7)
"""Most of them the shortest one."""
EXAMPLE = '{"name": "g", "parameters": {"on": 1}}'
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
PARIS = "What is the weather in Paris for the next two days?"


@pytest.fixture
def engine(wrapper: Any) -> Iterator[_Engine]:
    found: _Engine = wrapper.unwrap_python_model()._engine
    form = found.prompts.calls
    yield found
    found.prompts.calls = form


def answers(
    engine: _Engine, rows: Sequence[dict[str, Any]], forms: Sequence[_CallForm]
) -> Iterator[dict[str, Any]]:
    """The last items of answers, four at once. Their prompts are the bare questions and one line of JSON, so that each
    takes half a second; what the model was shown makes no difference to what it may say."""
    control = engine.prompts.calls.control
    pairs = list(zip(rows, forms, strict=True))
    for start in range(0, len(pairs), AT_ONCE):
        group = pairs[start : start + AT_ONCE]
        jobs = []
        for number, (row, form) in enumerate(group):
            engine.prompts.calls = replace(form, control=control)
            job = engine.read(row, None, number)
            job.prompt = engine.prompts.raw(f"{row['messages'][0]['content']}\n{EXAMPLE}\n")
            jobs.append(job)
        lanes = list(engine.lanes(jobs, beyond=True))
        last: dict[int, dict[str, Any]] = {}
        while lanes:
            for lane in list(lanes):
                step = next(lane, None)
                if step is None:
                    lanes.remove(lane)
                    continue
                last |= {row: item for row, item in step if isinstance(item, dict)}
        yield from (last[number] for number in range(len(group)))


def test_every_call_fits_the_schema_of_its_tool(engine: _Engine, figures: dict[str, str]) -> None:
    tools = every()
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
            "tools": [tool, tools[number - 1]],
            "tool_choice": {"type": "function", "function": {"name": tool["function"]["name"]}},
            "max_tokens": MAX_TOKENS,
            **({"temperature": 1.0, "seed": number} if number % 2 else {}),
        }
        for number, tool in enumerate(tools)
    ]
    forms = [FORMS[number % len(FORMS)] for number in range(COUNT)]
    called, valid, cut = 0, 0, 0
    for row, last in zip(rows, answers(engine, rows, forms), strict=True):
        calls = last.get("tool_calls", [])
        assert last["finish_reason"] == ("tool_calls" if calls else "length")
        cut += not calls
        for call in calls:
            called += 1
            assert call["name"] == row["tool_choice"]["function"]["name"]
            checker = Draft202012Validator.FORMAT_CHECKER
            schema = Draft202012Validator(parameters[call["name"]], format_checker=checker)
            problem = next(schema.iter_errors(json.loads(call["arguments"])), None)
            assert problem is None, (call, problem)
            valid += 1
    figures["calls that fit the schema of their tool"] = f"{valid} of {called}"
    figures[f"calls that end within {MAX_TOKENS} tokens"] = f"{COUNT - cut} of {COUNT}"
    assert called + cut == COUNT
    assert cut <= COUNT // 5, "strings and objects that are open take the most"


def test_a_program_runs_what_the_model_calls_and_asks_again(client: Client) -> None:
    asked = chat(PARIS, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True)
    correlation = client.send({**asked, "max_tokens": MAX_TOKENS})
    answer = client.answer(correlation)
    assert answer.status == 200, answer.json
    (choice,) = answer.json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    Draft202012Validator(WEATHER["function"]["parameters"]).validate(
        json.loads(call["function"]["arguments"])
    )
    wait_until(lambda: client.chunks(correlation)[-1].json["choices"][0]["finish_reason"], 60, "all chunks")
    chunks = [chunk.json["choices"][0] for chunk in client.chunks(correlation)]
    assert [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]] == [
        [{"index": 0, **call}]
    ]
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"sky": "clear", "celsius": 21}'}
    messages = [*asked["messages"], choice["message"], result]
    told = client.ask({"messages": messages, "tools": [WEATHER], "max_tokens": 16})
    assert told.status == 200, told.json
    assert told.json["usage"]["prompt_tokens"] > answer.json["usage"]["prompt_tokens"]
