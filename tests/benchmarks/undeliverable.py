"""What undeliverable answers cost a new prompt: `python -m tests.benchmarks.undeliverable [ANSWERS [MODEL]]`.

The agent's MQTT side and journal before a real mosquitto whose rules forbid the topics of the old answers. Latency is
from an answer's commit in the journal to its arrival at the client, in milliseconds; the median of 30. First with an
empty journal, then with so many answers that the broker refuses: while they are tried for the first time, and later.
Then the same before one that hangs up instead. Last, whole prompts: the daemon with the model of that
folder, else the sample model, from a prompt's PUBLISH to its answer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from edge_agent.chat import clock
from edge_agent.chat.prompt import Answer
from edge_agent.demo import SAMPLE_MODEL
from edge_agent.publishing import publish_folder
from tests.support.client import Client, chat, connected
from tests.support.doorkeeper import Doorkeeper
from tests.support.mlflow_server import running_mlflow_server
from tests.support.mosquitto import Broker, running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import running_daemon, short_folder, wait_until
from tests.support.sample_device import SAMPLE, settings_for, wait_for_state

PROMPTS = 30


def measure(agent: Agent, client: Client) -> list[float]:
    """[ms] of `PROMPTS` answers, one after the other."""
    found = []
    for _ in range(PROMPTS):
        prompt = agent.accept(client.replies)
        payload, started_s = str(prompt.row).encode(), time.perf_counter()
        agent.answer(prompt, payload)
        client.wait(lambda message, payload=payload: message.payload == payload, timeout_s=600)
        found.append((time.perf_counter() - started_s) * 1000)
        time.sleep(0.05)
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 9_900
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        acl = folder / "acl"
        acl.write_text("topic readwrite edge/#\ntopic readwrite replies/+\n")  # nothing below replies/CLIENT
        acl.chmod(0o600)
        with (
            running_broker(folder, extra_config=f"acl_file {acl}") as broker,
            connected(broker, device="bare") as client,
            Doorkeeper(broker, "replies/x/other", b"") as door,
        ):
            for kind, port in (("refuses", broker.port), ("hangs up", door.port)):
                compare(folder / kind, port, client, count, f"a broker that {kind}")
            print(f"connections ended: {door.ended}")
            whole_prompts(folder, broker, count, Path(sys.argv[2]) if len(sys.argv) > 2 else SAMPLE_MODEL)


def compare(folder: Path, port: int, client: Client, count: int, what: str) -> None:
    """Prints the latency with nothing else in the journal, and with answers that this broker does not take."""
    folder.mkdir()
    with Agent(folder, {"req/chat": Recorder()}, host="127.0.0.1", port=port) as agent:
        agent.wait_connected()
        report(f"{what}, nothing else", usual := measure(agent, client))
    with Agent(folder, {"req/chat": Recorder()}, host="127.0.0.1", port=port) as agent:
        rows = [agent.accept(f"replies/x/other/{number}").row for number in range(count)]
        for row in rows:
            agent.journal.answer(row, Answer(payload=b"{}", properties={}), moment=clock.now())
        agent.wait_connected()
        report(f"{what}, {count} not tried", first := measure(agent, client))
        counters = agent.transport.counters
        enough = count if what.endswith("refuses") else 5
        wait_until(lambda: counters["answers_refused"] >= enough, 600, "a try of each, or some ends")
        report(f"{what}, {count} later", later := measure(agent, client))
    worst = max(statistics.median(each) for each in (first, later)) / statistics.median(usual)
    print(f"ratio {worst:.2f}", flush=True)


def whole_prompts(folder: Path, broker: Broker, count: int, model: Path) -> None:
    (folder / "registry").mkdir()
    with running_mlflow_server(folder / "registry") as server, short_folder() as home:
        publish_folder(model, name=SAMPLE, registry_uri=server.uri, alias="prod")
        with (
            running_daemon(settings_for(broker, server.uri, device="whole"), folder=home) as daemon,
            connected(broker, device="whole") as client,
        ):
            wait_for_state(daemon, "ready")
            report("whole prompts, nothing else", usual := ask_each(client))
            daemon.stop()
            fill(daemon.state_dir, broker, count)
            daemon.start()
            wait_for_state(daemon, "ready")
            report(f"whole prompts, {count} undeliverable", behind := ask_each(client))
    print(f"ratio {statistics.median(behind) / statistics.median(usual):.2f}", flush=True)


def ask_each(client: Client) -> list[float]:
    found = []
    for number in range(PROMPTS + 1):
        started_s = time.perf_counter()
        assert client.ask(chat("What is the capital of Spain?", max_tokens=16)).status == 200
        if number:
            found.append((time.perf_counter() - started_s) * 1000)
    return found


def fill(state_dir: Path, broker: Broker, count: int) -> None:
    """Leaves so many answers in a daemon's journal that the broker does not take."""
    agent = Agent(state_dir, {}, device="whole", host=broker.host, port=broker.port)
    for number in range(count):
        row = agent.accept(f"replies/x/other/{number}").row
        agent.journal.answer(row, Answer(payload=b"{}", properties={}), moment=clock.now())
    agent.journal.close()


def report(what: str, found: list[float]) -> None:
    print(f"{what:40} median {statistics.median(found):6.1f} ms   worst {max(found):6.1f} ms", flush=True)


if __name__ == "__main__":
    main()
