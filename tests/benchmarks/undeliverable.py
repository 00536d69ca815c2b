"""What undeliverable answers cost a new prompt: `python -m tests.benchmarks.undeliverable [ANSWERS]`.

The agent's MQTT side and journal before a real mosquitto whose rules forbid the topics of the old answers. Latency is
from an answer's commit in the journal to its arrival at the client, in milliseconds; the median of 30. First with an
empty journal, then with so many answers that the broker refuses: while they are tried for the first time, and later.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edge_agent.chat import clock
from edge_agent.chat.prompt import Answer
from tests.support.client import Client, connected
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
        ):
            settings: dict[str, Any] = {"host": broker.host, "port": broker.port}
            with Agent(folder, {"req/chat": Recorder()}, **settings) as agent:
                agent.wait_connected()
                report("nothing else", usual := measure(agent, client))
            with Agent(folder, {"req/chat": Recorder()}, **settings) as agent:
                rows = [agent.accept(f"replies/x/other/{number}").row for number in range(count)]
                for row in rows:
                    agent.journal.answer(row, Answer(payload=b"{}", properties={}), moment=clock.now())
                agent.wait_connected()
                report(f"{count} never tried", first := measure(agent, client))
                wait_until(lambda: agent.transport.counters["answers_refused"] >= count, 600, "a try of each")
                report(f"{count} refused once", later := measure(agent, client))
        worst = max(statistics.median(each) for each in (first, later)) / statistics.median(usual)
        print(f"ratio {worst:.2f}")


def report(what: str, found: list[float]) -> None:
    print(f"{what:24} median {statistics.median(found):6.1f} ms   worst {max(found):6.1f} ms", flush=True)


if __name__ == "__main__":
    main()
