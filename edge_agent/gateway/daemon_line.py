"""The way to the daemon: one request over its control socket, and the events that come back, without a thread.

The same lines as in `transport/control.py`. Closing it is how a prompt is cancelled.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from edge_agent.errors import DaemonNotRunning, EdgeAgentError
from edge_agent.runner.lines import LineReader
from edge_agent.transport.control import MAX_LINE_BYTES, encode

_CONNECT_S = 5.0
_CONNECT_AGAIN_S = 0.05
_PIECE_BYTES = 1 << 16


async def ask(path: Path, op: str, **fields: Any) -> AsyncGenerator[dict[str, Any], None]:
    """Sends one request and yields its events. Close the generator to hang up.

    Raises:
        DaemonNotRunning: nothing answers there.
        EdgeAgentError: the daemon sent something that is no event.
    """
    reader, writer = await asyncio.open_unix_connection(sock=await _connected(path))
    try:
        lines = LineReader(
            limit_bytes=MAX_LINE_BYTES,
            broken=lambda reason: EdgeAgentError(f"the control socket brought {reason}"),
        )
        try:
            writer.write(encode({"op": op, **fields}))
            await writer.drain()
        except ConnectionError:
            pass  # it has closed: see what it said
        while data := await _piece(reader):
            lines.add(data)
            while (document := lines.document()) is not None:
                yield document
    finally:
        writer.transport.abort()


async def _piece(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_PIECE_BYTES)
    except ConnectionError:
        return b""


async def _connected(path: Path) -> socket.socket:
    """Waits a little while the daemon's queue of connections is full. Not the loop's own way to connect: it takes the
    kernel's EAGAIN for a beginning (unix(7))."""
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(_CONNECT_S):
            while True:
                try:
                    connection.connect(str(path))
                    return connection
                except BlockingIOError:
                    await asyncio.sleep(_CONNECT_AGAIN_S)
    except PermissionError as error:
        connection.close()
        raise DaemonNotRunning(
            f"permission denied on control socket {path}", remedy="run this process in the group edge-agent"
        ) from error
    except (OSError, TimeoutError) as error:
        connection.close()
        raise DaemonNotRunning(
            f"no daemon answers on {path}",
            remedy="start it with `edge-agent run` or `systemctl start edge-agent`",
        ) from error
    except BaseException:
        connection.close()
        raise
