"""What undeliverable answers cost a new prompt: `python -m tests.benchmarks.undeliverable [ANSWERS]`.

The agent's MQTT side and journal before a real mosquitto whose rules forbid the topics of the old answers. Latency is
from an answer's commit in the journal to its arrival at the client, in milliseconds; the median of 30. First with an
empty journal, then with so many answers that the broker refuses: while they are tried for the first time, and later.
Then the same before one that hangs up instead.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from edge_agent.chat import clock
from edge_agent.chat.prompt import Answer
from tests.support.client import Client, connected
from tests.support.doorkeeper import Doorkeeper
from tests.support.mosquitto import running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import wait_until

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


def report(what: str, found: list[float]) -> None:
    print(f"{what:40} median {statistics.median(found):6.1f} ms   worst {max(found):6.1f} ms", flush=True)


if __name__ == "__main__":
    main()
