"""Several prompts in one runner: each with its own options, end and fate, over MQTT against the running agent."""

from typing import Any

from tests.support.client import Client, chat
from tests.support.in_the_middle import in_the_middle, stopped_in_the_middle
from tests.support.processes import Daemon, wait_until

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."


def long(characters: int = 1900, **fields: Any) -> dict[str, Any]:
    """A request whose answer has exactly so many characters, one token each."""
    response_format = {"type": "regex", "regex": f"(0|1){{{characters}}}"}
    return chat("Count", max_tokens=characters + 20, response_format=response_format, stream=True, **fields)


def streamed(client: Client, correlation: bytes) -> str:
    """What came of a streamed answer, once its last part is here."""

    def choices() -> list[dict[str, Any]]:
        return [message.json["choices"][0] for message in client.chunks(correlation)]

    wait_until(lambda: any(choice["finish_reason"] for choice in choices()), 60, "the last chunk")
    return "".join(choice["delta"]["content"] for choice in choices())


def cancel(client: Client, correlation: bytes) -> None:
    client.publish(
        f"{client.root}/ctl/cancel", b"", ResponseTopic=client.replies, CorrelationData=correlation
    )


def test_each_of_several_at_once_gets_what_it_gets_alone(client: Client) -> None:
    sampled = {"temperature": 1.5, "max_tokens": 30}
    requests = [
        chat(SPAIN),
        chat(SPAIN, stop=[" Madrid"]),
        chat("Count to one hundred", max_tokens=7),
        chat("Tell me a long story", seed=1, **sampled),
        chat("Tell me a long story", seed=2, **sampled),
        chat(SPAIN, response_format={"type": "regex", "regex": "(yes|no)"}),
        chat("Say hello in Nepali."),
        {"prompt": "<|user|>Tell me a joke about atom<|end|><|assistant|>"},
    ]
    alone = [client.ask(request).json for request in requests]
    for _ in range(2):
        sent = [client.send({**request, "stream": True}) for request in requests]
        for correlation, expected in zip(sent, alone, strict=True):
            answer = client.answer(correlation).json
            assert answer["choices"] == expected["choices"]
            assert answer["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
            assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
            assert streamed(client, correlation) == expected["choices"][0]["message"]["content"]


def test_a_newcomer_waits_for_nobodys_whole_answer(client: Client, agent: Daemon) -> None:
    with in_the_middle(client, agent, *[long()] * 3) as running:
        accepted = agent.log.count("prompt accepted")
        newcomer = client.send(chat(SPAIN))
        wait_until(lambda: agent.log.count("prompt accepted") > accepted, 60, "the newcomer")
    assert client.answer(newcomer).text == MADRID
    for correlation in running:
        cancel(client, correlation)
        assert client.answer(correlation).status in (499, 200)
    came = [message.correlation for message in client.messages if message.topic == client.replies]
    first = next(correlation for correlation in came if correlation in (newcomer, *running))
    assert first == newcomer, "somebody's whole answer came first"


def test_a_cancel_and_a_deadline_end_their_own_prompt_only(client: Client, agent: Daemon) -> None:
    requests = long(), long(deadline_ms=5000), long(600)  # time enough for all to start, on any machine
    with in_the_middle(client, agent, *requests) as (cancelled, late, whole):
        cancel(client, cancelled)
        assert client.answer(cancelled).status == 499
        assert client.answer(late).status == 408
    answer = client.answer(whole)
    assert answer.status == 200
    assert len(answer.text) == 600
    for correlation in (cancelled, late, whole):
        assert len(client.answers(correlation)) == 1


def test_a_runner_that_dies_costs_one_prompt_and_the_others_run_again(client: Client, agent: Daemon) -> None:
    runner, sent = stopped_in_the_middle(client, agent, *[long(900)] * 3)
    put_back = agent.log.count("prompt put back")
    runner.kill()
    statuses = sorted(client.answer(correlation).status for correlation in sent)
    assert statuses == [200, 200, 500]
    assert agent.log.count("prompt put back") == put_back + 2
    for correlation in sent:
        answer = client.answer(correlation)
        if answer.status == 200:
            assert len(answer.text) == 900
        assert len(client.answers(correlation)) == 1
    wait_until(lambda: agent.status()["queue_depth"] == 0, 60, "an empty queue")
