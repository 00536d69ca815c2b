"""Threads and memory: measured once, kept within the budget, given back when nobody asks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_agent.cache.store import Store
from edge_agent.host import identity, memory
from edge_agent.publishing.register import Published
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Done, Load
from edge_agent.serving.learned import Learned
from edge_agent.serving.lifecycle import ModelLifecycle
from edge_agent.serving.loading import Loading
from edge_agent.serving.memory_budget import MemoryBudget
from edge_agent.serving.threads import ThreadChoice
from edge_agent.settings import Settings
from tests.support.client import Client, chat, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, wait_until
from tests.support.sample_device import SAMPLE, settings_for

SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."
MB = 1_000_000


@pytest.mark.long
def test_threads_are_measured_once_and_remembered(pulled: Settings) -> None:
    store = Store(pulled.state_dir)
    learned = Learned(store.learned_file)
    started: list[RunnerProcess] = []

    def start() -> RunnerProcess:
        started.append(RunnerProcess(model="assistant", environment=child_environment(pulled.state_dir)))
        return started[-1]

    def runners_for_a_load(configured: int = 0) -> int:
        """Loads the active version as a new process would, and asks it; gives how many runners that took."""
        started.clear()
        lifecycle = ModelLifecycle(
            "assistant",
            loading=Loading(
                settings=pulled.models["assistant"],
                threads=ThreadChoice(configured, learned=learned, measurable=(1, 2)),
                budget=MemoryBudget(0, learned=learned),
                verify=True,
                public_keys=(),
                allow_unsigned_code=False,
                memory_limit_bytes=0,
            ),
            store=store,
            start_runner=start,
        )
        try:
            with lifecycle.lease() as lease:
                assert lease is not None, lifecycle.reason
                document = {"messages": [{"role": "user", "content": SPAIN}]}
                assert isinstance(list(lease.runner.generate("p", document, timeout_s=60))[-1], Done)
                assert [runner.alive for runner in started] == [False] * (len(started) - 1) + [True]
        finally:
            lifecycle.close()
        return len(started)

    digest = store.versions("assistant")[0].digest
    assert runners_for_a_load(configured=1) == 1
    assert learned.of(digest, identity.of_host()).threads == 0, "a configured number is not measured"

    assert runners_for_a_load() in (2, 3)  # one for each number, and another when the first was faster
    entry = learned.of(digest, identity.of_host())
    assert entry.threads in (1, 2)
    assert set(entry.tokens_per_s) == {1, 2}
    assert all(rate > 0 for rate in entry.tokens_per_s.values())
    assert entry.peaks[2048] > 50 * MB

    assert runners_for_a_load() == 1


@pytest.mark.long
def test_a_runners_memory_is_flat_over_a_thousand_prompts(pulled: Settings) -> None:
    store = Store(pulled.state_dir)
    folder = store.folder(store.versions("assistant")[0])
    rng = random.Random(6)
    runner = RunnerProcess(model="assistant", environment=child_environment(pulled.state_dir))

    def ask(number: int) -> None:
        words = " ".join(rng.choices(("atom", "joke", "Spain", "नमस्ते", "7", "plus"), k=rng.randint(1, 60)))
        document: dict[str, Any] = {"messages": [{"role": "user", "content": words}], "max_tokens": 3}
        if number % 3 == 0:
            document |= {"temperature": 0.7, "seed": number, "stop": ["a", "bc"]}
        if number % 50 == 0:
            document |= {"response_format": {"type": "regex", "regex": "[a-z]{3}"}}
        assert isinstance(list(runner.generate(f"p{number}", document, timeout_s=60))[-1], Done)

    try:
        runner.load(Load(folder=str(folder), context_tokens=1024, max_tokens=8, threads=1), timeout_s=60)
        for number in range(200):
            ask(number)
        early = memory.resident_bytes(runner.pid)
        for number in range(200, 1000):
            ask(number)
        growth = memory.resident_bytes(runner.pid) - early
    finally:
        runner.stop()
    assert growth < 16 * MB, f"{growth / 800:.0f} bytes for each prompt"


class Device:
    """A daemon whose memory settings change from start to start."""

    def __init__(self, daemon: Daemon, client: Client) -> None:
        self.daemon = daemon
        self.client = client

    def start(self, limit_bytes: int, *names: str, **model: Any) -> None:
        uri = f"models:/{SAMPLE}@prod"
        self.daemon.config["models"] = {name: {"uri": uri, **model} for name in names}
        self.daemon.config["inference"] = {"memory_limit_bytes": limit_bytes, "threads": 1}
        self.daemon.restart()

    def wait_model(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> None:
        try:
            wait_until(lambda: wanted(self.daemon.status()["models"][0]), 60, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.daemon.status()}\n{self.daemon.log}") from error

    def ask(self, question: str = SPAIN, **options: Any) -> str:
        wait_until(lambda: self.daemon.status()["broker"]["connected"], 60, "the broker")
        return self.client.ask(chat(question, **options)).text


@pytest.fixture
def device(
    new_daemon: Callable[..., Daemon], broker: Broker, mlflow_server: Server, published: Published
) -> Iterator[Device]:
    with connected(broker, device="memory") as client:
        yield Device(new_daemon(settings_for(broker, mlflow_server.uri, device="memory")), client)


@pytest.mark.long
def test_the_memory_budget_refuses_shrinks_shares_and_gives_back(device: Device) -> None:
    daemon = device.daemon

    device.start(1 * MB, "assistant")  # the sample's files are larger
    device.wait_model(lambda model: "bytes of weights" in model["reason"], "the refusal")
    assert daemon.status()["models"][0]["quarantined"] == {}, "the model is not to blame"
    assert daemon.runners() == []

    device.start(215 * MB, "assistant")
    device.wait_model(lambda model: model["state"] == "ready", "a load with a smaller context")
    device.wait_model(lambda model: "context of" in model["reason"], "the warning")
    assert device.ask() == MADRID
    assert device.client.ask(chat("atom " * 1500)).json["error"]["code"] == "prompt_too_long"

    resident = memory.resident_bytes(daemon.runners()[0].pid)
    device.start(resident * 3 // 2, "assistant", "second", idle_unload_s=3)
    wait_until(
        lambda: all(model["state"] in ("ready", "idle") for model in daemon.status()["models"]),
        90,
        "both models",
    )
    for _ in range(2):
        for name in ("assistant", "second"):
            assert device.ask(model=name) == MADRID
            assert len(daemon.runners()) == 1, "the budget holds one runner"
    assert "unloaded to make room model=assistant for=second" in daemon.log
    assert "unloaded to make room model=second for=assistant" in daemon.log
    wait_until(lambda: daemon.runners() == [], 60, "the idle runner to be unloaded")
    assert [model["state"] for model in daemon.status()["models"]] == ["idle", "idle"]
    assert device.ask(model="second") == MADRID
