"""Whether two hosts compute the same: their tokens, and how far their logits are from each other.

Kernels for other instructions add in another order, and so round otherwise. Greedy tokens stay the same as long as the
logits differ by less than half of what is between the best two; both are told, so that the next model can be judged.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.machine.console import MachineError

_ROUNDING = 0.02
"""Of the range of a row of logits: more is another computation, or a wrong one."""

Answers = Sequence[dict[str, Any]]
"""What `tokens.py` prints."""


def agreement(found: Answers, expected: Answers) -> str:
    """How many tokens are the same, and by how much their logits differ.

    Raises:
        MachineError: a token is another one; it says whether rounding can be the reason.
    """
    furthest, narrowest = 0.0, np.inf
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        for step, (left, right) in enumerate(zip(_logits(ours), _logits(theirs), strict=False)):
            apart = float(np.abs(left - right).max())
            margin = float(np.diff(np.sort(right)[-2:])[0])
            furthest, narrowest = max(furthest, apart), min(narrowest, margin)
            if ours["tokens"][step] != theirs["tokens"][step]:
                why = "rounding" if apart <= _ROUNDING * float(np.ptp(right)) else "more than rounding"
                raise MachineError(
                    f"{why}: answer {number} has another token {step + 1}, {ours['tokens']} for {theirs['tokens']}; "
                    f"logits {apart:.2g} apart, the best two {margin:.2g}"
                )
        if ours["tokens"] != theirs["tokens"]:
            raise MachineError(f"answer {number} ends elsewhere: {ours['tokens']} for {theirs['tokens']}")
    count = sum(len(each["tokens"]) for each in expected)
    return (
        f"{count} tokens the same, logits at most {furthest:.2g} apart, the best two at least {narrowest:.2g}"
    )


def _logits(answer: dict[str, Any]) -> np.ndarray:
    """One row for each token, from which it was chosen."""
    return np.frombuffer(base64.b64decode(answer["logits"]), np.float32).reshape(len(answer["tokens"]), -1)
