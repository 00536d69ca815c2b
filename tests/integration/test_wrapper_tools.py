"""Tools through the library: which form a template gets, what of it is tokens, and calls that fit their schemas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from edge_agent.chat import messages
from edge_agent.publishing.package import build_package
from edge_agent.runner import loader
from edge_agent.runner.model import End
from edge_agent.wrapper import genai_pyfunc
from tests.support.tool_templates import TEMPLATES
from tests.support.wrapper import load, user

SWITCH: dict[str, Any] = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "bath"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = [tool("switch", SWITCH), tool("wait", None)]
ASKED = {**user("Switch on the light in the kitchen"), "tools": TOOLS, "tool_choice": "required"}


# --- Templates ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(sample_model: Path) -> Any:
    import onnxruntime_genai as og

    return og.Tokenizer(og.Config(str(sample_model)))


def prompts_with(tokenizer: Any, sample_model: Path, template: str) -> genai_pyfunc._Prompts:
    """The sample model's tokenizer with another template, in its special tokens."""
    for theirs, ours in {
        "<|im_end|>": "<|end|>",
        "<jupyter_code>": "<|system|>",
        "<jupyter_output>": "<|user|>",
        "<repo_name>": "<|user|>",
        "<file_sep>": "<|end|>",
    }.items():
        template = template.replace(theirs, ours)
    files = genai_pyfunc.TokenizerFiles.read(sample_model)
    return genai_pyfunc._Prompts(tokenizer, replace(files, template=template))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("tags", (True, "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments")),
        ("bare", (True, "", "", "", "parameters")),
        ("tokens", (True, "<|system|>[", ", ", "]", "arguments")),
        ("xml", (False, "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments")),
        ("none", (False, "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments")),
    ],
)
def test_a_template_keeps_its_own_form_of_calls_where_it_writes_them_as_json(
    tokenizer: Any, sample_model: Path, name: str, form: tuple[Any, ...]
) -> None:
    found = prompts_with(tokenizer, sample_model, TEMPLATES[name]).calls
    assert (found.own, found.opening, found.between, found.closing, found.arguments) == form


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_in_tools_calls_and_results_becomes_no_special_token(
    tokenizer: Any, sample_model: Path, name: str
) -> None:
    """Neither as a text nor as a key; and what was added to the vocabulary for frames does not end one."""
    any_id = TEMPLATES[name].replace("| length != 9", "| length == 0")
    prompts = prompts_with(tokenizer, sample_model, any_id)

    def control(mark: str) -> list[int]:
        properties = {f"k{mark}": {"enum": [mark]}}
        asked = genai_pyfunc._Request.parse(
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {
                        "role": "assistant",
                        "content": mark,
                        "tool_calls": [
                            {
                                "id": mark,
                                "type": "function",
                                "function": {"name": "a", "arguments": json.dumps({mark: [mark]})},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": mark, "content": f"x{mark}y"},
                    {"role": "user", "content": "Hi"},
                ],
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "a",
                            "description": mark,
                            "parameters": {"properties": properties},
                        },
                    }
                ],
            },
            None,
        )
        return [token for token in prompts.chat(asked.messages, asked.tools) if token in prompts.control_ids]

    assert control("<|end|><|system|>") == control("text")
    assert control("text"), "the frames are"


# --- Answers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tools") / "package"
    return build_package(sample_model, target, name="sample", signature="chat", options={}).folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return loader.load(folder, context_tokens=2048, max_tokens=0, threads=0)


def answered(model: Any, **fields: Any) -> tuple[str, End]:
    document = messages.parse(json.dumps({**ASKED, **fields}).encode(), limit_bytes=1 << 20).document
    *texts, end = model.stream(document)
    assert isinstance(end, End)
    return "".join(texts), end


@pytest.mark.parametrize(
    "sampling", [{}, *({"temperature": 1.5, "seed": seed} for seed in range(4))], ids=str
)
def test_a_call_fits_the_schema_of_its_tool_whatever_the_model_would_say(
    model: Any, sampling: dict[str, Any]
) -> None:
    text, end = answered(model, **sampling)
    assert (text, end.finish_reason) == ("", "tool_calls")
    assert 1 <= len(end.tool_calls) <= genai_pyfunc.MAX_CALLS
    for call in end.tool_calls:
        schema = {"switch": {**SWITCH, "additionalProperties": False}, "wait": {"maxProperties": 0}}[
            call.name
        ]
        Draft202012Validator(schema).validate(json.loads(call.arguments))
    again = answered(model, **sampling)[1]
    assert again.tool_calls == end.tool_calls


def test_a_tool_that_is_named_is_called_once(model: Any) -> None:
    named = {"type": "function", "function": {"name": "wait"}}
    _, end = answered(model, tool_choice=named)
    assert [(call.name, call.arguments) for call in end.tool_calls] == [("wait", "{}")]


def test_without_parallel_calls_there_is_one(model: Any) -> None:
    for seed in range(3):
        _, end = answered(model, parallel_tool_calls=False, temperature=1.5, seed=seed)
        assert len(end.tool_calls) == 1


def test_a_call_that_is_cut_is_no_call(model: Any) -> None:
    text, end = answered(model, max_tokens=12)
    assert (text, end.finish_reason, end.tool_calls) == ("", "length", ())


def test_a_call_that_ends_with_the_last_token_is_whole(model: Any) -> None:
    named = {"type": "function", "function": {"name": "wait"}}
    tokens = answered(model, tool_choice=named)[1].usage["completion_tokens"]
    _, end = answered(model, tool_choice=named, max_tokens=tokens)
    assert (end.finish_reason, len(end.tool_calls)) == ("tool_calls", 1)
    _, end = answered(model, tool_choice=named, max_tokens=tokens - 1)
    assert (end.finish_reason, len(end.tool_calls)) == ("length", 0)


def test_stop_strings_are_about_text_and_not_about_calls(model: Any) -> None:
    _, end = answered(model, stop=["{", '"', "a"])
    assert end.finish_reason == "tool_calls"


def test_the_model_may_answer_with_text(model: Any) -> None:
    text, end = answered(model, tool_choice="auto", max_tokens=8)
    assert (bool(text), end.tool_calls) == (True, ())
    assert answered(model, tool_choice="auto", max_tokens=8)[0] == text


def test_without_a_choice_of_a_tool_an_answer_is_as_without_tools(model: Any) -> None:
    text, end = answered(model, tool_choice="none")
    plain = model.ask({"messages": ASKED["messages"]})
    assert (text, end.usage["completion_tokens"]) == plain


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (
            {"properties": {"a": {"not": {"type": "string"}}}},
            r'tools\[1\].function.parameters: "not" in a schema',
        ),
        (
            {"properties": {"a": {"format": "x"}}},
            r"tools\[1\].function.parameters: the string format x is not",
        ),
        (
            {"properties": {"a": {"enum": []}}, "required": ["a"]},
            r"tools\[1\].function.parameters: no answer can",
        ),
    ],
)
def test_what_the_library_cannot_follow_is_refused_by_the_tools_name(
    model: Any, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(Exception, match=said) as caught:
        answered(model, tools=[TOOLS[0], tool("odd", parameters)])
    assert getattr(caught.value, "code", "") in ("bad_request", "model_failed")


def test_as_many_tools_as_a_request_may_have_are_one_grammar(model: Any) -> None:
    properties = {"text": {"type": "string"}, "many": {"type": "array"}, "n": {"type": "number"}}
    given = [tool(f"t{number}", {"properties": properties}) for number in range(genai_pyfunc.MAX_TOOLS)]
    tools = genai_pyfunc._Tools.parse({"tools": given})
    assert tools
    engine = model._wrapper._engine
    job = engine.read(user("Hi"), None, 0)
    engine.generator(replace(job, guidance=engine.prompts.calls.guidance(tools)), 64)


# --- Elsewhere, and other packages ----------------------------------------------------------------------


def test_any_mlflow_program_gets_completions_with_calls_and_chunks_of_them(folder: Path, model: Any) -> None:
    elsewhere = load(folder)
    (whole,) = elsewhere.predict({**ASKED, "id": "q-1"})
    (choice,) = whole["choices"]
    calls = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    device = answered(model)[1].tool_calls
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        (call.name, call.arguments) for call in device
    ]
    *_, called, last = elsewhere.predict_stream({**ASKED, "id": "q-1"})
    assert called["choices"][0]["delta"]["tool_calls"] == [
        {"index": index, **call} for index, call in enumerate(calls)
    ]
    assert (last["choices"][0]["finish_reason"], called["choices"][0]["finish_reason"]) == (
        "tool_calls",
        None,
    )
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in calls]
    chat = [*ASKED["messages"], choice["message"], *results]
    (after,) = elsewhere.predict({**ASKED, "messages": chat, "tool_choice": "auto", "max_tokens": 4})
    assert after["usage"]["prompt_tokens"] > whole["usage"]["prompt_tokens"]
