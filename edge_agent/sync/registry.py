"""The registry: what a reference means now, and the bytes of a version's files.

Imports the MLflow client, as `refusal.py` does, and only in the sync process. Flow: `resolve` → `package` → `listing`
and `open`. Refuses listings without bound, and a remote registry that points at files of this device.
Credentials come from MLflow's own variables and are never shown. MLflow's retries are switched off, because
with them an unreachable registry blocks for minutes: `fetch.py` has the one retry policy.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from edge_agent.cache import durable
from edge_agent.cache.disk import store_error, store_errors
from edge_agent.errors import (
    EdgeAgentError,
    PolicyError,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.package.manifest import (
    MAX_MANIFEST_BYTES,
    check_path,
)
from edge_agent.package.reference import ModelRef, ModelVersion, version_number
from edge_agent.sync import http_session, refusal
from edge_agent.sync.files import (
    Changed,
    Listed,
    LocalPackage,
    Package,
    PastTheEnd,
    RequestRefused,
    Stream,
    walk,
)
from edge_agent.sync.pace import CHUNK_BYTES, StallLimit

_UNBOUNDED_STORES = frozenset(("ftp", "sftp", "hdfs", "viewfs", "dbfs"))
"""MLflow's clients of these have no limit in time, or take keys and tokens that are not the registry's."""
_MAX_NAMES = 4
_TRY_AGAIN = frozenset((408, 429))


class Registry:
    """One MLflow registry.

    Args:
        uri: `http(s)://…`, `sqlite:///…` or what else MLflow accepts.
        timeout_s: for one request, and for one read that brings nothing.
    """

    def __init__(self, uri: str, *, timeout_s: float, clock: Clock = CLOCK) -> None:
        self.uri = uri
        self.timeout_s = timeout_s
        self.clock = clock
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(timeout_s)))
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        self._refuse_missing_database()
        try:
            self._session = http_session.RegistrySession(uri, timeout_s=timeout_s, clock=clock)
        except ValueError as error:
            raise TransportError(
                f"registry.uri {uri!r} is not an address", remedy="check registry.uri"
            ) from error
        with self._errors():
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """What the reference means now.

        Raises:
            UnknownReference: the registry has no such model, alias or version.
            RegistryRefused: it does not let this device in.
            ManifestError: the version has a number that no version can have.
            TransportError: the registry cannot be reached, or fails.
        """
        with self._errors(ref):
            if ref.alias:
                found = self._client.get_model_version_by_alias(ref.name, ref.alias)
            else:
                found = self._client.get_model_version(ref.name, str(ref.version))
            source = self._client.get_model_version_download_uri(found.name, found.version)
        if found.name != ref.name:
            raise TransportError(f"the registry answered {ref} with another model")
        return ModelVersion(
            name=found.name,
            version=version_number(found.version),
            run_id=found.run_id or "",
            source=source,
            tags=dict(found.tags or {}),
        )

    def package(self, version: ModelVersion, *, scratch: Path) -> Package:
        """Where the version's files are.

        Args:
            scratch: a folder to make, for stores that give whole files only.

        Raises:
            PolicyError: a remote registry names a folder of this device, or a store that is never asked.
            TransportError: there is no way to its artifact store.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        with self._errors():
            source = self._store_of(version.source)
            repository = get_artifact_repository(source, tracking_uri=self.uri, registry_uri=self.uri)
        if isinstance(repository, LocalArtifactRepository):
            if not self._is_local():
                raise PolicyError(f"the registry says that {version.name!r} is in a folder of this device")
            return LocalPackage(Path(repository.artifact_dir))
        if isinstance(repository, HttpArtifactRepository):
            return _HttpPackage(repository, self)
        return _OtherPackage(repository, self, scratch)

    def _store_of(self, source: str) -> str:
        """The store that a source names. `models:` and `runs:` are names for another one: this registry says which.

        Looked at before MLflow makes a client for it: some of them connect at once.

        Raises:
            PolicyError: that store is never asked.
        """
        from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
        from mlflow.store.artifact.utils.models import get_model_name_and_version
        from mlflow.tracking.artifact_utils import get_artifact_uri

        for _ in range(_MAX_NAMES):
            scheme = urlsplit(source).scheme.lower()
            if scheme in _UNBOUNDED_STORES:
                raise PolicyError(f"the registry says that the version is in a store of the kind {scheme!r}")
            if scheme == "runs":
                source = get_artifact_uri(*RunsArtifactRepository.parse_runs_uri(source), self.uri)
            elif scheme == "models":
                named = get_model_name_and_version(self._client, source)
                if len(named) == 1:
                    source = self._client.get_logged_model(*named).artifact_location
                else:
                    source = self._client.get_model_version_download_uri(*named)
            else:
                return source
        raise PolicyError("the registry names one name after the other for the version's store")

    def is_at(self, url: str) -> bool:
        """True for an address of the registry itself, where its credentials go."""
        return http_session.origin_of(url) == http_session.origin_of(self.uri)

    def _is_local(self) -> bool:
        url = urlsplit(self.uri)
        return url.scheme not in ("http", "https") or http_session.is_local(url.hostname or "")

    def _refuse_missing_database(self) -> None:
        """MLflow would make a new, empty one: a misspelt path must not look like an unknown model."""
        if self.uri.startswith("sqlite:///"):
            path = Path(unquote(self.uri.removeprefix("sqlite:///").split("?")[0]))
            if not path.is_file():
                raise TransportError(f"registry database {path} does not exist", remedy="check registry.uri")

    @contextmanager
    def _errors(self, ref: ModelRef | None = None) -> Iterator[None]:
        """Whatever MLflow and the libraries below it raise, in this tree's words."""
        from mlflow.exceptions import MlflowException, RestException

        try:
            with http_session.in_use(self._session):
                yield
        except EdgeAgentError:
            raise
        except MlflowException as error:
            if ours := http_session.refusal_in(error):
                raise ours from None
            if ref and error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise UnknownReference(
                    f"the registry has no {ref}", remedy="check the name and the alias or version"
                ) from error
            if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
                raise refusal.refused(self.uri) from error
            if isinstance(error, RestException) and "error_code" not in error.json:
                if refusal.refuses(self.uri):
                    raise refusal.refused(self.uri, words=refusal.first_line(error)) from error
                raise TransportError(
                    f"registry {self.uri} is behind something else that answered: {refusal.first_line(error)}",
                    remedy="see what stands before it",
                ) from error
            if isinstance(error, RestException):
                raise TransportError(
                    f"registry {self.uri} answered with an error: {refusal.first_line(error)}"
                ) from error
            raise TransportError(
                f"registry {self.uri} cannot be reached: {refusal.reason_of(error)}"
            ) from error
        except ImportError as error:
            raise TransportError(
                f"registry {self.uri} needs a library that is missing: {error.name}",
                remedy="install edge-agent[local-registry] for sqlite, or the artifact store's library",
            ) from error
        except OSError as error:  # requests' exceptions are OSErrors
            if refusal.is_refusal(error):
                raise refusal.refused(self.uri) from error
            raise TransportError(
                f"registry {self.uri} cannot be reached: {refusal.reason_of(error)}"
            ) from error
        except Exception as error:
            # Its client trusts the registry: an answer of another form ends in whatever is raised there.
            raise TransportError(
                f"registry {self.uri} gave an answer that cannot be read: {refusal.first_line(error)}",
                remedy="see what answers at registry.uri",
            ) from error


class _HttpPackage:
    """Artifacts that the MLflow server hands through; resumed where it honours Range and If-Range."""

    whole_files = False

    def __init__(self, repository: Any, registry: Registry) -> None:
        self._repository = repository
        self._registry = registry

    def listing(self) -> list[Listed]:
        with self._registry._errors():
            return walk(self._repository)

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        from mlflow.utils.rest_utils import http_request

        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if etag:
                headers["If-Range"] = etag
        with self._registry._errors():
            response = http_request(
                self._repository._host_creds,
                "/" + quote(check_path(path)),
                "GET",
                stream=True,
                extra_headers=headers,
                max_retries=0,
                raise_on_status=False,
            )
        try:
            self._check_status(response, path)
            start = _range_start(response, offset) if response.status_code == 206 else 0
            now = response.headers.get("ETag", "")
            if start and etag and now != etag:
                raise Changed(
                    f"{path!r} was changed on the registry {self._registry.uri} while it was fetched"
                )
            yield Stream(start=start, etag="" if now.startswith("W/") else now, chunks=self._chunks(response))
        finally:
            response.close()

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
        if 400 <= status < 500 and status not in _TRY_AGAIN:
            raise RequestRefused(message)
        raise TransportError(message)

    def _chunks(self, response: Any) -> Iterator[bytes]:
        """What comes, as it comes: a piece that is here is not lost when the next one does not follow."""
        from urllib3.exceptions import HTTPError

        read = getattr(response.raw, "read1", response.raw.read)  # urllib3 1 waits for the whole piece
        limit = StallLimit(self._registry.timeout_s, clock=self._registry.clock)
        while True:
            try:
                with self._registry._errors():
                    chunk = limit.wait_for(lambda: bytes(read(CHUNK_BYTES, decode_content=False)))
            except HTTPError as error:
                raise TransportError(
                    f"registry {self._registry.uri} broke off: {refusal.first_line(error)}"
                ) from error
            if not chunk:
                return
            if limit.is_over:
                raise TransportError(
                    f"registry {self._registry.uri} stalled: "
                    f"{limit.came_bytes} bytes in {limit.waited_s:.0f} s"
                )
            yield chunk


class _OtherPackage:
    """A store that MLflow reaches by itself (S3, Azure, …): each file whole, through a folder in staging.

    MLflow's clients of these stores have no resume and no bound: the one call that all of them share takes a
    remote path and a local one, and no offset. So files that are whole are kept over an interruption, and the one
    that was interrupted comes again. Here it may not grow over its listed size, and what it takes is in the cache's
    own file system, where the quota counts it.
    """

    whole_files = True

    def __init__(self, repository: Any, registry: Registry, scratch: Path) -> None:
        self._repository = repository
        self._registry = registry
        self._scratch = scratch
        self._sizes_bytes: dict[str, int] = {}

    def listing(self) -> list[Listed]:
        with self._registry._errors():
            found = walk(self._repository)
        self._sizes_bytes = {file.path: file.size_bytes for file in found}
        return found

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        target = self._scratch / "file"
        try:
            with store_errors("write", self._scratch):
                durable.remove_tree(self._scratch)  # of a process that died
                durable.make_folder(self._scratch)
            self._download(check_path(path), target)
            with target.open("rb") as file:
                durable.unlink(target)  # the open file is enough, and goes with the process
                yield Stream(start=0, etag="", chunks=iter(lambda: file.read(CHUNK_BYTES), b""))
        finally:
            durable.remove_tree(self._scratch)

    def _download(self, path: str, target: Path) -> None:
        limit_bytes = self._sizes_bytes.get(path, MAX_MANIFEST_BYTES)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            with self._registry._errors():
                self._repository._download_file(path, str(target))
        except TransportError as error:
            cause = error.__cause__
            number = cause.errno if isinstance(cause, OSError) else None
            if number == errno.EFBIG:
                raise VerificationError(f"{path!r} has more than the listed {limit_bytes} bytes") from error
            if isinstance(cause, OSError) and number in (errno.ENOSPC, errno.EDQUOT):
                raise store_error("write", target, cause) from cause
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _range_start(response: Any, offset: int) -> int:
    """Where a 206 answer starts: `Content-Range: bytes 100-199/200`."""
    with suppress(ValueError):
        start = int(response.headers.get("Content-Range", "").removeprefix("bytes ").split("-")[0])
        if start == offset:
            return start
    raise TransportError("the registry answered with another range than was asked for")
