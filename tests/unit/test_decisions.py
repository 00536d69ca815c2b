"""The decisions in docs/adr have one form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "adr"
PAGES = sorted(FOLDER.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name[:4])
def test_a_decision_has_a_title_a_status_and_three_parts(page: Path) -> None:
    text = page.read_text("utf-8")
    assert re.match(rf"# {int(page.name[:4])}\. .+\n\nStatus: (accepted|superseded by \d{{4}})\n\n", text)
    assert re.findall(r"^#+ (.+)$", text, re.MULTILINE)[1:] == ["Context", "Decision", "Consequences"]


def test_a_decision_has_a_number_of_its_own() -> None:
    numbers = [int(page.name[:4]) for page in PAGES]
    assert sorted(set(numbers)) == numbers
