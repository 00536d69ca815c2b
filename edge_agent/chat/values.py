"""The kinds of values that a request's fields have, whatever they mean. Pure; each is refused by the field's name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from edge_agent.errors import BadRequest

MAX_SHOWN_CHARACTERS = 40
"""Of a name that a client made up."""


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string")
    check_text(name, value)
    return value


def check_text(name: str, value: str) -> None:
    """NUL cuts a prompt short in the tokenizer without a word; lone surrogates are no text."""
    if "\0" in value:
        raise BadRequest(f"{name} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} has a lone surrogate") from error


def check_json(name: str, value: object) -> None:
    """What is handed on as it is. Python reads `1e400` as infinite, and writes that as no JSON: a runner would end of
    it."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise BadRequest(f"{name} has a number that is too large") from error
    check_text(name, written)


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false")
    return value


def only_known(name: str, value: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := sorted(set(value) - set(known)):
        raise BadRequest(f"unknown field {name}.{shown(unknown[0])}")


def shown(name: str) -> str:
    return json.dumps(name[:MAX_SHOWN_CHARACTERS])


def printable_name(name: str) -> str:
    """A field's name as its client wrote it, but short and text: a key of JSON may be neither."""
    return name[:MAX_SHOWN_CHARACTERS].encode("utf-8", "replace").decode()
