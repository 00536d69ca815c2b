"""The whole contract of docs/mqtt.md on each broker: mosquitto in the default run, the others in `broker-test`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.brokers import KINDS, ContractBroker, make
from tests.support.caller import Caller, calling
from tests.support.processes import Daemon, running_daemon, short_folder, standing_still, wait_until
from tests.support.sample_device import copy_cache, settings_for, wait_for_state

SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."
LONG = {"max_tokens": 1900, "response_format": {"type": "regex", "regex": "(0|1){1850}"}}
MANY = 20
TABLE: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """What each broker did, printed at the end (seen with `--capture=no`)."""
    yield
    for kind, found in TABLE.items():
        print(f"\n{kind}: " + "; ".join(f"{what} {value}" for what, value in found.items()))


@pytest.fixture(
    scope="module",
    params=[kind if kind == "mosquitto" else pytest.param(kind, marks=pytest.mark.brokers) for kind in KINDS],
)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    TABLE.setdefault(name, {})
    return name


@pytest.fixture(scope="module")
def site(kind: str) -> Iterator[ContractBroker]:
    """The broker; a test that stops it starts it again."""
    with short_folder() as folder:
        broker = make(kind, folder)
        try:
            broker.start()
            yield broker
        finally:
            broker.stop()


@pytest.fixture(scope="module")
def device(site: ContractBroker, agent: Daemon) -> Iterator[Daemon]:
    """A daemon on it, with the sample model and no registry."""
    with short_folder() as folder:
        copy_cache(agent, folder / "state")
        with running_daemon(settings_for(site, "", device="plain"), folder=folder) as daemon:
            wait_for_state(daemon, "ready")
            yield daemon


@pytest.fixture
def caller(site: ContractBroker, device: Daemon) -> Iterator[Caller]:
    with calling(site, "plain", version5=site.version5) as made:
        yield made


def text_of(answer: dict[str, object]) -> str:
    return str(answer["choices"][0]["message"]["content"])  # type: ignore[index]


@pytest.mark.parametrize("version5", [True, False], ids=["5", "3.1.1"])
def test_a_chat_is_answered_in_json_in_text_and_as_a_stream(
    site: ContractBroker, device: Daemon, version5: bool
) -> None:
    if version5 and not site.version5:
        return  # nothing to show: the broker speaks only the other one
    with calling(site, "plain", version5=version5) as caller:
        assert text_of(caller.answer(caller.send(SPAIN))) == MADRID
        streamed = caller.send(SPAIN, stream=True)
        assert text_of(caller.answer(streamed)) == MADRID
        chunks = [json.loads(body) for topic, body in caller.came if topic.endswith("/stream")]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == MADRID
        caller.subscribe("edge/v1/plain/rsp/#")
        caller.publish("req/chat", SPAIN)
        wait_until(lambda: MADRID.encode() in [body for _, body in caller.came], 60, "the answer in text")


def test_a_running_prompt_is_cancelled(caller: Caller) -> None:
    running = caller.send("Count", stream=True, **LONG)
    wait_until(lambda: any(topic.endswith("/stream") for topic, _ in caller.came), 60, "the first chunk")
    caller.publish("ctl/cancel", {"id": running, "reply_to": caller.replies})
    assert caller.answer(running)["error"]["status"] == 499


def test_prompts_that_wait_for_a_dead_daemon_are_computed_once_each_and_answered(
    kind: str, device: Daemon, caller: Caller
) -> None:
    os.kill(device.pid, signal.SIGSTOP)
    unacked = [caller.send(SPAIN) for _ in range(MANY)]
    device.kill()
    queued = [caller.send(SPAIN) for _ in range(MANY)]
    device.start()
    caller.wait_answers(unacked + queued)
    # QoS 1: what a broker delivers again is answered again, with the same answer.
    answers = [{json.dumps(answer) for answer in caller.answers(each)} for each in unacked + queued]
    assert {len(of_one) for of_one in answers} == {1}
    TABLE[kind]["un-acked/queued"] = f"{len(unacked)}/{len(queued)}"


@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_a_broker_that_ends_with_prompts_in_flight_costs_none_of_them(
    kind: str, site: ContractBroker, device: Daemon, caller: Caller, way: str
) -> None:
    wait_for_state(device, "ready")
    accepted = device.log.count("prompt accepted")
    ids = [caller.send(SPAIN, **({} if number % 4 else {"max_tokens": 400})) for number in range(MANY)]
    wait_until(lambda: device.log.count("prompt accepted") >= accepted + MANY, 60, "all of them")
    if way == "killed":
        time.sleep(1.5)  # mosquitto saves once a second
        site.kill()
    else:
        site.stop()
    wait_until(lambda: not device.status()["broker"]["connected"], 60, "the end of the connection")
    time.sleep(3)
    site.start()
    begun_s = time.monotonic()
    wait_until(lambda: device.status()["broker"]["connected"], 60, "the next connection")
    TABLE[kind][f"back after it was {way}"] = f"{time.monotonic() - begun_s:.1f} s"
    caller.wait_answers(ids)
    TABLE[kind][f"in flight, {way}"] = str(sum(bool(caller.answers(each)) for each in ids))
    late = caller.send(SPAIN)
    assert text_of(caller.answer(late)) == MADRID, "the device hears again"


def test_a_client_that_was_away_gets_its_answer(site: ContractBroker, device: Daemon) -> None:
    with calling(site, "plain", version5=site.version5) as caller:
        asked = caller.send(SPAIN, max_tokens=300)
        caller.leave()
        wait_until(lambda: device.status()["queue_depth"] == 0, 60, "the answer")
        caller.connect()
        assert text_of(caller.answer(asked)) == MADRID


def test_a_client_without_a_session_that_was_away_gets_its_answer_where_the_broker_tells(
    site: ContractBroker, device: Daemon
) -> None:
    if not site.version5:
        return  # a broker without MQTT 5 acks what nobody listens to
    with calling(site, "plain", version5=True, clean=True) as caller:
        unheard = device.log.count("answer unheard")
        os.kill(device.pid, signal.SIGSTOP)
        asked = caller.send(SPAIN)
        caller.leave()
        os.kill(device.pid, signal.SIGCONT)
        wait_until(lambda: device.log.count("answer unheard") > unheard, 60, "an answer that nobody hears")
        caller.connect()
        assert text_of(caller.answer(asked)) == MADRID


def test_the_will_says_offline_of_this_boot_and_a_slow_start_says_starting(
    site: ContractBroker, device: Daemon, caller: Caller
) -> None:
    caller.subscribe("edge/v1/plain/status")

    def said(state: str) -> list[dict[str, object]]:
        found = [json.loads(body) for topic, body in caller.came if topic == "edge/v1/plain/status"]
        return [document for document in found if document["state"] == state]

    device.restart()
    wait_for_state(device, "ready")
    ready = wait_until(lambda: said("ready"), 60, "ready")[-1]
    device.kill()
    will = wait_until(
        lambda: [d for d in said("offline") if d["boot_id"] == ready["boot_id"]], 120, "the will"
    )
    assert set(will[0]) == {"state", "time", "boot_id"}
    device.start(ready=False)
    (runner,) = wait_until(device.runners, 60, "the runner")
    with standing_still(runner):
        wait_until(lambda: said("starting"), 60, "what a slow start says")
    wait_for_state(device, "ready")


def test_a_console_sees_a_device_by_wildcard_where_the_broker_can_and_by_name_everywhere(
    kind: str, site: ContractBroker, device: Daemon
) -> None:
    listed = device.folder / "devices.txt"
    listed.write_text("plain\nnever-there\n")

    def seen(*arguments: str) -> dict[str, str]:
        done = device.cli("fleet", "status", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return {each["device"]: each["state"] for each in json.loads(done.stdout)["devices"]}

    assert seen("--devices", str(listed)) == {"plain": "ready", "never-there": "never_seen"}
    assert seen().get("plain") == ("ready" if site.wildcard_retained else None)
    done = device.cli("fleet", "sync", "--devices", str(listed))
    assert done.returncode == 0, done.stderr
    TABLE[kind]["fleet status"] = "by wildcard" if site.wildcard_retained else "by name"


def test_a_device_with_a_dot_in_its_name_works_or_says_that_it_is_deaf(
    kind: str, site: ContractBroker, agent: Daemon
) -> None:
    with short_folder() as folder:
        copy_cache(agent, folder / "state")
        config = settings_for(site, "", device="press.3")
        with running_daemon(config, folder=folder) as daemon:
            if site.takes_dots:
                wait_for_state(daemon, "ready")
                with calling(site, "press.3", version5=site.version5) as caller:
                    assert text_of(caller.answer(caller.send(SPAIN))) == MADRID
                TABLE[kind]["dot"] = "answers"
                return
            wait_until(lambda: daemon.status()["state"] == "degraded", 120, "degraded")
            (trouble,) = daemon.status()["broker"]["troubles"]
            assert trouble["code"] == "self_test_failed"
            assert "without dots" in trouble["remedy"]
            TABLE[kind]["dot"] = (
                "degraded" if daemon.status()["broker"]["connected"] else "degraded, never connected"
            )
