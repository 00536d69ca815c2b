"""Results of the benchmark with figures that a test chooses."""

from __future__ import annotations

from typing import Any

from edge_agent.bench.measurements import Measured, PeerTogether, Together
from edge_agent.bench.report import BARE, BARE_DEFAULT, LLAMA_CPP, MQTT, RUNNER, document
from edge_agent.bench.timing import Timing


def timing(
    first_ms: float, decode_ms: float, *, tokens: int = 11, prompt: int = 32, cached: int = 0
) -> Timing:
    return Timing(
        prompt_tokens=prompt,
        completion_tokens=tokens,
        first_token_ms=first_ms,
        total_ms=first_ms + decode_ms,
        cached_tokens=cached,
    )


def measured(first_ms: float, decode_ms: float, resident: int) -> Measured:
    timings = {
        length: [timing(first_ms, decode_ms), timing(first_ms * 9, decode_ms), timing(first_ms, decode_ms)]
        for length in (32, 256, 1024)
    }
    return Measured(timings=timings, load_ms=[5.0], resident_bytes=[resident], peak_bytes=[resident + 1])


def together() -> Together:
    return Together(
        tokens_per_s={4: [30.0]}, first_token_ms={4: [1.0, 2.0]}, in_turn_tokens_per_s=[20.0],
        newcomer_ms=[20.0, 30.0], cold_ms=[100.0], known_ms=[5.0], daemon_bytes=[40_000_000],
    )  # fmt: skip


def peer_together() -> PeerTogether:
    return PeerTogether(
        tokens_per_s=[10.0, 15.0, 60.0], first_token_ms=[1.0, 2.0], equal=[True, True, False, True]
    )


def whole(*, first_ms: float = 400, decode_ms: float = 1000, peer: bool = False) -> dict[str, Any]:
    """A document: 100 tokens/s of memory, and an agent that decodes 10 tokens in so many milliseconds."""
    sides = {
        BARE: measured(10, 100, 100_000_000),
        BARE_DEFAULT: measured(10, 200, 100_000_000),
        RUNNER: measured(11, 100, 220_000_000),
        MQTT: measured(first_ms, decode_ms, 230_000_000),
    }
    if peer:
        sides[LLAMA_CPP] = measured(500, 2000, 200_000_000)
    head = {"model": "m", "version": 1, "threads": 2, "host": "h", "launches": 3, "tokens": 11}
    roofline = {"bandwidth_bytes_per_s": 1e9, "model_bytes": 10_000_000}
    against = {"peer": "llama.cpp", "file": "m.gguf", "library": "xllamacpp 1"} if peer else None
    return document(head, sides, together(), roofline, [], against, peer_together() if peer else None)
