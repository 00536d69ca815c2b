"""Prompts over MQTT against the running agent: answers, streams, cancels, deadlines, errors, bad input."""

import json
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.client import Client, chat, connected
from tests.support.in_the_middle import in_the_middle
from tests.support.mosquitto import Broker, tool
from tests.support.processes import Daemon, short_folder, standing_still, wait_until
from tests.support.sample_device import copy_cache, running_device, settings_for, wait_for_state

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."
STORY = "Tell me a long story"
SEED_PROMPT = (
    "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
)


def long(**fields: Any) -> dict[str, Any]:
    """A request whose answer takes a while: the grammar lets it end after 1,900 characters only."""
    return chat("Count", max_tokens=1950, response_format={"type": "regex", "regex": "(0|1){1900}"}, **fields)


PARALLEL = 4  # the default of inference.parallel


@contextmanager
def occupied(client: Client, agent: Daemon) -> Iterator[None]:
    """Every place in the runner is taken, and the runner stands still; its prompts are cancelled in the end."""
    with in_the_middle(client, agent, *[long(stream=True)] * PARALLEL) as running:
        yield
        assert not any(client.answers(correlation) for correlation in running), "they ran all the time"
        for correlation in running:
            cancel(client, correlation)
        assert {client.answer(correlation).status for correlation in running} == {499}


def cancel(client: Client, correlation: bytes) -> None:
    client.publish(
        f"{client.root}/ctl/cancel", b"", ResponseTopic=client.replies, CorrelationData=correlation
    )


def test_a_chat_is_answered_with_the_seeds_completion_object(client: Client) -> None:
    answer = client.ask(chat(SPAIN), correlation=b"\x00binary\xff")
    document = answer.json
    assert answer.text == MADRID
    assert answer.correlation == b"\x00binary\xff"
    assert answer.properties == {"status": "200", "model": "assistant", "version": "1"}
    assert document["object"] == "chat.completion"
    assert document["model"] == "assistant"
    assert document["choices"][0]["finish_reason"] == "stop"
    usage = document["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"}
    assert set(document["timings"]) == {"queue_ms", "first_token_ms", "total_ms", "tokens_per_s"}


def test_the_seeds_raw_prompt_is_answered_with_a_joke(client: Client) -> None:
    answer = client.ask({"prompt": SEED_PROMPT})
    assert answer.status == 200
    assert "atom" in answer.text.lower()
    assert answer.json["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("question", "expected"),
    [("What is the capital of Nepal?", "The capital of Nepal is Kathmandu."), (SPAIN, MADRID)],
)
def test_mosquitto_rr_prints_the_sentence(
    broker: Broker, agent: Daemon, question: str, expected: str
) -> None:
    result = subprocess.run(
        [
            *(tool("mosquitto_rr"), "-V", "5", "-p", str(broker.port), "-W", "60"),
            *("-t", "edge/v1/dev/req/chat", "-e", f"replies/{uuid.uuid4().hex}", "-m", question),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.strip() == expected


def test_plain_text_gets_its_error_in_plain_text(client: Client) -> None:
    answer = client.ask(b"a\x00b")
    assert answer.payload.startswith(b"error 400 bad_request: ")
    assert answer.properties["status"] == "400"


def test_a_client_of_mqtt_3_names_id_and_answer_topic_in_the_body(old_client: Client) -> None:
    request = chat(SPAIN, id="req-1", reply_to=old_client.replies)
    old_client.publish(f"{old_client.root}/req/chat", json.dumps(request))
    answer = old_client.wait_on(old_client.replies)
    assert answer.text == MADRID
    assert answer.json["id"] == "req-1"


def test_a_request_without_an_answer_topic_is_answered_under_the_device(client: Client) -> None:
    client.subscribe(f"{client.root}/rsp/#")
    request_id = uuid.uuid4().hex
    client.publish(f"{client.root}/req/chat", json.dumps(chat(SPAIN, id=request_id)))
    assert client.wait_on(f"{client.root}/rsp/{request_id}").text == MADRID


def test_a_qos_0_prompt_is_answered_too(client: Client) -> None:
    client.publish(
        f"{client.root}/req/chat", SPAIN, qos=0, ResponseTopic=client.replies, CorrelationData=b"q0"
    )
    assert client.answer(b"q0").payload.decode() == MADRID


def test_a_stream_has_no_gaps_and_says_what_the_answer_says(client: Client) -> None:
    answer = client.ask(chat(STORY, stream=True))
    assert answer.correlation is not None
    wait_until(
        lambda: any(_reason(c.json) for c in client.chunks(answer.correlation or b"")), 60, "the last chunk"
    )
    chunks = [message.json for message in client.chunks(answer.correlation)]
    assert [chunk["seq"] for chunk in chunks] == list(range(len(chunks)))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == answer.text
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [_reason(chunk) for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def _reason(chunk: dict[str, Any]) -> str | None:
    reason: str | None = chunk["choices"][0]["finish_reason"]
    return reason


def test_nothing_is_streamed_unasked(client: Client) -> None:
    answer = client.ask(chat(SPAIN))
    assert answer.correlation is not None
    assert client.chunks(answer.correlation) == []


def test_options_of_a_request_reach_the_model(client: Client) -> None:
    short = client.ask(chat(SPAIN, max_tokens=2))
    assert short.json["choices"][0]["finish_reason"] == "length"
    assert short.json["usage"]["completion_tokens"] == 2
    stopped = client.ask(chat(SPAIN, stop=[" Madrid"]))
    assert stopped.text == "The capital of Spain is"
    guided = client.ask(chat(SPAIN, response_format={"type": "regex", "regex": "(yes|no)"}))
    assert guided.text in ("yes", "no")
    sampled = [client.ask(chat(STORY, temperature=1.5, seed=7, max_tokens=20)).text for _ in range(2)]
    assert sampled[0] == sampled[1]


SWITCH = {
    "type": "function",
    "function": {
        "name": "switch",
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["kitchen", "bath"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}


def test_a_program_runs_the_calls_of_an_answer_and_asks_again(client: Client) -> None:
    asked = chat("Light, please", tools=[SWITCH], tool_choice="required", parallel_tool_calls=False)
    answer = client.ask({**asked, "stream": True}, correlation=b"tools")
    (choice,) = answer.json["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == "switch"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments.keys() == {"room", "on"}
    assert (arguments["room"] in ("kitchen", "bath"), arguments["on"] in (True, False)) == (True, True)
    wait_until(lambda: any(_reason(c.json) for c in client.chunks(b"tools")), 60, "the last chunk")
    *_, called, last = [chunk.json["choices"][0] for chunk in client.chunks(b"tools")]
    assert called["delta"]["tool_calls"] == [{"index": 0, **call}]
    assert last["finish_reason"] == "tool_calls"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    chat_so_far = [*asked["messages"], choice["message"], result]
    assert client.ask({"messages": chat_so_far, "tools": [SWITCH], "max_tokens": 4}).status == 200
    stray = client.ask({"messages": [*asked["messages"], result]})
    assert "messages[1].tool_call_id" in stray.json["error"]["message"]
    wrong = {"type": "function", "function": {"name": "odd", "parameters": {"not": {}}}}
    error = client.ask({**asked, "tools": [SWITCH, wrong]}).json["error"]
    assert (error["status"], error["code"]) == (500, "model_failed")
    assert error["message"].startswith('tools[1].function.parameters: "not" in a schema')


def test_a_resend_gets_the_same_answer_byte_for_byte(client: Client) -> None:
    first = client.ask(chat(SPAIN), correlation=b"again")
    client.send(chat(SPAIN), correlation=b"again")
    wait_until(lambda: len(client.answers(b"again")) == 2, 60, "the second answer")
    assert client.answers(b"again")[1].payload == first.payload


def test_the_same_correlation_with_another_body_is_409(client: Client) -> None:
    client.ask(chat(SPAIN), correlation=b"reused")
    client.send(chat("What is the capital of Japan?"), correlation=b"reused")
    wait_until(lambda: len(client.answers(b"reused")) == 2, 60, "the refusal")
    assert client.answers(b"reused")[1].json["error"]["code"] == "id_reused"


BAD = [
    (b'{"messages": ', 400, "bad_request", "not JSON"),
    (b"{}", 400, "bad_request", "messages or prompt"),
    (b'{"prompt": 3}', 400, "bad_request", "prompt"),
    (b'{"prompt": "x", "colour": "red"}', 400, "bad_request", "colour"),
    (b'{"prompt": "a\\u0000b"}', 400, "bad_request", "NUL"),
    (b'{"prompt": "\\udc00"}', 400, "bad_request", "surrogate"),
    (b'{"messages": [{"role": "user"}]}', 400, "bad_request", "content"),
    (b'{"prompt": "x", "temperature": "hot"}', 400, "bad_request", "temperature"),
    (b'{"prompt": "x", "model": "missing"}', 404, "unknown_model", "missing"),
    (b'{"prompt": "' + b"x" * 102_400 + b'"}', 413, "prompt_too_long", "102400"),
    (b'{"prompt": "' + b"x y " * 20_000 + b'"}', 413, "prompt_too_long", "context"),
    (b'{"prompt": "x", "max_tokens": 5000}', 413, "prompt_too_long", "context"),
]


@pytest.mark.parametrize(("payload", "status", "code", "word"), BAD, ids=lambda value: str(value)[:24])
def test_bad_input_gets_its_error_and_the_next_prompt_its_answer(
    client: Client, payload: bytes, status: int, code: str, word: str
) -> None:
    refused = client.ask(payload)
    error = refused.json["error"]
    assert (error["status"], error["code"]) == (status, code)
    assert word in error["message"]
    assert refused.properties["status"] == str(status)
    assert client.ask(chat(SPAIN)).text == MADRID


def test_bytes_that_are_not_utf_8_are_refused(client: Client) -> None:
    assert client.ask(b"\xff\xfe\xfd").payload.startswith(b"error 400 bad_request")


@pytest.mark.parametrize(
    "topic", ["elsewhere/x", "edge/v1/dev/req/chat", "edge/v1/dev/ctl/cancel", "edge/v1/dev/status"]
)
def test_a_forbidden_answer_topic_is_refused_under_the_device(client: Client, topic: str) -> None:
    client.subscribe(f"{client.root}/rsp/#")
    request_id = uuid.uuid4().hex
    client.publish(f"{client.root}/req/chat", json.dumps(chat(SPAIN, id=request_id)), ResponseTopic=topic)
    assert client.wait_on(f"{client.root}/rsp/{request_id}").json["error"]["code"] == "bad_request"
    assert client.ask(chat(SPAIN)).text == MADRID


def test_a_request_with_the_retain_flag_is_an_ordinary_one_to_an_agent_that_is_there(client: Client) -> None:
    topic = f"{client.root}/req/chat"
    try:
        client.publish(topic, SPAIN, retain=True, ResponseTopic=client.replies, CorrelationData=b"retained")
        assert client.answer(b"retained").payload.decode() == MADRID
    finally:
        client.publish(topic, b"", retain=True)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_request_that_the_broker_has_retained_is_never_run(
    agent: Daemon, broker: Broker, protocol: str
) -> None:
    """A device that is new there: over MQTT 5 it wants none of them, over 3.1.1 it gets and drops it."""
    name = f"later-{protocol.replace('.', '')}"
    with connected(broker, device=name) as client:
        topic = f"{client.root}/req/chat"
        old = chat(SPAIN, id="retained", reply_to=client.replies)
        client.publish(topic, json.dumps(old), retain=True)
        try:
            settings = settings_for(broker, "", device=name, mqtt={"protocol": protocol})
            with running_device(agent, settings) as daemon:
                client.publish(topic, json.dumps({**old, "id": "asked"}))
                client.wait(lambda m: m.topic == client.replies and m.json["id"] == "asked")
                wait_until(lambda: daemon.status()["queue_depth"] == 0, 60, "an empty queue")
                assert daemon.stop() == 0
                assert daemon.log.count("prompt accepted") == 1
                assert "request=retained" not in daemon.log
                assert daemon.log.count("retained request dropped") == (protocol == "3.1.1")
            assert [m.json["id"] for m in client.messages if m.topic == client.replies] == ["asked"]
        finally:
            client.publish(topic, b"", retain=True)


def test_a_running_prompt_is_cancelled(client: Client, agent: Daemon) -> None:
    with in_the_middle(client, agent, long(stream=True)) as (correlation,):
        cancel(client, correlation)
        answer = client.answer(correlation)
    assert (answer.status, answer.json["error"]["code"]) == (499, "cancelled")
    assert "choices" not in answer.json
    assert client.ask(chat(SPAIN)).text == MADRID


def test_a_cancel_of_what_is_unknown_is_ignored(client: Client) -> None:
    for payload in (b'{"id": "nobody"}', b"not json", b""):
        client.publish(f"{client.root}/ctl/cancel", payload)
    assert client.ask(chat(SPAIN)).text == MADRID


def test_a_waiting_prompt_is_cancelled_by_id(old_client: Client, client: Client, agent: Daemon) -> None:
    with occupied(client, agent):
        request = chat(SPAIN, id="waits", reply_to=old_client.replies)
        old_client.publish(f"{old_client.root}/req/chat", json.dumps(request))
        old_client.publish(
            f"{old_client.root}/ctl/cancel", json.dumps({"id": "waits", "reply_to": old_client.replies})
        )
        assert old_client.wait_on(old_client.replies).status == 499
    assert "prompt starts request=waits" not in agent.log


def test_a_running_prompt_ends_at_its_deadline(client: Client, agent: Daemon) -> None:
    (runner,) = agent.runners()
    with standing_still(runner):
        answer = client.ask(long(id="runs-late", deadline_ms=5000))  # time enough to start, on any machine
    assert "prompt starts request=runs-late" in agent.log
    assert (answer.status, answer.json["error"]["code"]) == (408, "deadline_exceeded")
    assert client.ask(chat(SPAIN)).text == MADRID


def test_a_waiting_prompt_is_answered_at_its_deadline_and_never_starts(client: Client, agent: Daemon) -> None:
    with occupied(client, agent):
        waiting = client.send(chat(SPAIN, id="too-late", deadline_ms=300))
        assert client.answer(waiting).status == 408
    assert "prompt starts request=too-late" not in agent.log


def test_message_expiry_is_a_deadline_too(client: Client, agent: Daemon) -> None:
    (runner,) = agent.runners()
    with standing_still(runner):  # in fewer seconds, it might expire on its way to the agent
        assert client.ask(chat(SPAIN), MessageExpiryInterval=5).status == 408
    assert client.ask(chat(SPAIN)).text == MADRID


def test_status_is_retained_and_complete(client: Client) -> None:
    client.subscribe(f"{client.root}/status")
    topic = f"{client.root}/status"
    status = client.wait(lambda message: message.topic == topic and message.json["state"] != "starting").json
    assert status["state"] == "ready"
    assert set(status) == {
        *("state", "time", "boot_id", "seq", "agent_version", "queue_depth", "models", "troubles", "walls"),
    }
    assert status["troubles"] == []
    (model,) = status["models"]
    assert set(model) == {
        *("name", "uri", "version", "digest", "flavor", "state", "reason", "tokens_per_s", "walls"),
    }
    assert (model["name"], model["version"], model["state"]) == ("assistant", 1, "ready")
    assert len(model["digest"]) == 64


class Resting(Daemon):
    """One whose main thread rests for an hour where nothing goes on."""

    def _command(self, *arguments: str) -> list[str]:
        program = "from edge_agent import cli, daemon; daemon.REST_S = 3600.0; cli.main()"
        return [self.python, "-c", program, *super()._command(*arguments)[3:]]


def test_what_comes_ends_the_main_threads_rest(agent: Daemon, broker: Broker) -> None:
    with short_folder() as folder:
        copy_cache(agent, folder / "state")
        daemon = Resting(folder, settings_for(broker, "", device="resting"))
        try:
            daemon.start()
            wait_for_state(daemon, "ready")
            with connected(broker, device="resting") as client:
                assert client.ask(chat(SPAIN)).text == MADRID
                (runner,) = daemon.runners()
                with standing_still(runner):
                    assert client.ask(chat(SPAIN, deadline_ms=500)).status == 408
            assert daemon.stop() == 0
        finally:
            daemon.close()
