"""The demo: everything on one machine without any configuration.

All parts are real: the sample model is published to an embedded registry, a private mosquitto listens on a free
loopback port, and the daemon runs as a process, pulls the model and answers over MQTT.

    sample model → publish → registry (sqlite) → daemon: pull, gate, ready → prompt over MQTT → answer
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edge_agent import environment, terminal
from edge_agent.chat import messages
from edge_agent.errors import DaemonNotRunning, EdgeAgentError
from edge_agent.private_broker import child_process, private_broker, tail
from edge_agent.transport import control

SAMPLE_MODEL = Path(__file__).parent / "sample_model"
NAME = "sample"
DEVICE = "demo"

_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0


class DemoError(EdgeAgentError):
    """A part of the demo is missing, or did not start."""

    code = "demo_failed"


def run_demo(question: str, *, stay: bool, quiet: bool, model: Path = SAMPLE_MODEL) -> dict[str, Any]:
    """Runs the demo and returns the answer in the form of `probe --json`.

    Args:
        stay: keep everything running after the answer until interrupted.
        quiet: print nothing on stdout.
        model: folder made by the onnxruntime-genai model builder.

    Raises:
        EdgeAgentError: a part is missing or did not start.
    """
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        what = "the sample model" if model == SAMPLE_MODEL else f"the model in {model}"
        registry_uri = f"sqlite:///{folder / 'registry.db'}"
        port = stack.enter_context(private_broker(folder))
        _say(f"mosquitto is listening on 127.0.0.1:{port}")
        _say(f"registering {what} in an embedded registry")
        _publish(model, registry_uri)
        config = _write_config(folder, registry_uri, port)
        _say("starting the agent; it pulls the model and loads it")
        stack.enter_context(
            child_process(
                [sys.executable, "-m", "edge_agent", "--config", str(config), "run"], folder / "agent.log"
            )
        )
        status = _await_ready(folder)
        _say(f"asking over MQTT: {question}")
        result = _ask(port, question, status["models"][0]["flavor"])
        if not quiet:
            _print_result(result)
        if stay:
            _stay(config, port)
        return result


def _publish(model: Path, registry_uri: str) -> None:
    from edge_agent.publishing import publish_folder

    publish_folder(model, name=NAME, registry_uri=registry_uri, alias="prod")


def _write_config(folder: Path, registry_uri: str, port: int) -> Path:
    config = folder / "config.toml"
    config.write_text(
        "\n".join(
            (
                f'device_id = "{DEVICE}"',
                f"state_dir = {json.dumps(str(folder / 'state'))}",
                f"control_socket = {json.dumps(str(folder / 'control.sock'))}",
                f"[registry]\nuri = {json.dumps(registry_uri)}",
                f'[models.assistant]\nuri = "models:/{NAME}@prod"',
                f'[mqtt]\nhost = "127.0.0.1"\nport = {port}',
            )
        )
    )
    return config


def _await_ready(folder: Path) -> dict[str, Any]:
    limit_s = time.monotonic() + _START_TIMEOUT_S
    cached_bytes = 0
    while time.monotonic() < limit_s:
        status = _status(folder / "control.sock")
        if status is not None:
            model = status["models"][0]
            if model["state"] != "absent" and status["cache"]["bytes"] and not cached_bytes:
                cached_bytes = status["cache"]["bytes"]
                _say(f"{terminal.human_bytes(cached_bytes)} verified and in the cache; loading the model")
            if status["state"] == "ready" and status["broker"]["connected"]:
                return status
            if model["update_problem"]:
                raise DemoError(f"the agent could not fetch the model: {model['update_problem']}")
        time.sleep(0.1)
    raise DemoError(f"the agent was not ready within {_START_TIMEOUT_S:.0f} s: {tail(folder / 'agent.log')}")


def _status(path: Path) -> dict[str, Any] | None:
    try:
        for event in control.call(path, "status", timeout_s=5):
            status: dict[str, Any] | None = event.get("status")
            return status
    except (DaemonNotRunning, TimeoutError):
        return None
    return None


def _ask(port: int, question: str, flavor: str) -> dict[str, Any]:
    """Sends one prompt over MQTT 5, as any client would."""
    from paho.mqtt.client import Client, MQTTv5
    from paho.mqtt.enums import CallbackAPIVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    subscribed: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    client.on_message = lambda _c, _u, message: answers.put(message)
    client.on_subscribe = lambda *_: subscribed.put(None)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        client.subscribe("replies/demo", qos=1)
        subscribed.get(timeout=_ANSWER_TIMEOUT_S)
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = "replies/demo"
        request = json.dumps({"messages": [{"role": "user", "content": question}]})
        client.publish(f"edge/v1/{DEVICE}/req/chat", request, qos=1, properties=properties)
        message = answers.get(timeout=_ANSWER_TIMEOUT_S)
    except queue.Empty as error:
        raise DemoError(f"no answer came over MQTT within {_ANSWER_TIMEOUT_S:.0f} s") from error
    finally:
        client.disconnect()
        client.loop_stop()
    answer = json.loads(message.payload)
    if "error" in answer:
        raise DemoError(f"the agent answered with an error: {answer['error']['message']}")
    version = int(dict(message.properties.UserProperty)["version"])
    return messages.result(question, answer, version=version, flavor=flavor)


def _print_result(result: dict[str, Any]) -> None:
    terminal.echo(f"\nQuestion: {result['question']}")
    terminal.echo_answer(f"Answer:   {result['answer']}\n")
    terminal.echo(f"Usage:    {result['usage']}\n\n{terminal.answer_line(result)}")
    if note := messages.cut_note(result["finish_reason"], result["usage"]):
        _say(f"the answer was {note}")


def _stay(config: Path, port: int) -> None:
    own = sys.argv[0] if Path(sys.argv[0]).name == "edge-agent" else f"{sys.executable} -m edge_agent"
    client = shutil.which("mosquitto_rr", path=environment.search_path()) or "mosquitto_rr"
    terminal.echo(
        f"""
Everything is still running. Ask more from another terminal; press Ctrl-C here to stop:

  {own} --config {config} probe "What is the capital of Nepal?"
  {own} --config {config} chat
  {own} --config {config} status
  {client} -V 5 -p {port} -t edge/v1/{DEVICE}/req/chat -e replies/me -m "What is the capital of Japan?"
"""
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    _say("stopping")


def _say(line: str) -> None:
    terminal.echo(f"demo: {line}", err=True)
