"""Whether two hosts compute the same: their tokens, and how far the best logits are from each other.

Kernels for other instructions add in another order, and so round otherwise. Greedy tokens stay the same as long as the
logits differ by less than half of what is between the best two; both are told, so that the next model can be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.machine.console import MachineError

_ROUNDING = 0.02
"""Of the best logit: more is another computation, or a wrong one."""

Answers = Sequence[dict[str, Any]]
"""What `tokens.py` prints."""


def agreement(found: Answers, expected: Answers) -> str:
    """How many tokens are the same, and by how much the logits of the best differ.

    Raises:
        MachineError: a token is another one; it says whether rounding can be the reason.
    """
    furthest, narrowest = 0.0, float("inf")
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        for step, (left, right) in enumerate(zip(ours["best"], theirs["best"], strict=False)):
            apart, margin = _apart(left, right), right[0][1] - right[1][1]
            furthest, narrowest = max(furthest, apart), min(narrowest, margin)
            if ours["tokens"][step] != theirs["tokens"][step]:
                why = "rounding" if apart <= _ROUNDING * abs(right[0][1]) else "more than rounding"
                raise MachineError(
                    f"{why}: answer {number} has another token {step + 1}, {ours['tokens']} for {theirs['tokens']}; "
                    f"logits {apart:.2g} apart, the best two {margin:.2g}"
                )
        if ours["tokens"] != theirs["tokens"]:
            raise MachineError(f"answer {number} ends elsewhere: {ours['tokens']} for {theirs['tokens']}")
    count = sum(len(each["tokens"]) for each in expected)
    return f"{count} tokens the same, best logits at most {furthest:.2g} apart, the best two at least {narrowest:.2g}"


def _apart(left: Sequence[tuple[int, float]], right: Sequence[tuple[int, float]]) -> float:
    """The most that the logit of a token differs by that is among the best on both sides; infinite without one."""
    ours = dict(left)
    return max((abs(ours[token] - logit) for token, logit in right if token in ours), default=float("inf"))
