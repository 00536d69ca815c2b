"""mosquitto with the configuration of docs/broker.md, word for word, and an application that uses it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.support.certificates import Authority, Pair
from tests.support.client import chat
from tests.support.mosquitto import Broker
from tests.support.processes import free_port, short_folder, wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "broker.md"
DEVICE = "press-3"
ROOT = f"edge/v1/{DEVICE}"
SECRET = "correct horse battery staple"


def block(kind: str) -> str:
    """The one code block of docs/broker.md in this language."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return str(text)


def documented_config(folder: Path, port: int, *, passwords: bool) -> str:
    """The document's configuration; only places and the port are others. Its log goes where tests read it."""
    config = block("conf")
    if passwords:
        config = config[: config.index("listener 8883")] + block("conf-password")
    config = config.replace("/etc/mosquitto/certs/", f"{folder}/").replace("/etc/mosquitto/", f"{folder}/")
    config = config.replace("/var/lib/mosquitto/", f"{folder}/").replace(
        "listener 8883", f"listener {port} 127.0.0.1"
    )
    assert "/etc/" not in config and str(port) in config
    user = "user root\n" if os.geteuid() == 0 else ""
    return f"log_dest stderr\nlog_type all\n{user}{config}"


@contextlib.contextmanager
def documented_broker(*, passwords: bool = False) -> Iterator[tuple[Broker, Authority]]:
    with short_folder() as folder:
        authority = Authority(folder, "ca")
        authority.server()
        (folder / "edge-agent.acl").write_text(block("acl"))
        (folder / "edge-agent.acl").chmod(0o600)
        if passwords:
            write_passwords(folder, {DEVICE: SECRET, "shop": "of the shop"})
        port = free_port()
        broker = Broker(folder, documented_config(folder, port, passwords=passwords), port)
        try:
            broker.start()
            yield broker, authority
        finally:
            broker.stop()


def write_passwords(folder: Path, passwords: dict[str, str]) -> None:
    """What `mosquitto_passwd` writes: PBKDF2 with SHA-512, 101 rounds."""
    lines = []
    for name, password in passwords.items():
        salt = os.urandom(12)
        digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
        lines.append(f"{name}:$7$101${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}\n")
    file = folder / "edge-agent.passwords"
    file.write_text("".join(lines))
    file.chmod(0o600)


def tls_settings(authority: Authority, pair: Pair | None = None) -> dict[str, Any]:
    settings: dict[str, Any] = {"ca_file": str(authority.file)}
    if pair is not None:
        settings |= {"cert_file": str(pair.certificate), "key_file": str(pair.key)}
    return settings


@dataclass(frozen=True, kw_only=True)
class Came:
    topic: str
    payload: bytes
    correlation: bytes | None


class Application:
    """A client of MQTT 5 with a certificate, or a name and a password. `published` is what the broker said."""

    def __init__(
        self,
        broker: Broker,
        authority: Authority,
        name: str,
        *,
        client_id: str = "",
        password: str | None = None,
        session_expiry_s: int = 0,
    ) -> None:
        self.name = name
        self.came: list[Came] = []
        self.published: dict[int, str] = {}
        self.connects = 0
        self._subscribed = threading.Event()
        self._paho = Paho(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTv5)
        context = ssl.create_default_context(cafile=str(authority.file))
        if password is None:
            pair = authority.client(name)
            context.load_cert_chain(pair.certificate, pair.key)
        else:
            self._paho.username_pw_set(name, password)
        self._paho.tls_set_context(context)
        self._paho.on_connect = self._on_connect
        self._paho.on_message = self._on_message
        self._paho.on_publish = self._on_publish
        self._paho.on_subscribe = lambda *_: self._subscribed.set()
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = session_expiry_s
        self._paho.connect(broker.host, broker.port, clean_start=not session_expiry_s, properties=properties)
        self._paho.loop_start()

    def __enter__(self) -> Application:
        return self

    def __exit__(self, *_: object) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()

    def wait_connected(self) -> None:
        wait_until(lambda: self.connects > 0, 60, "CONNACK")

    def subscribe(self, topic: str) -> None:
        self._subscribed.clear()
        self._paho.subscribe(topic, qos=1)
        assert self._subscribed.wait(60)

    def publish(
        self,
        topic: str,
        payload: bytes | str,
        *,
        retain: bool = False,
        response_topic: str = "",
        correlation: bytes = b"",
    ) -> str:
        """Gives the reason of the PUBACK."""
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if response_topic:
            properties.ResponseTopic = response_topic
            properties.CorrelationData = correlation
        mid = self._paho.publish(topic, payload, qos=1, retain=retain, properties=properties).mid
        wait_until(lambda: mid in self.published, 60, "PUBACK")
        return self.published[mid]

    def send(self, topic: str, payload: bytes) -> None:
        """Publishes, and does not wait for what becomes of it."""
        self._paho.publish(topic, payload, qos=1)

    def ask(self, question: str, response_topic: str, correlation: bytes, **fields: Any) -> None:
        """A chat, under its own name."""
        request = json.dumps(chat(question, **fields))
        said = self.publish(
            f"{ROOT}/req/chat/{self.name}", request, response_topic=response_topic, correlation=correlation
        )
        assert said == "Success"

    def wait_answer(self, correlation: bytes) -> str:
        text: str = self.wait_document(correlation)["choices"][0]["message"]["content"]
        return text

    def wait_document(self, correlation: bytes) -> dict[str, Any]:
        """The answer, whatever it says."""

        def find() -> list[Came]:
            return [message for message in self.came if message.correlation == correlation]

        document: dict[str, Any] = json.loads(wait_until(find, 120, "the answer")[0].payload)
        return document

    def _on_connect(self, _client: Paho, _data: object, _flags: Any, code: Any, _properties: Any) -> None:
        self.connects += not code.is_failure

    def _on_message(self, _client: Paho, _data: object, message: MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        self.came.append(Came(topic=message.topic, payload=bytes(message.payload), correlation=correlation))

    def _on_publish(self, _client: Paho, _data: object, mid: int, code: Any, _properties: Any) -> None:
        self.published[mid] = str(code)
