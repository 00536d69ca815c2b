"""How many prompts are to blame when a runner dies with several in it."""

import pytest

from edge_agent.models.lifecycle import _distinct


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
    assert _distinct(frozenset(key.encode() for key in crash) for crash in crashes) == expected
