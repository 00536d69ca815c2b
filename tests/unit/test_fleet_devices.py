"""What a console reads in the retained topics of devices, be they old, new, damaged or hostile."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.devices import (
    MAX_MODELS,
    NEVER_SEEN,
    UNKNOWN,
    Attempt,
    Device,
    Fleet,
    Gate,
    Golden,
    Link,
    Quarantined,
    Trouble,
    Wanted,
    parse_reported,
    parse_status,
)
from edge_agent.fleet.fields import MAX_DOCUMENT_BYTES
from tests.support.generated_messages import examples
from tests.support.scripted_fleet import TOPICS, device, model, reported, status

FULL: dict[str, Any] = {
    "wanted": {"version": 8, "via": "alias"},
    "attempt": {"version": 8, "digest": "e" * 64, "step": "gate", "code": "gate_failed", "at": 1_790_000_000},
    "previous": 6,
    "quarantined": [{"version": 8, "code": "gate_failed"}],
    "gate": {"load_ms": 812.5, "tokens_per_s": 21.4, "golden": {"passed": 2, "of": 3}},
    "link": {"missing_bytes": 5, "held_until": 1_790_000_600},
}

NO_OBJECTS: tuple[Any, ...] = (7, "x", [], {}, None)
NO_VERSIONS: tuple[Any, ...] = (0, -1, True, 1.5, "x", 10**400, [], {}, None)


def fleet(*documents: dict[str, bytes], expected: tuple[str, ...] = ()) -> Fleet:
    made = Fleet(TOPICS, expected)
    for each in documents:
        made.take_all(each)
    return made


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_a_report_is_read_whole() -> None:
    (entry,) = parse_reported(encoded(reported(**FULL))) or ()
    assert (entry.name, entry.uri, entry.version) == ("assistant", "models:/phi3-mini@prod", 7)
    assert entry.wanted == Wanted(version=8, via="alias")
    assert entry.attempt == Attempt(
        version=8, digest="e" * 64, step="gate", code="gate_failed", at=1_790_000_000
    )
    assert entry.previous == 6
    assert entry.quarantined == (Quarantined(version=8, code="gate_failed"),)
    assert entry.gate == Gate(load_ms=812.5, tokens_per_s=21.4, golden=Golden(passed=2, of=3))
    assert entry.link == Link(missing_bytes=5, held_until=1_790_000_600)
    assert entry.codes() == {"gate_failed"}


def test_a_device_is_its_status_and_its_report_together() -> None:
    trouble = {"code": "quarantined", "text": "version 8 is in quarantine"}
    said = status("degraded", troubles=[trouble], models=[{"name": "assistant", "tokens_per_s": 21.5}])
    made = fleet({TOPICS.of("a").status: encoded(said), TOPICS.of("a").reported: encoded(reported(**FULL))})
    (a,) = made.devices()
    assert (a.device_id, a.state, a.agent_version) == ("a", "degraded", "0.2.0")
    assert (a.seen_at, a.boot_id) == (1_790_000_000, "b1")
    assert a.troubles == (Trouble(code="quarantined", text="version 8 is in quarantine"),)
    (entry,) = a.models
    assert (entry.version, entry.tokens_per_s) == (7, 21.5)
    assert a.codes() == {"quarantined", "gate_failed"}


def test_a_document_of_a_device_has_the_names_of_the_contract() -> None:
    document = fleet(device("a", **FULL)).devices()[0].document()
    assert {"device", "state", "agent_version", "seen_at", "models"} <= document.keys()
    assert "device_id" not in document
    for key, value in FULL.items():
        assert json.loads(json.dumps(document["models"][0][key])) == value


def test_an_offline_device_keeps_what_it_reported() -> None:
    gone = {"state": "offline", "time": 1_790_000_000, "boot_id": "b1"}
    (a,) = fleet(device("a"), {TOPICS.of("a").status: encoded(gone)}).devices()
    assert (a.state, a.agent_version) == ("offline", "")
    assert [entry.version for entry in a.models] == [7]


def test_the_models_of_a_status_stand_in_for_a_report_that_is_missing() -> None:
    said = status(models=[{"name": "assistant", "version": 7, "state": "ready", "tokens_per_s": 3}])
    (a,) = fleet({TOPICS.of("a").status: encoded(said)}).devices()
    assert [(entry.name, entry.version, entry.tokens_per_s) for entry in a.models] == [("assistant", 7, 3)]
    assert parse_status(encoded(said), "a") == a


def test_an_expected_device_is_listed_though_nothing_is_known_of_it() -> None:
    made = fleet(device("b"), expected=("a", "b"))
    assert [(each.device_id, each.state) for each in made.devices()] == [("a", NEVER_SEEN), ("b", "ready")]


def test_a_report_without_a_status_is_of_an_unknown_state() -> None:
    documents = device("a")
    del documents[TOPICS.of("a").status]
    assert fleet(documents).devices()[0].state == UNKNOWN


def test_a_retained_message_that_is_removed_is_forgotten() -> None:
    made = fleet(device("a"))
    made.take(TOPICS.of("a").status, b"")
    made.take(TOPICS.of("a").reported, b"")
    assert made.devices() == []


@pytest.mark.parametrize(
    "topic",
    [
        "edge/v1/@fleet/status",
        "edge/v1/a/metrics",
        "edge/v1//status",
        "other/v1/a/status",
        "edge/v1/status",
        "",
    ],
)
def test_what_is_no_device_is_no_device(topic: str) -> None:
    made = fleet()
    assert made.take(topic, encoded(status())) is None
    assert made.devices() == []


@pytest.mark.parametrize(
    "body",
    [
        *(b"rubbish", b"\xff\xfe", b"[]", b"{}", b"null", b'{"state": 7}'),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b" " * MAX_DOCUMENT_BYTES + b'{"state": "ready", "models": {}}', id="long"),
    ],
)
def test_rubbish_is_listed_with_what_could_be_read(body: bytes) -> None:
    made = fleet(device("a"))
    made.take(TOPICS.of("a").status, body)
    (a,) = made.devices()
    assert (a.state, a.problem) == (UNKNOWN, "status cannot be read")
    assert [entry.version for entry in a.models] == [7]
    made = fleet(device("a"))
    made.take(TOPICS.of("a").reported, body)
    (a,) = made.devices()
    assert (a.state, a.problem, a.models) == ("ready", "model/reported cannot be read", ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(key, value) for key in ("wanted", "attempt", "gate", "link") for value in NO_OBJECTS],
        *[(key, value) for key in ("version", "previous") for value in NO_VERSIONS],
        *[("quarantined", value) for value in (*NO_OBJECTS, [7, "x"])],
    ],
)
def test_a_field_of_another_form_costs_that_field_only(field: str, value: object) -> None:
    (entry,) = parse_reported(encoded(reported(**{**FULL, field: value}))) or ()
    assert getattr(entry, field) in (None, ())
    assert entry.state == "ready"


def test_an_older_device_names_its_previous_version_by_its_key() -> None:
    (entry,) = parse_reported(encoded({"models": {"assistant": {"previous": "6-0123456789ab"}}})) or ()
    assert entry.previous == 6


def test_texts_are_bounded_lines_without_control_characters() -> None:
    text = "\x1b[2J\n" + "x" * 10_000
    (entry,) = parse_reported(encoded(reported(reason=text, state=text))) or ()
    assert entry.reason.startswith("\\u001b[2J\\u000ax")
    assert len(entry.reason) < 500 and len(entry.state) <= 80


def test_lists_are_bounded() -> None:
    many = {f"m{number}": model() for number in range(100)}
    assert len(parse_reported(encoded({"models": many})) or ()) == MAX_MODELS
    (entry,) = parse_reported(encoded(reported(quarantined=[{"version": 1, "code": "x"}] * 1_000))) or ()
    assert len(entry.quarantined) <= 64


KEYS = st.sampled_from(["state", "time", "boot_id", "troubles", "models", "agent_version", "a", *model()])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(KEYS, LEAVES, max_size=3)


@examples(100)
@given(
    top=st.dictionaries(KEYS, VALUES, max_size=4),
    entry=st.dictionaries(KEYS, VALUES, max_size=4),
    raw=st.binary(max_size=64),
)
def test_nothing_that_a_device_says_ends_the_console(
    top: dict[str, Any], entry: dict[str, Any], raw: bytes
) -> None:
    for body in (encoded(top), encoded({**top, "models": [entry]}), encoded({"models": {"a": entry}}), raw):
        made = fleet({TOPICS.of("a").status: body, TOPICS.of("a").reported: body})
        for each in made.devices():
            assert isinstance(each, Device)
            json.dumps(each.document(), allow_nan=False)
