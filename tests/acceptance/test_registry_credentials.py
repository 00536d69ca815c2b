"""A registry that lets nobody in without credentials: the real one behind a proxy that asks for them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator

import pytest

from edge_agent import settings as settings_module
from edge_agent.doctor import registry as registry_check
from edge_agent.doctor.finding import Level
from tests.support.doctor import contents, doctor
from tests.support.http_faults import FaultyProxy, faulty_proxy
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import (
    Commands,
    Daemon,
    free_port,
    running_daemon,
    short_folder,
    wait_until,
)
from tests.support.sample_device import settings_for, wait_for_state

RIGHT, WRONG = "planted-right-token", "planted-wrong-token"
USER, PASSWORD = "press-3", "planted-password"
BASIC = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"


@pytest.fixture
def guarded(mlflow_server: Server, published: object) -> Iterator[FaultyProxy]:
    with faulty_proxy(mlflow_server.host, mlflow_server.port) as proxy:
        proxy.authorization = f"Bearer {RIGHT}"
        yield proxy


def pull(daemon: Daemon) -> tuple[int, str]:
    result = daemon.cli("models", "pull", timeout_s=120)
    return result.returncode, result.stdout + result.stderr


def test_the_token_of_the_service_opens_the_registry_and_is_seen_nowhere(
    guarded: FaultyProxy, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with short_folder() as folder:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
        config = settings_for(broker, guarded.uri, device="guarded")
        env = {"CREDENTIALS_DIRECTORY": str(folder)}
        with running_daemon(config, folder=folder, env=env) as daemon:
            seen = [check_refused(daemon)]
            token = folder / "mlflow-tracking-token"
            token.write_text(f"{WRONG}\n")
            seen.append(check_refused(daemon))
            assert guarded.refused >= 4, "each of them was turned away"
            wait_until(lambda: not daemon.status()["registry"]["asking"], 60, "the daemon's own checks")
            token.write_text(f"{RIGHT}\n")
            before, commands = guarded.refused, Commands(daemon)
            with commands:
                code, said = pull(daemon)
            assert code == 0, said
            wait_for_state(daemon, "ready")
            assert daemon.status()["registry"]["problem"] == ""
            code, found = doctor(daemon, "--bundle", str(folder / "support.tar.gz"))
            assert (code, found["registry.reach"]["level"]) == (0, "ok"), found
            assert guarded.refused == before
            seen += [said, json.dumps(found), json.dumps(daemon.status())]
            daemon.stop()
            seen += [daemon.log, contents(folder / "support.tar.gz")]
    assert any("-m edge_agent.sync." in line for line in commands.seen), "the process with the token was seen"
    assert [text for text in (*seen, *commands.seen) if RIGHT in text or WRONG in text] == []


def check_refused(daemon: Daemon) -> str:
    """The command and doctor say that the registry refuses, and what to do; gives all that they said."""
    code, said = pull(daemon)
    assert code == 1
    assert "refuses this device" in said and "/etc/credstore/mlflow-tracking-token" in said
    (finding,) = registry_check.check(settings_module.load(daemon.config_file))
    assert (finding.check, finding.level, finding.code) == (
        "registry.reach",
        Level.FAIL,
        "registry_refused",
    )
    registry = daemon.status()["registry"]
    assert (registry["reachable"], registry["problem"]) == (True, "registry_refused"), registry
    assert "refuses this device, last asked" in daemon.cli("status").stdout
    assert "mlflow-tracking-token" in finding.remedy
    return f"{said}{finding}"


def test_mlflows_own_variables_open_it_where_there_is_no_service(
    guarded: FaultyProxy, broker: Broker, new_daemon: Callable[..., Daemon]
) -> None:
    guarded.authorization = BASIC
    device = new_daemon(settings_for(broker, guarded.uri, device="variables"))
    device.env = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": WRONG}
    assert pull(device)[0] == 1
    device.env["MLFLOW_TRACKING_PASSWORD"] = PASSWORD
    assert pull(device)[0] == 0


@pytest.mark.parametrize("token", [f"{RIGHT}\nand more", f"{RIGHT}…"], ids=["two lines", "not ASCII"])
def test_a_token_that_cannot_be_sent_is_refused_before_a_library_quotes_it(
    guarded: FaultyProxy, broker: Broker, new_daemon: Callable[..., Daemon], token: str
) -> None:
    device = new_daemon(settings_for(broker, guarded.uri, device="unsendable"))
    device.env = {"MLFLOW_TRACKING_TOKEN": token}
    code, said = pull(device)
    assert (code, "MLFLOW_TRACKING_TOKEN" in said) == (78, True), said
    assert (RIGHT in said, guarded.refused) == (False, 0)


def test_a_gateway_that_refuses_in_words_of_its_own_is_told_from_the_registry(
    guarded: FaultyProxy, broker: Broker, new_daemon: Callable[..., Daemon]
) -> None:
    guarded.refusal = (401, b'{"message": "Unauthorized"}')
    device = new_daemon(settings_for(broker, guarded.uri, device="gateway"))
    code, said = pull(device)
    assert (code, "Unauthorized" in said, "mlflow-tracking-token" in said) == (1, True, True), said


@pytest.mark.parametrize(
    ("registry", "reason"),
    [
        ("http://127.0.0.1:{free}", "Connection refused"),
        ("https://127.0.0.1:{plain}", "wrong version number"),
    ],
)
def test_why_a_registry_is_not_reached_is_said_in_the_systems_words(
    guarded: FaultyProxy, broker: Broker, new_daemon: Callable[..., Daemon], registry: str, reason: str
) -> None:
    uri = registry.format(free=free_port(), plain=guarded.uri.rsplit(":", 1)[1])
    code, said = pull(new_daemon(settings_for(broker, uri, device="away")))
    assert (code, said.count("\n") <= 2, reason in said) == (1, True, True), said
