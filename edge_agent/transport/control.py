"""The control socket: the CLI's way into the daemon.

A Unix socket, JSON lines. A client sends one request, `{"op": …, …}`, with at most one open file, and reads
events until the connection closes; the last event is `done` or `error`. Owns the listening socket and a bounded
number of connection threads: one user cannot take all of them, and root has its own. Refuses lines over the bound,
requests that are slow to come, and unknown operations; a client whose request is wrong gets an `error` event in any
case. The socket's file mode decides who may connect.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_agent.chat.wake import Wake
from edge_agent.errors import (
    BadRequest,
    ControlSocketError,
    DaemonNotRunning,
    DaemonRunning,
    EdgeAgentError,
    PromptError,
    QueueFull,
    error_of,
)
from edge_agent.runner.lines import LineReader

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 34 << 20
"""Of an answer, or of a request where nobody says less."""
_LEAST_REQUEST_BYTES = 1 << 20
_FIELDS_BYTES = 4096
"""Of a prompt's line, beside its text."""
MAX_CONNECTIONS = 96
MAX_OF_ONE_USER = 40
"""The OpenAI interface is one user, and each prompt of it a connection: the usual queue has room for 32."""
_SEAT_AGAIN_MS = 1000
_TAKE_AGAIN_S = 1.0
_UNKNOWN_OPERATION = "unknown operation "
"""How daemons of all releases begin to say it."""
SOCKET_MODE = 0o660
_REQUEST_TIMEOUT_S = 10.0
"""For the whole of it: a client that sends a byte now and then has no more time than one that sends nothing."""
_SEND_TIMEOUT_S = 30.0
_CONNECT_S = 5.0
_CONNECT_AGAIN_S = 0.05
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED
_ROOT = 0


class ClientGone(Exception):
    """The other end has closed: nobody waits for this answer any more."""


class Call:
    """One request and the way back to its client. Used by the connection's own thread only.

    Attributes:
        file: descriptor of an open file that came with the request, or None; open as long as the call.
    """

    def __init__(
        self, connection: socket.socket, request: Mapping[str, Any], file: int | None = None
    ) -> None:
        self._connection = connection
        self.request = request
        self.file = file

    @property
    def process(self) -> int:
        """The client's, as the kernel says it; 0 where it has no number here."""
        return _peer_of(self._connection)[0]

    def send(self, event: str, **fields: Any) -> None:
        """Sends one event.

        Raises:
            ClientGone: nobody reads any more.
        """
        try:
            self._connection.sendall(encode({"event": event, **fields}))
        except OSError as error:
            raise ClientGone from error

    def fail(self, error: EdgeAgentError) -> None:
        """Sends the last event of a call that failed.

        Raises:
            ClientGone: nobody reads any more.
        """
        more: dict[str, Any] = {}
        if isinstance(error, PromptError) and error.retry_after_ms is not None:
            more["retry_after_ms"] = error.retry_after_ms
        if isinstance(error, BadRequest) and error.param is not None:
            more["param"] = error.param
        self.send("error", code=error.code, message=error.message, remedy=error.remedy, **more)

    def check(self) -> None:
        """Raises ClientGone when the client has closed; does not wait.

        Not MSG_DONTWAIT: on a socket with a timeout Python itself waits that long before it gives up.
        """
        try:
            readable, _, _ = select.select([self._connection], [], [], 0)
            if readable and self._connection.recv(1, socket.MSG_PEEK) == b"":
                raise ClientGone
        except (OSError, ValueError) as error:
            raise ClientGone from error


Operation = Callable[[Call], None]
"""Answers one request; what it raises becomes the `error` event."""


class _Seats:
    """How many connections each user has. Any thread.

    A connection that says nothing, or a command that waits for a long answer, keeps its seat; so a user has a part of
    the seats only. Root's are beside the others': whoever has to mend the device gets in.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: Counter[int] = Counter()

    def take(self, user: int) -> bool:
        """True where the user has a seat now; `leave` gives it back."""
        with self._lock:
            of_others = self._taken.total() - self._taken[_ROOT]
            if self._taken[user] >= MAX_OF_ONE_USER or (user != _ROOT and of_others >= MAX_CONNECTIONS):
                return False
            self._taken[user] += 1
            return True

    def leave(self, user: int) -> None:
        with self._lock:
            self._taken[user] -= 1


class ControlServer:
    """Listens on the control socket; `run` is its thread.

    Args:
        operations: by name.
        max_request_bytes: of a request: each connection may hold so many in memory. See `request_bytes`.

    Raises:
        ControlSocketError: the socket cannot be made.
        DaemonRunning: another daemon listens on it.
    """

    def __init__(
        self, path: Path, operations: Mapping[str, Operation], *, max_request_bytes: int = MAX_LINE_BYTES
    ) -> None:
        self._path = path
        self._operations = operations
        self._max_request_bytes = max_request_bytes
        self._seats = _Seats()
        self._closing = threading.Event()
        self._wake = Wake()
        self._listener = listen(path, key="control_socket")
        self._listener.setblocking(False)  # a client that is counted may have left

    def run(self) -> None:
        """The thread: accepts until `close`."""
        while not self._closing.is_set():
            self._wake.wait(None, self._listener.fileno())
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # no descriptors, no memory: it waits in the listener's queue
                if not self._closing.is_set():
                    log.warning("control connection not taken code=internal reason=%r", str(error))
                    self._closing.wait(_TAKE_AGAIN_S)
                continue
            connection.settimeout(_SEND_TIMEOUT_S)
            _, user = _peer_of(connection)
            if not (self._seats.take(user) and self._begin(connection, user)):
                full = QueueFull(
                    "too many control connections",
                    remedy="end some of the other commands",
                    retry_after_ms=_SEAT_AGAIN_MS,
                )
                log.info("control request refused code=%s user=%d", full.code, user)
                with connection, contextlib.suppress(ClientGone):
                    Call(connection, {}).fail(full)

    def _begin(self, connection: socket.socket, user: int) -> bool:
        """Starts a connection's thread. False where this host has none left; the user has no seat then."""
        thread = threading.Thread(
            target=self._serve, args=(connection, user), name="control-connection", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            self._seats.leave(user)
            return False
        return True

    def close(self) -> None:
        """Ends `run` and removes the socket."""
        self._closing.set()
        self._wake.set()
        self._listener.close()
        with contextlib.suppress(OSError):  # on a disk that has turned read-only the next daemon replaces it
            self._path.unlink(missing_ok=True)

    def _serve(self, connection: socket.socket, user: int) -> None:
        files: list[int] = []
        try:
            with connection, contextlib.suppress(ClientGone):
                self._answer(connection, files)
        finally:
            for file in files:
                os.close(file)
            self._seats.leave(user)

    def _answer(self, connection: socket.socket, files: list[int]) -> None:
        call = Call(connection, {})
        try:
            request = _request(connection, files, limit_bytes=self._max_request_bytes)
            # A client that stops reading must not keep its seat for ever.
            connection.settimeout(_SEND_TIMEOUT_S)
            call = Call(connection, request, files[0] if files else None)
            operation = self._operations.get(str(request.get("op")))
            if operation is None:
                raise EdgeAgentError(f"{_UNKNOWN_OPERATION}{str(request.get('op'))[:80]!r}")
            operation(call)
        except EdgeAgentError as error:  # its message may quote a prompt
            op = str(call.request.get("op"))
            log.info(
                "control request refused code=%s op=%s", error.code, op if op in self._operations else ""
            )
            call.fail(error)
        except ClientGone:
            raise
        except Exception:
            log.exception("control connection failed code=internal")
            call.fail(EdgeAgentError("an error that nobody foresaw", remedy="see the daemon's log"))


def call(
    path: Path, op: str, *, timeout_s: float | None = None, file: int | None = None, **fields: Any
) -> Generator[dict[str, Any], None, None]:
    """The CLI's side: sends one request and yields its events. Closing it early hangs up.

    Args:
        file: descriptor of an open file to send along: the daemon may not be able to open it by its name.
        timeout_s: for each event; None waits as long as the daemon lives.

    Raises:
        DaemonNotRunning: nothing listens on `path`.
        TimeoutError: no event came in time.
        EdgeAgentError: the daemon sent something that is no event.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            _connect(connection, path)
        except PermissionError as error:
            raise EdgeAgentError(
                f"permission denied on control socket {path}", remedy="join the group edge-agent, or use sudo"
            ) from error
        except (BlockingIOError, TimeoutError) as error:
            raise EdgeAgentError(
                f"the daemon on {path} is too busy to answer", remedy="try again; see `edge-agent status`"
            ) from error
        except OSError as error:
            raise DaemonNotRunning(
                f"no daemon answers on {path}",
                remedy="start it with `edge-agent run` or `systemctl start edge-agent`; "
                "if it runs with other settings, name them: `edge-agent --config FILE …`",
            ) from error
        # From here on a daemon is there and may have done what it was asked: the caller must not do it again itself.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has closed: see what it said
            _send_request(connection, encode({"op": op, **fields}), file)
        connection.settimeout(timeout_s)
        yield from _lines(connection)


def reported(event: Mapping[str, Any], *, among: Iterable[type[EdgeAgentError]]) -> EdgeAgentError:
    """The error that the daemon reported in an event, or in an answer.

    Where it does not know what it was asked, it is of another release: it was not restarted after an upgrade.

    Args:
        among: the families that are told apart.
    """
    code, message = event.get("code"), str(event.get("message"))
    if code == EdgeAgentError.code and message.startswith(_UNKNOWN_OPERATION):
        return EdgeAgentError(
            f"the daemon that runs is of another release and does not know {message.removeprefix(_UNKNOWN_OPERATION)}",
            remedy="`sudo systemctl restart edge-agent` starts the one that is installed",
        )
    return error_of(code, message, remedy=event.get("remedy") or "", among=among, otherwise=EdgeAgentError)


def _connect(connection: socket.socket, path: Path) -> None:
    """Waits while the listener's queue is full: a daemon is there, and the caller must not do its work."""
    connection.settimeout(_CONNECT_S)
    until_s = time.monotonic() + _CONNECT_S
    while True:
        try:
            connection.connect(str(path))
            return
        except BlockingIOError:
            if time.monotonic() >= until_s:
                raise
        time.sleep(_CONNECT_AGAIN_S)


def _peer_of(connection: socket.socket) -> tuple[int, int]:
    """(process, user) that connected, as the kernel says it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return int(process), int(user)


def _send_request(connection: socket.socket, line: bytes, file: int | None) -> None:
    if file is not None:
        line = line[socket.send_fds(connection, [line], [file]) :]
    if line:  # sending nothing, too, fails when the daemon has answered and closed
        connection.sendall(line)


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The daemon's documents as they come."""
    lines = _reader()
    while True:
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            return
        if not data:
            return
        lines.add(data)
        while (document := lines.document()) is not None:
            yield document


def request_bytes(payload_bytes: int) -> int:
    """How long the line of a prompt may be.

    Three times as long as the prompt: `encode` writes two bytes of UTF-8 as six. Somewhat longer ones come in as
    well, to be refused as prompts.

    Args:
        payload_bytes: `limits.payload_bytes`.
    """
    return max(_LEAST_REQUEST_BYTES, 3 * payload_bytes + _FIELDS_BYTES)


def _request(connection: socket.socket, files: list[int], *, limit_bytes: int) -> dict[str, Any]:
    """A client's one request. One open file may come along; it is put into `files`.

    Raises:
        EdgeAgentError: it is no request, or it does not come in time.
        ClientGone: the client closed before it had said anything.
    """
    lines = _reader(limit_bytes)
    until_s = time.monotonic() + _REQUEST_TIMEOUT_S
    came = False
    while (document := lines.document()) is None:
        try:
            if (left_s := until_s - time.monotonic()) <= 0:
                raise TimeoutError
            connection.settimeout(left_s)
            data = _receive(connection, files)
        except TimeoutError as error:
            raise EdgeAgentError(f"no whole request came within {_REQUEST_TIMEOUT_S:.0f} s") from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            if came:
                raise EdgeAgentError("the request ends before its line does")
            raise ClientGone
        came = True
        lines.add(data)
    return document


def _reader(limit_bytes: int = MAX_LINE_BYTES) -> LineReader:
    return LineReader(
        limit_bytes=limit_bytes,
        broken=lambda reason: EdgeAgentError(f"the control socket brought {reason}"),
    )


def _receive(connection: socket.socket, files: list[int]) -> bytes:
    data, came, _, _ = socket.recv_fds(connection, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
    files.extend(came)
    if len(files) > 1:
        raise EdgeAgentError("a request brings more than one file")
    return data


def encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def listen(path: Path, *, key: str) -> socket.socket:
    """Binds a Unix socket for the members of its group. Replaces one that a dead process left behind, but not that of
    a living one.

    Args:
        key: of the setting that names it.

    Raises:
        ControlSocketError: it cannot be made.
        DaemonRunning: somebody listens on it.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(str(path))
                except OSError:
                    path.unlink(missing_ok=True)
                else:
                    raise DaemonRunning(f"another daemon listens on {path}", remedy="see `edge-agent status`")
        old_mask = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old_mask)
        listener.listen(2 * MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ControlSocketError(f"{key}: {path} cannot be made: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener
