"""What a candidate must show, what counts against a version, and how many prompts explain a runner's crashes."""

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
from edge_agent.runner.protocol import Tried
from edge_agent.serving import verdicts
from edge_agent.serving.verdicts import (
    Crashes,
    GateFailed,
    LoadFailures,
    LoadVerdict,
    UnmetRequirement,
    UnmetRequirements,
    distinct_causes,
)


def tried(*failures: str) -> Tried:
    return Tried(failures=list(failures), asked=3, tokens_per_s=12.34, memory_bytes=1000)


def test_one_wrong_answer_is_one_too_many_and_the_first_three_are_named() -> None:
    verdicts.check_golden(tried())
    with pytest.raises(GateFailed, match=r"^one$"):
        verdicts.check_golden(tried("one"))
    with pytest.raises(GateFailed, match=r"^one; two; three$"):
        verdicts.check_golden(tried("one", "two", "three", "four"))


@pytest.mark.parametrize(
    ("least", "limit", "expected"),
    [
        (0.0, 0, ""),
        (12.0, 1000, ""),
        (20.0, 0, "12.3 tokens/s, 20 are wanted"),
        (0.0, 999, "1000 bytes of memory, 999 are allowed"),
        (12.5, 999, "12.3 tokens/s, 12.5 are wanted; 1000 bytes of memory, 999 are allowed"),
    ],
)
def test_what_falls_short_of_the_settings_is_said(least: float, limit: int, expected: str) -> None:
    assert verdicts.shortfalls(tried(), min_tokens_per_s=least, memory_limit_bytes=limit) == expected


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
    assert distinct_causes(frozenset(key.encode() for key in crash) for crash in crashes) == expected


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
    assert (verdicts.caused_by_candidate(error("x")), verdicts.caused_by_host(error("x"))) == (True, False)


@pytest.mark.parametrize("error", [MemoryShort, CannotRun])
def test_what_the_host_unmet_is_not(error: type[EdgeAgentError]) -> None:
    assert (verdicts.caused_by_candidate(error("x")), verdicts.caused_by_host(error("x"))) == (False, True)


@pytest.mark.parametrize("error", [StoreError, CacheBusy, RunnerError, VerificationError])
def test_what_may_have_had_another_cause_is_held_against_nobody(error: type[EdgeAgentError]) -> None:
    assert (verdicts.caused_by_candidate(error("x")), verdicts.caused_by_host(error("x"))) == (False, False)


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
    assert verdicts.on_load_failure(error("x"), failures) == expected


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
    wanted = verdicts.memory_for_another_attempt(950, before_bytes=1_000, after_bytes=900)
    unmet = UnmetRequirements()
    unmet.add(
        "2-b",
        UnmetRequirement(error=MemoryShort("950 bytes", remedy="less"), host="this", wanted_bytes=wanted),
    )
    error = unmet.error_expected("2-b", host="this", attainable_bytes=1_049)
    assert isinstance(error, MemoryShort)
    assert (error.message, error.remedy) == ("950 bytes", "less")
    assert unmet.error_expected("2-b", host="this", attainable_bytes=wanted) is None
    assert unmet.error_expected("2-b", host="another", attainable_bytes=0) is None
    assert unmet.error_expected("3-c", host="this", attainable_bytes=0) is None


def test_a_lack_of_anything_else_lasts_as_long_as_the_host_is_the_same() -> None:
    unmet = UnmetRequirements()
    for number in range(100):
        unmet.add(f"{number}-b", UnmetRequirement(error=CannotRun("no library"), host="this"))
    assert isinstance(unmet.error_expected("99-b", host="this", attainable_bytes=1 << 60), CannotRun)
    assert unmet.error_expected("99-b", host="another", attainable_bytes=0) is None
    assert unmet.error_expected("0-b", host="this", attainable_bytes=0) is None, (
        "no more are kept than may come"
    )
