"""The wheel `xllamacpp` as far as the benchmark uses it: a server that streams over HTTP what llama.cpp's does.

It says "Once upon", always; but "Once again" to a prompt that ends with "wavers" and that it is asked a second time.
A prompt that it is asked a second time waits until as many are there as it has slots. Others get what the server says
when something is wrong.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

WAIT_S = 30.0
USAGE = {"completion_tokens": 2, "prompt_tokens": 30, "prompt_tokens_details": {"cached_tokens": 0}}


class CommonParams(SimpleNamespace):
    """The settings of a server."""

    def __init__(self) -> None:
        super().__init__(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        )


class Server:
    """It has loaded its file and listens once it is made.

    Attributes:
        asked: the bodies of all requests.
        stalling: set once the answer to "stalls" has begun and waits.
        stalled: set by a test that lets it go on.
        gave_up: nobody did, and it went on by itself.
    """

    def __init__(self, settings: Any) -> None:
        if not settings.model.path.endswith("good.gguf"):
            raise RuntimeError("Failed to init server,\nplease check")
        self.settings, self.asked = settings, list[dict[str, Any]]()
        self.stalling, self.stalled, self.gave_up = threading.Event(), threading.Event(), False
        self._seen, self._together = Counter[str](), threading.Barrier(settings.n_parallel)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.listening_address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.stalled.set()
        self._http.shutdown()
        self._http.server_close()

    def events(self, question: dict[str, Any]) -> Iterator[str]:
        """The answer, with a comment that only keeps the connection alive."""
        text = question["messages"][0]["content"]
        self.asked.append(question)
        self._seen[text] += 1
        again = self._seen[text] > 1
        if again:
            self._together.wait(WAIT_S)
        yield _chunk([{"role": "assistant", "content": None}])
        yield ":\n\n"
        if text == "thinks":
            yield _chunk([{"reasoning_content": "Hm. "}])
        yield _chunk([{"content": "Once"}])
        if text == "breaks off":
            return
        if text == "stalls":
            self.stalling.set()
            self.gave_up = not self.stalled.wait(WAIT_S)
        if text == "fails":
            yield 'data: {"error":{"code":500,"message":"Compute error."}}\n\n'
            return
        yield _chunk([{"content": " again" if again and text.endswith("wavers") else " upon"}])
        yield _chunk([{}])
        yield _chunk([], usage=USAGE)
        yield "data: [DONE]\n\n"


def _chunk(deltas: list[dict[str, Any]], **more: Any) -> str:
    choices = [{"finish_reason": None, "index": 0, "delta": delta} for delta in deltas]
    return f"data: {json.dumps({'choices': choices, **more})}\n\n"


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] not in {f"Bearer {key}" for key in server.settings.api_keys}:
                self._refuse(401, "Invalid API Key")
            elif question["messages"][0]["content"] == "too long":
                self._refuse(400, "request (1431 tokens) exceeds the available context size")
            else:
                self._stream(question)

        def _stream(self, question: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in server.events(question):
                self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
            if question["messages"][0]["content"] != "breaks off":
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def _refuse(self, code: int, message: str) -> None:
            body = json.dumps({"error": {"message": message, "code": code}}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
