"""A device with the real model that `./build.sh real-model` makes, and the answers that each prompt gets alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing import publish_folder
from edge_agent.publishing.package import build_package
from tests.real.prompts import PROMPTS
from tests.support.client import Client, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon
from tests.support.sample_device import settings_for, wait_for_state
from tests.support.wrapper import ask, forget, load, user

NAME = "smollm2"
NEW_TOKENS = 24
THREADS = 1
"""The same for all sides of a comparison."""
_WAYS = pytest.StashKey[dict[str, str]]()
_SCHEMAS = {
    "test_a_finished_answer_is_valid": "answers that ended by themselves, and are valid",
    "test_an_answer_without_end_is_cut_and_one_with_an_end_is_valid": "answers without a bound, valid or cut",
    "test_what_the_library_cannot_follow_is_refused_before_the_first_token": "refused before the first token",
    "test_a_wrong_schema_is_the_clients_mistake": "refused as the client's mistake",
}


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, str]:
    """Rows of the table at the end of the run: what was measured → how it came out."""
    return request.config.stash.setdefault(_WAYS, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cases: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if report.when != "call" or not report.nodeid.startswith("tests/real/"):
                continue
            file, _, test = report.nodeid.partition("::")
            for row in (f"cases in {Path(file).name}", _SCHEMAS.get(test.partition("[")[0], "")):
                cases[row] += outcome == "passed"
                cases[f"{row}, all"] += 1
    rows = {
        row: f"{count} of {cases[f'{row}, all']}" for row, count in cases.items() if f"{row}, all" in cases
    }
    rows.pop("", None)
    measured: dict[str, str] = config.stash.get(_WAYS, {})
    if rows:
        terminalreporter.section("the real model")
    for row, outcome in {**rows, **measured}.items():
        terminalreporter.line(f"{row:<52} {outcome:>24}")


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> Path:
    """The recommended int4 folder."""
    folder = Path(request.config.getoption("--real-model")) / "onnx"
    assert (folder / "genai_config.json").is_file(), f"no real model in {folder}"
    return folder


@pytest.fixture(scope="session")
def wrapper(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The packaged model in this process, as any MLflow program loads it."""
    folder = tmp_path_factory.mktemp("real") / "package"
    package = build_package(real_model, folder, name=NAME, signature="chat", options={})
    return load(package.folder, threads=THREADS, context_tokens=2048, kv_bytes=512 << 20)


@pytest.fixture(scope="session")
def alone(wrapper: Any) -> tuple[str, ...]:
    """What each prompt gets from a model that has nothing in mind."""
    answers = []
    for prompt in PROMPTS:
        forget(wrapper)
        answers.append(ask(wrapper, user(prompt), max_tokens=NEW_TOKENS).text)
    return tuple(answers)


@pytest.fixture(scope="session")
def device(real_model: Path, mlflow_server: Server, broker: Broker) -> Iterator[Daemon]:
    """The real daemon with the real model, from a real registry."""
    publish_folder(real_model, name=NAME, registry_uri=mlflow_server.uri, alias="prod")
    settings = settings_for(broker, mlflow_server.uri, device="real", inference={"threads": THREADS})
    settings["models"] = {"assistant": {"uri": f"models:/{NAME}@prod"}}
    with running_daemon(settings) as daemon:
        wait_for_state(daemon, "ready", 300)
        yield daemon


@pytest.fixture
def client(broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(broker, device="real") as running:
        yield running
