"""Applications that share a device, with the rules of docs/broker.md: none of them can harm another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.client import chat
from tests.support.documented_broker import DEVICE, ROOT, Application, tls_settings
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, standing_still, wait_until
from tests.support.sample_device import running_device, settings_for

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."
SYSTEM = "You keep the secret of the third stone, and you answer in one sentence. " * 4
QUEUE_DEPTH = 8
LONG = {"max_tokens": 420, "response_format": {"type": "regex", "regex": "(0|1){400}"}}


@pytest.fixture(scope="module")
def press(documented: tuple[Broker, Authority], agent: Daemon) -> Iterator[Daemon]:
    """A device with a short queue and a system prompt, that answers two prompts at once."""
    broker, authority = documented
    config = settings_for(
        broker,
        "",
        device=DEVICE,
        mqtt=tls_settings(authority, authority.client(DEVICE)),
        limits={"queue_depth": QUEUE_DEPTH},
        inference={"parallel": 2},
    )
    config["models"]["assistant"]["system"] = SYSTEM
    with running_device(agent, config) as daemon:
        yield daemon


@pytest.fixture
def shop(documented: tuple[Broker, Authority], press: Daemon) -> Iterator[Application]:
    yield from application(documented, "shop")


@pytest.fixture
def lab(documented: tuple[Broker, Authority], press: Daemon) -> Iterator[Application]:
    yield from application(documented, "lab")


def application(documented: tuple[Broker, Authority], name: str) -> Iterator[Application]:
    with Application(*documented, name) as connected:
        connected.subscribe(f"replies/{name}/#")
        connected.subscribe(f"{ROOT}/rsp/{name}/#")
        yield connected


def inbox(client: Application) -> str:
    return f"replies/{client.name}/{DEVICE}"


def status_of(client: Application, correlation: bytes) -> int:
    error = client.wait_document(correlation).get("error")
    return int(error["status"]) if error else 200


# --- Turns and shares ----------------------------------------------------------------------------------


def test_forty_prompts_of_one_application_cost_another_two_turns(
    press: Daemon, shop: Application, lab: Application
) -> None:
    (runner,) = press.runners()
    greedy = [f"greedy-{number}".encode() for number in range(40)]
    with standing_still(runner):  # nothing ends while all of it comes
        for correlation in greedy:
            shop.ask("Count", inbox(shop), correlation, deadline_ms=600_000, **LONG)
        for number in range(3):
            lab.ask(SPAIN, inbox(lab), f"polite-{number}".encode())
        wait_until(lambda: press.log.count("client=lab") >= 3, 60, "the polite one's prompts in the journal")
        refused = wait_until(
            lambda: len([m for m in shop.came if b"queue_full" in m.payload]) == 40 - QUEUE_DEPTH, 60, "429s"
        )
        assert refused
    assert [lab.wait_document(f"polite-{n}".encode()).get("error") for n in range(3)] == [None] * 3
    assert sorted(status_of(shop, each) for each in greedy) == [200] * QUEUE_DEPTH + [429] * (
        40 - QUEUE_DEPTH
    )
    after = press.log[press.log.index("client=lab") :]
    starts = re.findall(r"prompt starts request=(greedy|polite)", after)
    assert starts[:6].count("polite") == 3, f"clients take turns: {starts}"


def test_beside_another_an_application_gets_its_share_and_is_told_why(
    press: Daemon, shop: Application, lab: Application
) -> None:
    (runner,) = press.runners()
    with standing_still(runner):
        lab.ask(SPAIN, inbox(lab), b"first")
        for number in range(QUEUE_DEPTH):
            shop.ask(SPAIN, inbox(shop), f"share-{number}".encode())
        wait_until(lambda: shop.came, 60, "a refusal")
        error = json.loads(shop.came[0].payload)["error"]
        assert (error["status"], error["code"]) == (429, "queue_full")
        assert f"its share of the queue is {QUEUE_DEPTH // 2}" in error["message"]
        assert error["retry_after_ms"] > 0
    statuses = [status_of(shop, f"share-{number}".encode()) for number in range(QUEUE_DEPTH)]
    assert statuses.count(200) == QUEUE_DEPTH // 2
    assert lab.wait_document(b"first").get("error") is None


def test_a_deadline_of_a_week_is_refused(shop: Application) -> None:
    shop.ask(SPAIN, inbox(shop), b"week", deadline_ms=7 * 86_400_000)
    assert "limits.max_deadline_s" in shop.wait_document(b"week")["error"]["message"]


# --- Answers, cancels, correlations --------------------------------------------------------------------


def test_an_application_is_answered_on_its_own_topics(shop: Application) -> None:
    shop.ask(SPAIN, f"{inbox(shop)}/1", b"own")
    assert shop.wait_answer(b"own") == MADRID
    assert shop.publish(f"{ROOT}/req/chat/shop", json.dumps(chat(SPAIN, id="made"))) == "Success"
    topic = f"{ROOT}/rsp/shop/made"
    wait_until(lambda: topic in [message.topic for message in shop.came], 60, "the answer under rsp")


def test_no_answer_goes_into_somebody_elses_inbox(shop: Application, lab: Application) -> None:
    for number, topic in enumerate((inbox(lab), f"{ROOT}/rsp/lab/1", f"replies/lab/{DEVICE}/x")):
        correlation = f"astray-{number}".encode()
        shop.ask(SPAIN, topic, correlation)
        error = shop.wait_document(correlation)["error"]
        assert error["status"] == 400
        assert "'replies/shop/'" in error["message"]
        (came,) = [message for message in shop.came if message.correlation == correlation]
        assert came.topic == f"{ROOT}/rsp/shop/astray-{number}"
    lab.ask(SPAIN, inbox(lab), b"after")
    assert lab.wait_answer(b"after") == MADRID
    assert [message.correlation for message in lab.came] == [b"after"]


@pytest.mark.parametrize(
    "topic", ["req/chat", "req/chat/lab", "ctl/cancel", "ctl/cancel/lab", "req/chat/shop/x", "rsp/lab/1"]
)
def test_nobody_speaks_under_anothers_name(shop: Application, topic: str) -> None:
    assert shop.publish(f"{ROOT}/{topic}", json.dumps(chat(SPAIN, id="forged"))) == "Not authorized"


def test_nobody_reads_anothers_answers(shop: Application, lab: Application) -> None:
    for topic in (f"{ROOT}/rsp/#", f"{ROOT}/rsp/lab/#", "replies/lab/#", f"{ROOT}/req/#"):
        shop.subscribe(topic)
    lab.publish(f"{ROOT}/req/chat/lab", json.dumps(chat(SPAIN, id="secret")))
    lab.ask(SPAIN, inbox(lab), b"secret-2")
    assert lab.wait_answer(b"secret-2") == MADRID
    wait_until(lambda: len(lab.came) == 2, 60, "both answers")
    shop.ask(SPAIN, inbox(shop), b"mine")
    assert shop.wait_answer(b"mine") == MADRID
    assert [message.topic for message in shop.came] == [inbox(shop)]


def test_two_applications_may_use_the_same_correlation(shop: Application, lab: Application) -> None:
    shop.ask(SPAIN, inbox(shop), b"1")
    lab.ask("What is the capital of Japan?", inbox(lab), b"1")
    assert (shop.wait_answer(b"1"), lab.wait_answer(b"1")) == (MADRID, "The capital of Japan is Tokyo.")


def test_an_application_cancels_its_own_prompts_only(
    press: Daemon, shop: Application, lab: Application
) -> None:
    (runner,) = press.runners()
    with standing_still(runner):
        for client in (shop, lab):
            client.ask("Count", inbox(client), b"long", **LONG)
        for _ in range(2):  # the second time there is nothing left to cancel
            said = shop.publish(
                f"{ROOT}/ctl/cancel/shop", b"", response_topic=inbox(lab), correlation=b"long"
            )
            assert said == "Success"
        assert status_of(shop, b"long") == 499, "by its own name and correlation, whatever the topic says"
    assert status_of(lab, b"long") == 200


# --- What numbers tell ---------------------------------------------------------------------------------


def test_the_number_of_cached_tokens_tells_nothing_of_anothers_prompt(
    shop: Application, lab: Application
) -> None:
    def cached(client: Application, text: str, correlation: bytes) -> int:
        client.ask(text, inbox(client), correlation, max_tokens=4)
        return int(client.wait_document(correlation)["usage"]["cached_tokens"])

    asked = "My doctor says that I have {}. What may I eat, and what should I do now?"
    first = cached(lab, asked.format("diabetes"), b"victim")
    unlike = [cached(shop, f"{number}. {SPAIN}", f"unlike-{number}".encode()) for number in range(2)]
    alike = cached(shop, asked.format("diabetes"), b"guess")
    assert {*unlike, alike} == {unlike[0]}
    assert alike > 40, "the system prompt of the settings is shared"
    again = cached(lab, asked.format("diabetes"), b"victim-2")
    assert again > first, "its own prompts serve it"
