"""The house's rules about imports, held against the source itself."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "edge_agent"
HEAVY = {
    *("mlflow", "numpy", "pandas", "onnxruntime", "onnxruntime_genai", "torch", "transformers"),
    *("starlette", "uvicorn", "prometheus_client", "jinja2"),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, at any depth; a `TYPE_CHECKING` block is no import."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
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


ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(rooms.split())
    for rooms in (
        "cli",
        "daemon device_status device_metrics",
        "doctor bench demo fleet gateway",
        "transport updates",
        "chat serving sync publishing",
        "runner cache",
        "owner private_broker",
        "settings",
        "package",
        "host",
        "metrics",
        "wrapper environment topics errors logs terminal sd_notify",
        "printable documents named_file",
    )
)
"""From the top down: a room imports what stands below it. Rooms in one line do not know each other."""
TOGETHER = {
    ("daemon", "device_status"),
    ("daemon", "device_metrics"),
    ("topics", "errors"),
    ("environment", "errors"),
}
"""Within one line, who knows whom all the same."""
APART = {("chat", "cache"), ("chat", "serving"), ("transport", "serving"), ("transport", "sync")}
"""Further down, and still none of its business: prompts do not know where models come from."""


def level(room: str) -> int:
    return next(number for number, rooms in enumerate(ORDER) if room in rooms)


def arrows() -> Iterator[tuple[str, str, str]]:
    """(file, its room, the room of something that it imports)."""
    for path in modules():
        name = str(path.relative_to(PACKAGE))
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(path):
            parts = module.split(".")
            if parts[0] != "edge_agent" or len(parts) < 2 or not is_room(parts[1]) or parts[1] == room:
                continue
            yield name, room, parts[1]


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_every_room_has_its_place() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert found - {"__init__", "__main__"} == frozenset().union(*ORDER)


def test_nothing_imports_upwards() -> None:
    found = list(arrows())
    assert len(found) > 300, "the imports were not found"
    wrong = {
        f"{name} -> {other}"
        for name, room, other in found
        if room != "__main__"
        and (room, other) not in TOGETHER
        and (level(other) <= level(room) or (room, other) in APART)
    }
    assert wrong == set()


def test_of_a_runner_prompts_know_the_protocol_only() -> None:
    names = {
        module
        for path in (PACKAGE / "chat").glob("*.py")
        for module in imports(path)
        if module.startswith("edge_agent.runner.")
    }
    assert names
    assert {".".join(name.split(".")[:3]) for name in names} == {"edge_agent.runner.protocol"}


def test_no_room_is_overcrowded() -> None:
    folders = {path.parent for path in modules()}
    assert {
        str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py")))
        for folder in folders
        if len(list(folder.glob("*.py"))) > 20
    } == {}


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        (
            "paho",
            {
                "transport/connection.py",
                "transport/paho_client.py",
                "fleet/connection.py",
                "transport/command_connection.py",
                "demo/__init__.py",
                "bench/mqtt_client.py",
            },
        ),
        (
            "onnxruntime_genai",
            {"wrapper/genai_pyfunc.py", "runner/capability.py", "bench/bare.py"},
        ),
        (
            "transformers",
            {"runner/transformers_flavor.py", "runner/capability.py"},
        ),
        ("torch", {"runner/transformers_flavor.py"}),
        ("sqlite3", {"chat/journal_file.py"}),
        (
            "starlette",
            {"gateway/app.py", "gateway/answers.py", "gateway/guard.py", "gateway/page/__init__.py"},
        ),
        ("jinja2", {"gateway/page/rendering.py"}),
        ("uvicorn", {"gateway/server.py", "gateway/connection.py"}),
        ("h11", {"gateway/connection.py"}),
        ("prometheus_client", {"gateway/prometheus.py"}),
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
    own_processes = {"sync/registry/__init__.py", "publishing/register.py", "publishing/trial.py"}
    assert users - own_processes - {"bench/bandwidth.py"} == {"environment.py"}


def imported(*modules: str, path: str = "") -> set[str]:
    """What a process has once it has imported these: modules, and the packages that they are of.

    Args:
        path: a folder with more packages.
    """
    program = (
        f"import sys; sys.path.append({path!r}); import {', '.join(modules)};"
        "print(*{name.split('.')[0] for name in sys.modules}, *(n for n in sys.modules if '.' in n))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return set(result.stdout.split())


def test_the_daemon_imports_nothing_heavy() -> None:
    assert imported("edge_agent.cli", "edge_agent.daemon", "edge_agent.doctor") & HEAVY == set()


def test_the_daemon_imports_nothing_that_fetches() -> None:
    """It lives for months, and what it has imported stays in memory; a sync takes seconds."""
    names = imported("edge_agent.cli.run", "edge_agent.daemon")
    assert {"edge_agent.daemon", "edge_agent.sync.process", "pydantic", "paho"} <= names
    assert (
        names & {"requests", "urllib3", "certifi", "edge_agent.sync.bring", "edge_agent.sync.registry"}
        == set()
    )


def test_the_daemon_imports_neither_an_event_loop_nor_the_other_commands() -> None:
    names = imported("edge_agent.cli.run", "edge_agent.daemon")
    assert names & {"asyncio", "pydantic_settings", "rich", "prompt_toolkit", "cryptography", "yaml"} == set()
    of_commands = {name for name in names if name.startswith(("edge_agent.cli.", "edge_agent.fleet"))}
    assert of_commands == {"edge_agent.cli.command", "edge_agent.cli.run"}


def test_the_daemon_imports_no_dns_library_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "dns").mkdir()
    for file in ("__init__.py", "resolver.py"):
        (tmp_path / "dns" / file).touch()
    names = imported("edge_agent.daemon", path=str(tmp_path))
    assert "paho.mqtt.client" in names
    assert "dns" not in names, "paho would"
    assert "dns" in imported("edge_agent.daemon", "dns.resolver", path=str(tmp_path)), "others may"
    assert "dns.resolver" in imported("paho.mqtt.client", path=str(tmp_path)), "and paho by itself does"


def test_a_side_of_the_benchmark_does_not_carry_the_benchmark() -> None:
    program = (
        "import sys, edge_agent.bench.confined, edge_agent.bench.llama_cpp;"
        "print(sorted({'pydantic', 'http', 'edge_agent.settings', 'edge_agent.runner'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_the_gateway_imports_what_makes_its_page_when_that_is_asked_for() -> None:
    names = imported("edge_agent.cli.serve", "edge_agent.gateway")
    assert {"starlette", "uvicorn", "edge_agent.gateway.page"} <= names
    assert {name for name in names if "jinja" in name or name.startswith("edge_agent.gateway.page.")} == set()


def test_the_gateway_imports_what_writes_metrics_when_they_are_asked_for() -> None:
    names = imported("edge_agent.cli.serve", "edge_agent.gateway")
    assert (
        names & {"prometheus_client", "edge_agent.metrics", "pydantic_settings", "paho", "sqlite3"} == set()
    )


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
