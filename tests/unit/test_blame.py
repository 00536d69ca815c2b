"""What is held against a version, and how many prompts are to blame when a runner dies with several in it."""

import pytest

from edge_agent.errors import (
    CacheBusy,
    CannotRun,
    EdgeAgentError,
    LoadFailed,
    MemoryShort,
    PolicyError,
    RunnerCrashed,
    RunnerError,
    StoreError,
    VerificationError,
)
from edge_agent.serving import blame
from edge_agent.serving.blame import Crashes, Lack, Lacks, LoadFailures, LoadVerdict, distinct
from edge_agent.serving.gate import GateFailed


@pytest.mark.parametrize(
    ("crashes", "expected"),
    [
        ([], 0),
        (["a"], 1),
        (["a", "a", "a"], 1),
        (["a", "b", "c"], 3),
        (["ab", "ac", "ad"], 1),  # a alone explains them
        (["ab", "bc", "cd"], 2),  # b and c do
        (["abcd", "a", "b", "c"], 3),
        (["ab", "cd", "ef"], 3),
        (["abc", "abc", "d"], 2),
    ],
)
def test_one_poison_prompt_is_not_counted_as_several(crashes: list[str], expected: int) -> None:
    assert distinct(frozenset(key.encode() for key in crash) for crash in crashes) == expected


def test_crashes_of_long_ago_are_not_counted() -> None:
    crashes = Crashes()
    assert [
        crashes.add(frozenset({key}), at_s) for key, at_s in ((b"a", 0.0), (b"b", 300.0), (b"c", 601.0))
    ] == [
        1,
        2,
        2,
    ]
    crashes.clear()
    assert crashes.add(frozenset({b"d"}), 602.0) == 1


@pytest.mark.parametrize("error", [GateFailed, LoadFailed, RunnerCrashed, PolicyError])
def test_what_a_candidate_did_is_held_against_it(error: type[EdgeAgentError]) -> None:
    assert (blame.is_the_candidates(error("x")), blame.is_the_hosts(error("x"))) == (True, False)


@pytest.mark.parametrize("error", [MemoryShort, CannotRun])
def test_what_the_host_lacks_is_not(error: type[EdgeAgentError]) -> None:
    assert (blame.is_the_candidates(error("x")), blame.is_the_hosts(error("x"))) == (False, True)


@pytest.mark.parametrize("error", [StoreError, CacheBusy, RunnerError, VerificationError])
def test_what_may_have_had_another_cause_is_held_against_nobody(error: type[EdgeAgentError]) -> None:
    assert (blame.is_the_candidates(error("x")), blame.is_the_hosts(error("x"))) == (False, False)


@pytest.mark.parametrize(
    ("error", "failures", "expected"),
    [
        (VerificationError, 1, LoadVerdict(step_back=True, quarantine=False, final=True)),
        (PolicyError, 1, LoadVerdict(step_back=True, quarantine=False, final=True)),
        (CannotRun, 1, LoadVerdict(step_back=True, quarantine=False, final=True)),
        (LoadFailed, 1, LoadVerdict(step_back=False, quarantine=True, final=False)),
        (LoadFailed, 2, LoadVerdict(step_back=True, quarantine=True, final=True)),
        (MemoryShort, 1, LoadVerdict(step_back=False, quarantine=True, final=False)),
        (MemoryShort, 2, LoadVerdict(step_back=False, quarantine=True, final=True)),
    ],
)
def test_an_active_version_steps_back_when_another_attempt_would_end_the_same_way(
    error: type[EdgeAgentError], failures: int, expected: LoadVerdict
) -> None:
    assert blame.of_load(error("x"), failures) == expected


def test_the_wait_for_the_next_attempt_doubles_up_to_a_minute() -> None:
    failures = LoadFailures()
    waits = []
    for _ in range(8):
        failures.add(100.0)
        waits.append(failures.retry_at_s - 100.0)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    failures.clear()
    assert (failures.count, failures.retry_at_s) == (0, 0.0)


def test_a_lack_of_memory_lasts_until_as_much_is_there_as_was_short() -> None:
    """Before the attempt 1000 bytes could be had, but 100 of them were counted twice: 900 of 950 were there."""
    wanted = blame.memory_for_another_attempt(950, before_bytes=1_000, after_bytes=900)
    lacks = Lacks()
    lacks.add("2-b", Lack(error=MemoryShort("950 bytes", remedy="less"), host="this", wanted_bytes=wanted))
    error = lacks.still("2-b", host="this", attainable_bytes=1_049)
    assert isinstance(error, MemoryShort)
    assert (error.message, error.remedy) == ("950 bytes", "less")
    assert lacks.still("2-b", host="this", attainable_bytes=wanted) is None
    assert lacks.still("2-b", host="another", attainable_bytes=0) is None
    assert lacks.still("3-c", host="this", attainable_bytes=0) is None


def test_a_lack_of_anything_else_lasts_as_long_as_the_host_is_the_same() -> None:
    lacks = Lacks()
    for number in range(100):
        lacks.add(f"{number}-b", Lack(error=CannotRun("no library"), host="this"))
    assert isinstance(lacks.still("99-b", host="this", attainable_bytes=1 << 60), CannotRun)
    assert lacks.still("99-b", host="another", attainable_bytes=0) is None
    assert lacks.still("0-b", host="this", attainable_bytes=0) is None, "no more are kept than may come"
