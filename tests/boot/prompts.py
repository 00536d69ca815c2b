"""A client beside the container: `python -m tests.boot.prompts COUNT`, in the container's network.

Sends prompts one after the other, COUNT of them, or until its standard input says something when COUNT is 0; waits
for every answer, and prints one JSON line: how many were asked, how many answers came, with which status. A prompt that
finds the queue full, as while the service starts again on a slow machine, is sent again.
"""

from __future__ import annotations

import collections
import json
import select
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

from tests.boot import DEVICE
from tests.support.client import chat, connected
from tests.support.mosquitto import Broker

_PAUSE_S = 0.25
_MOST = 2_000
_MOST_REFUSALS = 20
_PROMPT = chat("What is the capital of Spain?", deadline_ms=300_000)


def main() -> None:
    count = int(sys.argv[1])
    broker = cast(Broker, SimpleNamespace(host="127.0.0.1", port=1883))
    with connected(broker, device=DEVICE) as client:
        sent: list[bytes] = []
        while len(sent) < (count or _MOST):
            sent.append(client.send(_PROMPT))
            if count:
                time.sleep(_PAUSE_S)
            elif select.select([sys.stdin], [], [], _PAUSE_S)[0]:
                break
        statuses: collections.Counter[str] = collections.Counter()
        for correlation in sent:
            answer = client.answer(correlation, timeout_s=240)
            for _ in range(_MOST_REFUSALS):
                if answer.status != 429:
                    break
                time.sleep(answer.json["error"]["retry_after_ms"] / 1000)
                answer = client.answer(client.send(_PROMPT), timeout_s=240)
            statuses[str(answer.status)] += 1
            statuses["right"] += _text(answer.json) == "The capital of Spain is Madrid."
        repeated = sum(len(client.answers(correlation)) - 1 for correlation in sent)
    print(json.dumps({"asked": len(sent), "repeated": repeated, **statuses}))


def _text(document: dict[str, Any]) -> str:
    choices = document.get("choices") or [{"message": {"content": ""}}]
    return str(choices[0]["message"]["content"])


if __name__ == "__main__":
    main()
