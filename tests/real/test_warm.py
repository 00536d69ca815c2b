"""The system prompt of the settings is warm before the first prompt comes: after a start, and after an unload."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.conftest import NAME, THREADS
from tests.real.prompts import PROMPTS
from tests.support.client import Client, chat, connected
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, wait_until
from tests.support.sample_device import copy_cache, settings_for, wait_for_state

DEVICE = "warm"
SYSTEM = "You answer in one short sentence, and you never mention the weather in the harbour. " * 60
ROUNDS = 3


@pytest.fixture
def warm(device: Daemon, broker: Broker, short_dir: Path) -> Iterator[Daemon]:
    """A device with a long system prompt, that forgets its model when nobody asks for a while."""
    settings = settings_for(broker, "", device=DEVICE, inference={"threads": THREADS})
    model = {"uri": f"models:/{NAME}@prod", "system": SYSTEM, "idle_unload_s": 2}
    settings["models"] = {"assistant": model}
    copy_cache(device, short_dir / "state")
    with running_daemon(settings, folder=short_dir) as daemon:
        wait_for_state(daemon, "ready", 300)
        yield daemon


def asked(client: Client, document: dict[str, Any]) -> tuple[int, float]:
    """(tokens of the prompt that were run, milliseconds from its turn to the first token)."""
    answer = client.ask({**document, "max_tokens": 8})
    assert answer.status == 200, answer.payload
    usage, timings = answer.json["usage"], answer.json["timings"]
    assert usage["prompt_tokens"] > 1000
    run = usage["prompt_tokens"] - usage["cached_tokens"]
    return run, timings["first_token_ms"] - timings["queue_ms"]


def test_the_first_prompt_pays_only_for_what_is_new(
    warm: Daemon, broker: Broker, figures: dict[str, str]
) -> None:
    """Each prompt is the first after a start, the first after an unload and one of a warm model, in turn."""
    rows: dict[str, list[tuple[int, float]]] = {"cold": [], "warm": [], "restarted": [], "unloaded": []}
    with connected(broker, device=DEVICE) as client:
        for number in range(ROUNDS):
            first, second, third = (chat(PROMPTS[(number + turn) % ROUNDS]) for turn in range(3))
            rows["restarted"].append(asked(client, first))
            rows["warm"].append(asked(client, second))
            own = {"role": "system", "content": f"{number}. {SYSTEM}"}
            rows["cold"].append(asked(client, {"messages": [own, *third["messages"]]}))
            wait_until(lambda: warm.runners() == [], 60, "the idle runner to be unloaded")
            rows["unloaded"].append(asked(client, third))
            warm.restart()
            wait_for_state(warm, "ready", 300)
    for name, measured in rows.items():
        figures[f"first token, {name}"] = f"{statistics.median(ms for _, ms in measured):.0f} ms"
    assert min(run for run, _ in rows["cold"]) > 1000, "the comparison is one"
    assert max(run for name in ("warm", "restarted", "unloaded") for run, _ in rows[name]) < 64
