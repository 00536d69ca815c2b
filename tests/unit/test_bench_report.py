"""The benchmark's arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import edge_agent
from edge_agent import terminal
from edge_agent.bench import page
from edge_agent.bench.measurements import Measured, Together, percentile
from edge_agent.bench.report import BARE, BARE_DEFAULT, MQTT, RUNNER, Ratio, document
from edge_agent.bench.timing import summary
from tests.support.bench_results import measured, timing, whole


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


def shown(result: dict[str, Any]) -> list[str]:
    return [part for part in page.page(result) if isinstance(part, str)]


@pytest.mark.parametrize(
    ("first_ms", "decode_ms", "said"),
    [
        (400, 826, "12.1 tokens/s, 12 % of what this memory allows; first token 0.4 s at 256 tokens"),
        (34.4, 108, "92.6 tokens/s, 93 % of what this memory allows; first token 34 ms at 256 tokens"),
        (
            120_000,
            90,
            "111.1 tokens/s, 111 % of what this memory allows (some of it stays in the caches); "
            "first token 120 s at 256 tokens",
        ),
    ],
)
def test_one_sentence_comes_first(first_ms: float, decode_ms: float, said: str) -> None:
    assert shown(whole(first_ms=first_ms, decode_ms=decode_ms))[0] == said


def test_without_a_broker_the_sentence_is_of_the_runner() -> None:
    sides = {side: measured(10, 100, 1) for side in (BARE, BARE_DEFAULT, RUNNER)}
    roofline = {"bandwidth_bytes_per_s": 1e9, "model_bytes": 5_000_000}
    assert document({}, sides, None, roofline, [])["headline"] == {
        "side": RUNNER,
        "tokens_per_s": 100.0,
        "first_token_ms": 10.0,
        "prompt_tokens": 256,
        "memory_share": 0.5,
    }


def test_answers_of_one_token_and_a_short_context_have_a_sentence_too() -> None:
    one = Measured(timings={32: [timing(10, 0, tokens=1)]}, load_ms=[1.0], resident_bytes=[1], peak_bytes=[1])
    roofline = {"bandwidth_bytes_per_s": 1e9, "model_bytes": 5_000_000}
    result = document({}, {BARE: one, BARE_DEFAULT: one, RUNNER: one}, None, roofline, [])
    assert page.sentence(result) == "first token 10 ms at 32 tokens; answers were too short for a rate"


@pytest.mark.parametrize(
    ("value", "goal", "reached"),
    [
        (1.5, ">= 1.5", True),
        (1.49, ">= 1.5", False),
        (9.0, "<= 10 on a small model", True),
        (11.0, "<= 10 on a small model", False),
        (11.0, "", None),
    ],
)
def test_a_goal_is_reached_or_not(value: float, goal: str, reached: bool | None) -> None:
    assert Ratio(name="x", value=value, goal=goal, left=1, right=1, unit="ms").reached is reached


def test_a_goal_is_shown_beside_what_was_measured() -> None:
    *_, goals = (part for part in page.page(whole()) if isinstance(part, terminal.Rows))
    rows = {str(row[-1]).partition(" (")[0]: row for row in goals.rows}
    assert rows["decode, over MQTT / bare library"] == (
        "0.1",
        ">= 0.95",
        "missed",
        "decode, over MQTT / bare library (10 and 100 tokens/s)",
    )
    assert rows["memory, daemon"][:3] == ("40", "<= 50", "reached")
    assert rows["four prompts, at once / one after the other"][:3] == ("1.5", "", "no goal")


def test_a_peer_stands_beside_the_agent() -> None:
    assert whole()["against"] is None
    result = whole(peer=True)
    assert shown(result)[1] == "llama.cpp with m.gguf: 5.0 tokens/s; first token 0.5 s at 256 tokens"
    ratios = {ratio["name"]: (ratio["value"], ratio["reached"]) for ratio in result["ratios"]}
    assert ratios["decode, over MQTT / llama.cpp"] == (2.0, True)
    assert ratios["first token at 1,024, over MQTT / llama.cpp"] == (0.8, False)
    assert ratios["four prompts at once, over MQTT / llama.cpp"] == (2.0, True)
    assert result["against"]["equal_answers"] == {"equal": 3, "of": 4}
    assert "llama.cpp, 4 at once: 15.0 tokens/s" in shown(result)
    assert "equal answers: 3 of 4, at once and one after the other" in shown(result)
    assert ratios["memory, runner / llama.cpp"] == (1.1, False)
    assert ratios["load, runner / llama.cpp"] == (1.0, True)
    assert "docs/models.md" in result["notes"][-1], "speed counts at equal quality only"


def test_the_bare_side_prefills_and_rounds_as_the_wrapper_does() -> None:
    # The bare side must not import the wrapper: its process would have MLflow's memory, too.
    package = Path(edge_agent.__file__).parent
    bare, wrapper = (
        re.findall(r"^(?:SLICE|ROUND)_TOKENS = \d+", (package / name).read_text("utf-8"), re.MULTILINE)
        for name in ("bench/bare.py", "wrapper/genai_pyfunc.py")
    )
    assert bare == wrapper
    assert len(bare) == 2
