"""The control socket: the CLI's way into the daemon.

A Unix socket, JSON lines. A client sends one request, `{"op": …, …}`, with at most one open file, and reads
events until the connection closes; the last event is `done` or `error`. Owns the listening socket and a bounded
number of connection threads. Refuses lines over the bound and unknown operations. The socket's file mode decides
who may connect.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_agent.errors import ControlSocketError, DaemonNotRunning, DaemonRunning, EdgeAgentError
from edge_agent.runner.lines import LineReader

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 20 << 20
MAX_CONNECTIONS = 32
SOCKET_MODE = 0o660
_REQUEST_TIMEOUT_S = 10.0
_ACCEPT_S = 0.5
_SEND_TIMEOUT_S = 30.0


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

    def send(self, event: str, **fields: Any) -> None:
        """Sends one event.

        Raises:
            ClientGone: nobody reads any more.
        """
        try:
            self._connection.sendall(_encode({"event": event, **fields}))
        except OSError as error:
            raise ClientGone from error

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


class ControlServer:
    """Listens on the control socket; `run` is its thread.

    Args:
        operations: by name.

    Raises:
        ControlSocketError: the socket cannot be made.
        DaemonRunning: another daemon listens on it.
    """

    def __init__(self, path: Path, operations: Mapping[str, Operation]) -> None:
        self._path = path
        self._operations = operations
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._closing = threading.Event()
        self._listener = _listen(path)

    def run(self) -> None:
        """The thread: accepts until `close`."""
        self._listener.settimeout(_ACCEPT_S)
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._closing.is_set():
                    return
                raise
            connection.settimeout(_SEND_TIMEOUT_S)
            if not self._slots.acquire(blocking=False):
                with connection, contextlib.suppress(OSError):
                    connection.sendall(_encode(_error_event(EdgeAgentError("too many control connections"))))
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="control-connection", daemon=True
            ).start()

    def close(self) -> None:
        """Ends `run` and removes the socket."""
        self._closing.set()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._answer(connection)
            except ClientGone:
                pass
            except Exception:
                log.exception("control connection failed")
            finally:
                self._slots.release()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_REQUEST_TIMEOUT_S)
        files: list[int] = []
        try:
            try:
                request = next(_lines(connection, files), None)
            except (OSError, EdgeAgentError):
                return
            # A client that stops reading must not hold its slot for ever.
            connection.settimeout(_SEND_TIMEOUT_S)
            self._run(Call(connection, request or {}, files[0] if files else None))
        finally:
            for file in files:
                os.close(file)

    def _run(self, call: Call) -> None:
        try:
            operation = self._operations.get(str(call.request.get("op")))
            if operation is None:
                raise EdgeAgentError(f"unknown operation {call.request.get('op')!r}")
            operation(call)
        except EdgeAgentError as error:
            call.send(**_error_event(error))


def call(
    path: Path, op: str, *, timeout_s: float | None = None, file: int | None = None, **fields: Any
) -> Iterator[dict[str, Any]]:
    """The CLI's side: sends one request and yields its events.

    Args:
        file: descriptor of an open file to send along: the daemon may not be able to open it by its name.
        timeout_s: for each event; None waits as long as the daemon lives.

    Raises:
        DaemonNotRunning: nothing listens on `path`.
        TimeoutError: no event came in time.
        EdgeAgentError: the daemon sent something that is no event.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5.0)
        try:
            connection.connect(str(path))
        except PermissionError as error:
            raise EdgeAgentError(
                f"permission denied on control socket {path}", remedy="join the group edge-agent, or use sudo"
            ) from error
        except OSError as error:
            raise DaemonNotRunning(
                f"no daemon answers on {path}",
                remedy="start it with `edge-agent run` or `systemctl start edge-agent`",
            ) from error
        # From here on a daemon is there and may have done what it was asked: the caller must not do it again itself.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has closed: see what it said
            _send_request(connection, _encode({"op": op, **fields}), file)
        connection.settimeout(timeout_s)
        yield from _lines(connection)


def _send_request(connection: socket.socket, line: bytes, file: int | None) -> None:
    if file is not None:
        line = line[socket.send_fds(connection, [line], [file]) :]
    if line:  # sending nothing, too, fails when the daemon has answered and closed
        connection.sendall(line)


def _lines(connection: socket.socket, files: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Documents as they come. One open file may come along; it is put into `files`."""
    lines = LineReader(
        limit_bytes=MAX_LINE_BYTES,
        broken=lambda reason: EdgeAgentError(f"the control socket brought {reason}"),
    )
    while True:
        try:
            data = connection.recv(1 << 16) if files is None else _receive(connection, files)
        except ConnectionResetError:
            return
        if not data:
            return
        lines.add(data)
        while (document := lines.document()) is not None:
            yield document


def _receive(connection: socket.socket, files: list[int]) -> bytes:
    data, came, _, _ = socket.recv_fds(connection, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
    files.extend(came)
    if len(files) > 1:
        raise EdgeAgentError("a request brings more than one file")
    return data


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _error_event(error: EdgeAgentError) -> dict[str, Any]:
    return {"event": "error", "code": error.code, "message": error.message, "remedy": error.remedy}


def _listen(path: Path) -> socket.socket:
    """Binds the socket. Replaces one that a dead daemon left behind, but not that of a living one."""
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
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ControlSocketError(
            f"control_socket: {path} cannot be made: {error.strerror or error}"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener
