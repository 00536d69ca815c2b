"""Generated messages near the contract, for tests of everything that reads one. The same ones in every run."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

LIMIT_BYTES = 102_400


CORPUS = "PYTEST_ATTACK_CORPUS"
"""The environment's name for the folder in which `./build.sh attack` keeps what got through."""
tried = 0
"""Generated inputs, so far."""


def examples(number: int) -> Callable[[Any], Any]:
    """The same `number` examples each time, however slow the host is; other ones each time in `./build.sh attack`,
    after those that got through before."""
    corpus = os.environ.get(CORPUS)
    chosen = settings(
        max_examples=number,
        derandomize=corpus is None,
        database=DirectoryBasedExampleDatabase(corpus) if corpus else None,
        deadline=None,
        phases=[Phase.explicit, *([Phase.reuse] if corpus else []), Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    def counted(test: Any) -> Any:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def count(*args: Any, **kwargs: Any) -> None:
            global tried
            tried += 1
            inner(*args, **kwargs)

        test.hypothesis.inner_test = count
        return chosen(test)

    return counted


_characters = st.characters(codec="utf-8", exclude_characters="\0")
_words = st.sampled_from(
    ["", " ", "Hello", "What is the capital of Spain?", "\u00e9\U0001f34e", "<|end|>", "a\0b"]
)
_texts = st.one_of(_words, st.text(_characters, max_size=12), st.text(max_size=3))
_numbers = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5, -0.0, 1e308, 1 << 31, 1 << 63, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=False, allow_infinity=False),
)
_odd = st.one_of(st.none(), st.booleans(), _numbers, _texts, st.just([]), st.just({}), st.just([None]))
_parts = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.sampled_from(["text", "text", "image_url"]), "text": _texts}), _odd
    ),
    max_size=3,
)
_names = st.one_of(st.sampled_from(["a", "b"]), _odd)
_functions = st.fixed_dictionaries(
    {"name": _names},
    optional={
        "description": _texts,
        "parameters": st.one_of(
            st.sampled_from(
                [
                    {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
                    {"properties": {"x": {"not": {}}}},
                    {"properties": {"x": {"$ref": "#/$defs/x"}}},
                    {"type": "string"},
                ]
            ),
            _odd,
        ),
        "strict": st.one_of(st.booleans(), _odd),
    },
)
_tools = st.one_of(
    st.lists(
        st.builds(lambda f: {"type": "function", "function": f}, st.one_of(_functions, _odd)), max_size=3
    ),
    _odd,
)
_choices = st.one_of(
    st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "a"}}]), _odd
)
_calls = st.one_of(
    st.lists(
        st.fixed_dictionaries(
            {
                "id": st.one_of(st.just("c1"), _odd),
                "type": st.just("function"),
                "function": st.fixed_dictionaries(
                    {
                        "name": _names,
                        "arguments": st.one_of(st.sampled_from(["{}", '{"x": 1}', "[]", "{"]), _odd),
                    }
                ),
            }
        ),
        max_size=2,
    ),
    _odd,
)
_message = st.one_of(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "assistant", "developer"]),
            "content": st.one_of(_texts, _parts),
        }
    ),
    st.fixed_dictionaries(
        {"role": st.one_of(st.just("user"), _odd), "content": st.one_of(_texts, _odd)},
        optional={"name": st.one_of(_texts, _odd), "tool": _odd, "tool_calls": _calls},
    ),
    _odd,
)
_called = st.builds(
    lambda calls, answer: [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": answer, "content": "done"},
    ],
    _calls,
    st.one_of(st.just("c1"), _odd),
)
_messages = st.one_of(
    _called,
    st.lists(_message, min_size=1, max_size=3),
    st.just([{"role": "user", "content": "Hello"}]),
    st.builds(lambda count: [{"role": "user", "content": "x"}] * count, st.sampled_from([0, 256, 257])),
    _odd,
)


def nested(depth: int, *, objects: bool) -> Any:
    """A value inside `depth` lists or objects."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if objects else [value]
    return value


_deep = st.builds(nested, st.sampled_from([1, 5, 40, 200, 600]), objects=st.booleans())
_formats = st.one_of(
    st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "regex", "regex": "(yes|no)"},
            {"type": "regex", "regex": "(("},
            {"type": "regex", "regex": "a\0"},
            {"type": "regex"},
            {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}},
            {"type": "json_schema", "json_schema": {"schema": {"type": 3}}},
            {"type": "json_schema", "json_schema": []},
            {"type": "xml"},
            {"type": []},
        ]
    ),
    st.builds(lambda value: {"type": "json_schema", "json_schema": {"schema": {"enum": value}}}, _deep),
    _odd,
)
_ids = st.one_of(st.sampled_from(["r-1", "r-2", "A.b_c"]), _odd)
reply_topics = st.sampled_from(
    [
        *("replies/a", "replies/a/b", "edge/v1/dev/rsp/x", "replies/", "replies"),
        *("replies/+/x", "replies/#", "$SYS/x", "$share/g/replies/a", "elsewhere", "", "/", "replies/\u00e9"),
        *("edge/v1/dev/req/chat", "edge/v1/dev/ctl/cancel", "edge/v1/dev/status", "edge/v1/other/req/chat"),
        *("edge/v1/dev/rsp/a/b/c/d/e", "replies/" + "/" * 9, "replies/" + "x" * 300, "replies/a\0b"),
    ]
)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": _numbers,
    "top_p": _numbers,
    "top_k": _numbers,
    "seed": _numbers,
    "repetition_penalty": _numbers,
    "max_completion_tokens": st.one_of(st.sampled_from([1, 4, 4.0]), _odd),
    "user": st.one_of(_texts, _odd),
    "stream_options": st.one_of(st.just({"include_usage": True}), _odd),
    "logprobs": st.one_of(st.just(False), _odd),
    "frequency_penalty": st.one_of(st.just(0), _odd),
    "presence_penalty": st.one_of(st.just(0.0), _odd),
    "stop": st.one_of(_texts, st.lists(st.one_of(_texts, _odd), max_size=3), st.just(["x"] * 17), _odd),
    "n": st.one_of(st.just(1), _odd),
    "stream": st.one_of(st.booleans(), _odd),
    "response_format": _formats,
    "tools": _tools,
    "tool_choice": _choices,
    "parallel_tool_calls": st.one_of(st.booleans(), _odd),
    "model": st.one_of(st.sampled_from(["assistant", "missing"]), _odd),
    "id": _ids,
    "reply_to": st.one_of(reply_topics, _odd),
    "deadline_ms": st.one_of(st.sampled_from([1, 500, 5000, 0, -1, 10**12]), _odd),
    "colour": _odd,
    "\udc80": _odd,
}
_short = st.one_of(st.integers(1, 4), st.just(1 << 21), st.just(1 << 20), _odd)


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    """Near the contract: the content is mostly good, and each field may be wrong in many ways."""
    document: dict[str, Any] = {}
    if draw(st.integers(0, 9)) < 8:
        document["messages"] = draw(_messages)
    else:
        document["prompt"] = draw(st.one_of(_texts, _odd))
        if draw(st.integers(0, 9)) == 0:
            document["messages"] = draw(_messages)
    for name in draw(st.lists(st.sampled_from(sorted(_fields)), max_size=3, unique=True)):
        document[name] = draw(_fields[name])
    document["max_tokens"] = draw(st.integers(1, 4)) if draw(st.integers(0, 9)) < 9 else draw(_short)
    return document


_broken = st.sampled_from(
    [
        *(
            b"",
            b" \r\n",
            b"{",
            b"{}",
            b"{}{}",
            b'{"prompt":',
            b'{"prompt":NaN}',
            b'{"prompt":"a","prompt":"b"}',
        ),
        *(
            b"\xff\xfe",
            b'{"prompt":"\xff"}',
            b"\xef\xbb\xbf{}",
            b"a\0b",
            b"[1]",
            b"null",
            b'"x"',
            b"\xed\xa0\x80",
        ),
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"x","temperature":1e999}',
        b'{"prompt":"x","temperature":' + b"9" * 400 + b"}",
        b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"x" * LIMIT_BYTES,
        b"x" * (LIMIT_BYTES + 1),
        b'{"prompt":"' + b"x" * LIMIT_BYTES + b'"}',
    ]
)


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Mostly JSON objects near the contract; also damaged ones, broken ones, texts and raw bytes."""
    kind = draw(st.integers(0, 19))
    if kind < 14:
        return json.dumps(draw(objects()), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind < 16:
        whole = json.dumps(draw(objects())).encode()
        place = draw(st.integers(0, len(whole)))
        return whole[:place] + draw(st.binary(max_size=3)) + whole[place + draw(st.integers(0, 3)) :]
    if kind < 17:
        return draw(_broken)
    return draw(st.one_of(_texts.map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=40)))


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What a message carries beside its body."""

    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None
    qos: int
    retained: bool


@st.composite
def properties(draw: st.DrawFn) -> Properties:
    return Properties(
        response_topic=draw(st.one_of(st.none(), reply_topics)),
        correlation=draw(
            st.one_of(st.none(), st.sampled_from([b"", b"r-1", b"\xff\0"]), st.binary(max_size=100))
        ),
        expiry_s=draw(st.one_of(st.none(), st.integers(0, 5), st.just(0xFFFF_FFFF))),
        qos=draw(st.integers(0, 1)),
        retained=draw(st.integers(0, 9)) == 0,
    )
