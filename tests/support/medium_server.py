"""One `Medium` for all the processes that write to a state folder.

The test's process holds it, before the first of the others starts and after the last one was killed. Each of
them tells it what it synced, renamed or removed, through a Unix socket: one call, one connection, and the call
goes on when the answer is here. A descriptor comes with the call that syncs it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.support.power import Medium

_LIMIT_S = 30
_MAX_BYTES = 65_536
_DONE = b"done"


class MediumServer:
    """Its thread feeds the medium; the test looks at it between two of the thread's steps.

    Args:
        root: folder whose medium it is; what is there now is taken as synced.
        address: path of the socket, a short one.

    Attributes:
        synced: how often each path below the root was synced; by whom does not matter.
        trouble: what it did not understand; whatever was made of the folder then is not to be relied on.
    """

    def __init__(self, root: Path, address: Path) -> None:
        self.synced = Counter[str]()
        self.trouble = ""
        self._root = root
        self._medium = Medium(root)
        self._turn = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, name="medium", daemon=True)
        self._thread.start()

    def write(self, target: Path) -> None:
        """Makes a folder that is what the medium holds."""
        with self._turn:
            self._medium.write(target)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread
        self._thread.join(_LIMIT_S)
        self._listener.close()
        self._medium.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(_LIMIT_S)
                try:
                    request, descriptors, _, _ = socket.recv_fds(connection, _MAX_BYTES, 1)
                except OSError:
                    continue  # killed between connect and send: its call was not made
                answer = self._answer(request, descriptors)
                try:
                    connection.sendall(answer)
                except OSError:
                    continue  # killed while it waited: its call was made

    def _answer(self, request: bytes, descriptors: list[int]) -> bytes:
        """`done`, or what went wrong: that ends the process which asked, and so the test."""
        if not request:
            return b""
        try:
            with self._turn:
                self._take(*json.loads(request), descriptors=descriptors)
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.trouble = f"the medium did not understand {request!r}: {error!r}"
            return self.trouble.encode()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return _DONE

    def _take(self, call: str, *paths: str, descriptors: list[int]) -> None:
        if call == "synced":
            (descriptor,) = descriptors
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path != self._root.parent:  # where the root's name was before all this
                self._medium.synced(descriptor)
                self.synced[path.relative_to(self._root).as_posix()] += 1
        elif call == "renamed":
            self._medium.renamed(*map(Path, paths))
        elif call == "hold":
            with suppress(FileNotFoundError):  # the removal that comes now says so, too
                self._medium.hold(*map(Path, paths))
        else:
            raise ValueError(call)


class RemoteMedium:
    """What a process knows of it."""

    def __init__(self, address: Path) -> None:
        self._address = address

    def synced(self, descriptor: int) -> None:
        self._tell("synced", descriptors=[descriptor])

    def renamed(self, source: Path, target: Path) -> None:
        self._tell("renamed", str(source), str(target))

    def hold(self, path: Path) -> None:
        self._tell("hold", str(path))

    def _tell(self, *call: str, descriptors: list[int] | None = None) -> None:
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(_LIMIT_S)
            end.connect(str(self._address))
            socket.send_fds(end, [json.dumps(call).encode()], descriptors or [])
            answer = end.recv(_MAX_BYTES)
        if answer != _DONE:
            raise AssertionError(answer.decode())
