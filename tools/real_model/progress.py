"""One line on standard error for each step that takes long."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """The table alone goes to standard output."""
    print(f"real-model: {line}", file=sys.stderr, flush=True)
