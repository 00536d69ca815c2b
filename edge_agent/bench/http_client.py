"""An ordinary HTTP client of an OpenAI interface, that streams answers and measures when they arrive.

One connection for each prompt, and its time counts. Answers at once have a thread each; the threads only wait.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from edge_agent.bench.line_child import BenchError
from edge_agent.bench.timing import Timing

_MAX_LINE_BYTES = 1 << 20
_MAX_REASON_BYTES = 1 << 16
_EVENT, _END = b"data: ", b"[DONE]"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The text of an answer, and how long it took."""

    text: str
    timing: Timing


class HttpClient:
    """Asks greedily.

    Args:
        name: of the server, for errors.
        port: on the loopback interface.
        api_key: what the server wants to see.
        timeout_s: for a whole answer.
    """

    def __init__(self, name: str, port: int, *, api_key: str, timeout_s: float) -> None:
        self._name, self._port = name, port
        self._api_key = api_key
        self._timeout_s = timeout_s

    def ask_at_once(self, texts: Sequence[str], max_tokens: int) -> list[Answer]:
        """Returns the answers in the order of the texts.

        Raises:
            BenchError: as `ask` does.
        """
        threads = ThreadPoolExecutor(len(texts), "bench-http")
        try:
            return list(threads.map(lambda text: self.ask(text, max_tokens), texts))
        finally:
            threads.shutdown(wait=False)  # after an error, or Ctrl-C, the others end with the server

    def ask(self, text: str, max_tokens: int) -> Answer:
        """
        Raises:
            BenchError: the server refuses the prompt, breaks off, or is too slow.
        """
        started, first, pieces, usage = time.perf_counter(), 0.0, list[str](), dict[str, Any]()
        for chunk in self._chunks(json.dumps(_question(text, max_tokens)).encode()):
            if piece := _text(chunk):
                first = first or time.perf_counter()
                pieces.append(piece)
            usage = chunk.get("usage") or usage
        ended = time.perf_counter()
        if not usage:
            raise BenchError(f"{self._name} broke an answer off")
        timing = {"first_token_ms": ((first or ended) - started) * 1000, "total_ms": (ended - started) * 1000}
        return Answer(text="".join(pieces), timing=Timing.of({**usage, **timing}))

    def _chunks(self, body: bytes) -> Iterator[dict[str, Any]]:
        """The chunks of an answer until its end."""
        limit_s = time.monotonic() + self._timeout_s
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_s)
        headers = {"Authorization": f"Bearer {self._api_key}", "Content-Type": "application/json"}
        try:
            with contextlib.closing(connection):
                connection.request("POST", "/v1/chat/completions", body, headers)
                response = connection.getresponse()
                if response.status != http.client.OK:
                    raise self._refusal(response.read(_MAX_REASON_BYTES))
                for event in self._events(response, limit_s):
                    chunk = json.loads(event)
                    if "error" in chunk:
                        raise self._refusal(event)
                    yield chunk
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BenchError(f"{self._name} did not answer: {error or type(error).__name__}") from error

    def _events(self, response: http.client.HTTPResponse, limit_s: float) -> Iterator[bytes]:
        """What the server sends as events; its comments, which keep a connection alive, are none."""
        while line := response.readline(_MAX_LINE_BYTES):
            if time.monotonic() > limit_s:
                raise TimeoutError(f"not through within {self._timeout_s:.0f} s")
            if line.startswith(_EVENT):
                event = line.removeprefix(_EVENT).strip()
                if event == _END:
                    return
                yield event

    def _refusal(self, said: bytes) -> BenchError:
        return BenchError(f"{self._name} refuses a prompt: {said.decode('utf-8', 'replace').strip()[:300]}")


def _question(text: str, max_tokens: int) -> dict[str, Any]:
    """It is to read every prompt anew, as the bare library does (`cache_prompt` is an option of llama.cpp)."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": False,
    }


def _text(chunk: dict[str, Any]) -> str:
    """What the model wrote, its thoughts too: llama.cpp's server has a field of its own for them."""
    deltas = [choice["delta"] for choice in chunk.get("choices", ())]
    return "".join(delta.get(field) or "" for delta in deltas for field in ("reasoning_content", "content"))
