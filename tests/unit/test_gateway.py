"""The OpenAI interface before a scripted daemon: its shapes, its refusals, its bounds."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import (
    BadRequest,
    DeadlineExceeded,
    EdgeAgentError,
    IdReused,
    ModelFailed,
    NoModel,
    PromptTooLong,
    QueueFull,
    UnknownModel,
)
from edge_agent.gateway import app, connection, handshakes, server
from edge_agent.transport import control
from edge_agent.transport.control import Call
from tests.support import gateway
from tests.support.certificates import Authority
from tests.support.gateway import CHAT, ScriptedDaemon, ServedHere, accept, done, fail, say
from tests.support.processes import short_folder, wait_until


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[ScriptedDaemon, ServedHere]]:
    with gateway.served_here() as made:
        yield made


@pytest.fixture
def daemon(pair: tuple[ScriptedDaemon, ServedHere]) -> ScriptedDaemon:
    """As new for each test."""
    pair[0].script = gateway.answer
    pair[0].asked.clear()
    return pair[0]


@pytest.fixture
def served(pair: tuple[ScriptedDaemon, ServedHere], daemon: ScriptedDaemon) -> ServedHere:
    return pair[1]


# --- Shapes ---------------------------------------------------------------------------------------------


def test_a_chat_is_a_chat_completion(served: ServedHere) -> None:
    response = served.chat()
    assert response.status == 200
    assert response.json == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "assistant",
        "system_fingerprint": "assistant/3",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Madrid.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "timings": {"queue_ms": 0.1, "first_token_ms": 1.0, "total_ms": 2.0, "tokens_per_s": 3.0},
    }


def test_the_daemon_gets_the_body_as_it_came(served: ServedHere, daemon: ScriptedDaemon) -> None:
    body = ' {"messages": [{"role":"user",  "content": "¿Qué?"}], "seed": 1.0}\n'
    assert served.chat(body.encode(), idempotency_key="k-1").status == 200
    (asked,) = daemon.asked
    assert asked == {"op": "chat", "body": body, "surface": "chat", "key": "k-1"}


def test_a_stream_is_chunks_with_a_role_and_an_end(served: ServedHere) -> None:
    events = served.chat({**CHAT, "stream": True}).events
    assert {(event["id"], event["object"], event["model"]) for event in events} == {
        ("chatcmpl-abc", "chat.completion.chunk", "assistant")
    }
    assert [(event["choices"][0]["delta"], event["choices"][0]["finish_reason"]) for event in events] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Mad"}, None),
        ({"content": "rid."}, None),
        ({}, "stop"),
    ]
    assert events[-1]["system_fingerprint"] == "assistant/3"
    assert not any("usage" in event for event in events)


def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(served: ServedHere) -> None:
    *others, last = served.chat({**CHAT, "stream": True, "stream_options": {"include_usage": True}}).events
    assert [event["usage"] for event in others] == [None] * 4
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)


def test_a_completion_is_text(served: ServedHere, daemon: ScriptedDaemon) -> None:
    response = served.request("POST", "/v1/completions", {"prompt": "x"})
    assert response.json["object"] == "text_completion"
    assert response.json["choices"] == [
        {"index": 0, "text": "Madrid.", "finish_reason": "stop", "logprobs": None}
    ]
    events = served.request("POST", "/v1/completions", {"prompt": "x", "stream": True}).events
    assert [event["choices"][0]["text"] for event in events] == ["Mad", "rid.", ""]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert {asked["surface"] for asked in daemon.asked} == {"completion"}


def test_a_repeat_that_gets_no_pieces_streams_the_whole_answer(
    served: ServedHere, daemon: ScriptedDaemon
) -> None:
    def again(call: Call) -> None:
        accept(call)
        done(call)

    daemon.script = again
    deltas = [event["choices"][0]["delta"] for event in served.chat({**CHAT, "stream": True}).events]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Madrid."}, {}]


def test_calls_of_tools_pass_through(served: ServedHere, daemon: ScriptedDaemon) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]

    def call_a_tool(call: Call) -> None:
        accept(call)
        done(
            call,
            message={"role": "assistant", "content": None, "tool_calls": calls},
            finish_reason="tool_calls",
        )

    daemon.script = call_a_tool
    choice = served.chat().json["choices"][0]
    assert (choice["message"]["tool_calls"], choice["finish_reason"]) == (calls, "tool_calls")
    events = served.chat({**CHAT, "stream": True}).events
    assert events[1]["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **calls[0]}]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_event_is_one_line_for_clients_that_know_all_of_unicodes(
    served: ServedHere, daemon: ScriptedDaemon
) -> None:
    """httpx' `iter_lines` and others cut text at these, too."""
    text = "a\x85b\u2028c\u2029d\x0be\x1cf\r\ng\n\ndata: [DONE]\n\n"

    def speak(call: Call) -> None:
        accept(call)
        say(call, text)
        done(call, text)

    daemon.script = speak
    response = served.chat({**CHAT, "stream": True})
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in response.events) == text
    lines = response.body.decode().splitlines()
    assert lines == response.body.decode().split("\n")[:-1]
    assert lines.count("data: [DONE]") == 1


def test_models_are_listed_and_found(served: ServedHere) -> None:
    listed = served.request("GET", "/v1/models").json
    assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", ["assistant", "b"])
    assert served.request("GET", "/v1/models/b").json == listed["data"][1]
    missing = served.request("GET", "/v1/models/c")
    assert (missing.status, missing.error["code"]) == (404, "unknown_model")


@pytest.mark.parametrize(("state", "status"), [("ready", 200), ("degraded", 200), ("starting", 503)])
def test_health_is_whether_it_answers(
    served: ServedHere, daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch, state: str, status: int
) -> None:
    monkeypatch.setitem(daemon.status, "state", state)
    response = served.request("GET", "/healthz")
    assert (response.status, response.json) == (status, {"state": state})


def test_the_unix_socket_serves_the_same(served: ServedHere) -> None:
    assert served.chat(unix=True).status == 200
    assert served.socket_path.stat().st_mode & 0o777 == 0o660


# --- Errors ---------------------------------------------------------------------------------------------

ERRORS: list[tuple[EdgeAgentError, int, str]] = [
    (BadRequest("no", param="seed"), 400, "invalid_request_error"),
    (UnknownModel("no"), 404, "invalid_request_error"),
    (DeadlineExceeded("no"), 408, "server_error"),
    (IdReused("no"), 409, "invalid_request_error"),
    (PromptTooLong("no"), 413, "invalid_request_error"),
    (QueueFull("no", retry_after_ms=1200), 429, "rate_limit_error"),
    (ModelFailed("no"), 500, "server_error"),
    (NoModel("no"), 503, "server_error"),
    (EdgeAgentError("no"), 500, "server_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind"), ERRORS)
def test_a_refusal_has_openais_shape_and_https_status(
    served: ServedHere, daemon: ScriptedDaemon, error: EdgeAgentError, status: int, kind: str, stream: bool
) -> None:
    daemon.script = fail(error)
    response = served.chat({**CHAT, "stream": stream})
    assert response.status == status
    assert response.error == {
        "message": str(error),
        "type": kind,
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    retry = {429: ("2", "1200"), 503: ("2", "2000")}.get(status, (None, None))
    assert (response.headers.get("retry-after"), response.headers.get("retry-after-ms")) == retry


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_an_error_has_its_status(
    served: ServedHere, daemon: ScriptedDaemon, stream: bool
) -> None:
    def script(call: Call) -> None:
        accept(call)
        body = {"status": 408, "code": "deadline_exceeded", "message": "too late"}
        call.send("done", answer={"id": "abc", "error": body}, version=None, flavor=None)

    daemon.script = script
    response = served.chat({**CHAT, "stream": stream})
    assert (response.status, response.error["message"]) == (408, "too late")


def test_an_error_after_the_first_piece_is_an_event_and_the_end(
    served: ServedHere, daemon: ScriptedDaemon
) -> None:
    def script(call: Call) -> None:
        accept(call)
        say(call, "Mad")
        raise ModelFailed("no")

    daemon.script = script
    *_, last = served.chat({**CHAT, "stream": True}).events
    assert last["error"]["code"] == "model_failed"


def test_a_daemon_that_dies_before_the_end_is_one_to_ask_again(
    served: ServedHere, daemon: ScriptedDaemon
) -> None:
    daemon.script = accept
    response = served.chat()
    assert (response.status, response.error["code"]) == (503, "daemon_not_running")
    assert response.headers["retry-after"] == "2"


def test_metrics_are_prometheus_text_and_openmetrics_for_those_who_ask(served: ServedHere) -> None:
    response = served.request("GET", "/metrics")
    assert (response.status, response.headers["content-type"]) == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
    )
    assert b"\nedge_agent_queue_depth 3.0\n" in response.body
    asked = served.request("GET", "/metrics", accept="application/openmetrics-text;version=1.0.0,*/*;q=0.1")
    assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert asked.body.endswith(b"# EOF\n")


def test_metrics_are_said_while_too_much_is_asked(
    served: ServedHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_PROMPTS", 0)
    assert served.chat().status == 429
    assert served.request("GET", "/metrics").status == 200


def test_metrics_obey_host_and_origin(served: ServedHere) -> None:
    assert served.request("GET", "/metrics", host="evil.test").status == 421
    assert served.request("GET", "/metrics", origin="http://evil.test").status == 403


def test_no_daemon_is_503(short_dir: Path) -> None:
    served = ServedHere(short_dir / "c.sock", short_dir)
    try:
        for response in (
            served.chat(),
            served.request("GET", "/v1/models"),
            served.request("GET", "/healthz"),
        ):
            assert (response.status, response.error["code"]) == (503, "daemon_not_running")
        measured = served.request("GET", "/metrics")
        assert (measured.status, measured.body.splitlines()[-1]) == (200, b"edge_agent_up 0.0")
    finally:
        served.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/a", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_served_says_so(
    served: ServedHere, method: str, path: str, status: int, code: str
) -> None:
    response = served.request(method, path)
    assert (response.status, response.error["code"]) == (status, code)


def test_a_body_that_is_no_text_is_refused(served: ServedHere) -> None:
    response = served.chat(b"\xff{")
    assert (response.status, response.error["code"]) == (400, "bad_request")


# --- Bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(served: ServedHere, daemon: ScriptedDaemon, chunked: bool) -> None:
    size = served.settings.limits.payload_bytes + 1
    http = served.connection()
    with contextlib.closing(http):
        body: Any = iter([b"x" * 1000] * (size // 1000 + 1)) if chunked else b"x" * size
        http.request("POST", "/v1/chat/completions", body, encode_chunked=chunked)
        response = http.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "prompt_too_long")
        http.request("GET", "/healthz")
        assert http.getresponse().status == 200, "the connection goes on"
    assert daemon.asked == []


def test_a_body_that_does_not_come_is_408(
    served: ServedHere, daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.05)
    with served.raw() as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        )
        assert b" 408 " in client.recv(1 << 16)
    assert daemon.asked == []


@pytest.mark.parametrize(
    ("requests_before", "sent"),
    [(0, b""), (0, b"GET / HTTP/1.1\r\nX: a"), (1, b"GET / HTTP/1.1\r\nX: a")],
    ids=["nothing", "half a header", "half a second header"],
)
def test_a_request_that_does_not_come_ends_its_connection(
    served: ServedHere, monkeypatch: pytest.MonkeyPatch, requests_before: int, sent: bytes
) -> None:
    with served.raw() as client:
        for _ in range(requests_before):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        client.sendall(sent)
        monkeypatch.setattr(connection, "REQUEST_S", 0.0)
        assert ended(client)


def ended(client: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while client.recv(1 << 16):
            pass
    return True


def test_headers_without_end_are_refused(served: ServedHere) -> None:
    with served.raw() as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (connection.MAX_HEADER_BYTES + 100))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        assert ended(client)


def test_what_is_not_http_gets_an_error_in_openais_shape(served: ServedHere) -> None:
    with served.raw() as client:
        client.sendall(b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n")
        data = client.makefile("rb").read()
    assert data.startswith(b"HTTP/1.1 400 ")
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"


def test_a_client_that_leaves_hangs_up_on_the_daemon(served: ServedHere, daemon: ScriptedDaemon) -> None:
    daemon.script = gateway.until_client_leaves
    for stream in (False, True):
        http = served.connection()
        http.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": stream}))
        wait_until(lambda: daemon.asked, 60, "the daemon to be asked")
        http.close()
        assert daemon.gone.get(timeout=60)
        daemon.asked.clear()


def test_a_client_that_reads_nothing_is_ended_and_its_prompt_with_it(
    served: ServedHere, daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the daemon nor the kernel would end it in this time."""
    monkeypatch.setattr(connection, "STALL_S", 0.2)
    monkeypatch.setattr(control, "_SEND_TIMEOUT_S", 600.0)

    def flood(call: Call) -> None:
        accept(call)
        while True:
            say(call, "x" * 100_000)

    daemon.script = flood
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.port))
        body = json.dumps({**CHAT, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        accepted = wait_until(lambda: accepted_from(client, served), 60, "the connection")
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 600_000)
        client.sendall(head.encode() + body)
        assert daemon.gone.get(timeout=60)
        daemon.script = gateway.answer
        assert served.chat().status == 200, "others are served"


def accepted_from(client: socket.socket, served: ServedHere) -> Any:
    """The other end of its connection; None before there is one."""
    here = client.getsockname()
    for each in list(served.server.server_state.connections):
        if each.transport.get_extra_info("peername") == here:
            return each.transport.get_extra_info("socket")
    return None


def test_more_requests_than_places_are_refused_at_once(
    served: ServedHere, daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_PROMPTS", 2)
    daemon.script = gateway.until_client_leaves
    with contextlib.ExitStack() as stack:
        for stream in (False, True):
            http = stack.enter_context(contextlib.closing(served.connection()))
            http.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": stream}))
        wait_until(lambda: len(daemon.asked) == 2, 60, "both to be asked")
        refused = served.chat()
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert served.request("GET", "/healthz").status == 200, "that is no prompt"
    for _ in range(2):
        daemon.gone.get(timeout=60)
    daemon.script = gateway.answer
    wait_until(lambda: served.chat().status == 200, 60, "a place")


def test_no_piece_of_an_answer_waits_for_the_clients_acknowledgement(served: ServedHere) -> None:
    with served.raw():
        wait_until(lambda: served.server.server_state.connections, 60, "the connection")
        for each in list(served.server.server_state.connections):
            accepted = each.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_connections_that_idle_give_way_to_new_ones(
    served: ServedHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REQUEST_S", 600.0)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(served.raw()) for _ in range(connection.MAX_CONNECTIONS)]
        assert [served.request("GET", "/healthz").status for _ in range(3)] == [200] * 3
        assert ended(idle[0])
        wait_until(lambda: len(served.server.server_state.connections) <= connection.MAX_CONNECTIONS, 60)


def test_handshakes_that_say_nothing_give_way_to_new_ones(
    daemon: ScriptedDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 600.0)
    authority = Authority(tmp_path)
    pair = authority.server()
    with short_folder() as folder, contextlib.ExitStack() as stack:
        served = ServedHere(daemon.path, folder, cert_file=str(pair.certificate), key_file=str(pair.key))
        stack.callback(served.close)
        served.tls = ssl.create_default_context(cafile=str(authority.file))
        silent = [stack.enter_context(served.raw()) for _ in range(handshakes.MAX_HANDSHAKES + 8)]
        assert all(ended(client) for client in silent[:8]), "the oldest"
        assert [served.chat().status for _ in range(3)] == [200] * 3
        assert served.chat(unix=True).status == 200
        assert sum(server.handshakes for server in served.server._tls) <= handshakes.MAX_HANDSHAKES
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)
        silent[-1].setblocking(True)
        silent[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert ended(silent[-1]), "what is no TLS"
        assert served.chat().status == 200


def test_a_client_cannot_say_who_it_is_through_a_proxys_headers(
    served: ServedHere, daemon: ScriptedDaemon
) -> None:
    response = served.request("GET", "/healthz", x_forwarded_host="evil.test", x_forwarded_proto="https")
    assert response.status == 200
    assert "server" not in response.headers


def test_it_ends_when_nobody_comes(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_S", 600.0)
    served = ServedHere(short_dir / "c.sock", short_dir)
    connections = served.server.server_state.connections
    assert served.request("GET", "/healthz").status == 503
    wait_until(lambda: not connections, 60, "the end of that one")
    with served.raw():
        wait_until(lambda: connections, 60, "the connection")
        served.server._idle_s = 0.3  # from the start, a slow machine could end it before anybody comes
        busy = served.server._busy_s
        wait_until(lambda: served.server._busy_s > busy + 0.5, 60, "a connection that counts")
        assert not served.server.should_exit
    served.wait_end()


def test_a_signal_ends_it_however_seldom_it_looks(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOOK_S", 3600.0)
    served = ServedHere(short_dir / "c.sock", short_dir)
    assert served.request("GET", "/healthz").status == 503
    served.close()
