"""TLS, who is who, and who may do what: mosquitto with the configuration of docs/broker.md, word for word."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.certificates import LOOPBACK, Authority
from tests.support.client import chat
from tests.support.documented_broker import DEVICE, ROOT, SECRET, Application, documented_broker, tls_settings
from tests.support.mosquitto import Broker, running_broker
from tests.support.mqtt_agent import Agent, Recorder
from tests.support.processes import Daemon, short_folder, wait_until
from tests.support.sample_device import running_device, settings_for, wait_for_state

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."


# --- The broker of the document ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def press(documented: tuple[Broker, Authority], agent: Daemon) -> Iterator[Daemon]:
    """The device of the document, which answers over TLS with a certificate of its own."""
    broker, authority = documented
    config = settings_for(broker, "", device=DEVICE, mqtt=tls_settings(authority, authority.client(DEVICE)))
    with running_device(agent, config) as daemon:
        yield daemon


# --- An application ------------------------------------------------------------------------------------


# --- Who may do what, with the rules of the document ---------------------------------------------------


def test_an_application_of_the_document_is_answered_over_tls(
    documented: tuple[Broker, Authority], press: Daemon
) -> None:
    with Application(*documented, "shop") as shop:
        shop.subscribe("replies/shop/#")
        shop.ask(SPAIN, f"replies/shop/{DEVICE}", b"s-1")
        assert shop.wait_answer(b"s-1") == MADRID


def test_nobody_else_can_read_the_answers(documented: tuple[Broker, Authority], press: Daemon) -> None:
    with Application(*documented, "shop") as shop, Application(*documented, "mallory") as mallory:
        for topic in ("#", "replies/#", "replies/shop/#", f"replies/+/{DEVICE}", "edge/#", f"{ROOT}/rsp/#"):
            mallory.subscribe(topic)
        shop.subscribe("replies/shop/#")
        shop.ask(SPAIN, f"replies/shop/{DEVICE}", b"s-2")
        shop.subscribe(f"{ROOT}/rsp/shop/#")
        shop.publish(f"{ROOT}/req/chat/shop", json.dumps(chat(SPAIN, id="to-rsp")))
        assert shop.wait_answer(b"s-2") == MADRID
        own = f"{ROOT}/rsp/shop/to-rsp"
        wait_until(lambda: own in [message.topic for message in shop.came], 60, "the answer under rsp")
        assert mallory.publish("replies/mallory/mallory/x", b"to myself") == "Success"
        wait_until(lambda: len(mallory.came) > 0, 60, "what comes after it")
        assert {message.topic for message in mallory.came} == {"replies/mallory/mallory/x"}


@pytest.mark.parametrize(
    "topic",
    [
        *(f"{ROOT}/status", f"{ROOT}/model/reported", f"{ROOT}/model/desired", f"{ROOT}/metrics"),
        *(f"{ROOT}/rsp/x", f"{ROOT}/req/chat", f"{ROOT}/ctl/cancel", f"{ROOT}/ctl/sync"),
        f"{ROOT}/ctl/plan",
        *(f"{ROOT}/req/chat/shop", f"{ROOT}/ctl/cancel/shop", f"{ROOT}/req/chat/mallory"),
        f"replies/shop/{DEVICE}",
    ],
)
def test_nobody_else_can_speak_for_the_device_or_to_it(
    documented: tuple[Broker, Authority], press: Daemon, topic: str
) -> None:
    with Application(*documented, "mallory") as mallory:
        assert mallory.publish(topic, b"{}", retain=topic.endswith("status")) == "Not authorized"


def test_a_fake_status_reaches_nobody(documented: tuple[Broker, Authority], press: Daemon) -> None:
    with Application(*documented, "console") as console, Application(*documented, "shop") as shop:
        assert shop.publish(f"{ROOT}/status", b'{"state": "offline"}', retain=True) == "Not authorized"
        console.subscribe("edge/v1/+/status")
        wait_until(lambda: len(console.came) > 0, 60, "the retained status")
        assert json.loads(console.came[0].payload)["state"] == "ready"
        assert console.publish(f"{ROOT}/model/desired", b"{}") in ("Success", "No matching subscribers")


def test_the_console_hears_what_a_version_would_take(
    documented: tuple[Broker, Authority], press: Daemon
) -> None:
    with Application(*documented, "console") as console:
        console.subscribe("replies/console/#")
        question = {"id": "p", "reply_to": f"replies/console/{DEVICE}", "model": "assistant", "version": 1}
        assert console.publish(f"{ROOT}/ctl/plan", json.dumps(question)) == "Success"
        wait_until(lambda: len(console.came) > 0, 60, "the answer")
        answer = json.loads(console.came[0].payload)
        assert (answer["id"], answer["code"]) == ("p", "settings_invalid"), "it has no registry"
        assert answer["free_bytes"] > 0


def test_nobody_else_can_take_the_devices_client_id(
    documented: tuple[Broker, Authority], press: Daemon
) -> None:
    broker = documented[0]
    before = broker.log_text().count(f"as {DEVICE} ")
    for client_id in (DEVICE, f"edge-agent-{DEVICE}"):
        with Application(*documented, "mallory", client_id=client_id) as mallory:
            mallory.wait_connected()
            assert mallory.publish(f"{ROOT}/status", b"{}") == "Not authorized"
    with Application(*documented, "shop") as shop:
        shop.subscribe("replies/shop/#")
        shop.ask(SPAIN, f"replies/shop/{DEVICE}", b"s-3")
        assert shop.wait_answer(b"s-3") == MADRID
    assert broker.log_text().count(f"as {DEVICE} ") == before, "the device kept its connection"


def test_without_a_certificate_nobody_connects(documented: tuple[Broker, Authority]) -> None:
    broker, authority = documented
    context = ssl.create_default_context(cafile=str(authority.file))
    bare = Paho(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    bare.tls_set_context(context)
    ended = threading.Event()
    accepted = threading.Event()
    bare.on_disconnect = lambda *_: ended.set()
    bare.on_connect = lambda _c, _u, _f, code, _p: None if code.is_failure else accepted.set()
    with contextlib.suppress(OSError):
        bare.connect(broker.host, broker.port)
    bare.loop_start()
    try:
        assert ended.wait(60)
        assert not accepted.is_set()
    finally:
        bare.disconnect()
        bare.loop_stop()


def test_no_secret_is_in_the_log_or_in_the_process_list(press: Daemon) -> None:
    key = Path(press.config["mqtt"]["key_file"]).read_text()
    command = Path(f"/proc/{press.pid}/cmdline").read_text()
    for line in key.splitlines()[1:-1]:
        assert line not in press.log
        assert line not in command


def test_the_largest_prompt_gets_through_and_a_larger_message_reaches_nobody(
    documented: tuple[Broker, Authority], press: Daemon
) -> None:
    topic, replies = f"{ROOT}/req/chat/shop", f"replies/shop/{DEVICE}"
    with Application(*documented, "shop") as shop:
        shop.subscribe("replies/shop/#")
        largest = b'{"id": "large", "prompt": "' + b"x" * 102_370 + b'"}'
        assert shop.publish(topic, largest, response_topic=replies, correlation=b"l") == "Success"
        wait_until(lambda: shop.came, 60, "an answer about the context")
        assert json.loads(shop.came[0].payload)["error"]["code"] == "prompt_too_long"
        assert "bytes" not in json.loads(shop.came[0].payload)["error"]["message"]
    with Application(*documented, "shop") as clumsy:
        clumsy.wait_connected()
        clumsy.send(topic, b"x" * 140_000)
        wait_until(lambda: clumsy.connects > 1, 60, "the end of its connection")
    assert "(140000 bytes)" not in documented[0].log_text(), "it went to nobody"
    with Application(*documented, "shop") as shop:
        shop.subscribe("replies/shop/#")
        shop.ask(SPAIN, replies, b"n")
        assert shop.wait_answer(b"n") == MADRID


def test_a_prompt_for_a_device_that_is_away_survives_a_power_cut_of_the_broker(short_dir: Path) -> None:
    with documented_broker() as (broker, authority):
        settings = {
            "host": broker.host,
            "port": broker.port,
            **tls_settings(authority, authority.client(DEVICE)),
        }
        with Agent(short_dir, {"req/chat/+": Recorder()}, device=DEVICE, **settings) as agent:
            agent.wait_connected()
            wait_until(lambda: "Sending SUBACK" in broker.log_text(), 60, "the subscription")
        with Application(broker, authority, "shop") as shop:
            assert shop.publish(f"{ROOT}/req/chat/shop", b"asked while away") == "Success"
        database = broker.folder / "mosquitto.db"
        wait_until(
            lambda: database.exists() and b"asked while away" in database.read_bytes(), 60, "the autosave"
        )
        broker.kill()
        broker.start()
        handler = Recorder()
        with Agent(short_dir, {"req/chat/+": handler}, device=DEVICE, **settings):
            wait_until(lambda: handler.seen == [b"asked while away"], 60, "the prompt")


# --- Passwords -----------------------------------------------------------------------------------------


def test_a_wrong_password_is_said_and_a_new_one_is_read_at_the_next_connect(agent: Daemon) -> None:
    """The daemon is ready without its broker, and needs no restart."""
    with documented_broker(passwords=True) as (broker, authority), short_folder() as folder:
        password_file = folder / "password"
        password_file.write_text("not the one\n")
        mqtt = {"username": DEVICE, "password_file": str(password_file), **tls_settings(authority)}
        config = settings_for(broker, "", device=DEVICE, mqtt=mqtt)
        with running_device(agent, config, ready=False) as daemon:
            wait_until(lambda: "refused by the broker: Not authorized" in daemon.log, 60, "the log line")
            assert daemon.status()["broker"]["connected"] is False
            password_file.unlink()
            wait_until(lambda: "mqtt.password_file" in daemon.log, 60, "the log line about the file")
            password_file.write_text(SECRET + "\n")
            wait_for_state(daemon, "ready")
            with Application(broker, authority, "shop", password="of the shop") as shop:
                shop.subscribe("replies/shop/#")
                shop.ask(SPAIN, f"replies/shop/{DEVICE}", b"p-1")
                assert shop.wait_answer(b"p-1") == MADRID
                assert shop.publish(f"{ROOT}/status", b"{}") == "Not authorized"
            assert SECRET not in daemon.log
            assert "not the one" not in daemon.log
            assert SECRET not in Path(f"/proc/{daemon.pid}/cmdline").read_text()
            assert "Traceback" not in daemon.log


# --- Certificates that are not good --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("authority", "unable to get local issuer certificate|self-signed certificate"),
        ("expired", "certificate has expired"),
        ("host", "Hostname mismatch|IP address mismatch"),
    ],
)
def test_a_server_that_cannot_prove_itself_gets_nothing_until_it_can(
    short_dir: Path, caplog: pytest.LogCaptureFixture, wrong: str, reason: str
) -> None:
    authority = Authority(short_dir, "ours")
    issuer = Authority(short_dir, "theirs") if wrong == "authority" else authority
    hosts = ("elsewhere.example",) if wrong == "host" else LOOPBACK
    lasts = datetime.timedelta(hours=-1 if wrong == "expired" else 1)
    served = issuer.server(hosts, lasts=lasts)
    extra = f"certfile {served.certificate}\nkeyfile {served.key}"
    caplog.set_level(logging.INFO)
    with (
        running_broker(short_dir, extra_config=extra) as broker,
        Agent(
            short_dir, {"req/chat": Recorder()}, host=broker.host, port=broker.port, **tls_settings(authority)
        ) as agent,
    ):
        wait_until(lambda: re.search(reason, caplog.text), 60, f"{reason} in the log")
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
        assert "as edge-agent-bare" not in broker.log_text(), "it said nothing to such a server"
        assert "Traceback" not in caplog.text
        authority.server()  # over the same files
        broker.restart()
        agent.wait_connected(60)
        assert "broker connected" in caplog.text
