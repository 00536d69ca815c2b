"""A version's files as the MLflow server gives them: through itself, or from the store behind it.

What the server hands through is resumed where it honours Range and If-Range: it does for a folder of its own, and does
not for S3. Where a store behind it gives files by itself (`presigned.py`), larger files are fetched there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from edge_agent.errors import TransportError
from edge_agent.package.manifest import check_path
from edge_agent.sync import refusal
from edge_agent.sync.files import (
    TRY_AGAIN,
    Listed,
    PastTheEnd,
    RequestRefused,
    Stream,
    stream_of,
    walk,
)
from edge_agent.sync.presigned import PresignedStore

if TYPE_CHECKING:
    from edge_agent.sync.registry import Registry

LEAST_SIGNED_BYTES = 64 << 10
"""A smaller file is fetched again in less than it takes to ask for its address."""


class HttpPackage:
    """Files behind an MLflow server."""

    whole_files = False
    over_line = True

    def __init__(self, repository: Any, registry: Registry) -> None:
        self._repository = repository
        self._registry = registry
        self._store = PresignedStore(repository.artifact_uri, registry)
        self._sizes_bytes: dict[str, int] = {}

    def listing(self) -> list[Listed]:
        with self._registry.errors():
            found = walk(self._repository)
        self._sizes_bytes = {file.path: file.size_bytes for file in found}
        return found

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if etag:
                headers["If-Range"] = etag
        who, response = self._answer(check_path(path), headers)
        try:
            is_part = response.status_code == 206
            stream = stream_of(
                response.raw,
                path=path,
                content_range=response.headers.get("Content-Range", "") if is_part else None,
                offset=offset,
                had=etag,
                etag=response.headers.get("ETag", ""),
                who=who,
                timeout_s=self._registry.timeout_s,
                clock=self._registry.clock,
            )
            # A weak one says nothing of the bytes.
            yield replace(stream, etag="") if stream.etag.startswith("W/") else stream
        finally:
            response.close()

    def _answer(self, path: str, headers: Mapping[str, str]) -> tuple[str, Any]:
        """Who gives the file, and its answer: 200 or 206, and open."""
        if self._sizes_bytes.get(path, 0) >= LEAST_SIGNED_BYTES:
            response = self._store.get(path, headers)
            if response is not None:
                return self._store.name, response
        response = self._handed_through(path, headers)
        try:
            self._check_status(response, path)
        except TransportError:
            response.close()
            raise
        return f"registry {self._registry.uri}", response

    def _handed_through(self, path: str, headers: Mapping[str, str]) -> Any:
        from mlflow.utils.rest_utils import http_request

        with self._registry.errors():
            return http_request(
                self._repository._host_creds,
                "/" + quote(path),
                "GET",
                stream=True,
                extra_headers=dict(headers),
                max_retries=0,
                raise_on_status=False,
            )

    def _check_status(self, response: Any, path: str) -> None:
        status = response.status_code
        if status in (200, 206):
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise TransportError(f"registry {self._registry.uri} sends {path!r} in another encoding")
            return
        if status in refusal.STATUSES and self._registry.is_at(response.url):
            raise refusal.refused(self._registry.uri)
        message = f"registry {self._registry.uri} answered {status} for {path!r}"
        if status == 416:
            raise PastTheEnd(message)
        if 400 <= status < 500 and status not in TRY_AGAIN:
            raise RequestRefused(message)
        raise TransportError(message)
