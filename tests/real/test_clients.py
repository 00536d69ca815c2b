"""What clients and shells send by habit gets the answer of the request that it stands for."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing import publish_folder
from tests.real.conftest import THREADS
from tests.support.client import Client, Message, chat, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon
from tests.support.sample_device import settings_for, wait_for_state

SPAIN = "What is the capital of Spain?"
STORY = "Write a long story about a river."
SNOW = "Write a haiku about snow."
SHORT = "smollm2-short"
NEW_TOKENS = 12
PACKAGE_TOKENS = 80


def short(text: str, **fields: Any) -> dict[str, Any]:
    return chat(text, **{"max_tokens": NEW_TOKENS, **fields})


def what_counts(message: Message) -> tuple[str, int, int]:
    """(text, tokens of the prompt, tokens of the answer)"""
    usage = message.json["usage"]
    return message.text, usage["prompt_tokens"], usage["completion_tokens"]


@pytest.fixture(scope="module")
def short_device(real_model: Path, mlflow_server: Server, broker: Broker) -> Iterator[Client]:
    """A client of a device that follows a package with `max_tokens` of its own, and whose settings name none."""
    publish_folder(
        real_model,
        name=SHORT,
        registry_uri=mlflow_server.uri,
        alias="prod",
        options={"max_tokens": str(PACKAGE_TOKENS)},
    )
    settings = settings_for(broker, mlflow_server.uri, device="short", inference={"threads": THREADS})
    settings["models"] = {"assistant": {"uri": f"models:/{SHORT}@prod"}}
    with running_daemon(settings) as daemon, connected(broker, device="short") as client:
        wait_for_state(daemon, "ready", 300)
        yield client


def test_a_byte_order_mark_in_front_changes_no_answer(client: Client) -> None:
    plain = client.ask(short(SPAIN))
    marked = client.ask(codecs.BOM_UTF8 + json.dumps(short(SPAIN)).encode())
    assert what_counts(marked) == what_counts(plain)
    as_text, marked_text = (client.ask(mark + SPAIN.encode()) for mark in (b"", codecs.BOM_UTF8))
    assert marked_text.payload == as_text.payload


@pytest.mark.parametrize("payload", ["\u00a0".encode(), codecs.BOM_UTF8, b" \r\n"])
def test_a_prompt_of_white_space_is_refused(client: Client, payload: bytes) -> None:
    assert client.ask(payload).payload == b"error 400 bad_request: the request is empty"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": float(NEW_TOKENS), "n": 1.0},
        {"max_tokens": None, "max_completion_tokens": NEW_TOKENS},
        {
            "user": "someone",
            "stream_options": {"include_usage": True},
            "logprobs": False,
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": SPAIN}]}]},
    ],
    ids=["floats", "other name", "habits", "parts"],
)
def test_another_way_to_write_a_request_changes_no_answer(client: Client, fields: dict[str, Any]) -> None:
    assert what_counts(client.ask(short(SPAIN, **fields))) == what_counts(client.ask(short(SPAIN)))


def test_a_developer_is_the_system(client: Client) -> None:
    user = {"role": "user", "content": SPAIN}
    answers = [
        client.ask(short("", messages=[{"role": role, "content": "Answer in French."}, user]))
        for role in ("system", "developer")
    ]
    assert what_counts(answers[0]) == what_counts(answers[1])


def test_what_a_shell_adds_to_a_prompt_is_not_asked(client: Client, device: Daemon) -> None:
    expected = client.ask(chat(SPAIN)).json
    for ending in ("\n", "\r\n"):
        probed = json.loads(device.cli("probe", "-", "--json", stdin=f"{SPAIN}{ending}").stdout)
        assert probed["answer"] == expected["choices"][0]["message"]["content"]
        assert probed["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_a_packages_max_tokens_holds_where_nobody_says_otherwise(short_device: Client) -> None:
    answer = short_device.ask(chat(STORY))
    assert answer.json["usage"]["completion_tokens"] == PACKAGE_TOKENS
    assert answer.json["choices"][0]["finish_reason"] == "length"
    as_text = short_device.ask(STORY.encode()).payload.decode()
    assert as_text == f"{answer.text}\n\n[cut at {PACKAGE_TOKENS} tokens]"
    assert short_device.ask(short(STORY)).json["usage"]["completion_tokens"] == NEW_TOKENS


def test_a_repetition_penalty_ends_a_repetition(client: Client) -> None:
    plain = client.ask(short(SNOW, max_tokens=40))
    penalised = client.ask(short(SNOW, max_tokens=40, repetition_penalty=1.3))
    assert repeated(plain.text) > repeated(penalised.text)
    assert client.ask(short(SNOW, max_tokens=40)).text == plain.text


def repeated(text: str) -> int:
    """How many words of a text were in it before."""
    words = text.lower().split()
    return len(words) - len(set(words))
