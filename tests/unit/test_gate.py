"""What a candidate must have shown, and what is only reported."""

import pytest

from edge_agent.runner.protocol import Tried
from edge_agent.serving import gate
from edge_agent.serving.gate import GateFailed


def tried(*failures: str) -> Tried:
    return Tried(failures=list(failures), tokens_per_s=12.34, memory_bytes=1000)


def test_one_wrong_answer_is_one_too_many_and_the_first_three_are_named() -> None:
    gate.check_golden(tried())
    with pytest.raises(GateFailed, match=r"^one$"):
        gate.check_golden(tried("one"))
    with pytest.raises(GateFailed, match=r"^one; two; three$"):
        gate.check_golden(tried("one", "two", "three", "four"))


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
    assert gate.shortfalls(tried(), min_tokens_per_s=least, memory_limit_bytes=limit) == expected
