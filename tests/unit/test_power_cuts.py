"""The pure parts of the power cuts of `./build.sh machine-test`: when, what was lost, what is harm, what is printed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine.__main__ import main
from tests.machine.container import leader_of
from tests.machine.disk import BLOCK_BYTES
from tests.machine.kernel_log import names
from tests.machine.power import steps
from tests.machine.rig import Loss, marks, was_cut
from tests.machine.schedule import (
    EARLY,
    LATENCY_S,
    MOST_EVENTS,
    MOST_WRITES,
    Activity,
    Cut,
    Moment,
    Pace,
    Prompt,
    Reported,
    Seen,
    cuts,
    damage,
)
from tests.machine.table import Row, summary
from tests.support.processes import alive, wait_until

PACE = Pace(
    longest_s={activity: 10.0 * number for number, activity in enumerate(Activity, 1)},
    prompts_s=1.0,
    answer_s=1.0,
    ready_s=1.0,
)


def test_a_cut_depends_on_the_seed_and_its_number_alone() -> None:
    whole = list(cuts(7, 0, 40, PACE))
    assert [*cuts(7, 0, 13, PACE), *cuts(7, 13, 27, PACE)] == whole
    assert list(cuts(8, 0, 40, PACE)) != whole
    assert [each.number for each in whole] == list(range(40))


def test_each_activity_has_its_turn() -> None:
    whole = list(cuts(1, 0, 500, PACE))
    assert {(each.early, each.latency_s) for each in whole} == {(e, s) for e in EARLY for s in LATENCY_S}
    assert all(len({each.activity for each in whole[at : at + 5]}) == 5 for at in range(0, 500, 5))


@pytest.mark.parametrize("activity", Activity)
def test_every_moment_of_an_activity_may_come(activity: Activity) -> None:
    its = [each for each in cuts(1, 0, 1500, PACE) if each.activity is activity]
    begun = [each.delay_s for each in its if each.moment is Moment.BEGUN]
    longest_s = PACE.longest_s[activity]
    assert 0 <= min(begun) < 0.1 * longest_s
    assert 0.9 * longest_s < max(begun) <= longest_s
    reported = Moment.SAID if activity is Activity.PROMPTS else Moment.OVER
    assert {each.moment for each in its} == {Moment.BEGUN, Moment.TAKEN, Moment.WRITTEN, reported}


def test_most_cuts_come_within_moments_after_a_step_or_a_write() -> None:
    soon = [each for each in cuts(1, 0, 500, PACE) if each.moment is not Moment.BEGUN]
    assert 380 < len(soon) < 420
    assert min(each.delay_s for each in soon) < 0.001
    assert 0.15 < max(each.delay_s for each in soon) <= 0.2
    assert sum(each.delay_s < 0.01 for each in soon) > len(soon) / 3
    assert {each.count for each in soon if each.moment is Moment.TAKEN} == set(range(1, MOST_EVENTS + 1))
    assert {each.count for each in soon if each.moment is Moment.OVER} == {1}
    writes = [each.count for each in soon if each.moment is Moment.WRITTEN]
    assert 180 < len(writes) < 220
    assert min(writes) == 1
    assert MOST_WRITES / 2 < max(writes) <= MOST_WRITES
    assert sum(count <= 30 for count in writes) > len(writes) / 3


def test_the_log_of_the_broker_says_what_the_device_does() -> None:
    log = [
        "1: Received PUBLISH from auto-1 (d0, q1, r0, m1, 'edge/v1/press-7/req/chat', ... (9 bytes))",
        "1: Sending PUBLISH to edge-agent-press-7 (d0, q1, r0, m1, 'edge/v1/press-7/req/chat', ... (9 bytes))",
        "1: Received PUBACK from edge-agent-press-7 (Mid: 1, RC:0)",
        "1: Received PUBACK from auto-1 (Mid: 1, RC:0)",
        "1: Received PUBLISH from edge-agent-press-7 (d0, q1, r0, m2, 'replies/1', ... (9 bytes))",
        "1: Received PUBLISH from edge-agent-press-77 (d0, q1, r0, m2, 'replies/1', ... (9 bytes))",
    ]
    assert list(steps(log)) == [Moment.TAKEN, Moment.SAID]


def test_a_cut_that_lost_nothing_or_lost_what_was_flushed_was_none(tmp_path: Path) -> None:
    """What `marks` writes, on a file instead of a device."""
    scratch = tmp_path / "scratch"
    for line in marks(str(scratch)):  # not every file system of a test has direct access
        subprocess.run(["bash", "-c", line.replace("direct", "sync")], check=True, capture_output=True)
    whole = scratch.read_bytes()
    assert len(whole) == 2 * BLOCK_BYTES
    assert not was_cut(whole)
    assert was_cut(whole[:BLOCK_BYTES])
    assert not was_cut(bytes(BLOCK_BYTES))


def sound(**changes: Any) -> Seen:
    prompts = [Prompt(name="p1", answers=[(200, "a")]), Prompt(name="p2", answers=[(200, "b"), (200, "b")])]
    fields = {
        "mounted": "rw,relatime,errors=remount-ro",
        "state": "ready",
        "answer": "Madrid",
        "models": [1, 2],
        "versions": ["0.1.0", "0.1.1"],
        "current": "0.1.1",
        "prompts": prompts,
    }
    return Seen(**{**fields, **changes})


def test_a_device_that_is_as_promised_has_no_damage() -> None:
    assert damage(sound(), ["Madrid", "Kathmandu"], Reported()) == []
    given_up = Prompt(name="p", answers=[(500, "it was running at two ends")])
    assert damage(sound(prompts=[given_up]), ["Madrid"], Reported()) == []
    assert damage(sound(), ["Madrid"], Reported(model=2, program="0.1.1")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mounted": "ro,relatime"}, "the root file system is mounted ro,relatime"),
        ({"mounted": ""}, "the root file system is mounted nowhere"),
        ({"complaints": ["EXT4-fs error (device vda)"]}, "the file system: EXT4-fs error (device vda)"),
        ({"state": "degraded"}, "the agent is degraded"),
        ({"state": ""}, "the agent is not there"),
        ({"answer": "Paris"}, "the active version answers 'Paris'"),
        ({"verified": (1, "1 damaged")}, "models verify: 1 damaged"),
        ({"current": "0.1.2"}, "the current version is 0.1.2, whole are 0.1.0 0.1.1"),
        ({"damaged": ["0.1.1: a.py"]}, "installed and damaged: 0.1.1: a.py"),
        ({"prompts": [Prompt(name="p", answers=[])]}, "lost: p"),
        ({"prompts": [Prompt(name="p", answers=[(200, "a"), (200, "b")])]}, "two answers: p"),
        ({"prompts": [Prompt(name="p", answers=[(503, "no")])]}, "refused: p"),
    ],
)
def test_each_broken_promise_is_named(changes: dict[str, Any], said: str) -> None:
    (found,) = damage(sound(**changes), ["Madrid"], Reported())
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("reported", "said"),
    [
        (Reported(model=3), "version 3 was reported as done, the cache has [1, 2]"),
        (Reported(program="0.1.0"), "0.1.0 was reported as installed, 0.1.1 is current"),
    ],
)
def test_what_was_reported_before_the_cut_must_have_outlived_it(reported: Reported, said: str) -> None:
    assert damage(sound(), ["Madrid"], reported) == [said]


# --- The table --------------------------------------------------------------------------------------------


def row(activity: Activity, **changes: Any) -> Row:
    cut = Cut(
        number=7,
        activity=activity,
        moment=Moment.TAKEN,
        count=2,
        delay_s=0.0042,
        early=0.2,
        latency_s=0.002,
    )
    fields = {"cut": cut, "prompts": 9, "waiting": 2, "repeated": 1, "ready_s": 12.0, "found": []}
    loss = Loss(disk_bytes=12 << 10, kernel_bytes=300 << 10, over=None)
    return Row(**{**fields, "loss": loss, **changes})


def test_a_row_says_what_was_cut_and_what_it_took() -> None:
    said = " ".join(str(row(Activity.UPDATE)).split())
    assert said == "7 update taken +4 ms yes 20% 2 ms 300 12 9 2 1 12 as promised"
    over = Loss(disk_bytes=0, kernel_bytes=None, over=0)
    assert str(row(Activity.UPDATE, loss=over, found=["lost: p", "two answers: q"])).split()[5:] == (
        ["no", "20%", "2", "ms", "-", "0", "9", "2", "1", "12", "lost:", "p;", "two", "answers:", "q"]
    )


def test_a_summary_has_a_line_for_each_activity_and_one_for_all() -> None:
    rows = [row(Activity.UPDATE, ready_s=each) for each in (1.0, 2.0, 30.0)]
    lines = list(summary([*rows, row(Activity.IMPORT, found=["lost: p"])]))
    assert [line.split() for line in lines[1:]] == [
        ["update", "3", "3", "300,", "300", "12,", "12", "27", "6", "3", "2,", "30", "0"],
        ["import", "1", "1", "300,", "300", "12,", "12", "9", "2", "1", "12,", "12", "1"],
        ["all", "4", "4", "300,", "300", "12,", "12", "36", "8", "4", "7,", "30", "1"],
    ]


def test_what_nobody_could_look_at_is_no_zero_in_the_summary() -> None:
    unseen = Loss(disk_bytes=0, kernel_bytes=None, over=None)
    lines = list(summary([row(Activity.UPDATE, loss=unseen), row(Activity.IMPORT)]))
    assert [line.split()[3] for line in lines[1:]] == ["-", "300,", "300,"]


@contextlib.contextmanager
def parent(*command: str) -> Iterator[int]:
    """A process with one child."""
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.communicate()


def children(process: int) -> str:
    return Path(f"/proc/{process}/task/{process}/children").read_text()


def test_what_still_has_this_hosts_processes_is_no_container() -> None:
    with parent("sh", "-c", "cat; :") as process:
        wait_until(lambda: children(process), 60)
        assert leader_of(process) is None


def test_the_first_process_of_a_container_is_found() -> None:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    with parent("unshare", *user, "--pid", "--fork", "cat") as process:
        wait_until(lambda: children(process) or not alive(process), 60)
        if not alive(process):
            pytest.skip("no namespace of processes can be had here")
        assert leader_of(process) == int(children(process))


def test_a_line_of_the_kernel_about_another_device_is_left_out() -> None:
    assert names("EXT4-fs (loop1): recovery complete", "loop1")
    assert names("I/O error, dev loop1, sector 8 op 0x1:(WRITE)", "loop1")
    assert not names("EXT4-fs (loop10): recovery complete", "loop1")


@pytest.mark.parametrize("option", [("--arch", "aarch64"), ("--debian", "13")])
def test_a_container_is_not_said_to_be_another_machine(
    option: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ("--image", "i", "--bundles", "b", "--work", "w", "--cuts", "1")
    monkeypatch.setattr(sys, "argv", ["machine", "--container", *needed, *option])
    with pytest.raises(SystemExit):
        main()
    assert "leave --arch and --debian out" in capsys.readouterr().err
