"""Registration: a finished package becomes a version in an MLflow registry.

Owns the order: everything is uploaded and tagged before a version exists, and the alias moves last, so that no alias
ever points to an incomplete version. A failure leaves at most a run, or a version without the alias.

    check_target → experiment → run → files → registered model → version READY → alias
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import PublishError, SettingsError
from edge_agent.package.manifest import MANIFEST_NAME
from edge_agent.package.reference import MANIFEST_TAG, ModelRef
from edge_agent.publishing.package import Package, Progress, no_progress

EXPERIMENT = "edge-agent"
ARTIFACT_PATH = "model"
READY_TIMEOUT_S = 120
_RETRIES = "2"  # with its default of 7, MLflow waits four minutes for a server that is down
_REQUEST_TIMEOUT_S = "60"  # of each read
_STORED_BYTES_PER_S = (
    4 << 20
)  # a server answers an upload when its own store has the file; slow ones are slower than S3


@dataclass(frozen=True, kw_only=True)
class Published:
    """A registered version.

    Attributes:
        version: its number.
        digest: sha256 of `manifest.json`, the package's identity on devices.
        run_id: MLflow run that holds the files.
        limits: see `Package`.
    """

    name: str
    version: int
    alias: str | None
    digest: str
    run_id: str
    limits: tuple[str, ...] = ()


def check_target(*, name: str, registry_uri: str, alias: str | None) -> None:
    """Checks name, alias and address, without a connection.

    Raises:
        PublishError: the registry could not accept one of them.
    """
    try:
        ModelRef.parse(f"models:/{name}/1")
    except SettingsError as error:
        raise PublishError(f"model name {name!r} must not contain '/', ':' or '@'") from error
    if alias is not None:
        try:
            ModelRef.parse(f"models:/{name}@{alias}")
        except SettingsError as error:
            raise PublishError(f"alias {alias!r} must be letters, digits, '_' and '-'") from error
        if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE):
            raise PublishError(f"alias {alias!r} is reserved by MLflow", remedy="choose a word such as prod")
    if registry_uri.startswith("sqlite:///"):
        if missing := [lib for lib in ("sqlalchemy", "alembic") if not importlib.util.find_spec(lib)]:
            raise PublishError(
                f"a {registry_uri.partition(':')[0]} registry needs {' and '.join(missing)}",
                remedy="install edge-agent[local-registry]",
            )
    elif not re.match(r"https?://[^/]", registry_uri):
        raise PublishError(
            f"registry {_shown(registry_uri)!r} is not supported",
            remedy="give http://…, https://… or sqlite:///…",
        )


def publish(
    package: Package,
    *,
    registry_uri: str,
    name: str,
    alias: str | None = None,
    progress: Progress = no_progress,
) -> Published:
    """Uploads a package and registers it as a new version.

    Raises:
        PublishError: the registry cannot be reached or refuses; the message names the step that failed.
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
            version = registration.create_version()
            if alias is not None:
                step = f"move the alias {alias} to version {version}, which is registered"
                progress("alias", 0, 0)
                registration.client.set_registered_model_alias(name, alias, version)
        except PublishError:
            raise
        except Exception as error:  # the clients of artifact stores have trees of errors of their own
            raise PublishError(
                f"{_shown(registry_uri)}: could not {step}: {_one_line(error)}", remedy=_remedy(error)
            ) from error
    return Published(
        name=name,
        version=int(version),
        alias=alias,
        digest=package.manifest.digest,
        run_id=registration.run_id,
        limits=package.limits,
    )


class _Registration:
    """One publication in progress; owned by the thread that made it."""

    def __init__(self, package: Package, registry_uri: str, name: str) -> None:
        import mlflow

        # On the first use of a database they log each migration.
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._package = package
        self._registry_uri = registry_uri
        self._name = name
        if registry_uri.startswith("sqlite:///"):
            Path(registry_uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
        self.client: Any = mlflow.MlflowClient(tracking_uri=registry_uri, registry_uri=registry_uri)
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
                progress("upload", done, total)
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
        progress("upload", done, total)
        self.client.set_terminated(self.run_id, status="FINISHED")

    def create_version(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            self._name,
            source=f"{self._artifact_uri.rstrip('/')}/{ARTIFACT_PATH}",
            run_id=self.run_id,
            tags={MANIFEST_TAG: self._package.manifest.digest},
            await_creation_for=READY_TIMEOUT_S,
        )
        if version.status != "READY":
            version = self.client.get_model_version(self._name, version.version)
        if version.status != "READY":
            raise PublishError(f"version {version.version} of {self._name} is {version.status}, not READY")
        return str(version.version)

    def _experiment(self) -> str:
        """The experiment that holds the runs. With SQLite, files go to `artifacts/` beside the database."""
        from mlflow.exceptions import MlflowException

        if (found := self.client.get_experiment_by_name(EXPERIMENT)) is not None:
            return str(found.experiment_id)
        location = None
        if self._registry_uri.startswith("sqlite:///"):
            database = Path(self._registry_uri.removeprefix("sqlite:///")).absolute()
            location = (database.parent / "artifacts").as_uri()
        try:
            return str(self.client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another publisher was faster
                raise
            return str(self.client.get_experiment_by_name(EXPERIMENT).experiment_id)


@contextlib.contextmanager
def _calm_client() -> Iterator[None]:
    """Limits MLflow's retries and waits, and silences its prints, unless the environment sets these variables."""
    from mlflow import environment_variables as variables

    wanted: tuple[tuple[Any, object], ...] = (
        (variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES, _RETRIES),
        (variables.MLFLOW_HTTP_REQUEST_TIMEOUT, _REQUEST_TIMEOUT_S),
        (variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
        (variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, False),
    )
    set_here = [variable for variable, _ in wanted if not variable.is_set()]
    for variable, value in wanted:
        if variable in set_here:
            variable.set(value)
    try:
        yield
    finally:
        for variable in set_here:
            variable.unset()


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


def _remedy(error: Exception) -> str:
    text = str(error)
    if isinstance(error, ImportError):
        library = "edge-agent[s3]" if error.name == "boto3" else error.name
        return f"the registry keeps its files in a store that this host has no client for: install {library}"
    if "Unable to locate credentials" in text or "partial credentials" in text.lower():
        return "the store of the registry's files needs them: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "(AccessDenied)" in text or "(InvalidAccessKeyId)" in text or "(SignatureDoesNotMatch)" in text:
        return "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may write"
    if any(words in text for words in ("Max retries exceeded", "Connection", "Could not connect")):
        return "check that the server is running and that its address is right"
    if "401" in text or "403" in text or "Unauthorized" in text:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return ""


def _one_line(error: Exception) -> str:
    return re.sub(r"://[^/@\s]+@", "://", " ".join(str(error).split()))[:400]


def _shown(uri: str) -> str:
    """A URL without credentials."""
    return re.sub(r"://[^/@]*@", "://", uri)
