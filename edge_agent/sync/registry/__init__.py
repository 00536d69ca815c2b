"""The registry: what a reference means now, and where a version's files are.

Flow: `find`, in one plain request where that will do (`plain.py`) → `located` → `package`. All but the first need
MLflow's client, which is imported then, and only in the sync process. Refuses a
remote registry that points at files of this device, and stores whose clients have no limit.
Credentials come from MLflow's own variables and are never shown. MLflow's retries are switched off, because
with them an unreachable registry blocks for minutes: `fetch.py` has the one retry policy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from edge_agent.errors import EdgeAgentError, PolicyError, TransportError, UnknownReference
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.package.reference import ModelRef, ModelVersion, version_number
from edge_agent.sync import http_session, refusal
from edge_agent.sync.files import LocalPackage, Package
from edge_agent.sync.http_package import HttpPackage
from edge_agent.sync.registry import plain
from edge_agent.sync.s3_package import S3Package
from edge_agent.sync.tls import NO_FILES, TlsFiles
from edge_agent.sync.whole_package import WholePackage

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_UNBOUNDED_STORES = frozenset(("ftp", "sftp", "hdfs", "viewfs", "dbfs"))
"""MLflow's clients of these have no limit in time, or take keys and tokens that are not the registry's."""
_MAX_NAMES = 4


class Registry:
    """One MLflow registry.

    Args:
        uri: `http(s)://…`, `sqlite:///…` or what else MLflow accepts.
        timeout_s: for one request, and for one read that brings nothing.
        gap_s: between the starts of two requests.
    """

    def __init__(
        self,
        uri: str,
        *,
        timeout_s: float,
        tls: TlsFiles = NO_FILES,
        clock: Clock = CLOCK,
        gap_s: float = 0.0,
    ) -> None:
        self.uri = uri
        self.timeout_s = timeout_s
        self.clock = clock
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(timeout_s)))
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        self._refuse_missing_database()
        self.session = http_session.open_session(uri, timeout_s=timeout_s, tls=tls, clock=clock, gap_s=gap_s)

    @functools.cached_property
    def _client(self) -> MlflowClient:
        """Its import takes a second. Used inside `errors` only."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """What the reference means now, and where that is; see `find` and `located`."""
        return self.located(self.find(ref))

    def find(self, ref: ModelRef) -> ModelVersion:
        """What the reference means now; its source as it was registered.

        Raises:
            UnknownReference: the registry has no such model, alias or version.
            RegistryRefused: it does not let this device in.
            ManifestError: the version has a number that no version can have.
            TransportError: the registry cannot be reached, or fails.
        """
        if plain.knows_how_to_ask(self.uri):
            return plain.find(ref, self.uri, self.session)
        with self.errors(ref):
            if ref.alias:
                found = self._client.get_model_version_by_alias(ref.name, ref.alias)
            else:
                found = self._client.get_model_version(ref.name, str(ref.version))
        if found.name != ref.name:
            raise TransportError(f"the registry answered {ref} with another model")
        return ModelVersion(
            name=found.name,
            version=version_number(found.version),
            run_id=found.run_id or "",
            source=found.source,
            tags=dict(found.tags or {}),
        )

    def move_alias(self, ref: ModelRef, version: int) -> None:
        """Lets an alias name another version.

        Raises:
            RegistryRefused, TransportError, UnknownReference: as `find`.
        """
        with self.errors(ref):
            self._client.set_registered_model_alias(ref.name, ref.alias or "", str(version))

    def located(self, version: ModelVersion) -> ModelVersion:
        """The same version with the source that its files come from, which may be another than the registered one.

        Raises:
            RegistryRefused, TransportError, UnknownReference: as `find`.
        """
        with self.errors(ModelRef(name=version.name, version=version.version)):
            source = self._client.get_model_version_download_uri(version.name, str(version.version))
        return replace(version, source=source)

    def package(
        self, version: ModelVersion, *, scratch: Path, dropped: Callable[[int], None] = lambda count: None
    ) -> Package:
        """Where the version's files are.

        Args:
            scratch, dropped: for stores that give whole files only: see `WholePackage`.

        Raises:
            PolicyError: a remote registry names a folder of this device, or a store that is never asked.
            TransportError: there is no way to its artifact store.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
        from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

        with self.errors():
            source = self._store_of(version.source)
            repository = get_artifact_repository(source, tracking_uri=self.uri, registry_uri=self.uri)
        if isinstance(repository, LocalArtifactRepository):
            if not self._is_local():
                raise PolicyError(f"the registry says that {version.name!r} is in a folder of this device")
            return LocalPackage(Path(repository.artifact_dir))
        if isinstance(repository, HttpArtifactRepository):
            return HttpPackage(repository, self)
        if isinstance(repository, S3ArtifactRepository):
            return S3Package(repository, timeout_s=self.timeout_s, clock=self.clock)
        return WholePackage(repository, self, scratch, dropped=dropped)

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
    def errors(self, ref: ModelRef | None = None) -> Iterator[None]:
        """Whatever MLflow and the libraries below it raise, in this tree's words."""
        from mlflow.exceptions import MlflowException, RestException

        try:
            with http_session.in_use(self.session):
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
                remedy="install edge-agent[local-registry] for sqlite, edge-agent[s3] for S3, "
                "or the artifact store's library",
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
