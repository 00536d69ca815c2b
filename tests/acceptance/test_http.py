"""The OpenAI interface as programs use it: `edge-agent serve` before the running agent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from edge_agent.settings.limits import LimitSettings
from tests.support import openai_schema
from tests.support.certificates import Authority
from tests.support.gateway import CHAT, Gateway, Interface, gateway_settings, running_gateway
from tests.support.processes import (
    Daemon,
    clean_environment,
    free_port,
    short_folder,
    standing_still,
    to_toml,
    wait_until,
)

MADRID = "The capital of Spain is Madrid."
PROMPT = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
TOKEN = "a-token-of-this-test"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gateway(agent: Daemon) -> Iterator[Gateway]:
    with short_folder() as folder, running_gateway(agent.control_socket, folder) as running:
        yield running


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def long(**fields: Any) -> dict[str, Any]:
    """A request whose answer takes a while."""
    regex = {"type": "regex", "regex": "(0|1){1900}"}
    return {**CHAT, "max_tokens": 1950, "response_format": regex, **fields}


# --- Answers --------------------------------------------------------------------------------------------


def test_a_chat_is_answered_whole_and_in_pieces(gateway: Gateway) -> None:
    whole = gateway.chat().json
    assert whole["choices"][0]["message"]["content"] == MADRID
    assert whole["system_fingerprint"] == "assistant/1"
    *pieces, last = gateway.chat({**CHAT, "stream": True, "stream_options": {"include_usage": True}}).events
    assert text_of(pieces) == MADRID
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] > 0


def test_a_completion_is_the_prompt_as_it_stands(gateway: Gateway) -> None:
    response = gateway.request("POST", "/v1/completions", {"prompt": PROMPT})
    assert "atom" in response.json["choices"][0]["text"].lower()


def test_models_health_and_metrics(gateway: Gateway) -> None:
    assert [model["id"] for model in gateway.request("GET", "/v1/models").json["data"]] == ["assistant"]
    assert gateway.request("GET", "/healthz", unix=True).status == 200
    metrics = gateway.request("GET", "/metrics").body.decode()
    assert 'edge_agent_model_info{digest="' in metrics, "behind all walls"
    held = dict(re.findall(r'^edge_agent_memory_resident_bytes{.*process="(\w+)"} (\S+)$', metrics, re.M))
    assert held.keys() == {"daemon", "runner", "gateway"}, "no sync runs"
    assert min(map(float, held.values())) > 10_000_000


def test_the_page_shows_the_device_behind_all_walls(gateway: Gateway) -> None:
    """Also what makes it is imported behind them."""
    assert gateway.chat().status == 200
    wait_until(lambda: b"assistant" in (body := gateway.request("GET", "/").body) and b"answered" in body, 60)
    page = gateway.request("GET", "/")
    for said in (b"<h1>dev</h1>", b"Ready", b"version 1", b"walls stand around it", b"<svg"):
        assert said in page.body
    assert gateway.request("GET", "/page/script.js").body.startswith(b"// The page's script")
    assert "walls missing" not in gateway.child.log_text()


def test_an_answer_in_a_schema_fits_it(gateway: Gateway) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Madrid", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    content = gateway.chat({**CHAT, "response_format": form}).json["choices"][0]["message"]["content"]
    assert json.loads(content)["city"] in ("Madrid", "Oslo")


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeat_with_a_key_gets_the_same_answer_and_another_body_409(
    gateway: Gateway, stream: bool
) -> None:
    key = f"key-{stream}"
    body = {**CHAT, "stream": stream, "temperature": 1.5}
    first, again = (gateway.chat(body, Idempotency_Key=key) for _ in range(2))
    if stream:
        assert text_of(first.events) == text_of(again.events) != ""
        assert {event["id"] for event in first.events} == {event["id"] for event in again.events}
    else:
        assert first.body == again.body
    other = gateway.chat({**body, "seed": 1}, Idempotency_Key=key)
    assert (other.status, other.error["code"]) == (409, "id_reused")


@pytest.mark.parametrize(
    ("path", "table", "base"),
    [
        ("/v1/chat/completions", openai_schema.CHAT, {**CHAT, "max_tokens": 4}),
        ("/v1/completions", openai_schema.COMPLETION, {"prompt": "Hello", "max_tokens": 4}),
    ],
)
def test_every_field_of_openais_schema_is_taken_or_refused_by_name(
    gateway: Gateway, path: str, table: dict[str, openai_schema.Field], base: dict[str, Any]
) -> None:
    wrong = []
    for name, body, accepted in openai_schema.cases(table, base):
        if name == "max_completion_tokens":
            body.pop("max_tokens")
        response = gateway.request("POST", path, body)
        good = (
            response.status == 200
            if accepted
            else response.status == 400
            and response.error["param"] == name
            and name in response.error["message"]
        )
        if not good:
            wrong.append((name, body[name], response.status, response.body[:300]))
    assert wrong == []
    unknown = gateway.request("POST", path, {**base, "no_such_field": 1})
    assert (unknown.status, unknown.error["param"]) == (400, "no_such_field")


# --- What ends a prompt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_prompt(gateway: Gateway, agent: Daemon, stream: bool) -> None:
    (runner,) = agent.runners()
    before = agent.log.count("prompt ended code=cancelled")
    with standing_still(runner):  # it cannot end by itself
        connection = gateway.connection()
        connection.request("POST", "/v1/chat/completions", json.dumps(long(stream=stream)))
        wait_until(lambda: agent.status()["queue_depth"] == 1, 60, "the prompt")
        connection.close()
        wait_until(lambda: agent.log.count("prompt ended code=cancelled") == before + 1, 60, "its cancel")
        wait_until(lambda: agent.status()["queue_depth"] == 0, 60, "the queue")
    assert gateway.chat().json["choices"][0]["message"]["content"] == MADRID


def test_a_client_with_a_key_that_leaves_gets_its_answer_later(gateway: Gateway, agent: Daemon) -> None:
    (runner,) = agent.runners()
    started = agent.log.count("prompt starts") + 1
    with standing_still(runner):
        connection = gateway.connection()
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), {"Idempotency-Key": "left"})
        wait_until(lambda: agent.log.count("prompt starts") == started, 60, "the prompt")
        connection.close()
    again = gateway.chat(CHAT, Idempotency_Key="left")
    assert again.json["choices"][0]["message"]["content"] == MADRID
    assert agent.log.count("prompt starts") == started, "it was not generated twice"


def test_a_deadline_is_408_for_a_stream_as_well(gateway: Gateway, agent: Daemon) -> None:
    (runner,) = agent.runners()
    with standing_still(runner):
        for stream in (False, True):
            late = gateway.chat(long(stream=stream, deadline_ms=200))
            assert (late.status, late.error["code"]) == (408, "deadline_exceeded")


def test_a_full_queue_is_429_and_says_when_to_come_again(gateway: Gateway, agent: Daemon) -> None:
    (runner,) = agent.runners()
    depth = LimitSettings().queue_depth
    with standing_still(runner), contextlib.ExitStack() as stack:
        for _ in range(depth):
            connection = stack.enter_context(contextlib.closing(gateway.connection()))
            connection.request("POST", "/v1/chat/completions", json.dumps(long()))
        wait_until(lambda: agent.status()["queue_depth"] == depth, 60, "a full queue")
        refused = gateway.chat()
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: agent.status()["queue_depth"] == 0, 60, "the cancels")


def test_more_clients_than_places_are_all_answered_or_refused_cleanly(gateway: Gateway) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(gateway.chat({**CHAT, "max_tokens": 8}).status)

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(statuses) == 60
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 30
    assert gateway.chat().status == 200


# --- Who gets in ----------------------------------------------------------------------------------------


def test_a_web_page_does_not_get_in(gateway: Gateway) -> None:
    rebound = gateway.chat(Host="evil.test:8080")
    assert (rebound.status, rebound.error["code"]) == (421, "host_refused")
    elsewhere = gateway.chat(Origin="http://evil.test")
    assert (elsewhere.status, elsewhere.error["code"]) == (403, "origin_refused")
    assert gateway.chat(Origin="http://localhost:3000").status == 200
    log = gateway.child.log_text()
    assert "code=host_refused peer=127.0.0.1 " in log and "code=origin_refused peer=127.0.0.1 " in log
    assert "evil.test" not in log


def test_open_to_a_network_it_takes_tls_and_the_token(agent: Daemon) -> None:
    with short_folder() as folder:
        authority = Authority(folder)
        pair = authority.server()
        token = folder / "token"
        token.write_text(TOKEN + "\n")
        http = {"token_file": str(token), "cert_file": str(pair.certificate), "key_file": str(pair.key)}
        listen = f"0.0.0.0:{free_port()}"
        with running_gateway(agent.control_socket, folder, listen=listen, **http) as opened:
            opened.tls = ssl.create_default_context(cafile=str(authority.file))
            refused = opened.chat()
            assert (refused.status, refused.error["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert opened.chat(Authorization="Bearer wrong").status == 401
            right = {"Authorization": f"Bearer {TOKEN}"}
            assert opened.chat(**right).json["choices"][0]["message"]["content"] == MADRID
            assert text_of(opened.chat({**CHAT, "stream": True}, **right).events) == MADRID
            assert opened.chat(unix=True).status == 200, "its file says who may connect"
            with opened.raw() as plain:
                plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert not plain.recv(1 << 16).startswith(b"HTTP/1.1 200")
            log = opened.child.log_text()
            assert "requests refused code=unauthorized peer=127.0.0.1 times=1" in log
            assert TOKEN not in log and "wrong" not in log
            assert TOKEN not in " ".join(psutil.Process(opened.child.pid).cmdline())


@pytest.mark.parametrize("listen", ["0.0.0.0", "[::]"])
def test_without_them_it_exits_with_78_and_names_the_keys(agent: Daemon, listen: str) -> None:
    with short_folder() as folder:
        result = serve(agent, folder, listen=f"{listen}:{free_port()}")
    assert result.returncode == 78
    assert "http.token_file" in result.stderr and "http.cert_file" in result.stderr


def serve(agent: Daemon, folder: Path, **http: Any) -> subprocess.CompletedProcess[str]:
    file = folder / "http.toml"
    file.write_text(to_toml(gateway_settings(agent.control_socket, folder, **http)))
    command = [sys.executable, "-m", "edge_agent", "--config", str(file), "serve"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=clean_environment()
    )


# --- The process ----------------------------------------------------------------------------------------

BEHIND_ITS_WALLS = """
import json, os, socket, sys
from edge_agent import gateway
from edge_agent.gateway.doors import Door
from edge_agent.host.confinement import confine
from edge_agent.host.memory import ProcessMemory

memory = ProcessMemory(os.getpid())
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
other = socket.create_server(("127.0.0.1", 0))
place = other.getsockname()
found = {}

def attempt(name, action):
    try:
        action()
        found[name] = "done"
    except OSError as error:
        found[name] = error.errno

walls = gateway.around_gateway([Door(listener=listener, hosts=frozenset())], memory)
walls = confine(walls)
found["missing"] = sorted(walls.missing)
found["memory"] = memory.resident_bytes() > 10_000_000
attempt("accept", listener.accept)
attempt("control socket", lambda: socket.socket(socket.AF_UNIX).connect(sys.argv[1]))
attempt("settings", lambda: open(sys.argv[2]))
attempt("passwd", lambda: open("/etc/passwd"))
attempt("write", lambda: open("/tmp/x", "w"))
attempt("connect", lambda: socket.create_connection(place))
attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("bind", lambda: socket.socket(socket.AF_UNIX).bind("/tmp/x.sock"))
attempt("fork", os.fork)
attempt("execute", lambda: os.execv("/bin/true", ["true"]))
attempt("kept", lambda: os.fstat(other.fileno()))
print(json.dumps(found))
"""


def test_behind_its_walls_are_its_listening_sockets_and_the_daemon_only(agent: Daemon) -> None:
    command = [sys.executable, "-c", BEHIND_ITS_WALLS, str(agent.control_socket), str(agent.config_file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    found = json.loads(result.stdout)
    assert found.pop("missing") == []
    assert found.pop("memory") is True, "its own is still seen"
    assert {name for name, outcome in found.items() if outcome == "done"} == {"accept", "control socket"}


def test_the_process_is_behind_walls(gateway: Gateway) -> None:
    status = Path(f"/proc/{gateway.child.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (fields["Seccomp"], fields["NoNewPrivs"], fields["Threads"]) == ("2", "1", "1")
    assert "walls missing" not in gateway.child.log_text()


ACTIVATED = """
import os, sys
from pathlib import Path
from edge_agent import gateway, settings
os.environ["LISTEN_PID"] = str(os.getpid())
sys.exit(gateway.serve(settings.load(Path(sys.argv[1])), idle_s=1.0))
"""


def test_started_by_a_connection_it_answers_and_ends_when_it_is_idle(agent: Daemon) -> None:
    with short_folder() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        file = folder / "http.toml"
        file.write_text(to_toml(gateway_settings(agent.control_socket, folder)))
        client = Interface(port=listener.getsockname()[1], socket_path=folder / "none")
        for _ in range(2):  # the next connection starts it again
            connection = client.connection()
            connection.request("POST", "/v1/chat/completions", json.dumps(CHAT))
            process = subprocess.Popen(
                [sys.executable, "-c", ACTIVATED, str(file)],
                env=clean_environment({"LISTEN_FDS": "1"}),
                preexec_fn=lambda: os.dup2(listener.fileno(), 3),
                pass_fds=[3],
                cwd=ROOT,
            )
            with contextlib.closing(connection):
                assert connection.getresponse().status == 200
            assert process.wait(60) == 0
        assert not (folder / "http.sock").exists()


def test_sigterm_ends_it_with_0(agent: Daemon) -> None:
    with short_folder() as folder, running_gateway(agent.control_socket, folder) as stopped:
        assert stopped.chat().status == 200
        stopped.child.process.terminate()
        assert stopped.child.process.wait(60) == 0
