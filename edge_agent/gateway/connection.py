"""One client's connection, with the bounds that uvicorn has none for: how long a request may take to come, and how long
a client may take nothing of what it is sent.

Owns no HTTP: h11 parses, uvicorn speaks it. A client that idles gives way when there are too many.

    made → waits (REQUEST_S from its first byte, or from the connection) → works, as long as the app does → waits …
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 128
MAX_HEADER_BYTES = 16_384
REQUEST_S = 15.0
"""From the first byte to the end of the headers; for what follows a refused request, too."""
KEEP_ALIVE_S = 60
STALL_S = 30.0
_MALFORMED = {
    "error": {
        "message": "the request is not HTTP, or its headers are too long",
        "type": "invalid_request_error",
        "param": None,
        "code": "bad_request",
    }
}


class Connection(H11Protocol):
    """A connection of uvicorn's, which looks at the clock when `check` is called."""

    _since_s: float | None = None
    """When what it waits for began to come; None while it works, and between two requests."""
    _idle_s = 0.0
    """Since when it has no request."""
    _unsent_bytes = 0
    _moved_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since_s = self._idle_s = self._moved_s = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if not self.works and self._since_s is None:
            self._since_s = self.loop.time()
        super().data_received(data)
        if self.works:
            self._since_s = None

    def on_response_complete(self) -> None:
        self._since_s, self._idle_s = None, self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._moved_s = self.loop.time()
        super().resume_writing()

    @property
    def works(self) -> bool:
        """A request of it has not been answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def check(self, now_s: float) -> None:
        """Ends it where a bound is reached.

        Args:
            now_s: of the loop's clock.
        """
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent_bytes:
            self._moved_s = now_s
        self._unsent_bytes = unsent
        late = not self.works and self._since_s is not None and now_s - self._since_s > REQUEST_S
        if late or now_s - self._moved_s > STALL_S:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What cannot be read gets an error of the same shape as all others."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(_MALFORMED).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        events: list[Any] = [
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _make_room(self) -> None:
        """Ends the connection that has waited longest; this one where all others work."""
        waiting = [each for each in self.connections if isinstance(each, Connection) and not each.works]
        victim = min(waiting, key=lambda each: each._idle_s, default=self)
        victim.transport.abort()
        self.connections.discard(victim)
