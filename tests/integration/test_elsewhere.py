"""A request to the package elsewhere: whatever a device answers has the same text there, or is refused by name.

The device is the runner's model, behind the parser of the MQTT contract. Elsewhere is MLflow alone: `predict` with an
object and with the table that its scoring server makes, `predict_stream`, and `mlflow models serve` as a process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from edge_agent.chat import messages
from edge_agent.chat.fields import FIELDS
from edge_agent.errors import BadRequest
from edge_agent.publishing import signature
from edge_agent.publishing.package import build_package
from edge_agent.runner import loader
from edge_agent.runner.model import End
from tests.support.elsewhere import ScoringServer
from tests.support.packages import copy_package
from tests.support.wrapper import Answer, ask, forget, load

Way = Callable[[dict[str, Any]], str]
"""Asks for the text of an answer."""

QUESTION = "Count to one hundred"
RAW = f"<|user|>{QUESTION}<|end|><|assistant|>"
SAMPLING = {"temperature": 2.0, "seed": 7}
REGEX = {"type": "regex", "regex": "(red|green|blue)"}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "a", "parameters": SCHEMA}}]

FORMS: tuple[Literal["chat", "prompt"], ...] = ("chat", "prompt")
EVERYWHERE = ("predict", "table", "stream", "server")
WHOLE = ("predict", "table", "server")


class Refused(Exception):
    """With what was said of it."""


@dataclass(frozen=True)
class Case:
    """One field of a request.

    Attributes:
        refused: the ways elsewhere that refuse what a device answers, by the field's name.
        changes: the device's answer is another one because of it.
        form: of package and request; empty for both.
        beside: fields that it needs.
    """

    name: str
    value: Any
    refused: tuple[str, ...] = ()
    changes: bool = False
    form: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}={json.dumps(self.value)[:50]}"


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "a", "arguments": '{"a": "x"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "done"}
CASES = (
    Case("messages", user("What is the capital of Spain?"), changes=True, form="chat"),
    Case("messages", [{"role": "developer", "content": "Be kind."}, *user("Hi", name="a")], changes=True, form="chat"),
    Case("messages", user([{"type": "text", "text": QUESTION}]), refused=EVERYWHERE, form="chat"),
    Case("prompt", "<|user|>Hi<|end|><|assistant|>", changes=True, form="prompt"),
    Case("temperature", 0, changes=True),
    Case("top_p", 0.3, changes=True),
    Case("top_p", None),
    Case("top_k", 2, changes=True),
    Case("top_k", 2.0, refused=("server",), changes=True),
    Case("seed", 8, changes=True),
    Case("repetition_penalty", 3, changes=True),
    Case("max_tokens", 3, changes=True),
    Case("max_tokens", 3.0, refused=("predict", "stream", "server"), changes=True),
    Case("max_tokens", None, refused=("predict", "table", "stream")),
    Case("max_completion_tokens", 3, changes=True),
    Case("stop", [","], changes=True),
    Case("stop", ",", refused=EVERYWHERE, changes=True),
    Case("response_format", REGEX, changes=True),
    Case("response_format", {"type": "json_object"}, changes=True),
    Case("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, changes=True),
    Case("response_format", {"type": "text"}),
    Case("tools", TOOLS, changes=True, form="chat"),
    Case("tool_choice", "required", changes=True, form="chat", beside={"tools": TOOLS}),
    Case("tool_choice", "none", form="chat", beside={"tools": TOOLS}),
    Case("parallel_tool_calls", False, changes=True, form="chat", beside={"tools": TOOLS}),
    Case("messages", [*user("Hi"), CALLED, RESULT], changes=True, form="chat"),
    Case("stream", False),
    Case("stream", True, refused=WHOLE),
    Case("n", 1),
    Case("model", "assistant"),
    Case("id", "q-1"),
    Case("reply_to", "replies/me", refused=EVERYWHERE),
    Case("deadline_ms", 60_000, refused=EVERYWHERE),
    Case("user", "me"),
    Case("stream_options", {"include_usage": True}),
    Case("logprobs", False),
    Case("frequency_penalty", 0),
    Case("presence_penalty", 0.0),
)  # fmt: skip
NOWHERE = (
    *((name, "x") for name in signature.REFUSED if name not in FIELDS),
    *(("n", 2), ("logprobs", True), ("frequency_penalty", 1), ("presence_penalty", -1)),
    *(
        ("stream_options", {"include_usage": "yes"}),
        ("stream_options", {"other": 1}),
        ("user", 7),
        ("model", 7),
    ),
    *(("id", "a b"), ("stream", "yes"), ("top_p", 1.5), ("top_k", "many"), ("seed", 0.5)),
    *(("repetition_penalty", 0), ("max_completion_tokens", 0), ("response_format", {"type": "xml"})),
    ("response_format", {"type": "regex", "regex": "a(?=b)"}),
    *(("tools", "x"), ("tools", TOOLS * 2), ("tool_choice", "auto"), ("parallel_tool_calls", True)),
)
"""What a device refuses, too."""


def request(form: str, name: str, value: Any) -> dict[str, Any]:
    content = {"messages": user(QUESTION)} if form == "chat" else {"prompt": RAW}
    return {**content, **SAMPLING, name: value}


def text_of(answer: Any) -> str:
    answer = answer["predictions"] if isinstance(answer, dict) else answer
    if isinstance(answer, str):
        return answer
    message = answer[0]["choices"][0]["message"]
    return shown(message["content"] or "", [call["function"] for call in message.get("tool_calls", ())])


def shown(text: str, calls: Iterable[Mapping[str, str]]) -> str:
    """An answer as one text, calls included."""
    return text + "".join(f"{call['name']}({call['arguments']})" for call in calls)


# --- The ways -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("elsewhere")
    options = {"max_tokens": 16}
    for form in FORMS:
        build_package(sample_model, folder / form, name="sample", signature=form, options=options)
    return {form: folder / form for form in FORMS}


@pytest.fixture(scope="module")
def server(packages: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoringServer]:
    with ScoringServer(packages["chat"], tmp_path_factory.mktemp("serve")).running() as running:
        yield running


@pytest.fixture(scope="module")
def models(packages: Mapping[str, Path]) -> Mapping[str, Any]:
    return {form: load(folder) for form, folder in packages.items()}


@pytest.fixture(scope="module")
def device(packages: Mapping[str, Path]) -> Mapping[str, Way]:
    """What a device answers, by the package's form."""

    def way(folder: Path) -> Way:
        model = loader.load(folder, context_tokens=2048, max_tokens=0, threads=0)

        def ask(row: dict[str, Any]) -> str:
            document = messages.parse(json.dumps(row).encode(), limit_bytes=1 << 20).document
            *texts, end = model.stream(document)
            assert isinstance(end, End)
            return shown("".join(map(str, texts)), map(asdict, end.tool_calls))

        return ask

    return {form: way(folder) for form, folder in packages.items()}


@pytest.fixture
def elsewhere(
    models: Mapping[str, Any], request: pytest.FixtureRequest
) -> Callable[[str], Mapping[str, Way]]:
    """The ways of a form. The process serves the chat package; MLflow's own handler stands for a second one."""

    def ways(form: str) -> dict[str, Way]:
        from mlflow.pyfunc import scoring_server

        model = models[form]

        def handled(document: dict[str, Any]) -> str:
            schema = model.metadata.get_input_schema()
            return text_of(
                json.loads(
                    scoring_server.invocations(
                        json.dumps(document), "application/json", model, schema
                    ).response
                )
            )

        def posted(row: dict[str, Any]) -> str:
            status, answer = request.getfixturevalue("server").post(row)
            if status != 200:
                raise Refused(answer["message"])
            return text_of(answer)

        return {
            "predict": lambda row: text_of(model.predict(row)),
            "table": lambda row: handled({"dataframe_records": [row]}),
            "stream": lambda row: streamed(list(model.predict_stream(row))),
            "server": posted if form == "chat" else handled,
        }

    return ways


def streamed(items: list[Any]) -> str:
    """The text of a stream, and the calls that one of its chunks has."""
    chunks = [item["choices"][0]["delta"] for item in items if isinstance(item, dict) and "choices" in item]
    calls = [call["function"] for chunk in chunks for call in chunk.get("tool_calls", ())]
    return shown(Answer(items).text, calls)


def refusal(way: Way, row: dict[str, Any]) -> str:
    """What is said against a request, without what MLflow repeats of it."""
    with pytest.raises(Exception) as caught:
        way(row)
    said = str(caught.value)
    return said.rpartition("Error: ")[2] if "bad_request" in said or "model_failed" in said else said


# --- The table ------------------------------------------------------------------------------------------


def test_the_table_has_every_field_of_a_request() -> None:
    assert {case.name for case in CASES} == set(FIELDS)


def test_the_signature_declares_what_the_wrapper_takes_and_what_it_refuses(models: Mapping[str, Any]) -> None:
    for form, model in models.items():
        content = {"chat": "messages", "prompt": "prompt"}[form]
        wrapper = sys.modules[type(model.unwrap_python_model()).__module__]
        declared = set(model.metadata.get_input_schema().input_names())
        assert declared == wrapper._Request.INPUTS | {content, *signature.REFUSED}
        assert {param.name for param in model.metadata.get_params_schema().params} == wrapper._Request.PARAMS


@pytest.mark.parametrize(
    ("form", "case"),
    [(form, case) for case in CASES for form in FORMS if case.form in ("", form)],
    ids=str,
)
def test_what_a_device_answers_has_the_same_text_elsewhere_or_is_refused_by_name(
    form: str,
    case: Case,
    device: Mapping[str, Way],
    elsewhere: Callable[[str], Mapping[str, Way]],
) -> None:
    row = {**request(form, case.name, case.value), **case.beside}
    text = device[form](row)
    assert (text != device[form](request(form, "seed", 7))) == case.changes
    for name, way in elsewhere(form).items():
        if name in case.refused:
            assert case.name in refusal(way, row), name
        else:
            assert way(row) == text, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "value"), NOWHERE, ids=str)
def test_what_a_device_refuses_is_refused_elsewhere_by_name(
    form: str,
    name: str,
    value: Any,
    device: Mapping[str, Way],
    elsewhere: Callable[[str], Mapping[str, Way]],
) -> None:
    row = request(form, name, value)
    with pytest.raises((BadRequest, RuntimeError), match=name):
        device[form](row)
    for how, way in elsewhere(form).items():
        assert name in refusal(way, row), how


# --- In detail ------------------------------------------------------------------------------------------


def test_a_stream_of_a_chat_is_chunks_as_mlflows_chat_models_give_them(models: Mapping[str, Any]) -> None:
    from mlflow.types.llm import ChatCompletionChunk

    row = request("chat", "id", "q-1")
    items = list(models["chat"].predict_stream({**row, "stream": True}))
    chunks = [ChatCompletionChunk.from_dict(item) for item in items]
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        ("q-1", "chat.completion.chunk", "sample")
    }
    whole = models["chat"].predict(row)[0]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text_of([whole])
    assert whole["id"] == "q-1"
    assert [item["choices"][0]["delta"].get("role") for item in items[:2]] == ["assistant", None]
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert chunks[-1].choices[0].finish_reason == whole["choices"][0]["finish_reason"]
    assert chunks[-1].usage.to_dict() == whole["usage"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_options_are_params_too(models: Mapping[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    row = {"messages": user(QUESTION)}
    params = {**SAMPLING, "top_k": 2, "stop": [","], "response_format": REGEX}
    assert text_of(models["chat"].predict(row, params=params)) == text_of(
        models["chat"].predict({**row, **params})
    )
    with pytest.raises(MlflowException, match="response_format"):  # text, as 0.1.0's packages take it
        models["chat"].predict(row, params={"response_format": json.dumps(REGEX)})
    assert text_of(models["chat"].predict({**row, "response_format": json.dumps(REGEX)})) in (
        "red",
        "green",
        "blue",
    )


def test_rows_of_a_table_have_options_of_their_own(models: Mapping[str, Any]) -> None:
    import pandas as pd

    rows = [
        {"messages": user(QUESTION), "max_tokens": 8, **more}
        for more in ({"response_format": REGEX}, {"top_k": 2, "seed": 7, "temperature": 2.0}, {})
    ]
    answers = models["chat"].predict(pd.DataFrame(rows))
    assert [text_of([answer]) for answer in answers] == [text_of(models["chat"].predict(row)) for row in rows]


def test_a_row_that_is_refused_costs_no_answers_to_the_others(models: Mapping[str, Any]) -> None:
    import pandas as pd

    model, row = models["chat"], {"messages": user(QUESTION)}
    forget(model)
    with pytest.raises(ValueError, match="n must be 1"):
        model.predict(pd.DataFrame([{**row, "n": 1}, {**row, "n": 2}]))
    assert ask(model, row).usage["cached_tokens"] == 0


def test_a_refusal_has_a_status_and_says_in_words_what_is_wrong(server: ScoringServer) -> None:
    for value, status, said in (
        ({"type": "xml"}, 400, "bad_request: response_format must be"),
        ({"type": "regex", "regex": "a(?=b)"}, 500, "model_failed: response_format: look-around"),
    ):
        got, answer = server.post(request("chat", "response_format", value))
        assert got == status
        assert said in answer["message"]
        assert "stack_trace" not in answer


@pytest.mark.parametrize("form", FORMS)
def test_a_device_asks_a_wrapper_that_it_does_not_know_as_mlflow_would(
    form: str, packages: Mapping[str, Path], device: Mapping[str, Way], tmp_path: Path
) -> None:
    package = copy_package(packages[form], tmp_path / "package")
    code = package / "genai_pyfunc.py"
    code.write_text(code.read_text() + "\n# of another release\n")
    model = loader.load(package, context_tokens=2048, max_tokens=0, threads=0)
    assert model.flavor.startswith("mlflow.pyfunc ")
    row = request(form, "response_format", REGEX)
    assert model.ask(row)[0] == device[form](row)
