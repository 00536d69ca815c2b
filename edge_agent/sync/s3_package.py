"""Files in S3 that the device reads with credentials of its own: a source `s3://…`.

MLflow's own client is used, boto3 with its variables (`MLFLOW_S3_…`, `AWS_…`), under the registry's limit in time and
without its retries: `fetch.py` has the one retry policy. Reads begin where an earlier one ended (Range), of the same
object (If-Match). Refuses nothing of where the client goes: the device's operator says so, not the registry.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edge_agent.errors import EdgeAgentError, ManifestError, RegistryRefused, TransportError
from edge_agent.host.clock import Clock
from edge_agent.package.manifest import MAX_FILES, check_path
from edge_agent.sync import refusal
from edge_agent.sync.files import (
    MAX_LISTED,
    Changed,
    Listed,
    PastTheEnd,
    RequestRefused,
    Stream,
    checked,
    stream_of,
)

_REFUSALS = frozenset(("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"))
"""Of credentials, with a status that is neither 401 nor 403."""
_CREDENTIALS = (
    "write /etc/credstore/aws-access-key-id and aws-secret-access-key, and restart the service; "
    "without systemd set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


class S3Package:
    """Objects below one prefix of a bucket.

    Args:
        repository: MLflow's `S3ArtifactRepository`.
        timeout_s: for a connection, and for one read that brings nothing.

    Raises:
        TransportError: boto3 is not installed.
    """

    whole_files = False
    over_line = True

    def __init__(self, repository: Any, *, timeout_s: float, clock: Clock) -> None:
        self._repository = repository
        self._bucket, self._prefix = repository.parse_s3_compliant_uri(repository.artifact_uri)
        self._who = f"artifact store s3://{self._bucket}"
        self._timeout_s = timeout_s
        self._clock = clock
        with self._errors():
            _limit_client(timeout_s)

    def listing(self) -> list[Listed]:
        """All at once and page by page: MLflow's own way keeps a whole folder before anybody can count it."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        found: list[Listed] = []
        with self._errors():
            pages = self._repository._get_s3_client().get_paginator("list_objects_v2")
            for page in pages.paginate(
                Bucket=self._bucket, Prefix=prefix, **self._repository._bucket_owner_params
            ):
                found += [
                    Listed(path=check_path(entry["Key"].removeprefix(prefix)), size_bytes=entry["Size"])
                    for entry in page.get("Contents", ())
                    if not entry["Key"].endswith("/")  # a folder, as some tools leave them
                ]
                if len(found) > MAX_LISTED:
                    raise ManifestError(f"the package has more than {MAX_FILES} files")
        return checked(found)

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        wanted = {"Bucket": self._bucket, "Key": posixpath.join(self._prefix, check_path(path))}
        if offset:
            wanted["Range"] = f"bytes={offset}-"
            if etag:
                wanted["IfMatch"] = etag
        with self._errors():
            client = self._repository._get_s3_client()
            answer = client.get_object(**wanted, **self._repository._bucket_owner_params)
        body = answer["Body"]
        try:
            is_part = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
            # Below botocore's own stream: that one waits for a whole piece, and a byte now and then keeps it alive.
            yield stream_of(
                body._raw_stream,
                path=path,
                content_range=answer.get("ContentRange", "") if is_part else None,
                offset=offset,
                had=etag,  # a store may not know If-Match
                etag=answer.get("ETag", ""),
                who=self._who,
                timeout_s=self._timeout_s,
                clock=self._clock,
            )
        finally:
            body.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever MLflow's S3 client and boto3 raise, in this tree's words."""
        try:
            yield
        except EdgeAgentError:
            raise
        except Exception as error:
            raise self._as_ours(error) from error

    def _as_ours(self, error: Exception) -> EdgeAgentError:
        if isinstance(error, ImportError):
            return TransportError(f"{self._who} needs {error.name}", remedy="install edge-agent[s3]")
        from botocore.exceptions import (
            ClientError,
            CredentialRetrievalError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ClientError):
                return self._answered(cause.response)
            if isinstance(cause, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
                return self._refused("there are no credentials for it")
            cause = cause.__cause__ or cause.__context__
        return TransportError(f"{self._who} cannot be reached: {refusal.reason_of(error)}")

    def _answered(self, answer: Any) -> EdgeAgentError:
        """What an error answer means. Source: Amazon S3 API Reference, Error responses."""
        code = str(answer.get("Error", {}).get("Code", ""))
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        message = f"{self._who} answered {status} {code}".rstrip()
        if status in refusal.STATUSES or code in _REFUSALS:
            return self._refused(f"it answered {status} {code}".rstrip())
        if status == 404:
            return RequestRefused(message)
        if status == 412:
            return Changed(f"{message}: the file was changed while it was fetched")
        if status == 416:
            return PastTheEnd(message)
        return TransportError(message)

    def _refused(self, why: str) -> RegistryRefused:
        return RegistryRefused(f"{self._who} refuses this device: {why}", remedy=_CREDENTIALS)


def _limit_client(timeout_s: float) -> None:
    """Every S3 client that MLflow makes from now on in this process has limits in time, and does not try again."""
    import boto3
    from botocore.config import Config
    from botocore.session import get_session
    from mlflow.store.artifact import s3_artifact_repo

    session = get_session()
    session.set_default_client_config(
        Config(connect_timeout=timeout_s, read_timeout=timeout_s, retries={"total_max_attempts": 1})
    )
    boto3.setup_default_session(botocore_session=session)
    s3_artifact_repo._cached_get_s3_client.cache_clear()
