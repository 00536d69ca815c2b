"""The real model in MLflow's transformers flavor, in float32: the same contract as ONNX.

What is right comes from transformers itself, with no line of this agent: each prompt alone, in one piece.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from edge_agent.publishing import publish_folder
from tests.real.conftest import THREADS
from tests.real.prompts import PROMPTS
from tests.support.client import Client, Message, chat, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, wait_until
from tests.support.sample_device import settings_for, wait_for_state

NAME = DEVICE = "smollm2-hf"
NEW_TOKENS = 12
FRANCE, PARIS = PROMPTS[1], "The capital of France is Paris."
SHORT = PROMPTS[:6]
LONG = "The river is wide and the boat is slow. " * 70 + "What is the boat?"
"""About 700 tokens: several slices."""
VERY_LONG = "The river is wide and the boat is slow. " * 600
"""About 6,000 tokens."""
ENDLESS = {"prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 4000}
"""The model counts on for thousands of tokens."""
QUESTIONS = (*SHORT, LONG)


@pytest.fixture(scope="module")
def hugging_face(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--real-model")) / "hf"
    assert (folder / "model.safetensors").is_file(), f"no real model in {folder}"
    return folder


@pytest.fixture(scope="module")
def right(hugging_face: Path) -> dict[str, str]:
    """Question → the greedy answer of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(hugging_face, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(hugging_face, dtype=torch.float32, local_files_only=True)
    answers = {}
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        answers[question] = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    return answers


@pytest.fixture(scope="module")
def device(hugging_face: Path, mlflow_server: Server, broker: Broker) -> Iterator[Daemon]:
    publish_folder(
        hugging_face, name=NAME, flavor="transformers", registry_uri=mlflow_server.uri, alias="prod"
    )
    settings = settings_for(broker, mlflow_server.uri, device=DEVICE, inference={"threads": THREADS})
    settings["models"] = {"assistant": {"uri": f"models:/{NAME}@prod", "context_tokens": 8192}}
    with running_daemon(settings) as daemon:
        wait_for_state(daemon, "ready", 300)
        yield daemon


@pytest.fixture
def client(broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(broker, device=DEVICE) as running:
        yield running


@pytest.fixture
def runner(device: Daemon) -> Iterator[psutil.Process]:
    """The model's process, which is the same one at the end."""
    (before,) = device.runners()
    yield before
    assert [process.pid for process in device.runners()] == [before.pid], "no process had to be killed"


def greedy(question: str, **options: Any) -> dict[str, Any]:
    return chat(question, **{"temperature": 0, "max_tokens": NEW_TOKENS, **options})


def cancel(client: Client, correlation: bytes) -> None:
    client.publish(
        f"{client.root}/ctl/cancel", b"", ResponseTopic=client.replies, CorrelationData=correlation
    )
    assert client.answer(correlation).status == 499


def pieces(client: Client, correlation: bytes) -> list[str]:
    """The texts of a stream, up to its end."""

    def last(message: Message) -> bool:
        ours = message.topic == f"{client.replies}/stream" and message.correlation == correlation
        return ours and bool(message.json["choices"][0].get("finish_reason"))

    client.wait(last)
    return [chunk.json["choices"][0]["delta"].get("content", "") for chunk in client.chunks(correlation)]


def test_the_device_answers_as_transformers_does(client: Client, right: dict[str, str]) -> None:
    assert right[FRANCE] == PARIS
    assert {question: client.ask(greedy(question)).text for question in QUESTIONS} == right
    answer = client.ask(greedy(FRANCE))
    assert answer.json["usage"] == {
        "prompt_tokens": 37, "completion_tokens": 7, "total_tokens": 44, "cached_tokens": 0,
    }  # fmt: skip


def test_again_and_behind_others(client: Client, right: dict[str, str]) -> None:
    assert {question: client.ask(greedy(question)).text for question in reversed(QUESTIONS)} == right


def test_four_at_once(client: Client, right: dict[str, str]) -> None:
    sent = [(question, client.send(greedy(question))) for question in QUESTIONS[-4:]]
    assert all(client.answer(correlation).text == right[question] for question, correlation in sent)


def test_a_stream_is_the_whole_answer_in_pieces(client: Client, right: dict[str, str]) -> None:
    correlation = client.send(greedy(SHORT[0], stream=True))
    texts = pieces(client, correlation)
    assert client.answer(correlation).text == "".join(texts) == right[SHORT[0]]
    assert len([text for text in texts if text]) > 1


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"stop": ["Paris"]}, "The capital of France is ", "stop"),
        ({"stop": [" of France is Par", "nce is"]}, "The capital of Fra", "stop"),
        ({"stop": ["no such", "Paris, "]}, PARIS, "stop"),
        ({"max_tokens": 3}, "The capital of", "length"),
        ({"max_tokens": 7}, PARIS, "length"),
        ({"max_tokens": 8}, PARIS, "stop"),
    ],
)
def test_stop_and_max_tokens(client: Client, options: dict[str, Any], text: str, reason: str) -> None:
    answer = client.ask(greedy(FRANCE, **options))
    assert (answer.text, answer.json["choices"][0]["finish_reason"]) == (text, reason)


def test_an_answer_cut_within_a_character_ends_before_it(client: Client) -> None:
    question = "Translate into Chinese: The weather is nice today."
    correlation = client.send(greedy(question, max_tokens=7, stream=True))
    assert "".join(pieces(client, correlation)) == client.answer(correlation).text == "水滩"


def test_a_seed_makes_sampling_repeatable(client: Client) -> None:
    asked = [
        client.ask(chat(SHORT[4], temperature=1.0, max_tokens=NEW_TOKENS, seed=seed)).text
        for seed in (1, 1, 2)
    ]
    assert asked[0] == asked[1] != asked[2]


def test_a_cancel_in_an_answer(client: Client, runner: psutil.Process, right: dict[str, str]) -> None:
    cancelled = client.send({**ENDLESS, "stream": True})
    client.wait(lambda m: m.topic == f"{client.replies}/stream" and m.correlation == cancelled)
    cancel(client, cancelled)
    assert client.ask(greedy(FRANCE)).text == right[FRANCE]


def first_token_s(client: Client) -> float:
    sent_s = time.monotonic()
    correlation = client.send(greedy("hi", stream=True))
    first = client.wait(lambda m: m.topic == f"{client.replies}/stream" and m.correlation == correlation)
    client.answer(correlation)
    return first.at_s - sent_s


def computed_s(runner: psutil.Process) -> float:
    return float(runner.cpu_times().user)


def has_computed(runner: psutil.Process, until_s: float) -> bool:
    return computed_s(runner) > until_s


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_prompt_of_6000_tokens_that_is_stopped_does_not_hold_up_the_next_one(
    client: Client, runner: psutil.Process, how: str, figures: dict[str, str]
) -> None:
    """A prompt that waited for the prefill would wait for a hundred times the usual time. The better of two, because
    others use this machine as well."""
    usual_s = max(first_token_s(client) for _ in range(3))
    behind_s = []
    for _ in range(2):
        before_s = computed_s(runner)
        if how == "cancel":
            correlation = client.send(greedy(VERY_LONG))
            wait_until(functools.partial(has_computed, runner, before_s + 1.5), 120, "its computation")
            assert not client.answers(correlation)
            cancel(client, correlation)
        else:
            assert client.ask(greedy(VERY_LONG, deadline_ms=1500)).status == 408
            assert computed_s(runner) > before_s
        behind_s.append(first_token_s(client))
    ratio = min(behind_s) / usual_s
    figures[f"first token behind a stopped prefill ({how})"] = f"{ratio:.2f} x the usual"
    assert ratio < 10


def test_a_deadline_in_an_answer(client: Client, runner: psutil.Process, right: dict[str, str]) -> None:
    assert client.ask({**ENDLESS, "deadline_ms": 2500}).status == 408
    assert client.ask(greedy(FRANCE)).text == right[FRANCE]
