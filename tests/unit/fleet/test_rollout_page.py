"""What an operator sees of a rollout, and what the command takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from click.testing import CliRunner

from edge_agent.cli import main
from edge_agent.cli.fleet import rollout_page
from edge_agent.fleet.rollout.console import Progress
from edge_agent.fleet.rollout.standing import Standing
from edge_agent.fleet.rollout.state import Lease, Listed, Phase, State
from tests.support.scripted_rollout import NAME, NEW, OLD, plan_of

NOW = 1_790_000_000.0
STATE = State(
    id="ab" * 8,
    plan=plan_of([f"press-{number}" for number in range(100)], canaries=["press-1"]),
    at=NOW,
    since=NOW,
    phase=Phase.SOAKING,
    wave=2,
    soak_until=NOW + 754,
    counts={Standing.TAKEN: 23, Standing.FAILED: 1, Standing.PENDING: 0, Standing.UNREACHABLE: 1},
    listed=(Listed(device="press-7", standing="failed", code="gate_failed"),),
    speed=0.97,
    lease=Lease(console="cd" * 8, expires_at=NOW + 30),
)


def test_the_document_has_the_fields_of_the_contract() -> None:
    document = rollout_page.document(STATE)
    assert {key: document[key] for key in ("name", "version", "state", "wave", "waves")} == {
        "name": NAME,
        "version": NEW,
        "state": "soaking",
        "wave": 3,
        "waves": 4,
    }
    assert (document["taken"], document["failed"], document["pending"], document["reason"]) == (23, 1, 0, "")
    assert document["look_at"] == [{"device": "press-7", "standing": "failed", "code": "gate_failed"}]


@pytest.mark.parametrize(
    ("phase", "reason", "said"),
    [
        (Phase.ABORTED, "aborted by an operator; it was soaking", "aborted by an operator; it was soaking"),
        (Phase.HALTED, "3 devices have failed", "halted: 3 devices have failed"),
    ],
)
def test_an_end_is_said_once(phase: Phase, reason: str, said: str) -> None:
    assert rollout_page.ended(replace(STATE, phase=phase, reason=reason)) == said


@pytest.mark.parametrize("phase", [Phase.PAUSED, Phase.ABORTED])
def test_a_phase_and_its_reason_are_no_word_twice(phase: Phase) -> None:
    state = replace(STATE, phase=phase, reason=f"{phase} by an operator; it was soaking")
    assert rollout_page.line(state, "").endswith(": by an operator; it was soaking")
    assert text_of(rollout_page.page(state, now=NOW)).count(phase) == 1


def text_of(page: Sequence[object]) -> str:
    return "\n".join(str(part) for part in page)


def test_the_page_says_where_it_is_who_has_it_and_how_long_it_is_watched() -> None:
    text = text_of(rollout_page.page(STATE, now=NOW, note="the broker cannot be reached; again in 8 s"))
    for words in (
        f"version {NEW} instead of {OLD}: soaking",
        "wave 3 of 4 (25%), 25 of 100 devices",
        "23 taken, 1 failed, 0 pending, 1 unreachable",
        "another 12 min 34 s",
        "97% of before",
        "the broker cannot be reached",
        "press-7",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("taken", "wave", "whole", "drawn"),
    [(0, 0, 9, "░" * 30), (5, 10, 30, "█" * 5 + "▒" * 5 + "░" * 20), (9, 9, 9, "█" * 30)],
)
def test_the_bar_has_the_taken_the_wave_and_the_rest(taken: int, wave: int, whole: int, drawn: str) -> None:
    assert rollout_page.bar(taken, wave, whole) == drawn


def test_in_a_pipe_there_is_one_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    with rollout_page.shown(as_json=False) as tell:
        for state in (STATE, replace(STATE, at=NOW + 1), replace(STATE, counts={Standing.TAKEN: 25})):
            tell(Progress(state=state, leads=True, note=""))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[2] for line in lines] == [
        "soaking, wave 3 of 4 (25%): 23 taken, 1 failed, 0 pending, 1 unreachable",
        "soaking, wave 3 of 4 (25%): 25 taken, 0 failed, 0 pending",
    ]


def test_with_json_the_lines_go_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with rollout_page.shown(as_json=True) as tell:
        tell(Progress(state=STATE, leads=True, note=""))
    assert capsys.readouterr().out == ""


def test_after_a_halt_both_ways_on_are_named() -> None:
    halted = replace(STATE, phase=Phase.HALTED)
    assert f"rollout abort {NAME}" in rollout_page.what_next(halted)
    assert f"rollout resume {NAME}" in rollout_page.what_next(halted)
    assert rollout_page.what_next(replace(STATE, phase=Phase.DONE)) == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["assistant"], "VERSION"),
        (["assistant", "0"], "VERSION"),
        (["assistant", "prod"], "VERSION"),
        (["assistant", "8", "--soak", "half an hour"], "no time such as"),
        (["assistant", "8", "--soak", "31d"], "up to 30d"),
        (["assistant", "8", "--waves", "5%;100%"], "no list of shares"),
        (["assistant", "8", "--min-speed", "2"], "--min-speed"),
        (["assistant", "8", "--max-failed", "-1"], "--max-failed"),
        (["start", "status", "8", "--soak", "x"], "no time such as"),
    ],
)
def test_what_is_no_rollout_is_wrong_usage(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["fleet", "rollout", *arguments])
    assert (result.exit_code, says in result.output) == (2, True), result.output
