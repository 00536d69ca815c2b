"""docs/operating.md says what to do about every state and code that the program has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import edge_agent
from edge_agent import device_status
from edge_agent.cache.state import ModelState
from edge_agent.cli import command
from edge_agent.device_status import troubles
from edge_agent.errors import PromptError, by_code
from edge_agent.metrics.families import FAMILIES
from edge_agent.serving.seat import Serving
from tests.support.committed import fault

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text("utf-8")


def described(section: str) -> set[str]:
    """What stands first in the rows of a section's tables."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^\| `?(\w+)`?(?: \(\d+\))? \|", text, re.MULTILINE))


def test_every_state_is_on_the_page() -> None:
    returns = [node for node in ast.walk(status_function("_state")) if isinstance(node, ast.Return)]
    of_the_device = {"offline", *strings(returns)}
    assert of_the_device == {"starting", "ready", "degraded", "offline"}, "the words of docs/mqtt.md"
    model = ModelState(active="a", previous="b", candidate="c", quarantined={"d": fault("")}, pinned="e")
    of_a_version = {model.role(key) for key in "abcdef"}
    assert len(of_a_version) == 6
    assert of_the_device | of_a_version | set(Serving) == described("States") - {"state"}


def test_everything_to_look_at_is_on_the_page() -> None:
    section = PAGE[PAGE.index("## States") : PAGE.index("## Exit codes")]
    rows = [line for line in section.splitlines() if re.match(r"\| `[^`]+` \| `\w+` \|", line)]
    found = list(codes_of_troubles())
    assert len(found) == len(rows) - 2, "the broker's have a class each"
    for code, text in found:
        assert [line for line in rows if line.startswith(f"| `{text}") and f"` | `{code}` |" in line], code


def codes_of_troubles() -> Iterator[tuple[str, str]]:
    """(code, how its text begins)."""
    for function in tree_of(Path(troubles.__file__)):
        if not isinstance(function, ast.FunctionDef):
            continue
        texts = {
            ast.unparse(node.targets[0]): node for node in ast.walk(function) if isinstance(node, ast.Assign)
        }
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Trouble":
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                if isinstance(given["code"], ast.Constant):
                    text = texts.get(ast.unparse(given["text"]), given["text"])
                    yield str(given["code"].value), next(strings([text])).strip(" (:")


def test_every_error_code_is_on_the_page() -> None:
    codes = {"internal"}
    for path in sorted(Path(edge_agent.__file__).parent.rglob("*.py")):
        for kind in tree_of(path):
            if isinstance(kind, ast.ClassDef):
                codes |= {code for node in kind.body for code in assigned_codes(node)}
    assert set(by_code(PromptError)) < codes
    assert len(codes) > 25
    assert codes == described("Error codes") - {"code"}


def test_every_metric_is_on_the_page_with_its_kind() -> None:
    assert {family.full_name for family in FAMILIES} == described("Metrics") - {"metric"}
    for family in FAMILIES:
        assert f"| `{family.full_name}` | {family.kind} |" in PAGE


def status_function(name: str) -> ast.FunctionDef:
    (function,) = [
        node
        for node in tree_of(Path(device_status.__file__))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return function


def tree_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8")))


def strings(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        for value in ast.walk(node):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def assigned_codes(node: ast.stmt) -> Iterator[str]:
    """The string of `code = "…"` and of `code, status = "…", 400` in a class."""
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
        "code",
        "(code, status)",
        "code, status",
    ):
        yield from strings([node.value])


def test_every_exit_code_is_on_the_page() -> None:
    constants = {
        command.FAILED,
        command.NOT_RUNNING,
        command.NO_MODEL,
        command.TIMED_OUT,
        command.INVALID_SETTINGS,
    }
    commands = Path(command.__file__).parent.glob("*.py")
    interrupted = {
        int(code) for file in commands for code in re.findall(r"sys\.exit\((\d+)\)", file.read_text("utf-8"))
    }
    assert interrupted
    of_systemd = {"watchdog", "timeout", "203", "217", "238", "243"}
    known = {str(code) for code in {0, 2, *constants, *interrupted}}
    assert known == described("Exit codes") - {"code"} - of_systemd
