"""A disk that takes no writes any more, under the running agent: it says so until a write succeeds; SIGTERM works."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import pytest

from edge_agent.daemon import STEP_S
from tests.support.client import Client, chat, connected
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, wait_until
from tests.support.sample_device import running_device, settings_for

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."
DEVICE = "disk"


@pytest.fixture
def device(broker: Broker, agent: Daemon) -> Iterator[Daemon]:
    with running_device(agent, settings_for(broker, "", device=DEVICE, inference={"drain_s": 1})) as daemon:
        yield daemon


@pytest.fixture
def caller(broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(broker, device=DEVICE) as client:
        yield client


@contextlib.contextmanager
def taking_no_writes(device: Daemon) -> Iterator[None]:
    """Every write to a file fails; the transactions of SQLite that change nothing go on succeeding."""
    process = psutil.Process(device.pid)
    unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
    assert unlimited[1] == resource.RLIM_INFINITY
    process.rlimit(psutil.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        yield
    finally:
        if device.running:
            process.rlimit(psutil.RLIMIT_FSIZE, unlimited)


def looks(device: Daemon, times: int) -> set[str]:
    """The states that a device says in so many documents, with a turn of its main thread between them."""
    states = set()
    for _ in range(times):
        states.add(device.status()["state"])
        time.sleep(STEP_S)
    return states


def test_it_is_degraded_until_a_write_succeeds_and_heals_without_a_prompt(
    device: Daemon, caller: Client
) -> None:
    assert caller.ask(chat(SPAIN)).text == MADRID
    with taking_no_writes(device):
        assert caller.ask(chat(SPAIN)).status == 503
        assert looks(device, 20) == {"degraded"}
        assert any(trouble["code"] == "journal_unavailable" for trouble in device.status()["troubles"])
    wait_until(lambda: device.status()["state"] == "ready", 60, "a write that succeeds")
    assert device.status()["troubles"] == []
    assert caller.ask(chat(SPAIN)).text == MADRID


def test_a_file_system_that_refuses_to_be_written_is_noticed_without_a_prompt(device: Daemon) -> None:
    reserve = device.state_dir / "journal.db.reserve"
    reserve.rename(reserve.with_suffix(".aside"))
    reserve.mkdir()  # opening it for writing fails, as on a file system that the kernel made read-only
    wait_until(lambda: device.status()["state"] == "degraded", 60, "the trouble")
    reserve.rmdir()
    wait_until(lambda: device.status()["state"] == "ready", 60, "the end of the trouble")


def test_sigterm_ends_it_cleanly_all_the_same(device: Daemon, caller: Client) -> None:
    running = caller.send(
        chat("Count", max_tokens=1900, response_format={"type": "regex", "regex": "(0|1){1800}"}, stream=True)
    )
    caller.wait(lambda message: message.topic.endswith("/stream") and message.correlation == running)
    with taking_no_writes(device):
        assert caller.ask(chat(SPAIN)).status == 503
        assert device.stop() == 0, device.log[-3000:]
    assert "Traceback" not in device.log
    device.start()
    assert caller.answer(running).status == 200, "what was accepted is answered after the start"
