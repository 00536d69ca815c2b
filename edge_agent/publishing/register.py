"""Registration: a finished package becomes a version in an MLflow registry.

Owns the order: everything is uploaded and tagged before a version exists, and the alias moves last, so that no alias
ever points to an incomplete version. A failure leaves at most a run, or a version without the alias.

    check_target → reach → (the package is built) → experiment → run → files → registered model → version READY →
    read back as a device does → alias
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_agent.errors import EdgeAgentError, PublishError, SettingsError
from edge_agent.package import registry_uri as registry_uris
from edge_agent.package.manifest import MANIFEST_NAME, Manifest, ManifestFile
from edge_agent.package.onnx_graph import OnnxGraph
from edge_agent.package.reference import MANIFEST_TAG, ModelRef
from edge_agent.publishing.blobs import Blobs
from edge_agent.publishing.failures import failed, shown
from edge_agent.publishing.package import Package, Progress, no_progress

EXPERIMENT = "edge-agent"
ARTIFACT_PATH = "model"
READY_TIMEOUT_S = 120
_SQLITE = "sqlite:///"
_RETRIES = "2"  # with its default of 7, MLflow waits four minutes for a server that is down
_REQUEST_TIMEOUT_S = "60"  # of each read
_STORED_BYTES_PER_S = 4 << 20
"""A server answers an upload once its own store has the file: this is a slow one."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A registered version.

    Attributes:
        version: its number.
        digest: sha256 of `manifest.json`, the package's identity on devices.
        run_id: MLflow run that holds the files.
        limits, graph: see `Package`.
        blobs: what `write_blobs` did; None if nobody asked for it.
    """

    name: str
    version: int
    alias: str | None
    digest: str
    run_id: str
    limits: tuple[str, ...] = ()
    graph: OnnxGraph | None = None
    blobs: Blobs | None = None


def check_target(*, name: str, registry_uri: str, alias: str | None) -> None:
    """Checks name, alias and address, without a connection.

    Raises:
        PublishError: the registry could not accept one of them.
    """
    check_name(name)
    if alias is not None:
        try:
            ModelRef.parse(f"models:/{name}@{alias}")
        except SettingsError as error:
            raise PublishError(f"alias {alias!r} must be letters, digits, '_' and '-'") from error
        if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE):
            raise PublishError(f"alias {alias!r} is reserved by MLflow", remedy="choose a word such as prod")
    if problem := registry_uris.problem_of(registry_uri):
        raise PublishError(f"registry: {problem}")
    missing = [lib for lib in ("sqlalchemy", "alembic") if not importlib.util.find_spec(lib)]
    if missing and registry_uri.startswith(_SQLITE):
        raise PublishError(
            f"a sqlite registry needs {' and '.join(missing)}", remedy="install edge-agent[local-registry]"
        )


def check_name(name: str) -> None:
    """
    Raises:
        PublishError: no model could be registered under it.
    """
    try:
        ModelRef.parse(f"models:/{name}/1")
    except SettingsError as error:
        raise PublishError(f"model name {name!r} must not contain '/', ':' or '@'") from error


class ReadBack(Protocol):
    """Looks at a registered version as a device does before it fetches it.

    It has a client of its own, so whoever publishes passes it in: `cli.read_back`.
    """

    def __call__(
        self, registry_uri: str, ref: ModelRef, *, manifest: Manifest, attached: Sequence[ManifestFile]
    ) -> None:
        """
        Raises:
            EdgeAgentError: a device could not fetch it, for this reason.
        """


def reach(registry_uri: str) -> None:
    """Asks the registry once, and waits no longer than seconds: before a package is built, which may take an hour.

    Raises:
        PublishError: it cannot be reached, refuses, or is something else.
    """
    if registry_uri.startswith(_SQLITE) and not _database(registry_uri).exists():
        _check_writable(_database(registry_uri).parent)
        return
    with _calm_client(retries="0", timeout_s="10"):
        try:
            _client(registry_uri).get_experiment_by_name(EXPERIMENT)
        except Exception as error:
            raise failed(registry_uri, "reach the registry", error) from error


def publish(
    package: Package,
    *,
    registry_uri: str,
    name: str,
    alias: str | None = None,
    read_back: ReadBack | None = None,
    progress: Progress = no_progress,
) -> Published:
    """Uploads a package and registers it as a new version.

    Args:
        read_back: asked before the alias moves; None for nobody.

    Raises:
        PublishError: the registry cannot be reached or refuses, or a device could not fetch the version; the message
            names the step that failed.
    """
    check_target(name=name, registry_uri=registry_uri, alias=alias)
    if package.manifest.name != name:
        raise PublishError(f"the package was made for {package.manifest.name!r}, not for {name!r}")
    step = "connect"
    with _calm_client():
        try:
            registration = _Registration(package, registry_uri, name)
            step = "create the run"
            registration.start_run()
            step = "upload the files"
            registration.upload(progress)
            step = "register the version"
            progress("registering", 0, 0)
            version = registration.create_version()
            if read_back is not None:
                progress("reading back", 0, 0)
                registration.verify(read_back, version, alias)
            if alias is not None:
                step = f"move the alias {alias} to version {version}, which is registered"
                progress("moving the alias", 0, 0)
                registration.client.set_registered_model_alias(name, alias, version)
        except PublishError:
            raise
        except Exception as error:  # the clients of artifact stores have trees of errors of their own
            raise failed(registry_uri, step, error) from error
    return Published(
        name=name,
        version=int(version),
        alias=alias,
        digest=package.manifest.digest,
        run_id=registration.run_id,
        limits=package.limits,
        graph=package.graph,
    )


class _Registration:
    """One publication in progress; owned by the thread that made it."""

    def __init__(self, package: Package, registry_uri: str, name: str) -> None:
        self._package = package
        self._registry_uri = registry_uri
        self._name = name
        if registry_uri.startswith(_SQLITE):
            _database(registry_uri).parent.mkdir(parents=True, exist_ok=True)
        self.client = _client(registry_uri)
        self.run_id = ""
        self._artifact_uri = ""

    def start_run(self) -> None:
        run = self.client.create_run(self._experiment(), run_name=self._name)
        self.run_id, self._artifact_uri = run.info.run_id, run.info.artifact_uri

    def upload(self, progress: Progress) -> None:
        """Uploads every file of the package; the manifest and the signature last."""
        folder = self._package.folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files.sort(key=lambda path: path.parent == folder and path.name >= MANIFEST_NAME)
        total, done = sum(path.stat().st_size for path in files), 0
        try:
            for path in files:
                progress("uploading", done, total)
                parent = path.parent.relative_to(folder).as_posix()
                place = ARTIFACT_PATH if parent == "." else f"{ARTIFACT_PATH}/{parent}"
                size_bytes = path.stat().st_size
                with _time_to_store(size_bytes):
                    self.client.log_artifact(self.run_id, str(path), place)
                done += size_bytes
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is raised below
                self.client.set_terminated(self.run_id, status="FAILED")
            raise
        progress("uploading", done, total)
        self.client.set_terminated(self.run_id, status="FINISHED")

    def create_version(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        described = self._package.description
        version = self.client.create_model_version(
            self._name,
            source=f"{self._artifact_uri.rstrip('/')}/{ARTIFACT_PATH}",
            run_id=self.run_id,
            tags={**(described.tags if described else {}), MANIFEST_TAG: self._package.manifest.digest},
            description=described.text if described else None,
            await_creation_for=READY_TIMEOUT_S,
        )
        if version.status != "READY":
            version = self.client.get_model_version(self._name, version.version)
        if version.status != "READY":
            raise PublishError(f"version {version.version} of {self._name} is {version.status}, not READY")
        return str(version.version)

    def verify(self, read_back: ReadBack, version: str, alias: str | None) -> None:
        """
        Raises:
            PublishError: a device could not fetch the version; where the alias points now is said.
        """
        package = self._package
        ref = ModelRef(name=self._name, version=int(version))
        try:
            with _calm_client():  # it puts back what is asked with variables of its own
                read_back(self._registry_uri, ref, manifest=package.manifest, attached=package.attached)
        except EdgeAgentError as error:
            raise PublishError(
                f"{shown(self._registry_uri)}: version {version} of {self._name!r} is registered, but no device could "
                f"fetch it: {error.message}{self._where_is(alias)}",
                remedy=f"{error.remedy or 'look at what stands before the files of the registry'}; then publish again, "
                f"and delete version {version}",
            ) from error

    def _where_is(self, alias: str | None) -> str:
        """The rest of a sentence about an alias that was not moved."""
        from mlflow.exceptions import MlflowException

        if alias is None:
            return ""
        try:
            at = self.client.get_registered_model(self._name).aliases.get(alias)
        except (MlflowException, OSError):  # the first error is told
            return f"; alias {alias} was not moved"
        return f"; alias {alias} still points to version {at}" if at else f"; alias {alias} was not set"

    def _experiment(self) -> str:
        """The experiment that holds the runs. With SQLite, files go to `artifacts/` beside the database."""
        from mlflow.exceptions import MlflowException

        if (found := self.client.get_experiment_by_name(EXPERIMENT)) is not None:
            return str(found.experiment_id)
        location = None
        if self._registry_uri.startswith(_SQLITE):
            location = (_database(self._registry_uri).parent / "artifacts").as_uri()
        try:
            return str(self.client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another publisher was faster
                raise
            return str(self.client.get_experiment_by_name(EXPERIMENT).experiment_id)


@contextlib.contextmanager
def _calm_client(*, retries: str = _RETRIES, timeout_s: str = _REQUEST_TIMEOUT_S) -> Iterator[None]:
    """Limits MLflow's retries and waits, and silences its prints, unless the environment sets these variables.
    Afterwards they are what they were before."""
    from mlflow import environment_variables as variables

    wanted: tuple[tuple[Any, object], ...] = (
        (variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES, retries),
        (variables.MLFLOW_HTTP_REQUEST_TIMEOUT, timeout_s),
        (variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
        (variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, False),
    )
    before = [(variable, variable.get_raw()) for variable, _ in wanted]
    for variable, value in wanted:
        if not variable.is_set():
            variable.set(value)
    try:
        yield
    finally:
        for variable, value in before:
            variable.unset() if value is None else variable.set(value)


def _client(registry_uri: str) -> Any:
    import mlflow

    # On the first use of a database they log each migration.
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=registry_uri, registry_uri=registry_uri)


@contextlib.contextmanager
def _time_to_store(size_bytes: int) -> Iterator[None]:
    """Lets a request wait for its answer as long as a server may need to hand a large file on."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    before = TIMEOUT.get_raw()
    TIMEOUT.set(max(TIMEOUT.get(), size_bytes // _STORED_BYTES_PER_S))
    try:
        yield
    finally:
        TIMEOUT.unset() if before is None else TIMEOUT.set(before)


def _database(registry_uri: str) -> Path:
    return Path(registry_uri.removeprefix(_SQLITE)).absolute()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PublishError(f"{folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise PublishError(f"a registry cannot be made in {folder}: permission denied")
