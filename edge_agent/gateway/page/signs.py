"""What the page is made of: a state with its tone and its word, and a line with a name and a value. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]
OK, BUSY, WARN, BAD, QUIET, PLAIN = "ok", "busy", "warn", "bad", "quiet", "plain"
"""Tones: a sign has a word beside its colour."""


@dataclass(frozen=True)
class Sign:
    tone: str
    word: str


@dataclass(frozen=True)
class Fact:
    """A line of a list: `name: value`. `note` says more of it, in small letters."""

    name: str
    value: str
    note: str = ""
    tone: str = ""
