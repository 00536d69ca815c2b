"""A fleet at one look: what is counted, whom somebody should look at, and how a thousand devices are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_agent import terminal
from edge_agent.cli.fleet import status as command
from edge_agent.errors import EdgeAgentError
from edge_agent.fleet import overview
from edge_agent.fleet.devices import Device, Fleet
from edge_agent.fleet.overview import Trait
from edge_agent.fleet.survey import filters, read_list
from edge_agent.terminal import Rows
from tests.support.scripted_fleet import TOPICS, device, status

NOW = 1_790_000_100.0
FAILED = {"version": 8, "digest": "e" * 64, "step": "gate", "code": "gate_failed", "at": 1_790_000_000}
HELD = {**FAILED, "step": "held", "code": "link_held"}


def devices(*documents: dict[str, bytes], expected: tuple[str, ...] = ()) -> list[Device]:
    fleet = Fleet(TOPICS, expected)
    for each in documents:
        fleet.take_all(each)
    return fleet.devices()


def said(device_id: str, **fields: Any) -> dict[str, bytes]:
    """A device with a status of its own, and no report."""
    return {TOPICS.of(device_id).status: json.dumps(status(**fields)).encode()}


def traits(*documents: dict[str, bytes], now: float = NOW) -> list[Trait]:
    return [each.trait for each in overview.findings(devices(*documents), now=now)]


def test_devices_are_counted_by_version_state_and_code() -> None:
    counts = overview.count(
        devices(
            device("a"),
            device("b", version=8),
            device("c", "offline", version=None),
            device("d", "degraded", attempt=FAILED, quarantined=[{"version": 8, "code": "gate_failed"}]),
            device("e", attempt=HELD),
            expected=("f",),
        )
    )
    assert counts.by_version == {"7": 3, "8": 1, "none": 1}
    assert counts.by_model == {"assistant": counts.by_version}
    assert counts.by_state == {"ready": 3, "degraded": 1, "never_seen": 1, "offline": 1}
    assert counts.by_code == {"gate_failed": 1, "link_held": 1}, "a device counts once for a code"


def test_versions_of_different_models_are_apart() -> None:
    report = {"models": {"big": {"version": 1}, "small": {"version": 1}}}
    counts = overview.count(devices({TOPICS.of("a").reported: json.dumps(report).encode()}))
    assert counts.by_model == {"big": {"1": 1}, "small": {"1": 1}}


def test_the_document_has_the_shape_of_the_contract() -> None:
    document = json.loads(json.dumps(overview.document(devices(device("a")))))
    assert {"by_version", "by_state", "by_code"} <= document["counts"].keys()
    assert document["devices"][0]["device"] == "a"


def test_nobody_has_to_look_at_what_is_as_it_should_be() -> None:
    starting = said("c", state="starting", models=[{"name": "assistant", "state": "absent", "version": None}])
    coming = device("d", wanted={"version": 9, "via": "alias"})
    fetching = device(
        "e", wanted={"version": 8, "via": "alias"}, attempt={**FAILED, "step": "fetch", "code": None}
    )
    assert traits(device("a"), device("b", attempt=HELD), starting, coming, fetching) == []


@pytest.mark.parametrize(
    ("documents", "trait"),
    [
        (device("a", "offline"), Trait(kind="offline")),
        (device("a", "offline", state="absent", version=None), Trait(kind="offline")),
        (said("a", time=NOW - 601), Trait(kind="silent")),
        (said("a", state="degraded"), Trait(kind="degraded")),
        (
            said("a", state="degraded", troubles=[{"code": "self_test_failed", "text": "deaf"}]),
            Trait(kind="degraded", code="self_test_failed"),
        ),
        (device("a", state="failed"), Trait(kind="failed", model="assistant", version=7)),
        (device("a", state="absent", version=None), Trait(kind="absent", model="assistant")),
        (
            device("a", attempt=FAILED),
            Trait(kind="update failed", code="gate_failed", model="assistant", version=8),
        ),
        (
            device("a", wanted={"version": 9, "via": "desired"}, reason="the registry has no such version"),
            Trait(kind="update failed", model="assistant", version=9),
        ),
        (
            device("a", quarantined=[{"version": 5, "code": "load_failed"}]),
            Trait(kind="quarantined", code="load_failed", model="assistant", version=5),
        ),
        ({TOPICS.of("a").status: b"rubbish"}, Trait(kind="unreadable")),
        ({**device("a"), TOPICS.of("a").reported: b"rubbish"}, Trait(kind="unreadable")),
    ],
)
def test_somebody_should_look_at_it(documents: dict[str, bytes], trait: Trait) -> None:
    assert traits(documents) == [trait]


def test_a_version_that_was_tried_and_is_in_quarantine_is_told_once() -> None:
    trouble = {"code": "quarantined", "text": "version 8 is in quarantine"}
    documents = device("a", "degraded", attempt=FAILED, quarantined=[{"version": 8, "code": "gate_failed"}])
    documents |= said("a", state="degraded", troubles=[trouble])
    assert [trait.kind for trait in traits(documents)] == ["update failed"]


def test_an_expected_device_that_was_never_seen_is_named() -> None:
    (finding,) = overview.findings(devices(device("a"), expected=("a", "b")), now=NOW)
    assert (finding.trait, finding.devices) == (Trait(kind="never seen"), ("b",))


def test_devices_with_the_same_problem_stand_together_and_the_worse_ones_first() -> None:
    many = [device(f"d{number}", "offline") for number in range(5)]
    found = overview.findings(
        devices(*many, device("x", attempt=FAILED, reason="it says no"), device("y", attempt=FAILED)), now=NOW
    )
    assert [(each.trait.kind, len(each.devices)) for each in found] == [("update failed", 2), ("offline", 5)]
    assert found[0].text == "it says no"


# --- The page for people -------------------------------------------------------------------------------


def tables(page: list[str | Rows]) -> dict[str, Rows]:
    return {block.headings[0]: block for block in page if isinstance(block, Rows)}


def test_a_thousand_devices_are_a_few_lines() -> None:
    page = command.page(
        devices(*(device(f"d{number:04}", "offline" if number < 50 else "ready") for number in range(1_000))),
        now=NOW,
    )
    assert tables(page)[""].rows[0] == ("devices", "1000", "950 ready, 50 offline")
    assert tables(page)["LOOK AT"].rows == [
        ("offline", 50, "", "", "d0000, d0001, d0002, d0003 and 46 more", "")
    ]
    assert "DEVICE" not in tables(page)


def test_a_small_fleet_is_listed() -> None:
    page = command.page(
        devices(
            device("a", attempt=HELD, link={"missing_bytes": 5, "held_until": None}),
            device("b", attempt={**FAILED, "version": 7, "step": "active", "code": None}),
            device("c", wanted={"version": 9, "via": "desired"}),
        ),
        now=NOW,
    )
    assert tables(page)["DEVICE"].rows == [
        ("a", "ready", "1 min", "0.2.0", "assistant", 7, "ready", None, "8 held link_held"),
        ("b", "ready", "1 min", "0.2.0", "assistant", 7, "ready", None, ""),
        ("c", "ready", "1 min", "0.2.0", "assistant", 7, "ready", None, "9 wanted"),
    ]


def test_a_page_is_plain_text_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = device("a", state="\x1b[31mready", reason="x")
    terminal.print_page(command.page(devices(hostile), now=NOW))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\u001b[31mready" in shown


def test_a_change_is_one_line_for_a_pipe() -> None:
    (a,) = devices(device("a", "degraded", attempt=FAILED))
    assert command.line(a, now=NOW).endswith("  a  degraded  assistant 7 ready 8 gate gate_failed")


# --- The list of an operator ---------------------------------------------------------------------------


def test_a_list_of_devices_is_read(tmp_path: Path) -> None:
    file = tmp_path / "devices.txt"
    file.write_text("\ufeff# line 4\na\n\n b \na\n", encoding="utf-8")
    assert read_list(file) == ("a", "b")
    assert filters(TOPICS, ("a",)) == ["edge/v1/a/status", "edge/v1/a/model/reported"]


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"a\nb/c\n", b"\xff", b"a\nx y\n"])
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "devices.txt"
    file.write_bytes(content)
    with pytest.raises(EdgeAgentError, match=r"devices\.txt"):
        read_list(file)


def test_a_list_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(EdgeAgentError) as caught:
        read_list(tmp_path / "devices.txt")
    assert str(caught.value) == (
        f"the list of devices {tmp_path / 'devices.txt'} cannot be read: No such file or directory"
    )
