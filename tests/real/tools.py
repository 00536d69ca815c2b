"""Two hundred tools with schemas as programs write them, the same ones in every run."""

from __future__ import annotations

import random
from typing import Any

from tests.real.schemas import DIGIT, WORD, Schema, closed

COUNT = 200
_OPEN: list[Schema] = [
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "integer", "minimum": 1},
    {"type": "array", "items": {"type": "integer"}},
    {"type": "object"},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"description": "anything"},
    {"type": ["string", "null"], "default": None},
    {"anyOf": [{"type": "integer"}, {"type": "null"}], "title": "Count"},
]
"""They leave open how much comes."""
_BOUND: list[Schema] = [
    {"type": "boolean"},
    {"enum": ["on", "off", "größe"]},
    {"const": "€"},
    DIGIT,
    WORD,
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.5},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": DIGIT, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [DIGIT, {"type": "boolean"}]},
    closed(x=DIGIT, y=DIGIT),
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    {"$ref": "#/$defs/digit"},
]
_DEFINITIONS = {"digit": DIGIT}
_KEYS = ("room", "on", "level", "n", "unit", "größe", "x-1", "type")


def every() -> list[dict[str, Any]]:
    """The tools, with up to two parameters each, not all of them required."""
    chance = random.Random(20)
    return [_tool(number, chance) for number in range(COUNT)]


def _tool(number: int, chance: random.Random) -> dict[str, Any]:
    keys = chance.sample(_KEYS, chance.choice((0, 1, 1, 1, 1, 2, 2)))
    first = chance.choice((_OPEN, _BOUND))
    properties = {key: chance.choice(_BOUND if index else first) for index, key in enumerate(keys)}
    parameters: Schema = {"type": "object", "properties": properties}
    if keys and chance.random() < 0.8:
        parameters["required"] = keys[: chance.randint(1, len(keys))]
    if chance.random() < 0.3:
        parameters["additionalProperties"] = False
    if any("$ref" in schema for schema in properties.values()):
        parameters["$defs"] = _DEFINITIONS
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}
