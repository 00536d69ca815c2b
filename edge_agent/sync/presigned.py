"""The store behind an MLflow server, where it gives files by itself: at addresses that the server signs.

MLflow hands S3 through without Range, so a file that breaks off would begin again. The addresses honour Range, ETag and
If-Range. They live for minutes, so each request has one of its own. The registry's credentials go to the registry only;
the session's rules hold for the store as for any place that a registry leads to.

Many servers sign addresses that a device cannot use: the store stands in a network of its own. So this way is given up
for the rest of a sync, and the server hands the files through, when it is forbidden, or fails `MAX_FAILURES` times
where the server itself answers. A store that breaks off or is overloaded is there, and is not given up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from edge_agent.errors import PolicyError, TransportError
from edge_agent.sync import refusal
from edge_agent.sync.files import TRY_AGAIN, PastTheEnd
from edge_agent.sync.http_session import origin_of, place_of

if TYPE_CHECKING:
    from edge_agent.sync.registry import Registry

log = logging.getLogger(__name__)

_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
_ADDRESSES = "/api/2.0/mlflow-artifacts/presigned"
_SERVER_INFO = "/api/3.0/mlflow/server-info"
MAX_FAILURES = 3
"""One less than a fetch takes in a row: what was given up is tried the other way by the same fetch."""
_MAX_ADDRESS_CHARACTERS = 16_384


class PresignedStore:
    """Source: MLflow 3.14, `GET /api/2.0/mlflow-artifacts/presigned/<path>`.

    Args:
        artifact_uri: of the version, as MLflow resolved it.

    Attributes:
        name: for messages.
    """

    def __init__(self, artifact_uri: str, registry: Registry) -> None:
        self.name = "the artifact store"
        self._registry = registry
        self._server, self._is_mlflow, self._root = artifact_uri.partition(_ARTIFACTS)
        self._offered: bool | None = None
        self._failures = 0

    def get(self, path: str, headers: Mapping[str, str]) -> Any | None:
        """The store's answer, 200 or 206 and open; None where the server has to hand the file through.

        Raises:
            PastTheEnd: the file ends before what was asked for.
            TransportError: the way there failed; it may be tried again.
        """
        if self._offered is None:
            self._offered = self._server_offers()
        if not self._offered:
            return None
        try:
            return self._answer(self._address(path), path, headers)
        except _Unusable as why:
            log.warning(
                "files come through the registry from now on code=store_unreachable reason=%r", str(why)
            )
            self._offered = False
            return None

    def _server_offers(self) -> bool:
        if not self._is_mlflow:
            return False
        try:
            return self._ask(_SERVER_INFO).get("multipart_downloads_enabled") is True
        except _Unusable:
            return False

    def _address(self, path: str) -> str:
        answer = self._ask(f"{_ADDRESSES}/{self._root.strip('/')}/{quote(path)}")
        url = answer.get("url")
        if not isinstance(url, str) or len(url) > _MAX_ADDRESS_CHARACTERS or answer.get("headers"):
            raise _Unusable("the registry signs no address that a plain GET can use")
        try:
            scheme = origin_of(url)[0]
        except ValueError:
            scheme = ""
        if scheme not in ("http", "https"):
            raise _Unusable("the registry signs an address that is not http or https")
        return url

    def _answer(self, address: str, path: str, headers: Mapping[str, str]) -> Any:
        self.name = f"artifact store {place_of(address)}"
        try:
            response = self._registry.session.get_signed(address, headers)
        except PolicyError as error:
            raise _Unusable(error.message) from error
        except (OSError, ValueError) as error:
            raise self._failure(f"cannot be reached: {refusal.reason_of(error)}") from error
        status = response.status_code
        if status in (200, 206):
            self._failures = 0
            return response
        response.close()
        if status == 416:
            raise PastTheEnd(f"{self.name} answered {status} for {path!r}")
        if status >= 500 or status in TRY_AGAIN:
            raise TransportError(f"{self.name} answered {status} for {path!r}")
        raise self._failure(f"answered {status} for {path!r}")

    def _ask(self, endpoint: str) -> dict[str, Any]:
        """The server's answer."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        with self._registry.errors():
            response = http_request(
                get_default_host_creds(self._server), endpoint, "GET", max_retries=0, raise_on_status=False
            )
        status = response.status_code
        if status in TRY_AGAIN or (status >= 500 and status != 501):
            raise self._failure(f"has no address: the registry answered {status}")
        if status != 200:  # it does not know the question, or answers it to others only
            raise _Unusable(f"the registry answered {status} when it was asked for an address")
        try:
            answer = response.json()
        except (ValueError, RecursionError) as error:
            raise _Unusable("the registry gave an address that is not JSON") from error
        return answer if isinstance(answer, dict) else {}

    def _failure(self, how: str) -> Exception:
        """What to raise: the same may work later, or it has failed often enough."""
        self._failures += 1
        failure = f"{self.name} {how}"
        return TransportError(failure) if self._failures < MAX_FAILURES else _Unusable(failure)


class _Unusable(Exception):
    """Files cannot be fetched from the store by themselves."""
