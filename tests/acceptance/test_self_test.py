"""The self-test on a mosquitto with rules: of docs/broker.md, older ones, and such that let a device read nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.client import connected
from tests.support.documented_broker import DEVICE, block, documented_broker, tls_settings
from tests.support.mosquitto import running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import wait_until

HANDLERS = ("req/chat", "ctl/cancel/+")
WRITES = "topic write edge/v1/dev/#\n"
OLD = "topic write edge/v1/dev/status\n"  # as before: nothing below ctl/ may be written
READS = "topic read edge/v1/dev/req/#\ntopic read edge/v1/dev/ctl/#\n"
SOMEBODY = "topic write edge/v1/dev/req/chat\n"


def handlers() -> dict[str, Recorder]:
    return {name: Recorder() for name in HANDLERS}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize(
    ("rules", "codes"),
    [
        (WRITES + READS, {"5": [], "3.1.1": []}),
        (WRITES, {"5": ["self_test_failed"], "3.1.1": ["self_test_failed"]}),
        (OLD + READS, {"5": [], "3.1.1": ["self_test_failed"]}),
    ],
    ids=["allow it", "let the device read nothing", "are older"],
)
def test_what_rules_make_of_it(
    short_dir: Path, rules: str, codes: dict[str, list[str]], protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if codes[protocol]:  # elsewhere its own message comes, however late
        monkeypatch.setattr("edge_agent.transport.echo.PATIENCE_S", 2.0)
    acl = short_dir / "acl"
    acl.write_text(rules + SOMEBODY)
    acl.chmod(0o600)
    with running_broker(short_dir, extra_config=f"acl_file {acl}") as broker:
        place = {"host": broker.host, "port": broker.port, "protocol": protocol}
        with Agent(short_dir, dict(handlers()), device="dev", **place) as agent:
            wait_until(lambda: "ctl/cancel/@echo" in broker.log_text(), 60, "the message")
            if codes[protocol]:
                wait_until(agent.transport.troubles, 60, "the trouble")
            else:
                wait_until(lambda: agent.transport._echo._due_s is not None, 60, "the verdict")
            assert [trouble.code for trouble in agent.transport.troubles()] == codes[protocol]
            if "read" in rules:  # the first request shows that it hears
                with connected(broker) as client:
                    client.publish("edge/v1/dev/req/chat", b"hello")
                wait_until(lambda: not agent.transport.troubles(), 60, "the end of the trouble")


def test_the_documented_rules_allow_it(short_dir: Path) -> None:
    assert "@echo" in block("acl")
    with documented_broker() as (broker, authority):
        place = {
            "host": broker.host,
            "port": broker.port,
            **tls_settings(authority, authority.client(DEVICE)),
        }
        with Agent(short_dir, dict(handlers()), device=DEVICE, **place) as agent:
            wait_until(lambda: agent.transport._echo._own_heard, 60, "the message")
            assert agent.transport.troubles() == []
