"""A finished package as a version file, for `edge-agent models import`: no registry is needed, here or there.

A registry numbers its versions. Without one, the number is the time at which the package was made, in UTC, such as
20261127093000: a later package has a higher number, wherever it was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.version_file import write_version
from edge_agent.errors import ContentError, PublishError, StoreError
from edge_agent.package import mlmodel, trust
from edge_agent.package.onnx_graph import OnnxGraph
from edge_agent.package.reference import MODEL_NAME
from edge_agent.publishing.blobs import Blobs
from edge_agent.publishing.package import Package, Progress, no_progress

_OTHER_NAME = "model"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A version in a file.

    Attributes:
        version: its number.
        digest: sha256 of `manifest.json`, the package's identity on devices.
        bytes: of the file.
        limits, graph: see `Package`.
        blobs: what `write_blobs` did; None if nobody asked for it.
    """

    name: str
    version: int
    digest: str
    file: Path
    bytes: int
    limits: tuple[str, ...] = ()
    graph: OnnxGraph | None = None
    blobs: Blobs | None = None


def check_file(file: Path) -> None:
    """
    Raises:
        PublishError: a file cannot be written there.
    """
    if file.is_dir():
        raise PublishError(f"{file} is a folder", remedy="name a file in it")
    if not file.parent.is_dir():
        raise PublishError(f"{file.parent} is not a folder")


def write_file(
    package: Package, file: Path, *, progress: Progress = no_progress, clock: Callable[[], float] = time.time
) -> Written:
    """Writes the version. `file` appears only when it is complete, and replaces an existing one.

    Args:
        clock: gives seconds since the epoch.

    Raises:
        PublishError: the file cannot be written, or the package was changed while it was.
    """
    manifest = package.manifest
    packaged_at = mlmodel.read(package.folder).created_at
    made_at = packaged_at or clock()
    record = VersionRecord(
        # A device has names of its own for its models, and knows this one by the manifest's.
        name=manifest.name if MODEL_NAME.fullmatch(manifest.name) else _OTHER_NAME,
        version=int(datetime.fromtimestamp(made_at, UTC).strftime("%Y%m%d%H%M%S")),
        manifest=manifest,
        attached=package.attached,
        registry_uri="",
        source="",
        run_id="",
        trust=trust.decide(package.folder, manifest, registered_name=manifest.name),
        created_at=clock(),
        packaged_at=packaged_at,
    )
    try:
        with durable.replacing(file) as descriptor:
            size_bytes = write_version(
                descriptor,
                record,
                package.folder,
                report=lambda done, total: progress("writing the file", done, total),
            )
    except (ContentError, StoreError) as error:
        raise PublishError(f"{file}: {error.message}", remedy=error.remedy) from error
    except OSError as error:
        raise PublishError(f"{file} cannot be written: {error.strerror}") from error
    return Written(
        name=manifest.name,
        version=record.version,
        digest=manifest.digest,
        file=file,
        bytes=size_bytes,
        limits=package.limits,
        graph=package.graph,
    )
