"""One field of a document that a device wrote: its value, or None or an empty one where it is not what it should be.

Never raises. Every text is one bounded line without control characters, every number is in a range. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from edge_agent import printable

MAX_DOCUMENT_BYTES = 256 << 10

_MAX_ENTRIES = 64
_MAX_WORD_CHARACTERS = 80
_MAX_TEXT_CHARACTERS = 400
_MAX_NUMBER = 1e15
_KEY = re.compile(r"(\d{1,18})(-[0-9a-f]{1,64})?")


def read_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a message is; None if it is none, or too long."""
    if len(body) > MAX_DOCUMENT_BYTES:
        return None
    try:
        document = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def part(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


def objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects of a list, the first few of them."""
    for entry in value[:_MAX_ENTRIES] if isinstance(value, list) else ():
        if isinstance(entry, dict):
            yield entry


def text(value: Any) -> str:
    return printable.line(value[:_MAX_TEXT_CHARACTERS]) if isinstance(value, str) else ""


def word(value: Any) -> str:
    return text(value)[:_MAX_WORD_CHARACTERS]


def number(value: Any) -> float | None:
    """A number from 0 on. One that is out of any range was never measured."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return value if good and 0 <= value <= _MAX_NUMBER else None


def whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def version(value: Any) -> int | None:
    """A version's number, also in a key of the cache (`7-0123456789ab`)."""
    if isinstance(value, str) and (found := _KEY.fullmatch(value)):
        return int(found[1])
    good = isinstance(value, int) and not isinstance(value, bool)
    return value if good and 0 < value < 10**18 else None
