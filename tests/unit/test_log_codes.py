"""Rules over the log match `code=`: every event that tells of a refusal or a failure has one, from a list that does not
change with its words. Read from the source, so that a new call cannot forget it."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent import logs
from edge_agent.errors import BrokerRefused, BrokerUnreachable
from edge_agent.transport.reconnect import Ending

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "edge_agent").rglob("*.py"))
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
REFUSALS = re.compile(
    r"refused|failed|not understood|put off|held|stopped model|dropped|undelivered|unheard|unreachable|answered|ended"
)
"""What an event of level INFO says where something did not come about, in this project's words."""
CODE = re.compile(r"(?:^| )code=(%s|[a-z][a-z0-9_]*)(?: |$)")


@dataclass(frozen=True)
class Event:
    """One call of a logger.

    Attributes:
        code: its place in the format, a word or `%s`; None without one.
        value: what is written there, as source.
    """

    where: str
    level: str
    text: str
    code: str | None
    value: str | None


def events() -> Iterator[Event]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("log", "logger")
            ):
                text = ast.literal_eval(node.args[0])
                found = CODE.search(text)
                value = None
                if found and found[1] == "%s":
                    number = len(re.findall(r"%[-+.0-9]*[a-z]", text[: found.start(1)]))
                    value = ast.unparse(node.args[1 + number])
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield Event(where, node.func.attr, text, found[1] if found else None, value)


EVENTS = list(events())


def test_the_calls_are_found() -> None:
    assert len(EVENTS) > 100
    assert {event.level for event in EVENTS} >= {"info", "warning", "error", "exception", "critical"}


def test_every_event_that_is_not_only_told_has_a_code() -> None:
    missing = [
        (event.where, event.text)
        for event in EVENTS
        if event.code is None and (event.level not in ("debug", "info") or REFUSALS.search(event.text))
    ]
    assert missing == []


def test_a_code_stands_in_front_of_whatever_an_event_quotes() -> None:
    """So that no reason can bring one of its own: what comes before it is from an allow-list of characters."""
    late = [
        (event.where, event.text)
        for event in EVENTS
        if event.code
        and ("%r" in event.text[: event.text.index("code=")] or "reason=" in event.text.split("code=")[0])
    ]
    assert late == []


def test_every_code_is_on_the_list() -> None:
    """A word is the code of an error or of `EVENT_CODES`; a variable is the `code` of an error or of what it became."""
    known = {*codes_of_errors(), *logs.EVENT_CODES}
    words = {event.code for event in EVENTS if event.code not in (None, "%s")}
    assert words - known == set()
    assert logs.EVENT_CODES - words == set(), "nothing says these"
    values = {event.value for event in EVENTS if event.value}
    assert {value for value in values if not re.fullmatch(r"[\w.]*\bcode", value or "")} == set()


def codes_of_errors() -> set[str]:
    """Those of all classes, wherever they are defined."""
    return {str(code) for path in SOURCES for code in codes_in(ast.parse(path.read_text()))}


def codes_in(tree: ast.AST) -> Iterator[object]:
    for kind in ast.walk(tree):
        for line in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(
                line.value, ast.Constant | ast.Tuple
            ):
                target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                if ast.unparse(target).strip("()") in ("code", "code, status"):
                    value = line.value.elts[0] if isinstance(line.value, ast.Tuple) else line.value
                    yield ast.literal_eval(value)


def test_the_page_says_what_each_code_means() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = set(re.findall(r"^\| `([a-z_]+)`(?: \(\d+\))? \|", page, re.MULTILINE))
    assert logs.EVENT_CODES - rows == set()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (Ending(lasted_s=1.0), BrokerUnreachable.code),
        (Ending(lasted_s=1.0, refused=True), BrokerRefused.code),
        (Ending(lasted_s=1.0, taken_over=True), "device_id_taken"),
    ],
)
def test_the_end_of_a_connection_has_a_code(ending: Ending, code: str) -> None:
    assert ending.code == code
    assert code in codes_of_errors()


@pytest.mark.parametrize(
    ("text", "arguments", "code"),
    [
        ("update failed model=%s code=%s reason=%r", ("a", "gate_failed", "x code=forged y"), "gate_failed"),
        ("blob set aside code=verification_failed digest=%s", ("00",), "verification_failed"),
        ("prompt starts request=%s", ("code",), None),
    ],
)
def test_an_event_in_json_has_its_code_as_a_key(
    text: str, arguments: tuple[str, ...], code: str | None
) -> None:
    record = logging.LogRecord("part", logging.WARNING, "", 0, text, arguments, None)
    document = json.loads(logs._JsonFormatter().format(record))
    assert document.get("code") == code
