"""An ordinary MQTT 5 client that sends streamed prompts and measures when their answers arrive."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.bench.line_child import BenchError
from edge_agent.bench.timing import Timing

_CONNECT_TIMEOUT_S = 10.0


@dataclass(kw_only=True)
class _Prompt:
    """One prompt and its answer so far; the network thread fills it in."""

    sent_s: float
    first_s: float = 0.0
    ended_s: float = 0.0
    answer: dict[str, Any] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class MqttClient:
    """One connection. Its owner sends and waits; paho's thread receives.

    Args:
        root: the device's topics, `{prefix}/v1/{device}`.
    """

    def __init__(self, port: int, root: str) -> None:
        self._topic = f"{root}/req/chat"
        self._replies = f"replies/{uuid.uuid4().hex[:12]}"
        self._prompts: dict[bytes, _Prompt] = {}
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_socket_open = _without_delay
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe(f"{self._replies}/#", qos=1)
        if not self._subscribed.wait(_CONNECT_TIMEOUT_S):
            raise BenchError("the broker did not answer the subscription")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def send(self, text: str, max_tokens: int) -> bytes:
        """Sends a prompt and returns its key for `wait`."""
        key = uuid.uuid4().hex.encode()
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = self._replies
        properties.CorrelationData = key
        request = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        body = json.dumps(request)
        self._prompts[key] = _Prompt(sent_s=time.perf_counter())
        self._client.publish(self._topic, body, qos=1, properties=properties)
        return key

    def wait(self, key: bytes, *, timeout_s: float) -> Timing:
        """Waits for a prompt's answer and returns its timings.

        Raises:
            BenchError: no answer came in time, or it was an error.
        """
        prompt = self._prompts[key]
        if not prompt.done.wait(timeout_s):
            raise BenchError(f"no answer came over MQTT within {timeout_s:.0f} s")
        del self._prompts[key]
        if "error" in prompt.answer:
            raise BenchError(f"the agent answered with an error: {prompt.answer['error']['message']}")
        return Timing.of(
            {
                **prompt.answer["usage"],
                "first_token_ms": ((prompt.first_s or prompt.ended_s) - prompt.sent_s) * 1000,
                "total_ms": (prompt.ended_s - prompt.sent_s) * 1000,
            }
        )

    def wait_all(self, keys: Sequence[bytes], *, timeout_s: float) -> list[Timing]:
        return [self.wait(key, timeout_s=timeout_s) for key in keys]

    def wait_first(self, key: bytes, *, timeout_s: float) -> None:
        """Waits for the first text of an answer."""
        prompt, limit_s = self._prompts[key], time.monotonic() + timeout_s
        while not prompt.first_s and not prompt.done.is_set():
            if time.monotonic() > limit_s:
                raise BenchError(f"no text came over MQTT within {timeout_s:.0f} s")
            time.sleep(0.002)

    def _on_message(self, _client: Client, _userdata: object, message: Any) -> None:
        now_s = time.perf_counter()
        prompt = self._prompts.get(getattr(message.properties, "CorrelationData", b""))
        if prompt is None:
            return
        if message.topic.endswith("/stream"):
            prompt.first_s = prompt.first_s or now_s
            return
        prompt.ended_s = now_s
        prompt.answer = json.loads(message.payload)
        prompt.done.set()


def _without_delay(_client: Client, _userdata: object, connection: Any) -> None:
    """Turns off Nagle's algorithm: its 40 ms a message are not the agent's."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
