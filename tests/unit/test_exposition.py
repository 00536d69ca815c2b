"""The metrics as Prometheus gets them: names, labels, text, and the file for node_exporter."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.errors import PromptError, by_code
from edge_agent.gateway import prometheus
from edge_agent.metrics import exposition, histogram
from edge_agent.metrics.families import FAMILIES, MODEL
from edge_agent.metrics.measurements import OK, Measurements
from tests.support.measured import TOOK


def document(measurements: Measurements, **more: Any) -> dict[str, Any]:
    """What the daemon says, as it is once it has gone through JSON."""
    return dict(json.loads(json.dumps({**measurements.document(), **more})))


def read_back(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """By name, the value of each set of labels, as Prometheus' own library reads them."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of_model(name: str, **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({MODEL: name, **labels}.items()))


def test_each_family_has_a_name_of_its_own_and_one_line_of_help() -> None:
    assert len({family.full_name for family in FAMILIES}) == len(FAMILIES)
    assert all(family.help and "\n" not in family.help for family in FAMILIES)


def test_without_a_daemon_there_is_one_sample() -> None:
    assert read_back(exposition.text({})) == {"edge_agent_up": {(): 0.0}}


def test_numbers_are_read_back_as_they_were_measured() -> None:
    measurements = Measurements(["assistant"])
    measurements.note_answer("assistant", OK, TOOK)
    measurements.note_refusal("queue_full")
    found = read_back(
        exposition.text(
            document(
                measurements,
                queue_depth=3,
                cache={"bytes": 5, "free_bytes": None},
                broker={"connected": True},
                counters={"repeated": 2},
                state="degraded",
            )
        )
    )
    buckets = found["gen_ai_server_time_to_first_token_seconds_bucket"]
    assert len(buckets) == len(histogram.FIRST_TOKEN_S) + 1
    assert [buckets[of_model("assistant", le=le)] for le in ("5.0", "10.0", "+Inf")] == [0, 1, 1]
    assert found["gen_ai_server_time_to_first_token_seconds_sum"] == {of_model("assistant"): 7.0}
    assert found["gen_ai_client_token_usage_count"] == {
        of_model("assistant", gen_ai_token_type=kind): 1.0 for kind in ("input", "output")
    }
    assert found["edge_agent_answers_total"] == {of_model("assistant", code="ok", status="200"): 1.0}
    assert found["edge_agent_prompts_refused_total"] == {(("code", "queue_full"), ("status", "429")): 1.0}
    assert found["edge_agent_connection_events_total"] == {(("event", "repeated"),): 2.0}
    assert (found["edge_agent_queue_depth"], found["edge_agent_cache_bytes"]) == ({(): 3.0}, {(): 5.0})
    assert "edge_agent_cache_free_bytes" not in found, "nobody knows"
    assert found["edge_agent_broker_connected"] == {(): 1.0}
    states = {dict(labels)["state"]: value for labels, value in found["edge_agent_state"].items()}
    assert states == {"starting": 0.0, "ready": 0.0, "degraded": 1.0}


def test_what_others_wrote_cannot_end_a_label() -> None:
    evil = 'onnx"} 1\nedge_agent_up 0\\'
    model = {"version": 3, "digest": "d", "flavor": evil, "state": "ready"}
    found = read_back(exposition.text({"models": {"assistant": model}}))
    assert found["edge_agent_model_info"] == {
        of_model("assistant", version="3", digest="d", flavor=evil): 1.0
    }
    assert found["edge_agent_up"] == {(): 1.0}


def test_the_status_of_each_code_is_that_of_its_error() -> None:
    measurements = Measurements(["assistant"])
    errors = by_code(PromptError)
    for code in errors:
        measurements.note_answer("assistant", code)
    found = read_back(exposition.text(document(measurements)))["edge_agent_answers_total"]
    expected = {OK: 200, **{code: error.status for code, error in errors.items()}}
    assert {dict(labels)["code"]: int(dict(labels)["status"]) for labels in found} == expected


@pytest.mark.parametrize("value", [0.1, 1e-9, 123456789.0, 1e300])
def test_a_number_keeps_its_digits(value: float) -> None:
    found = read_back(exposition.text({"queue_depth": value}))
    assert math.isclose(found["edge_agent_queue_depth"][()], value, rel_tol=0)


def test_a_file_is_replaced_in_one_step_and_readable_for_the_scraper(tmp_path: Path) -> None:
    file = tmp_path / "edge-agent.prom"
    file.write_text("old")
    with file.open() as reader:
        exposition.write(file, "new\n")
        assert (file.read_text(), reader.read()) == ("new\n", "old"), (
            "who reads the former one reads all of it"
        )
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["edge-agent.prom"], "nothing else is left"


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "edge-agent.prom").mkdir()
    with pytest.raises(OSError):
        exposition.write(tmp_path / "edge-agent.prom", "new\n")
    assert [path.name for path in tmp_path.iterdir()] == ["edge-agent.prom"]


# --- The gateway's outlet -------------------------------------------------------------------------------

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def whole_document() -> dict[str, Any]:
    """One in which every family has a sample."""
    measurements = Measurements(["assistant"])
    measurements.note_answer("assistant", OK, TOOK)
    measurements.note_refusal("queue_full")
    with measurements.check("assistant") as failed:
        failed.code = "registry_unreachable"
    made = document(
        measurements,
        **dict.fromkeys(("queue_depth", "queue_limit", "answers_dropped", "prompts_damaged"), 1),
        started_at=1_790_000_000,
        memory_bytes=50_000_000,
        sync_memory_bytes=None,
        gateway_memory_bytes=60_000_000,
        agent_version="0.1.0",
        state="ready",
        counters={"repeated": 2},
        cache={"bytes": 1, "quota_bytes": 2, "free_bytes": 3},
        link={"bytes_per_day": 5, "used_bytes": 4},
        registry={"reachable": False},
        broker={"connected": True},
    )
    now = {"version": 3, "digest": "d", "flavor": 'a "flavor"', "state": "ready"}
    made["models"]["assistant"] |= {**now, "memory_bytes": 9, "runner_deaths": 1}
    return made


def test_every_family_has_samples_where_the_daemon_says_everything() -> None:
    assert [family.name for family in FAMILIES if not list(family.samples(whole_document()))] == []


def test_a_process_that_does_not_run_has_no_memory_and_none_of_zero() -> None:
    (family,) = [family for family in FAMILIES if family.name == "edge_agent_memory_resident_bytes"]
    held = {sample.labels["process"]: sample.value for sample in family.samples(whole_document())}
    assert held == {"daemon": 50_000_000, "gateway": 60_000_000, "runner": 9}


def test_the_gateway_says_what_the_file_says() -> None:
    body, content_type = prometheus.exposition(whole_document(), "text/plain;version=0.0.4")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert read_back(body.decode()) == read_back(exposition.text(whole_document()))


def test_openmetrics_is_given_to_those_who_ask_for_it_and_passes_the_strict_parser() -> None:
    body, content_type = prometheus.exposition(whole_document(), f"{OPENMETRICS},text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    read = openmetrics.text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    families = {family.name: family.type for family in read}
    assert families == {family.name: family.kind for family in FAMILIES}


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "image/png",
        "text/plain;version=surprise",
        "application/openmetrics-text; version=9.9.9;x=\xe9",
    ],
)
def test_whoever_asks_for_something_else_gets_the_text_format(accept: str) -> None:
    assert prometheus.exposition({}, accept)[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_gateway_without_a_daemon_says_so() -> None:
    assert read_back(prometheus.exposition({}, "")[0].decode()) == {"edge_agent_up": {(): 0.0}}
