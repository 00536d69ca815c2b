"""An operator's commands over real daemons and a real broker, with an operator's settings file."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.client import connected as client_of
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker, running_broker
from tests.support.processes import Child, Daemon, clean_environment, short_folder, to_toml, wait_until
from tests.support.sample_device import running_device, settings_for
from tests.support.scripted_fleet import TOPICS, device

CURSOR_UP = b"\x1b[1A"


@dataclass(frozen=True, kw_only=True)
class Console:
    """An operator's settings file, and a folder for what its commands need."""

    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "edge_agent",
            "--config",
            str(self.folder / "operator.toml"),
            *arguments,
        ]

    def run(self, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command("fleet", *arguments),
            capture_output=True,
            text=True,
            timeout=120,
            env=clean_environment({"HOME": str(self.folder)}),
            check=False,
        )
        assert done.returncode == exit_code, done.stderr
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def list_of(self, *ids: str) -> str:
        file = self.folder / "devices.txt"
        file.write_text("\n".join(ids))
        return str(file)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Two devices, and who looks at them."""

    broker: Broker
    console: Console
    daemons: Sequence[Daemon]
    client: Client


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, agent: Daemon, mlflow_server: Server) -> Iterator[Fleet]:
    """The devices have the sample model in their caches, and load it when they are asked."""
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(running_broker(tmp_path_factory.mktemp("broker")))
        daemons = []
        for name in ("press-1", "press-2"):
            settings = settings_for(broker, mlflow_server.uri, device=name)
            settings["models"]["assistant"]["preload"] = False
            daemons.append(stack.enter_context(running_device(agent, settings)))
        console = Console(folder=stack.enter_context(short_folder()))
        operators = {"fleet": {}, "mqtt": {"host": broker.host, "port": broker.port}}
        (console.folder / "operator.toml").write_text(to_toml(operators))
        client = stack.enter_context(client_of(broker))
        yield Fleet(broker=broker, console=console, daemons=daemons, client=client)


def test_an_operator_sees_every_device(fleet: Fleet) -> None:
    document = fleet.console.json("status")
    assert [each["device"] for each in document["devices"]] == ["press-1", "press-2"]
    first = document["devices"][0]
    assert first["state"] == "ready"
    assert first["agent_version"]
    assert time.time() - first["seen_at"] < 60
    (model,) = first["models"]
    assert (model["name"], model["version"], model["state"]) == ("assistant", 1, "idle")
    assert document["counts"]["by_state"] == {"ready": 2}
    assert document["counts"]["by_version"] == {"1": 2}
    page = fleet.console.run("status").stdout
    assert "2 ready" in page and "press-2" in page and "LOOK AT" not in page


def test_a_list_says_who_has_never_been_seen(fleet: Fleet) -> None:
    listed = fleet.console.list_of("press-2", "press-9")
    document = fleet.console.json("status", "--devices", listed)
    states = {each["device"]: each["state"] for each in document["devices"]}
    assert states == {"press-2": "ready", "press-9": "never_seen"}
    assert "never seen" in fleet.console.run("status", "--devices", listed).stdout


def test_every_device_is_told_to_ask_the_registry(fleet: Fleet) -> None:
    began = time.time()
    assert fleet.console.run("sync").stdout == "2 devices asked to check the registry now\n"
    for daemon in fleet.daemons:
        wait_until(partial(has_asked_since, daemon, int(began)), 60, "a check")


def has_asked_since(daemon: Daemon, moment: int) -> bool:
    return (daemon.status()["registry"]["last_check"] or 0) >= moment


def test_some_devices_are_told_to_ask_within_some_time(fleet: Fleet) -> None:
    topic = TOPICS.of("press-9").sync
    fleet.client.subscribe(topic)
    listed = fleet.console.list_of("press-9")
    said = fleet.console.run("sync", "--within", "300", "--devices", listed).stdout
    assert said == "1 device asked to check the registry within 300 s\n"
    assert json.loads(fleet.client.wait_on(topic).payload) == {"within_s": 300}
    fleet.console.run("sync", "--within", "-1", exit_code=2)


def test_each_device_says_whether_it_can_take_a_version(fleet: Fleet) -> None:
    document = fleet.console.json("plan", "assistant", "1")
    assert (document["name"], document["version"]) == ("assistant", 1)
    assert document["counts"]["now"] == 2, document
    for answer in document["devices"]:
        assert (answer["missing_bytes"], answer["fits"], answer["code"]) == (0, True, None)
        assert answer["free_bytes"] > 0
    page = fleet.console.run("plan", "assistant", "1").stdout
    assert "model assistant, version 1: 2 devices" in page
    assert "can take it now" in page


def test_a_version_that_nobody_has_and_a_model_that_no_device_has_are_told_apart(fleet: Fleet) -> None:
    unknown = fleet.console.json("plan", "assistant", "99")["devices"]
    assert {(each["outcome"], each["code"]) for each in unknown} == {("unknown", "unknown_reference")}
    other = fleet.console.json("plan", "translator", "1")["devices"]
    assert {each["outcome"] for each in other} == {"no_model"}


def test_a_version_that_does_not_come_is_to_be_looked_at(fleet: Fleet) -> None:
    desired = TOPICS.of("press-1").desired
    try:
        fleet.client.publish(desired, '{"models": {"assistant": {"version": 99}}}', retain=True)
        line = wait_until(partial(a_failed_update, fleet), 60, "what is wrong")
        assert "assistant 99" in line and "press-1" in line and "the registry has no" in line
    finally:
        fleet.client.publish(desired, '{"models": {"assistant": null}}', retain=True)
    wait_until(lambda: not a_failed_update(fleet), 60, "that nothing is wrong any more")


def a_failed_update(fleet: Fleet) -> str:
    """Its line on the page; empty while there is none."""
    lines = fleet.console.run("status").stdout.splitlines()
    return next((line for line in lines if line.startswith("update failed")), "")


def test_a_pipe_gets_a_line_for_each_change(fleet: Fleet) -> None:
    log = fleet.console.folder / "watch.log"
    child = Child(fleet.console.command("fleet", "status", "--watch"), log)
    try:
        wait_until(lambda: "2 ready" in child.log_text(), 60, "the fleet")
        fleet.daemons[1].stop()
        wait_until(lambda: "press-2  offline" in child.log_text(), 60, "its last word")
        child.process.send_signal(signal.SIGINT)
        assert child.process.wait(60) == 130
    finally:
        child.stop()
        fleet.daemons[1].start()
    changes = [line for line in log.read_text().splitlines() if line.startswith("20")]
    assert changes and not any("press-1" in line for line in changes), "the other has not changed"


def test_a_terminal_gets_the_page_in_place(fleet: Fleet) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        fleet.console.command("fleet", "status", "--watch"),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=clean_environment({"HOME": str(fleet.console.folder), "TERM": "xterm"}),
    )
    os.close(theirs)
    shown = b""
    try:
        while shown.count(b"2 ready") < 2:  # drawn, and drawn again
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 65_536)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    finally:
        child.kill()
        child.wait(60)
        os.close(ours)
    assert CURSOR_UP in shown


def test_a_broker_without_devices_is_no_failure_and_says_what_may_be_wrong(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        (tmp_path / "operator.toml").write_text(to_toml({"mqtt": {"host": broker.host, "port": broker.port}}))
        done = Console(folder=tmp_path).run("status", "--json")
        assert json.loads(done.stdout)["devices"] == []
        assert "mqtt.prefix" in done.stderr and "--devices" in done.stderr


def test_a_broker_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "operator.toml").write_text(to_toml({"mqtt": {"host": "127.0.0.1", "port": 1}}))
    assert "127.0.0.1:1 cannot be reached" in Console(folder=tmp_path).run("status", exit_code=1).stderr


def test_a_device_that_writes_rubbish_is_listed(fleet: Fleet) -> None:
    topics = TOPICS.of("odd")
    try:
        fleet.client.publish(topics.status, b"\xff{", retain=True)
        fleet.client.publish(topics.reported, device("odd")[topics.reported], retain=True)
        document = fleet.console.json("status")
        (odd,) = [each for each in document["devices"] if each["device"] == "odd"]
        assert (odd["state"], odd["models"][0]["version"]) == ("unknown", 7)
    finally:
        for topic in (topics.status, topics.reported):
            fleet.client.publish(topic, b"", retain=True)
