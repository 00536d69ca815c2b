"""The two kinds of mirrors: a folder that a web server gives away, and one of this host.

Both have a blob at `sha256/<digest>` below their address. Over HTTP nothing is sent that could tell who asks: no
credentials, no cookies, no `.netrc`; redirects are not followed, answers that are compressed are not taken. Where a
server knows no ranges, what is here already is read once more and dropped: it came over a longer way.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from urllib.parse import unquote, urlsplit

import certifi
import requests

from edge_agent.cache.store import Store
from edge_agent.errors import TransportError
from edge_agent.host.clock import Clock
from edge_agent.sync import refusal
from edge_agent.sync.files import Stream, stream_of
from edge_agent.sync.http_session import BoundedAdapter
from edge_agent.sync.mirrors import Mirror, Mirrors, NotThere
from edge_agent.sync.mirrors.left_alone import LeftAlone
from edge_agent.sync.pace import CHUNK_BYTES
from edge_agent.sync.protocol import SyncJob
from edge_agent.sync.tls import TlsFiles

CONNECT_S = 5.0
WINDOW_S = 10.0
"""A mirror that brings less than `LEAST_BYTES_PER_S` over this long is slow."""
LEAST_BYTES_PER_S = 128 << 10
_GONE = frozenset((404, 410))
_CLOSED = frozenset((401, 403))
"""A store answers so for what it does not have, where it shows no listing. It is not waited for."""


def mirrors_of(job: SyncJob, store: Store, *, clock: Clock, awaiting: Callable[[float], None]) -> Mirrors:
    """The mirrors of the settings; none for a version that comes in a file.

    Args:
        awaiting: see `Mirrors`.
    """
    urls = job.cache.mirrors if job.version_file is None else ()
    return Mirrors(
        [mirror_at(url, ca_file=job.cache.mirror_ca_file, clock=clock) for url in urls],
        left_alone=LeftAlone(store.mirrors_file, urls),
        clock=clock,
        patience_s=job.cache.mirror_patience_s,
        awaiting=awaiting,
    )


def mirror_at(url: str, *, ca_file: str, clock: Clock) -> Mirror:
    """The mirror at an address of the settings, `http(s)://…/` or `file:///…/`."""
    if urlsplit(url).scheme == "file":
        return FolderMirror(url)
    return HttpMirror(url, ca_file=ca_file, clock=clock)


def folder_of(url: str) -> Path | None:
    """The folder that an address names; None if it is not one of this host."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


class HttpMirror:
    """Blobs behind a web server.

    Args:
        url: with a slash at its end.
        ca_file: PEM; authorities beside the public ones.
    """

    def __init__(self, url: str, *, ca_file: str, clock: Clock) -> None:
        self.url = url
        self._clock = clock
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self._session.proxies.update(requests.utils.get_environ_proxies(url))
        self._session.headers.update({"Accept-Encoding": "identity"})
        tls = TlsFiles(ca_file=ca_file).for_stores(certifi.where())
        adapter = BoundedAdapter(timeout_s=WINDOW_S, clock=clock, peers=lambda address: None, tls=tls)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    @contextmanager
    def open(self, sha256: str, *, size_bytes: int, offset: int) -> Iterator[Stream]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            response = self._session.get(
                f"{self.url}sha256/{sha256}",
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_S, WINDOW_S),
            )
        except (OSError, ValueError) as error:  # what requests raises is one of them
            raise TransportError(
                f"mirror {self.url} cannot be reached: {refusal.reason_of(error)}"
            ) from error
        try:
            self._check(response, size_bytes=size_bytes, offset=offset)
            is_part = response.status_code == 206
            stream = stream_of(
                response.raw,
                path=sha256,
                content_range=response.headers.get("Content-Range", "") if is_part else None,
                offset=offset,
                had="",
                etag="",
                who=f"mirror {self.url}",
                timeout_s=WINDOW_S,
                least_bytes=int(LEAST_BYTES_PER_S * WINDOW_S),
                clock=self._clock,
            )
            if stream.start < offset:
                stream = replace(stream, start=offset, chunks=_without_first(stream.chunks, offset))
            yield stream
        finally:
            response.close()

    def _check(self, response: requests.Response, *, size_bytes: int, offset: int) -> None:
        """
        Raises:
            NotThere: it does not have the blob.
            TransportError: it answered something else, or its blob has another size.
        """
        status = response.status_code
        if status in _GONE or status in _CLOSED:
            raise NotThere(f"mirror {self.url} answered {status}", yet=status in _GONE)
        if status not in (200, 206) or (status == 206 and not offset):
            raise TransportError(f"mirror {self.url} answered {status}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TransportError(f"mirror {self.url} sends blobs in another encoding")
        promised = response.headers.get("Content-Length")
        wanted = size_bytes - (offset if status == 206 else 0)
        if promised is not None and promised != str(wanted):
            raise TransportError(f"mirror {self.url} has a blob of another size")


class FolderMirror:
    """Blobs in a folder of this host: a stick that an operator plugs in, a share that is mounted."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = folder_of(url) or Path()

    @contextmanager
    def open(self, sha256: str, *, size_bytes: int, offset: int) -> Iterator[Stream]:
        path = self._folder / "sha256" / sha256
        try:
            # Not blocking: a named pipe in the place of a blob would never be opened.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotThere(f"{path} is not there", yet=False) from error
        except OSError as error:
            raise self._unreadable(path, error) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size_bytes:
            os.close(descriptor)
            raise TransportError(f"{path} of mirror {self.url} is no file of {size_bytes} bytes")
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            file.seek(offset)
            yield Stream(start=offset, etag="", chunks=self._chunks(file, path))

    def _chunks(self, file: io.FileIO, path: Path) -> Iterator[bytes]:
        while True:
            try:
                chunk = file.read(CHUNK_BYTES)
            except OSError as error:
                raise self._unreadable(path, error) from error
            if not chunk:
                return
            yield chunk

    def _unreadable(self, path: Path, error: OSError) -> TransportError:
        return TransportError(f"{path} of mirror {self.url} cannot be read: {error.strerror}")


def _without_first(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    for chunk in chunks:
        if count < len(chunk):
            yield chunk[count:]
        count = max(0, count - len(chunk))
