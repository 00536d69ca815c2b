"""The dashboard asked of a real Prometheus that scrapes a real device: no panel stays empty."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator

import pytest

from edge_agent.publishing.register import Published
from edge_agent.transport import control
from tests.support.client import Client, chat, connected
from tests.support.dashboard import choices, filled, queries
from tests.support.gateway import running_gateway
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, short_folder, wait_until
from tests.support.prometheus import Prometheus, running_prometheus
from tests.support.sample_device import settings_for, wait_for_state

pytestmark = pytest.mark.look
DEVICE = "looked-at"
SPAIN = "What is the capital of Spain?"


@pytest.fixture(scope="module")
def device(broker: Broker, mlflow_server: Server, published: Published) -> Iterator[Daemon]:
    """One that fetches its model, with a bound for its line, so that there is something to say of both."""
    config = settings_for(broker, mlflow_server.uri, device=DEVICE, link={"bytes_per_day": 1 << 30})
    with running_daemon(config) as daemon:
        wait_for_state(daemon, "ready")
        yield daemon


@pytest.fixture(scope="module")
def client(broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(broker, device=DEVICE) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(device: Daemon) -> Iterator[Prometheus]:
    """One that has scraped the device, with the gateway's token."""
    with short_folder() as folder:
        token = folder / "token"
        token.write_text("0123456789abcdef0123456789abcdef")
        token.chmod(0o600)
        with running_gateway(device.control_socket, folder, token_file=str(token)) as gateway:
            target = f"127.0.0.1:{gateway.port}"
            assert gateway.request("GET", "/metrics").status == 401
            with running_prometheus(folder, target, token_file=token) as running:
                wait_until(lambda: running.query("edge_agent_up == 1"), 60, "the first scrape")
                yield running


def use(client: Client) -> None:
    """Prompts that are answered, and some that are not."""
    for _ in range(2):
        assert client.ask(chat(SPAIN)).status == 200
    assert client.ask(chat(SPAIN, max_tokens=100_000)).status == 413
    assert client.ask(chat(SPAIN, model="another")).status == 404


def fail_a_check(device: Daemon, client: Client) -> None:
    desired = f"{client.root}/model/desired"
    client.publish(desired, json.dumps({"models": {"assistant": {"version": 999}}}))
    wait_until(lambda: failures(device), 60, "a check that fails")
    client.publish(desired, json.dumps({"models": {"assistant": None}}))


def failures(device: Daemon) -> dict[str, int]:
    *_, last = control.call(device.control_socket, "metrics", timeout_s=60)
    found: dict[str, int] = last["metrics"]["models"]["assistant"]["check_failures"]
    return found


def has_data(prometheus: Prometheus, query: str) -> bool:
    """A quantile of nothing is a series, too, and its value is no number."""
    found = prometheus.query(filled(query))
    return any(not math.isnan(float(series["value"][1])) for series in found)


def test_every_query_of_the_dashboard_has_data(
    prometheus: Prometheus, device: Daemon, client: Client
) -> None:
    use(client)
    fail_a_check(device, client)

    def missing() -> list[str]:
        use(client)
        return [query for query in queries() if not has_data(prometheus, query)]

    try:
        wait_until(lambda: not missing(), 120, "data in every panel")
    except TimeoutError as error:
        raise AssertionError(f"no data for {missing()}; targets: {prometheus.targets()}") from error
    for query, label in choices():
        assert all(series["metric"][label] for series in prometheus.query(filled(query))), query


def test_what_prometheus_has_is_what_the_device_counts(
    prometheus: Prometheus, device: Daemon, client: Client
) -> None:
    use(client)
    *_, last = control.call(device.control_socket, "metrics", timeout_s=60)
    counted = last["metrics"]["models"]["assistant"]["answers"]["ok"]

    def scraped() -> bool:
        (series,) = prometheus.query('edge_agent_answers_total{code="ok"}')
        return int(float(series["value"][1])) == int(counted)

    wait_until(scraped, 60, f"{counted} answers")
    assert prometheus.query("edge_agent_sync_bytes_total > 100000"), "it has fetched its model"
    assert {each["health"] for each in prometheus.targets()} == {"up"}


def test_promtool_finds_nothing_to_mend(device: Daemon) -> None:
    text = device.cli("metrics").stdout
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
