"""JSON schemas of the shapes that clients send, most of them with few possible answers, so that tests are short.

The library follows those of `FOLLOWED` and `ENDLESS`; it does not know something in those of `UNSUPPORTED`; those of
`WRONG` are the client's mistakes.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "maxLength": 6}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(**properties: Schema) -> Schema:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_SCALARS: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["boolean", "null"]},
    WORD,
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "maxLength": 0},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(yes|no)$"},
    {"type": "string", "pattern": "^a/b\\d$"},
    {"type": "string", "pattern": "^\\d{4}-\\d{2}$", "maxLength": 7},
    {"type": "string", "pattern": 'x"', "maxLength": 4},
    {"type": ["string", "integer"], "maxLength": 3, "minimum": 1, "maximum": 5},
]

_NUMBERS: list[Schema] = [
    DIGIT,
    {"type": "integer", "minimum": -20, "maximum": -10},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    {"type": "integer", "minimum": 5, "maximum": 500, "multipleOf": 25},
    {"type": "integer", "minimum": 1000000, "maximum": 1000009},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": "number", "minimum": 1, "maximum": 9, "multipleOf": 2},
]

_FORMATS: list[Schema] = [
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time", "maxLength": 12},
    {"type": "string", "format": "date-time", "maxLength": 25},
    {"type": "string", "format": "email", "maxLength": 12},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "hostname", "maxLength": 8},
    closed(on=WORD, at={"type": "string", "format": "date"}),
]

_ENUMS: list[Schema] = [
    {"enum": ["red", "green", "blue"]},
    {"type": "string", "enum": ["on", "off"]},
    {"enum": [1, 2, 30]},
    {"enum": [1, "one", None, True, [1], {"a": 1}]},
    {"const": "fixed"},
    {"const": 42},
    {"const": {"a": [1, {"b": None}]}},
    {"const": 'a "quoted"\\ line\nand a tab\t'},
    closed(kind={"const": "point"}, x=DIGIT, y=DIGIT),
    {"enum": ["a/b", "a\\b", "%json", "{}"]},
    {"enum": ["<|im_end|>x", "<|im_start|>"]},
]

_NOT_ASCII: list[Schema] = [
    {"enum": ["€", "other"]},
    {"enum": ["—"]},
    {"enum": ["…"]},
    {"enum": ["½"]},
    {"enum": ["ł"]},
    {"enum": ["✓"]},
    {"enum": ["温度", "湿度"]},
    {"enum": ["👍", "👎"]},
    {"const": "größe in °C, año 2026"},
    {"const": "👩‍👩‍👧 ﷽ \u0301"},
    closed(温度=DIGIT),
    closed(größe=DIGIT, naïve={"const": "Ωμέγα"}),
    {"type": "object", "properties": {"🔥": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "string", "pattern": "^€[0-9]$"},
    {"type": "string", "pattern": "^[あ-ん]{3}$"},
    {"type": "string", "pattern": "^\\u20ac{2}$"},
    {"type": "string", "enum": ["Привет", "Пока"]},
    {"const": "\U0010ffff\u2028\u0000"},
]

_ARRAYS: list[Schema] = [
    _list(DIGIT, 2, 3),
    _list({"type": "boolean"}, 0, 2),
    _list(WORD, 1, 1),
    _list(_list(DIGIT, 1, 2), 1, 2),
    _list(closed(a=DIGIT), 2, 2),
    {"type": "array", "maxItems": 0},
    {"type": "array", "prefixItems": [DIGIT, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [WORD], "items": DIGIT, "minItems": 3, "maxItems": 3},
    {"type": "array", "items": {"enum": ["ä", "ö"]}, "minItems": 2, "maxItems": 2},
]

_OBJECTS: list[Schema] = [
    closed(name=WORD, ok={"type": "boolean"}),
    closed(a=closed(b=closed(c=closed(d=DIGIT)))),
    {"type": "object", "properties": {"a": DIGIT, "b": DIGIT, "c": DIGIT}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"a": DIGIT},
        "required": ["a", "b"],
        "additionalProperties": {"type": "null"},
        "maxProperties": 2,
    },
    {"type": "object", "additionalProperties": DIGIT, "minProperties": 1, "maxProperties": 1},
    {
        "type": "object",
        "patternProperties": {"^[a-c]$": DIGIT},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    },
    {
        "type": "object",
        "properties": {"id": DIGIT},
        "required": ["id"],
        "patternProperties": {"^é{2}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"type": "object", "maxProperties": 0},
    closed(**{"a b": DIGIT, 'q"': DIGIT, "back\\slash": DIGIT}),
]

_UNIONS: list[Schema] = [
    {"anyOf": [{"type": "boolean"}, DIGIT]},
    {"anyOf": [closed(cat=WORD), closed(dog=DIGIT)]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"oneOf": [closed(kind={"const": "a"}, v=DIGIT), closed(kind={"const": "b"}, w=DIGIT)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "additionalProperties": False,
    }
    | {"properties": {"a": True, "b": True}},
    closed(maybe={"anyOf": [WORD, {"type": "null"}]}),
    {
        "type": "object",
        "properties": {"a": DIGIT},
        "anyOf": [{"required": ["a"]}],
        "additionalProperties": False,
    },
]

_REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/digit", "$defs": {"digit": DIGIT}},
    {"$defs": {"p": closed(x=DIGIT)}} | closed(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"}),
    {"definitions": {"w": WORD}} | closed(w={"$ref": "#/definitions/w"}),
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/reading.json",
        "title": "Reading",
        "description": "What a sensor says",
        **closed(unit={"enum": ["°C", "°F"], "default": "°C"}, value={**DIGIT, "description": "rounded"}),
    },
    {"$defs": {"größe/a": DIGIT}, "$ref": "#/$defs/gr%C3%B6%C3%9Fe~1a"},
]

FOLLOWED: list[Schema] = [
    *_SCALARS,
    *_NUMBERS,
    *_FORMATS,
    *_ENUMS,
    *_NOT_ASCII,
    *_ARRAYS,
    *_OBJECTS,
    *_UNIONS,
    *_REFERENCES,
]

ENDLESS: list[Schema] = [
    {"type": "integer"},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "string"},
    {"type": "array"},
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "boolean"}}},
    {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
    {
        "$defs": {"node": closed(v=DIGIT, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
]
"""Schemas that the library follows, with answers of any length."""

UNSUPPORTED: list[Schema] = [
    {"not": {"type": "string"}},
    {"type": "array", "items": DIGIT, "uniqueItems": True},
    {"type": "array", "contains": DIGIT},
    {"if": {"type": "string"}, "then": {"maxLength": 3}},
    {"type": "object", "propertyNames": {"pattern": "^é"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "string", "format": "idn-email"},
    {"type": "string", "pattern": "^(?=.*[0-9])[a-z]+$"},
    {"type": "string", "pattern": "^(a)\\1$"},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2},
    {"$ref": "https://example.com/schema.json"},
]
"""Right schemas that the library cannot follow."""

WRONG: list[Schema] = [
    {"type": "nonsense"},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"enum": []},
    {"type": "string", "pattern": "["},
    {"$ref": "#/$defs/none"},
    {"type": "object", "properties": []},
]
"""Schemas that are wrong, or that no answer can satisfy."""
