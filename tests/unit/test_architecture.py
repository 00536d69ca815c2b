"""The house's rules about imports, held against the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "edge_agent"
HEAVY = {"mlflow", "numpy", "pandas", "onnxruntime", "onnxruntime_genai", "torch", "transformers"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth; a `TYPE_CHECKING` block is no import."""
    tree = ast.parse(path.read_text("utf-8"))
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_by(folder: str) -> dict[str, set[str]]:
    return {str(path.relative_to(PACKAGE)): set(imports(path)) for path in (PACKAGE / folder).rglob("*.py")}


@pytest.mark.parametrize(("folder", "other"), [("chat", "edge_agent.models"), ("models", "edge_agent.chat")])
def test_prompts_and_models_do_not_know_each_other(folder: str, other: str) -> None:
    found = imported_by(folder)
    assert found
    assert {
        name for name, names in found.items() if any(module.startswith(other) for module in names)
    } == set()


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        (
            "paho",
            {"transport/mqtt.py", "demo/__init__.py", "doctor/broker.py", "bench/mqtt_client.py"},
        ),
        (
            "onnxruntime_genai",
            {"wrapper/genai_pyfunc.py", "runner/capability.py", "demo/make_sample_model.py", "bench/bare.py"},
        ),
        (
            "transformers",
            {"runner/transformers_flavor.py", "runner/capability.py", "demo/make_sample_model.py"},
        ),
        ("torch", {"runner/transformers_flavor.py", "demo/make_sample_model.py"}),
        ("sqlite3", {"chat/journal_file.py"}),
    ],
)
def test_a_library_has_its_owners(package: str, owners: set[str]) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }
    assert users <= owners
    assert users


def test_the_environment_is_read_in_one_place() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if "os.environ" in path.read_text("utf-8") or "os.getenv" in path.read_text("utf-8")
    }
    own_processes = {"sync/registry.py", "sync/bring.py", "publishing/register.py", "publishing/trial.py"}
    assert users - own_processes - {"demo/make_sample_model.py", "bench/bandwidth.py"} == {"settings.py"}


def test_the_daemon_imports_nothing_heavy() -> None:
    parts = "edge_agent.cli, edge_agent.daemon, edge_agent.doctor"
    program = f"import sys, {parts}; print(sorted(set(sys.modules) & {HEAVY!r}))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_nothing_unpickles() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(
            name.split(".")[0] in ("pickle", "cloudpickle", "marshal", "shelve", "dill")
            for name in imports(path)
        )
    }
    assert users == set()
