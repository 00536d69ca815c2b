"""One run of a device with secrets and prompts planted everywhere; then all that others may see is searched.

Others may see the log, the process list, the status, the metrics and the support archive.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support import unforeseen
from tests.support.client import Client, chat, connected
from tests.support.doctor import contents
from tests.support.in_the_middle import stopped_in_the_middle
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import (
    Commands,
    Daemon,
    running_daemon,
    short_folder,
    standing_still,
)
from tests.support.sample_device import settings_for, wait_for_state

SECRETS = {
    "the broker's password": "planted-broker-password",
    "the broker's user": "planted-broker-user",
    "the registry's token": "planted-registry-token",
    "the artifact store's key": "planted-store-key",
    "a system prompt": "planted-system-prompt",
    "a prompt": "planted-prompt",
}
NAMED = "audit-1"


LONG = {"response_format": {"type": "regex", "regex": "(0|1){900}"}, "max_tokens": 920}


def test_nothing_that_others_may_see_has_a_secret_or_a_prompt_in_it(
    broker: Broker, mlflow_server: Server, published: object
) -> None:
    with short_folder() as folder:
        config = settings_for(
            broker,
            mlflow_server.uri,
            device="audited",
            mqtt={"username": SECRETS["the broker's user"]},
            models={"assistant": {"uri": "models:/sample@prod", "system": SECRETS["a system prompt"]}},
            limits={"payload_bytes": 4096},
        )
        env = {
            "CREDENTIALS_DIRECTORY": str(plant_credentials(folder)),
            "AWS_SECRET_ACCESS_KEY": SECRETS["the artifact store's key"],
        }
        with (
            running_daemon(
                config, folder=folder, env=env, before=[sys.executable, unforeseen.__file__]
            ) as daemon,
            connected(broker, device="audited") as client,
        ):
            client.subscribe(f"{client.root}/status")
            commands = Commands(daemon)
            wait_for_state(daemon, "ready")
            use(daemon, client, commands)
            assert (
                daemon.cli("doctor", "--bundle", str(folder / "support.tar.gz"), timeout_s=120).returncode
                == 0
            )
            status = client.wait_on(f"{client.root}/status").payload.decode()
            shown = daemon.cli("status", "--json").stdout
            daemon.stop()
            seen = {
                "the log": daemon.log,
                "the process list": "\n".join(commands.seen),
                "the status": status + shown,
                "the support archive": contents(folder / "support.tar.gz"),
            }
    for step in ("prompt accepted", "prompt starts", "prompt answered", "answer delivered"):
        assert f"{step} request={NAMED} " in seen["the log"], "a request's id goes from end to end"
    assert "-m edge_agent.sync." in seen["the process list"], "the process with the credentials was seen"
    assert "[removed]" in seen["the support archive"]
    found = [
        f"{what} in {where}"
        for where, text in seen.items()
        for what, secret in SECRETS.items()
        if secret in text
    ]
    assert found == []


def use(daemon: Daemon, client: Client, commands: Commands) -> None:
    """Everything that may go right and wrong with a prompt, each with the planted words in it."""
    words = SECRETS["a prompt"]
    client.send(chat(words, id=NAMED), correlation=None)
    client.wait(lambda m: m.topic == client.replies and m.json["id"] == NAMED)
    assert client.ask(words.encode()).payload
    for wrong in (
        f'{{"messages": "{words}',
        {"messages": [{"role": words, "content": words}]},
        {"prompt": words, words: words},
        chat(words, model=words.replace("-", "_")),
        chat(words * 400),
        chat(words, temperature=words),
        chat(words, response_format={"type": "regex", "regex": f"({words}"}),
        chat(words, response_format={"type": "json_schema", "json_schema": {"schema": {"format": words}}}),
    ):
        assert client.ask(wrong).status >= 400
    for place in (unforeseen.ON_ACCEPTANCE, unforeseen.ON_THE_WAY):
        known = daemon.log.count("builtins.ValueError")
        failed = client.ask(chat(f"{words}, {place}"))
        assert (failed.status, failed.json["error"]["code"]) == (500, "model_failed")
        assert daemon.log.count("builtins.ValueError") == known + 1, "it happened, and its kind is in the log"
    (runner,) = daemon.runners()
    with standing_still(runner):  # no model is quicker than a deadline or a cancel
        late = client.ask(chat(words, deadline_ms=1))
        assert late.status == 408
        cancelled = client.send(chat(words))
        client.publish(
            f"{client.root}/ctl/cancel", b"", ResponseTopic=client.replies, CorrelationData=cancelled
        )
        assert client.answer(cancelled).status == 499
    runner, (crashed,) = stopped_in_the_middle(client, daemon, chat(words, stream=True, **LONG))
    runner.kill()
    assert client.answer(crashed).status == 500
    with commands:
        assert daemon.cli("models", "pull").returncode == 0
        assert daemon.cli("probe", "-", stdin=words).returncode == 0


def plant_credentials(folder: Path) -> Path:
    """A folder as systemd makes it for a service."""
    credentials = folder / "credentials"
    credentials.mkdir()
    (credentials / "mqtt-password").write_text(SECRETS["the broker's password"] + "\n")
    (credentials / "mlflow-tracking-token").write_text(SECRETS["the registry's token"])
    return credentials
