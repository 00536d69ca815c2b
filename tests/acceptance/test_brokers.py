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
MANY = 20
NOT_SPOKEN, NOT_TOLD = "not spoken", "not told"


class Table:
    """What each broker did, by what was tried; a test that fails leaves its place empty."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, str]] = {}
        self._versions: dict[str, str] = {}

    def begin(self, site: ContractBroker) -> None:
        self._columns[site.kind], self._versions[site.kind] = {}, site.version

    def note(self, site: ContractBroker, what: str, value: str) -> None:
        self._columns[site.kind][what] = value

    def __str__(self) -> str:
        tried = list(dict.fromkeys(what for found in self._columns.values() for what in found))
        rows = [
            ["", *(f"{kind} {self._versions[kind]}" for kind in self._columns)],
            ["---"] * (len(self._columns) + 1),
            *([what, *(found.get(what, "") for found in self._columns.values())] for what in tried),
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Printed at the end (seen with `--capture=no`)."""
    made = Table()
    yield made
    print(f"\n\n{made}\n")


@pytest.fixture(
    scope="module",
    params=[kind if kind == "mosquitto" else pytest.param(kind, marks=pytest.mark.brokers) for kind in KINDS],
)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def site(kind: str, table: Table) -> Iterator[ContractBroker]:
    """The broker; a test that stops it starts it again."""
    with short_folder() as folder:
        broker = make(kind, folder)
        table.begin(broker)
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
        with running_daemon(
            settings_for(site, "", device="plain", limits={"queue_depth": 2 * MANY}), folder=folder
        ) as daemon:
            wait_for_state(daemon, "ready")
            yield daemon


@pytest.fixture
def caller(site: ContractBroker, device: Daemon) -> Iterator[Caller]:
    with calling(site, "plain", version5=site.version5) as made:
        yield made


def text_of(answer: dict[str, object]) -> str:
    return str(answer["choices"][0]["message"]["content"])  # type: ignore[index]


def text_streamed_to(caller: Caller) -> str:
    chunks = [json.loads(body) for topic, body in list(caller.came) if topic.endswith("/stream")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.parametrize("version5", [True, False], ids=["5", "3.1.1"])
def test_a_chat_is_answered_in_json_in_text_and_as_a_stream(
    table: Table, site: ContractBroker, device: Daemon, version5: bool
) -> None:
    what = f"JSON, text and stream over MQTT {'5' if version5 else '3.1.1'}"
    if version5 and not site.version5:
        assert "protocol=3.1.1" in device.log
        table.note(site, what, NOT_SPOKEN)
        return
    with calling(site, "plain", version5=version5) as caller:
        assert text_of(caller.answer(caller.send(SPAIN))) == MADRID
        streamed = caller.send(SPAIN, stream=True)
        assert text_of(caller.answer(streamed)) == MADRID
        # The answer may come before the last chunks: no broker keeps the order between two topics for certain.
        wait_until(lambda: text_streamed_to(caller) == MADRID, 60, "the whole stream")
        caller.subscribe("edge/v1/plain/rsp/#")
        caller.publish("req/chat", SPAIN)
        wait_until(lambda: MADRID.encode() in [body for _, body in caller.came], 60, "the answer in text")
    table.note(site, what, "answered")


def test_a_running_prompt_is_cancelled(
    table: Table, site: ContractBroker, device: Daemon, caller: Caller
) -> None:
    (runner,) = device.runners()
    with standing_still(runner):
        running = caller.send(SPAIN)
        wait_until(lambda: f"prompt starts request={running} " in device.log, 60, "its start")
        caller.publish("ctl/cancel", {"id": running, "reply_to": caller.replies})
        assert caller.answer(running)["error"]["status"] == 499
    table.note(site, "cancel of a running prompt", "499")


def test_prompts_that_wait_for_a_dead_daemon_are_computed_once_each_and_answered(
    table: Table, site: ContractBroker, device: Daemon, caller: Caller
) -> None:
    os.kill(device.pid, signal.SIGSTOP)
    unacked = [caller.send(SPAIN) for _ in range(MANY)]
    device.kill()
    queued = [caller.send(SPAIN) for _ in range(MANY)]
    device.start()
    caller.wait_answers(unacked + queued)
    # QoS 1: what a broker delivers again is answered again, with the same answer.
    for each in unacked + queued:
        answers = {json.dumps(answer) for answer in caller.answers(each)}
        assert len(answers) == 1
        assert text_of(caller.answer(each)) == MADRID
    found = f"{len(unacked)} / {len(queued)}"
    table.note(site, "answered of 20 un-acked / 20 queued while the device was down", found)


@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_a_broker_that_ends_with_prompts_in_flight_costs_none_of_them(
    table: Table, site: ContractBroker, device: Daemon, caller: Caller, way: str
) -> None:
    wait_for_state(device, "ready")
    accepted = device.log.count("prompt accepted")
    (runner,) = device.runners()
    with standing_still(runner):  # so that no answer is quicker than the end of the broker
        ids = [caller.send(SPAIN) for _ in range(MANY)]
        wait_until(lambda: device.log.count("prompt accepted") >= accepted + MANY, 60, "all of them")
        if way == "killed":
            site.save()
            site.kill()
        else:
            site.stop()
    wait_until(lambda: not device.status()["broker"]["connected"], 60, "the end of the connection")
    time.sleep(3)
    site.start()
    begun_s = time.monotonic()
    wait_until(lambda: device.status()["broker"]["connected"], 60, "the next connection")
    back_s = time.monotonic() - begun_s
    caller.wait_answers(ids)
    assert {text_of(caller.answer(each)) for each in ids} == {MADRID}
    found = f"{len(ids)}, back in {back_s:.1f} s"
    table.note(site, f"answered of 20 in flight, broker {way} for 3 s", found)
    late = caller.send(SPAIN)
    assert text_of(caller.answer(late)) == MADRID, "the device hears again"


def test_a_client_that_was_away_gets_its_answer(table: Table, site: ContractBroker, device: Daemon) -> None:
    with calling(site, "plain", version5=site.version5) as caller:
        (runner,) = device.runners()
        with standing_still(runner):
            asked = caller.send(SPAIN)
            wait_until(lambda: f"prompt starts request={asked} " in device.log, 60, "its start")
            caller.leave()
        wait_until(lambda: f"prompt answered request={asked} " in device.log, 60, "the answer")
        caller.connect()
        assert text_of(caller.answer(asked)) == MADRID
    table.note(site, "client with a session that was away", "gets its answer")


def test_a_client_without_a_session_that_was_away_gets_its_answer_where_the_broker_tells(
    table: Table, site: ContractBroker, device: Daemon
) -> None:
    what = "client without a session that was away"
    if not site.version5:
        table.note(site, what, NOT_TOLD)  # without MQTT 5, a PUBACK says nothing of who listens
        return
    with calling(site, "plain", version5=True, clean=True) as caller:
        unheard = device.log.count("answer unheard")
        os.kill(device.pid, signal.SIGSTOP)
        asked = caller.send(SPAIN)
        caller.leave()
        os.kill(device.pid, signal.SIGCONT)
        wait_until(lambda: device.log.count("answer unheard") > unheard, 60, "an answer that nobody hears")
        caller.connect()
        assert text_of(caller.answer(asked)) == MADRID
    table.note(site, what, "gets its answer")


def test_the_will_says_offline_of_this_boot_and_a_slow_start_says_starting(
    table: Table, site: ContractBroker, device: Daemon, caller: Caller
) -> None:
    caller.subscribe("edge/v1/plain/status")

    def said(state: str) -> list[dict[str, object]]:
        found = [json.loads(body) for topic, body in caller.came if topic == "edge/v1/plain/status"]
        return [document for document in found if document["state"] == state]

    earlier = wait_until(lambda: said("ready"), 60, "what is retained")[-1]["boot_id"]
    device.restart()
    wait_for_state(device, "ready")
    ready = wait_until(lambda: [d for d in said("ready") if d["boot_id"] != earlier], 60, "ready")
    boot_id = ready[-1]["boot_id"]
    device.kill()
    will = wait_until(lambda: [d for d in said("offline") if d["boot_id"] == boot_id], 120, "the will")
    assert set(will[0]) == {"state", "time", "boot_id"}
    before = len(said("starting"))
    device.start(ready=False)
    (runner,) = wait_until(device.runners, 60, "the runner")
    with standing_still(runner):
        wait_until(lambda: len(said("starting")) > before, 60, "what a slow start says")
    wait_for_state(device, "ready")
    table.note(site, "will; status of a slow start", "offline; starting")


def test_a_console_sees_a_device_by_wildcard_where_the_broker_can_and_by_name_everywhere(
    table: Table, site: ContractBroker, device: Daemon
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
    table.note(site, "fleet status", "by wildcard" if site.wildcard_retained else "by name")


def test_a_device_with_a_dot_in_its_name_works_or_says_that_it_is_deaf(
    table: Table, site: ContractBroker, agent: Daemon
) -> None:
    what = "device with a dot in its name"
    with short_folder() as folder:
        copy_cache(agent, folder / "state")
        config = settings_for(site, "", device="press.3")
        with running_daemon(config, folder=folder) as daemon:
            if site.takes_dots:
                wait_for_state(daemon, "ready")
                with calling(site, "press.3", version5=site.version5) as caller:
                    assert text_of(caller.answer(caller.send(SPAIN))) == MADRID
                table.note(site, what, "answers")
                return
            wait_until(lambda: daemon.status()["state"] == "degraded", 120, "degraded")
            (trouble,) = daemon.status()["broker"]["troubles"]
            assert trouble["code"] == "self_test_failed"
            assert "without dots" in trouble["remedy"]
            connected = daemon.status()["broker"]["connected"]
            table.note(site, what, "degraded" if connected else "degraded, never connected")
