"""The command line beside the running daemon, and without one."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.demo import SAMPLE_MODEL
from edge_agent.publishing.register import Published
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, wait_until
from tests.support.proxy import running_proxy
from tests.support.sample_device import settings_for
from tests.support.terminal import Terminal

ROOT = Path(__file__).parents[2]
JAPAN = "What is the capital of Japan?"
TOKYO = "The capital of Japan is Tokyo."


def test_probe_streams_the_answer_and_says_how_fast_it_was(agent: Daemon) -> None:
    result = agent.cli("probe", JAPAN)
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.strip().splitlines()
    assert first == TOKYO
    assert "first token" in last
    assert "tokens/s" in last
    assert "model assistant version 1" in last


def test_probe_json_is_one_document(agent: Daemon) -> None:
    document = json.loads(agent.cli("probe", "-", "--json", stdin=JAPAN).stdout)
    assert set(document) == {
        *("question", "answer", "model", "version", "flavor", "finish_reason", "usage"),
        *("queue_ms", "first_token_ms", "tokens_per_s"),
    }
    assert document["answer"] == TOKYO
    assert document["version"] == 1
    assert document["flavor"].startswith("onnxruntime-genai")


def test_probe_says_how_far_a_model_is_that_is_still_being_fetched(
    new_daemon: Callable[..., Daemon], broker: Broker, mlflow_server: Server, published: Published
) -> None:
    host, port = mlflow_server.uri.removeprefix("http://").split(":")
    with running_proxy(host, int(port)) as proxy:
        proxy.slow(20_000)
        device = new_daemon(settings_for(broker, f"http://{proxy.host}:{proxy.port}", device="newcomer"))
        device.start()
        wait_until(lambda: device.status()["models"][0]["progress"], 60, "the fetch")
        probe = device.cli("probe", JAPAN, "--json")
    assert (probe.returncode, probe.stdout) == (4, "")
    said = r"model 'assistant' is not here yet: fetching, \d+ % of [\d.]+ [kM]B(, [\d sminh]+ left)?\n"
    assert re.search(said, probe.stderr), probe.stderr


def test_probe_direct_needs_no_daemon(agent: Daemon) -> None:
    document = json.loads(agent.cli("probe", "--direct", "--json", JAPAN).stdout)
    assert document["answer"] == TOKYO


def test_chat_goes_on_from_what_was_said(agent: Daemon) -> None:
    result = agent.cli("chat", stdin=f"{JAPAN}\nAnd of Nepal?\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{TOKYO}\n")
    assert len(result.stdout.splitlines()) == 2


def test_chat_in_a_terminal_needs_a_folder_and_nothing_else(tmp_path: Path) -> None:
    """The real line editor and a real runner: one answer, a Ctrl-C that ends nothing, and the end."""
    with Terminal(["chat", "--direct", str(SAMPLE_MODEL)], home=tmp_path) as terminal:
        terminal.expect("/help")
        terminal.type(f"{JAPAN}\r")
        terminal.expect(TOKYO)
        terminal.expect(">>>")
        terminal.type("never sent\x03")
        terminal.expect("Ctrl-D")
        terminal.expect(">>>")
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert JAPAN in (tmp_path / ".local/state/edge-agent/chat-history").read_text()


def test_the_program_in_the_docs_gets_its_answer(agent: Daemon, broker: Broker, tmp_path: Path) -> None:
    """As it stands, but for where the broker is and what the device is called."""
    (code,) = re.findall(
        r"```python\n(import json, sys\n.*?)```", (ROOT / "docs/mqtt.md").read_text(), re.DOTALL
    )
    ours = f'"{broker.host}", {broker.port}, "{agent.config["device_id"]}"'
    told = code.replace('"localhost", 1883, "press-3"', ours)
    assert told != code
    program = tmp_path / "ask.py"
    program.write_text(told)
    done = subprocess.run(
        [sys.executable, str(program), JAPAN], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{TOKYO}\n"), done.stderr


def test_status_says_what_the_contract_says(agent: Daemon) -> None:
    printed = agent.cli("status", "--json")
    assert printed.returncode == 0, printed.stderr
    status = json.loads(printed.stdout)
    assert set(status) == set(agent.status())
    assert status["state"] == "ready"
    assert set(status["cache"]) >= {"bytes", "quota_bytes", "free_bytes"}
    assert status["registry"]["reachable"] is True
    assert status["broker"]["connected"] is True
    (model,) = status["models"]
    assert {"previous", "candidate", "pinned", "quarantined"} <= set(model)
    text = agent.cli("status").stdout
    assert "ready" in text
    assert "models:/sample@prod" in text


def test_models_list_show_and_verify(agent: Daemon) -> None:
    (version,) = json.loads(agent.cli("models", "list", "--json").stdout)
    assert set(version) == {"name", "version", "digest", "bytes", "state"}
    assert (version["name"], version["version"], version["state"]) == ("assistant", 1, "active")
    shown = json.loads(agent.cli("models", "show", "assistant", "--json").stdout)
    assert shown["versions"][0]["digest"] == version["digest"]
    verified = json.loads(agent.cli("models", "verify", "--json").stdout)
    assert verified["damaged"] == []
    assert verified["checked"] > 5
    assert "assistant" in agent.cli("models", "list").stdout
    assert "trust" in agent.cli("models", "show", "assistant").stdout


def test_pull_through_the_daemon_fetches_nothing_twice(agent: Daemon) -> None:
    result = agent.cli("models", "pull", "assistant", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["name"], document["version"], document["bytes_fetched"]) == ("assistant", 1, 0)


def test_pull_without_a_daemon_then_probe_direct(
    new_daemon: Callable[..., Daemon], broker: Broker, mlflow_server: Server, published: Any
) -> None:
    device = new_daemon(settings_for(broker, mlflow_server.uri, device="alone"))
    absent = device.cli("probe", "--direct", JAPAN)
    assert absent.returncode == 4
    assert "models pull" in absent.stderr
    pulled = device.cli("models", "pull")
    assert pulled.returncode == 0, pulled.stderr
    assert "assistant version 1: 1." in pulled.stdout
    assert "of" in pulled.stderr, "progress is shown"
    assert json.loads(device.cli("probe", "--direct", "--json", JAPAN).stdout)["answer"] == TOKYO


def test_without_a_daemon_the_exit_code_is_3(new_daemon: Callable[..., Daemon]) -> None:
    device = new_daemon({"models": {"assistant": {"uri": "models:/sample@prod"}}})
    probe = device.cli("probe", "Hello")
    assert probe.returncode == 3
    assert "edge-agent run" in probe.stderr
    status = device.cli("status", "--json")
    assert status.returncode == 3
    assert json.loads(status.stdout)["state"] == "offline"


def test_a_model_that_is_not_here_is_4_and_a_deadline_5(agent: Daemon) -> None:
    assert agent.cli("probe", "--model", "missing", "Hello").returncode == 4
    assert agent.cli("probe", "--timeout", "0.001", "Tell me a long story").returncode == 5


@pytest.mark.parametrize(
    "arguments",
    [("probe",), ("probe", "--timeout", "soon", "x"), ("models", "show"), ("nonsense",), ("publish", "x")],
)
def test_wrong_usage_is_2(agent: Daemon, arguments: tuple[str, ...]) -> None:
    assert agent.cli(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mqtt": {"port": 0}}, "mqtt.port"),
        ({"mqtt": {"prot": 1883}}, "mqtt.prot"),
        ({"models": {"assistant": {"uri": "phi3"}}}, "models.assistant.uri"),
        ({"device_id": "a/b"}, "device_id"),
        ({"limits": {"queue_depth": "many"}}, "limits.queue_depth"),
        ({"registry": {"uri": "127.0.0.1:5051"}}, "registry.uri"),
        ({"mqtt": {"ca_file": "/nonexistent.pem"}}, "mqtt.ca_file"),
    ],
)
def test_invalid_settings_are_78_and_the_key_is_named(
    new_daemon: Callable[..., Daemon], settings: dict[str, Any], key: str
) -> None:
    device = new_daemon(settings)
    result = device.cli("run")
    assert result.returncode == 78
    assert key in result.stderr


def test_a_misspelt_variable_is_an_error_too(new_daemon: Callable[..., Daemon]) -> None:
    device = new_daemon({}, env={"EDGE_AGENT_MQT__PORT": "1"})
    result = device.cli("run")
    assert result.returncode == 78
    assert "EDGE_AGENT_MQT__PORT" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        (),
        *(("run",), ("probe",), ("status",), ("publish",), ("demo",), ("doctor",), ("bench",), ("models",)),
        *(("models", name) for name in ("list", "show", "pull", "verify", "export", "import")),
    ],
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(agent: Daemon, command: tuple[str, ...]) -> None:
    text = agent.cli(*command, "--help").stdout
    assert "Example" in text
    assert "edge-agent" in text.split("Example")[1]


def test_a_lock_that_cannot_be_opened_is_a_clear_error(new_daemon: Callable[..., Daemon]) -> None:
    daemon = new_daemon({"mqtt": {"host": "127.0.0.1"}})
    (daemon.state_dir / "daemon.lock").mkdir(parents=True)  # for root, too, who may open every file
    result = daemon.cli("run")
    assert result.returncode == 1
    assert "daemon.lock cannot be opened" in result.stderr and "chown" in result.stderr
    assert "Traceback" not in result.stderr


def test_environment_overrules_the_file(new_daemon: Callable[..., Daemon], broker: Broker) -> None:
    device = new_daemon(
        {"mqtt": {"host": "127.0.0.1", "port": 1}}, env={"EDGE_AGENT_MQTT__PORT": str(broker.port)}
    )
    device.start()
    assert device.status()["broker"]["port"] == broker.port


def test_publish_registers_a_version_and_moves_the_alias(
    agent: Daemon, mlflow_server: Server, sample_model: Path
) -> None:
    arguments = (
        "publish",
        str(sample_model),
        "--name",
        "by-hand",
        "--registry",
        mlflow_server.uri,
        "--alias",
        "prod",
    )
    result = agent.cli(
        *arguments, "--option", "max_length=300", "--option", "temperature=0.2", "--json", timeout_s=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["version"] == 1
    assert "prune_lm_head=true" in result.stderr, "the sample is built in a slow way, and that is said"
    wrong = agent.cli("publish", "/nonexistent", "--name", "x", "--registry", mlflow_server.uri)
    assert wrong.returncode == 1
    assert "/nonexistent" in wrong.stderr
