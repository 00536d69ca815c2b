"""Good documents with a wound: near enough to pass most checks, and wrong in one place."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**30, -(10**400), math.inf, -math.inf, math.nan, 1e308),
    *(
        "",
        " ",
        "0",
        "x" * 5000,
        "\0",
        "\x1b[2J\x07",
        "\x9b31m",
        "\u202eabc",
        "\u2028",
        "\ud800",
        "\ufffd",
        "１",
    ),
    *("..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a//b", "a\\b", "file:///etc/passwd", "C:\\x"),
    *(
        "http://169.254.169.254/latest",
        "-r /dev/zero",
        "{{ 7 * 7 }}",
        "__class__",
        "!!python/object:os.system",
    ),
    *([], {}, [None], [[]], {"": ""}, {"a": {"a": {"a": {}}}}, ["x"] * 3000),
)
_ODD = st.sampled_from(ODD_VALUES).map(copy.deepcopy)  # what it goes into is changed
_BYTES = st.sampled_from(
    [
        b"",
        b"\0",
        b'"',
        b"{",
        b"]",
        b",",
        b":",
        b"\n",
        b"- ",
        b"&a *a",
        b"\xff",
        b"\\u0000",
        b"9" * 400,
        b"[" * 2000,
    ]
)

Place = tuple[str | int, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where a document has a value, itself included."""
    yield place
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*place, key))


@st.composite
def wounded(draw: st.DrawFn, good: Any) -> Any:
    """A copy of a JSON document in which one or two values are odd, missing or under another key."""
    document = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(sorted(places(document), key=repr)))
        if not place:
            document = draw(st.one_of(_ODD, st.just(document)))
            continue
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["value", "value", "value", "missing", "more", "key"]))
        if kind == "value":
            parent[place[-1]] = draw(_ODD)
        elif kind == "missing":
            del parent[place[-1]]
        elif isinstance(parent, dict):
            value = parent.pop(place[-1]) if kind == "key" else draw(_ODD)
            parent[str(draw(_ODD))[:100]] = value
        else:
            parent.extend([draw(_ODD)] * 3)
    return document


def encoded(document: Any) -> bytes:
    """JSON as Python writes it, `Infinity`, lone surrogates and all."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


@st.composite
def torn(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with one or two wounds: something else inside, a part missing, a part twice, or the end gone."""
    data = good
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        kind = draw(st.sampled_from(["inside", "inside", "twice", "cut"]))
        if kind == "inside":
            inside = draw(st.one_of(_BYTES, st.binary(max_size=6), _ODD.map(_shown)))
            data = data[:start] + inside + data[end:]
        elif kind == "twice":
            data = data[:end] + data[start:end] * draw(st.sampled_from([1, 100])) + data[end:]
        else:
            data = data[:start]
    return data


def _shown(value: Any) -> bytes:
    return encoded(value) if not isinstance(value, str) else value.encode("utf-8", "surrogatepass")
