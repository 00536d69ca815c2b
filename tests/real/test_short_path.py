"""README's shortest way from a clone to a conversation with a real model."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_first_commands_of_the_readme_lead_to_a_conversation() -> None:
    """What stands in the README runs as it stands; its set-up is done already where this test runs."""
    commands = re.findall(r"^\./build\.sh chat", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["./build.sh chat"]
    result = subprocess.run(
        commands[0].split(),
        cwd=ROOT,
        input="What is the capital of Italy?\nAnd of Spain?\n",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    first, *rest = result.stdout.strip().splitlines()
    assert "Rome" in first
    assert rest, "no answer to the second question"
