"""What MQTT and the agent add to the first token: the bare library and the whole way, interleaved in one run.

    python -m tests.benchmarks.first_token [ROUNDS]

Same model, prompt, threads (the library's default) and max_length on both sides; the bare library is a process
of its own, so that neither side disturbs the other. Prints medians in milliseconds and the resident memory
of the daemon and the runner.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import psutil  # type: ignore[import-untyped]

from edge_agent.publishing import publish_folder
from tests.conftest import SAMPLE_MODEL
from tests.support.client import chat, connected
from tests.support.mosquitto import running_broker
from tests.support.processes import running_daemon, short_folder, wait_until

# A new question each time: a kept prefix would make the agent look faster than it is.
QUESTIONS = ("What is the capital of {}?", "Tell me the capital of {}.")
COUNTRIES = ("Spain", "Nepal", "Japan", "France", "Germany", "Italy", "Portugal", "India", "Peru", "Chile")
MAX_TOKENS = 32

BARE = """
import json, sys, time
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
for line in sys.stdin:
    started = time.perf_counter()
    messages = json.dumps([{"role": "user", "content": json.loads(line)}])
    tokens = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + int(sys.argv[2]), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(tokens)
    generator.generate_next_token()
    print((time.perf_counter() - started) * 1000, flush=True)
    while not generator.is_done():
        generator.generate_next_token()
"""


def main(rounds: int) -> None:
    bare_ms, whole_ms = [], []
    with short_folder() as folder, running_broker(folder) as broker:
        registry = f"sqlite:///{folder / 'registry.db'}"
        publish_folder(SAMPLE_MODEL, name="sample", registry_uri=registry, alias="prod")
        settings = {
            "registry": {"uri": registry},
            "models": {"assistant": {"uri": "models:/sample@prod"}},
            "mqtt": {"host": broker.host, "port": broker.port},
        }
        bare = subprocess.Popen(
            [sys.executable, "-c", BARE, str(SAMPLE_MODEL), str(MAX_TOKENS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert bare.stdin is not None
        assert bare.stdout is not None
        with running_daemon(settings) as daemon, connected(broker) as client:
            wait_until(lambda: daemon.status()["state"] == "ready", 90, "ready")
            for number in range(rounds + 5):
                question = QUESTIONS[number % 2].format(COUNTRIES[number % len(COUNTRIES)])
                bare.stdin.write(json.dumps(question) + "\n")
                bare.stdin.flush()
                bare_once = float(bare.stdout.readline())
                started = time.monotonic()
                correlation = client.send(chat(question, stream=True, max_tokens=MAX_TOKENS))
                client.answer(correlation)
                whole_once = (client.chunks(correlation)[0].at_s - started) * 1000
                if number >= 5:  # both sides warm
                    bare_ms.append(bare_once)
                    whole_ms.append(whole_once)
            daemon_mb, runner_mb = (_rss_mb(pid) for pid in (daemon.pid, daemon.runners()[0].pid))
            bare_mb = _rss_mb(bare.pid)
        bare.stdin.close()
        bare.wait(10)
    print(f"first token, bare library   {statistics.median(bare_ms):6.1f} ms   (median of {rounds})")
    print(f"first token, over MQTT      {statistics.median(whole_ms):6.1f} ms   (median of {rounds})")
    print(f"difference                  {statistics.median(whole_ms) - statistics.median(bare_ms):6.1f} ms")
    print(
        f"resident: daemon {daemon_mb:.0f} MB, runner {runner_mb:.0f} MB, bare library process {bare_mb:.0f} MB"
    )


def _rss_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss / 1e6)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
