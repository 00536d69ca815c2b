"""Text that can be shown: what a registry, a package, a version file or a client wrote, without control characters.

A control character on a terminal moves the cursor, renames the window or types an answer; in a log it ends a line and
begins a forged one; a bidirectional one shows a name backwards. Each is written as `\\u001b` instead: it stays visible,
and inside of JSON it means the same character as before.

Pure. Errors, logs, the status document and everything that a command prints pass through here. A model's answer does
so on a terminal only: it is content, and a program that reads it gets what the model wrote.
"""

from __future__ import annotations

import re
from typing import Any

_LAYOUT = "\\t\\n"
_CONTROLS = (
    "\\x00-\\x08\\x0b-\\x1f"  # C0 without tab and line feed
    "\\x7f-\\x9f"  # DEL, C1
    "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"  # direction of writing
    "\\u2028\\u2029"  # line and paragraph separators
    "\\ud800-\\udfff"  # half a character: no output can encode it
)
_IN_TEXT = re.compile(f"[{_CONTROLS}]")
_IN_LINE = re.compile(f"[{_LAYOUT}{_CONTROLS}]")


def text(value: str) -> str:
    """The same text with its control characters escaped; tabs and line feeds stay."""
    return _IN_TEXT.sub(_escape, value)


def line(value: str) -> str:
    """The same text in one line: tabs and line feeds are escaped, too."""
    return _IN_LINE.sub(_escape, value)


def is_line(value: str) -> bool:
    """True for a text without any control character, tabs and line feeds included."""
    return _IN_LINE.search(value) is None


def document(value: Any) -> Any:
    """The same JSON document with `text` applied to each of its strings, keys included."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {document(key): document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [document(item) for item in value]
    return value


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
