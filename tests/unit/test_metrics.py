"""What is measured, and what bounds it."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from edge_agent.errors import EdgeAgentError, by_code
from edge_agent.metrics import histogram
from edge_agent.metrics.families import FAMILIES
from edge_agent.metrics.histogram import Histogram
from edge_agent.metrics.measurements import OK, Measurements
from edge_agent.metrics.recent import MOST, Took
from edge_agent.serving.seat import Serving
from edge_agent.sync.protocol import SyncResult
from edge_agent.updates.arrivals import Arrivals
from tests.support.measured import TOOK

# --- Instruments ----------------------------------------------------------------------------------------


def test_a_bucket_has_all_values_up_to_its_bound() -> None:
    measured = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.1, 3.0, 4.0, 99.0):
        measured.observe(value)
    assert measured.document() == {"count": 6, "sum": 108.6, "buckets": [2, 3, 5]}


def test_a_histogram_without_values_has_empty_buckets() -> None:
    assert Histogram((1.0, 2.0)).document() == {"count": 0, "sum": 0.0, "buckets": [0, 0]}


@pytest.mark.parametrize(
    "bounds",
    [
        histogram.FIRST_TOKEN_S,
        histogram.PER_TOKEN_S,
        histogram.REQUEST_S,
        histogram.QUEUE_S,
        histogram.TOKENS,
    ],
)
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_the_bounds_reach_what_a_slow_processor_takes() -> None:
    assert histogram.FIRST_TOKEN_S[-1] >= 300
    assert histogram.PER_TOKEN_S[-1] >= 5
    assert histogram.REQUEST_S[-1] == 3600, "limits.max_deadline_s"
    assert histogram.TOKENS[-1] == 1 << 20, "the most context_tokens"


# --- Counts ---------------------------------------------------------------------------------------------


def test_an_answer_is_counted_by_its_code_and_measured_if_it_is_none_of_an_error() -> None:
    measurements = Measurements(["assistant"])
    measurements.note_answer("assistant", OK, TOOK)
    measurements.note_answer("assistant", "cancelled")
    of = measurements.document()["models"]["assistant"]
    assert of["answers"] == {"ok": 1, "cancelled": 1}
    assert (of["first_token_s"]["count"], of["first_token_s"]["sum"]) == (1, 7.0)
    assert (of["input_tokens"]["sum"], of["output_tokens"]["sum"], of["cached_tokens"]) == (100, 16, 64)


def test_what_a_model_does_not_count_is_not_measured() -> None:
    measurements = Measurements(["assistant"])
    took = Took(
        queue_s=0,
        first_token_s=0,
        request_s=1,
        per_token_s=None,
        input_tokens=0,
        output_tokens=0,
        cached_tokens=0,
    )
    measurements.note_answer("assistant", OK, took)
    of = measurements.document()["models"]["assistant"]
    assert [of[key]["count"] for key in ("input_tokens", "output_tokens", "per_token_s")] == [0, 0, 0]
    assert [of[key]["count"] for key in ("queue_s", "first_token_s", "request_s")] == [1, 1, 1]


def test_models_are_those_of_the_settings_only() -> None:
    measurements = Measurements(["assistant"])
    measurements.note_answer("another", OK, TOOK)
    assert list(measurements.document()["models"]) == ["assistant"]


def test_the_last_prompts_are_remembered_by_what_they_took() -> None:
    measurements = Measurements(["assistant"], now=lambda: 1_790_000_000.9)
    measurements.note_answer("assistant", OK, TOOK)
    measurements.note_answer("assistant", "cancelled")
    measurements.note_answer("another", OK, TOOK)
    whole, cancelled = measurements.recent()
    assert whole == {
        "at": 1_790_000_000,
        "model": "assistant",
        "code": "ok",
        "queue_ms": TOOK.queue_s * 1000,
        "first_token_ms": TOOK.first_token_s * 1000,
        "total_ms": TOOK.request_s * 1000,
        "tokens_per_s": 1 / (TOOK.per_token_s or 1),
        "prompt_tokens": TOOK.input_tokens,
        "completion_tokens": TOOK.output_tokens,
        "cached_tokens": TOOK.cached_tokens,
    }
    assert cancelled == {"at": 1_790_000_000, "model": "assistant", "code": "cancelled"}


def test_a_speed_that_was_not_measured_is_none() -> None:
    for unknown in (None, 0.0):
        measurements = Measurements(["assistant"])
        measurements.note_answer("assistant", OK, dataclasses.replace(TOOK, per_token_s=unknown))
        assert measurements.recent()[0]["tokens_per_s"] is None


def test_no_more_prompts_are_remembered_than_fit_a_screen() -> None:
    clock = itertools.count()
    measurements = Measurements(["assistant"], now=lambda: next(clock))
    for _ in range(MOST + 5):
        measurements.note_answer("assistant", OK, TOOK)
    assert [each["at"] for each in measurements.recent()] == list(range(5, MOST + 5))


def test_what_64_models_have_measured_fits_a_message() -> None:
    names = [f"model-{number:02}-{'x' * 20}" for number in range(64)]
    measurements = Measurements(names)
    for name in names:
        for _ in range(1000):
            measurements.note_answer(name, OK, TOOK)
        measurements.note_answer(name, "cancelled")
        with measurements.check(name) as failed:
            failed.code = "registry_unreachable"
    size = len(json.dumps(measurements.document(), separators=(",", ":")))
    assert size < 80 << 10, "a message has at most 100 KiB, and the rest of it is 300 bytes for each model"


def test_bytes_of_a_sync_count_as_they_come_and_once() -> None:
    measurements = Measurements(["assistant"])

    def arrivals() -> Arrivals:
        return Arrivals(lambda fetched, mirrored: measurements.note_bytes("assistant", fetched, mirrored))

    broken = arrivals()
    for have in (500, 700, 900, 800):  # 500 were here; a part is given up at the end
        broken.look({"event": "progress", "bytes": have})
    assert measurements.document()["models"]["assistant"]["sync_bytes"] == 400
    broken.look({"event": "held", "fetched_bytes": 430})
    assert measurements.document()["models"]["assistant"]["sync_bytes"] == 430
    whole = arrivals()
    for have in (800, 900):
        whole.look({"event": "progress", "bytes": have})
    whole.look({"event": "verifying"})
    whole.ended(
        SyncResult(
            name="assistant",
            version=2,
            digest="d",
            key="2-d",
            bytes=1050,
            bytes_fetched=250,
            bytes_mirrored=50,
            bytes_reused=0,
            new=True,
        )
    )
    of = measurements.document()["models"]["assistant"]
    assert (of["sync_bytes"], of["mirror_bytes"]) == (680, 50)


def test_codes_are_ours() -> None:
    """Labels have no end where a code may be anything."""
    assert all(code.isidentifier() for code in by_code(EdgeAgentError))


def test_the_states_are_those_of_the_status() -> None:
    (states,) = (family for family in FAMILIES if family.name == "edge_agent_model_state")
    samples = states.samples({"models": {"assistant": {"state": "ready"}}})
    assert {each.labels["state"]: each.value for each in samples} == {
        each: float(each is Serving.READY) for each in Serving
    }
