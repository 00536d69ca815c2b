"""The benchmark's arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import edge_agent
from edge_agent.bench.measurements import Measured, Together, percentile
from edge_agent.bench.report import BARE, BARE_DEFAULT, MQTT, RUNNER, document
from edge_agent.bench.timing import Timing, summary


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
        32: [timing(first_ms, decode_ms), timing(first_ms * 9, decode_ms), timing(first_ms, decode_ms)]
    }
    return Measured(timings=timings, load_ms=[5.0], resident_bytes=[resident], peak_bytes=[resident + 1])


def test_decode_counts_the_tokens_behind_the_first_one() -> None:
    assert timing(100, 1000).decode_tokens_per_s == pytest.approx(10)
    assert timing(100, 0, tokens=1).decode_tokens_per_s is None


def test_prefill_counts_the_tokens_that_were_computed() -> None:
    assert timing(100, 1, prompt=32).prefill_tokens_per_s == pytest.approx(320)
    assert timing(100, 1, prompt=32, cached=22).prefill_tokens_per_s == pytest.approx(100)


def test_a_summary_is_of_medians_and_one_outlier_does_not_matter() -> None:
    assert summary([timing(1, 100), timing(2, 100), timing(1000, 100)])["first_token_ms"] == 2
    assert summary([timing(1, 0, tokens=1)])["decode_tokens_per_s"] is None


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(map(float, range(1, 101))), 0.95) == 95.0
    assert percentile([7.0], 0.95) == 7.0


def test_each_ratio_has_both_sides_and_without_a_broker_there_are_fewer() -> None:
    sides = {
        BARE: measured(10, 100, 100_000_000),
        BARE_DEFAULT: measured(10, 200, 100_000_000),
        RUNNER: measured(11, 100, 220_000_000),
    }
    head = {"model": "m"}
    roofline = {"bandwidth_bytes_per_s": 1e9, "model_bytes": 5_000_000}
    result = document(head, sides, None, roofline, ["no broker"])
    ratios = {ratio["name"]: ratio for ratio in result["ratios"]}
    threads = ratios["decode, these threads / the library's own"]
    assert (threads["value"], threads["left"], threads["right"]) == (2.0, 100.0, 50.0)
    assert ratios["memory, runner - bare library"]["value"] == 120.0
    assert result["roofline"]["limit_tokens_per_s"] == 200
    assert result["roofline"]["decode_share"] == 0.5
    assert result["notes"] == ["no broker"]
    assert "at_once" not in result

    together = Together(
        tokens_per_s={4: [30.0]}, first_token_ms={4: [1.0, 2.0]}, in_turn_tokens_per_s=[20.0],
        newcomer_ms=[20.0, 30.0], cold_ms=[100.0], known_ms=[5.0], daemon_bytes=[40_000_000],
        control_ms=[9.0, 10.0, 11.0], http_ms=[12.0, 12.5, 90.0], gateway_bytes=[30_000_000],
    )  # fmt: skip
    whole = document(head, sides | {MQTT: measured(13, 110, 230_000_000)}, together, roofline, [])
    ratios = {ratio["name"]: ratio["value"] for ratio in whole["ratios"]}
    assert ratios["first token, over MQTT - bare library"] == 3.0
    assert ratios["four prompts, at once / one after the other"] == 1.5
    assert ratios["first token, known 1,000-token prefix / cold"] == 0.05
    assert ratios["memory, daemon"] == 40.0
    assert ratios["first token, over HTTP - over the control socket"] == 2.5
    assert ratios["memory, gateway"] == 30.0


def test_the_bare_side_prefills_and_rounds_as_the_wrapper_does() -> None:
    # The bare side must not import the wrapper: its process would have MLflow's memory, too.
    package = Path(edge_agent.__file__).parent
    bare, wrapper = (
        re.findall(r"^(?:SLICE|ROUND)_TOKENS = \d+", (package / name).read_text("utf-8"), re.MULTILINE)
        for name in ("bench/bare.py", "wrapper/genai_pyfunc.py")
    )
    assert bare == wrapper
    assert len(bare) == 2
