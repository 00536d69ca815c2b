"""Lines of JSON, however their bytes are cut; none is ever longer than its bound."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import EdgeAgentError
from edge_agent.runner.lines import LineReader


def reader(limit_bytes: int = 100) -> LineReader:
    return LineReader(
        limit_bytes=limit_bytes, broken=lambda reason: EdgeAgentError(f"the child wrote {reason}")
    )


def documents(lines: LineReader) -> list[dict[str, Any]]:
    found = []
    while (document := lines.document()) is not None:
        found.append(document)
    return found


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2), max_size=8),
    st.lists(st.integers(1, 30), max_size=40),
)
def test_documents_are_found_however_the_bytes_are_cut(sent: list[dict[str, str]], cuts: list[int]) -> None:
    data = b"".join(json.dumps(document).encode() + b"\n" for document in sent)
    lines, found = reader(1_000), []
    for cut in [*cuts, len(data)]:
        lines.add(data[:cut])
        data = data[cut:]
        found += documents(lines)
    assert found == sent


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["not whole", "whole"])
def test_a_line_over_the_bound_is_refused_before_it_is_whole_and_after(end: bytes) -> None:
    lines = reader(10)
    lines.add(b"1234567890" + b"\n")
    assert lines.line() == b"1234567890"
    lines.add(b"12345678901" + end)
    with pytest.raises(EdgeAgentError, match=r"the child wrote a line of more than 10 bytes"):
        lines.line()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\x80\x04", "not JSON"),
        (b"[" * 90, "not JSON"),
        (b'{"deadline_ms": NaN}', "not JSON"),
        (b'{"deadline_ms": -Infinity}', "not JSON"),
        (b'{"a": [1e999]}', "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
    ],
)
def test_a_line_that_is_no_object_is_refused_with_its_reason(line: bytes, reason: str) -> None:
    lines = reader()
    lines.add(line + b"\n")
    with pytest.raises(EdgeAgentError, match=f"the child wrote a line that is {reason}"):
        lines.document()


def test_json_that_is_nested_too_deep_is_refused_like_any_other_line() -> None:
    lines = reader(1 << 20)
    lines.add(b'{"a":' * 100_000 + b"\n")
    with pytest.raises(EdgeAgentError, match="not JSON"):
        lines.document()
