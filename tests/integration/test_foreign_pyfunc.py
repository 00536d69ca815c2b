"""Pyfuncs that this agent did not make: logged with MLflow alone, loaded as the runner loads them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import clean_environment

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "support" / "foreign_model.py"

# Saves each package with plain MLflow, then loads and asks each one; the answers as JSON on the last line.
PROGRAM = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import mlflow, numpy, pandas
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import DataType
from mlflow.types.schema import Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema, TensorSpec
from edge_agent.errors import EdgeAgentError
from edge_agent.runner import loader
from edge_agent.runner.model import End

text = Schema([ColSpec("string", "answer")])
message = Object([Property("role", DataType.string), Property("content", DataType.string)])
chat = Schema([ColSpec(Array(message), "messages"), ColSpec("double", "temperature", required=False),
               ColSpec("long", "max_tokens", required=False)])
options = ParamSchema([ParamSpec("top_k", "long", 5)])
numbers = pandas.DataFrame({"petal": [1.0], "sepal": [2.0]})
SIGNATURES = {
    "prompt": infer_signature({"prompt": "<|user|>Hi<|end|><|assistant|>"}, ["Run"]),
    "question": ModelSignature(inputs=Schema([ColSpec("string", "question")]), outputs=text, params=options),
    "unnamed": ModelSignature(inputs=Schema([ColSpec("string")]), outputs=text),
    "chat": ModelSignature(inputs=chat, outputs=text),
    "numbers": infer_signature(numbers, numpy.array([1])),
    "tensor": ModelSignature(inputs=Schema([TensorSpec(numpy.dtype("float64"), (-1, 4))])),
    "none": None,
}
source, work, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def answer(model, document):
    texts = []
    for item in model.stream(document):
        if isinstance(item, End):
            return {"text": "".join(texts), "pieces": len([t for t in texts if t]),
                    "finish_reason": item.finish_reason, "usage": item.usage}
        texts.append(item)

def outcome(name, kind, signature, document):
    folder = work / name
    mlflow.pyfunc.save_model(folder, python_model=source, signature=SIGNATURES[signature],
                             model_config={"kind": kind}, pip_requirements=[])
    try:
        model = loader.load(folder, context_tokens=64, max_tokens=8, threads=1)
        if document == "cancel":
            items = model.stream({"prompt": "x"})
            first = next(items)
            items.close()
            return {"text": first, "finished": "FOREIGN_FINISHED" in os.environ}
        return {"signature": model.signature, "flavor": model.flavor, **answer(model, document)}
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print("\\n" + json.dumps({name: outcome(name, *case) for name, case in cases.items()}))
"""

PROMPT = {"prompt": "Hi"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
UNCOUNTED = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
COUNTED = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

# name → kind of the model, signature, document, what must come of it: fields of the outcome, or a part of the error
CASES: dict[str, tuple[str, str, Any, Any]] = {
    **{
        f"prompt-{kind}": (kind, "prompt", PROMPT, {"signature": "prompt", "text": "heard Hi", "usage": UNCOUNTED})
        for kind in ("text", "list", "table", "column", "object", "objects")
    },
    **{
        f"chat-{kind}": (kind, "chat", CHAT, {"signature": "chat", "text": "heard Hi {}"})
        for kind in ("text", "list", "table", "object")
    },
    **{
        f"chat-{kind}": (kind, "chat", CHAT, {"text": "heard Hi {}", "usage": COUNTED, "finish_reason": "length"})
        for kind in ("completion", "completions")
    },
    "question": ("text", "question", PROMPT, {"signature": "prompt", "text": "heard Hi {'top_k': 5}"}),
    "declared-params": ("text", "question", {**PROMPT, "top_k": 9}, {"text": "heard Hi {'top_k': 9}"}),
    "unnamed": ("text", "unnamed", PROMPT, {"text": "heard Hi"}),
    "one-message-is-a-prompt": ("text", "prompt", CHAT, {"text": "heard Hi"}),
    "declared-options": (
        "text",
        "chat",
        {**CHAT, "temperature": 0.0, "max_tokens": 3, "top_k": 4, "seed": 1},
        {"text": "heard Hi {'max_tokens': 3, 'temperature': 0.0}"},
    ),
    "stop": ("text", "prompt", {**PROMPT, "stop": ["d H"]}, {"text": "hear", "finish_reason": "stop"}),
    "stream": ("words", "prompt", PROMPT, {"text": "heard Hi and more", "pieces": 4, "finish_reason": "stop"}),
    "stream-chat": ("words", "chat", CHAT, {"text": "heard Hi {} and more", "pieces": 4}),
    "stream-chunks": (
        "chunks",
        "chat",
        CHAT,
        {
            "text": "heard Hi {} and more",
            "pieces": 4,
            "finish_reason": "length",
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        },
    ),
    "stream-own": ("own", "prompt", PROMPT, {"text": "heard Hi and more", "finish_reason": "length"}),
    "stream-stop": ("words", "prompt", {**PROMPT, "stop": ["i a"]}, {"text": "heard H", "finish_reason": "stop"}),
    # The package has no stream and takes 30 s: the iterator is closed before that.
    "cancel": ("slow", "prompt", "cancel", {"text": "", "finished": False}),
    "raises": ("raises", "prompt", PROMPT, "ValueError"),
    "number": ("number", "prompt", PROMPT, "answered with float, not with text"),
    "several": ("several", "prompt", PROMPT, "2 answers to one prompt"),
    "nothing": ("nothing", "prompt", PROMPT, "0 answers to one prompt"),
    "fields": ("fields", "prompt", PROMPT, "2 fields and no text"),
    "several-messages": (
        "text",
        "prompt",
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
        "BadRequest: this model takes one text",
    ),
    "prompt-to-a-chat": ("text", "chat", PROMPT, "BadRequest: this model takes messages"),
    "response-format": (
        "text",
        "prompt",
        {**PROMPT, "response_format": {"type": "regex", "regex": "a"}},
        "BadRequest: this model's signature has no response_format",
    ),
    "tools": (
        "text",
        "chat",
        {"messages": [{"role": "user", "content": "b"}], "tools": [{}]},
        "BadRequest: tools: this package has code of its own",
    ),
    "result-of-a-tool": (
        "text",
        "chat",
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": "b"}]},
        "BadRequest: tools, in messages[0]: this package has code of its own",
    ),
    "classical": ("number", "numbers", PROMPT, "RunnerError: the model's inputs are those of no language model"),
    "classical-tensor": ("number", "tensor", PROMPT, "RunnerError: the model's inputs are those of no language"),
    "no-signature": ("text", "none", PROMPT, "RunnerError: the model has no signature"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("foreign")
    cases = json.dumps({name: case[:3] for name, case in CASES.items()})
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(MODEL), str(folder), cases],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=clean_environment({"HOME": str(folder), "PYTHONPATH": str(ROOT)}),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


@pytest.mark.parametrize("name", CASES)
def test_it_is_answered_or_refused(outcomes: dict[str, Any], name: str) -> None:
    wanted, got = CASES[name][3], outcomes[name]
    if isinstance(wanted, str):
        assert isinstance(got, str), got
        assert wanted in got
    else:
        assert isinstance(got, dict), got
        assert {key: got[key] for key in wanted} == wanted


def test_the_flavor_says_that_it_is_somebody_elses(outcomes: dict[str, Any]) -> None:
    assert outcomes["chat-text"]["flavor"].startswith("mlflow.pyfunc 3.")
