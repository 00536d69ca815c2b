"""What `status` and doctor say of a model that answers, though something is wrong with its next version."""

from __future__ import annotations

from typing import Any

import pytest

from edge_agent import terminal
from edge_agent.doctor import service


def model(**fields: Any) -> dict[str, Any]:
    return {"name": "assistant", "state": "ready", "reason": "", "update_problem": "", **fields}


@pytest.mark.parametrize(
    ("reason", "problem", "said"),
    [
        ("", "", ""),
        ("its context is smaller", "", "its context is smaller"),
        ("", "registered anew", "registered anew"),
        ("its context is smaller", "registered anew", "its context is smaller; registered anew"),
        ("registered anew", "registered anew", "registered anew"),
    ],
)
def test_a_reason_does_not_hide_why_no_other_version_comes(reason: str, problem: str, said: str) -> None:
    assert terminal.reason_of(model(reason=reason, update_problem=problem)) == said


def test_doctor_names_the_problem_of_a_model_that_answers() -> None:
    document = {"models": [model(reason="its context is smaller", update_problem="registered anew"), model()]}
    assert list(service._model_troubles(document)) == [
        "model assistant is ready: its context is smaller; registered anew"
    ]
    waiting = model(update_problem="held until 22:00", link={"missing_bytes": 5, "held_until": 1})
    assert list(service._model_troubles({"models": [waiting]})) == [], "nothing is wrong"
    (absent,) = service._model_troubles({"models": [model(state="absent")]})
    assert absent == "model assistant is absent: no version is in the cache"
