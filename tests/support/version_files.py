"""A device with one version, that version as a file, and the file brought into another device's cache."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.package import trust
from edge_agent.package.reference import MANIFEST_TAG, ModelVersion
from edge_agent.sync.bring import bring
from edge_agent.sync.files import LocalPackage
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, TrustJob
from edge_agent.sync.version_file import ORIGIN, export_version, import_version
from tests.support.keys import sign
from tests.support.packages import add_manifest, make_package

MODEL = "phi"
CACHE = CacheJob(min_free_bytes=0)


@dataclass(frozen=True)
class Exported:
    """A device with one version, and the file made of it."""

    store: Store
    record: VersionRecord
    file: Path


def export(folder: Path, *, manifest: bool = True, key: Path | None = None, code: str = "") -> Exported:
    package = make_package(
        folder / "package",
        trust.WRAPPER,
        {"genai_pyfunc.py": code} if code else None,
        weights=random.Random(1).randbytes(20_000),
    )
    tags = {MANIFEST_TAG: add_manifest(package, MODEL)} if manifest else {}
    if key:
        sign(package, key)
    return export_package(folder, package, MODEL, tags=tags)


def export_package(
    folder: Path, package: Path, model: str, *, version: int = 7, tags: Mapping[str, str] | None = None
) -> Exported:
    """Any package, as a version of this registered model; nobody has loaded it."""
    store = Store(folder / "first")
    job = SyncJob(
        state_dir=str(folder / "first"),
        registry=RegistryJob(uri="sqlite:///registry.db"),
        name="assistant",
        ref=f"models:/{model}/{version}",
        trust=TrustJob(allow_unsigned_code=True),
        cache=CACHE,
    )
    found = ModelVersion(
        name=model, version=version, run_id="run", source=package.as_uri(), tags=dict(tags or {})
    )
    bring(job, found, LocalPackage(package), lambda event: None)
    (record,) = store.versions()
    file = folder / "stick" / f"{model}.tar"
    file.parent.mkdir()
    assert write_out(store, record, file) == file.stat().st_size
    return Exported(store=store, record=record, file=file)


def write_out(store: Store, record: VersionRecord, file: Path) -> int:
    with durable.replacing(file) as descriptor:
        return export_version(store, record, descriptor)


def bring_in(
    store: Store, file: Path, *, policy: TrustJob | None = None, ref: str = f"models:/{MODEL}/7"
) -> VersionRecord:
    job = SyncJob(
        state_dir=str(store.root.parent),
        registry=RegistryJob(uri=ORIGIN),
        name="assistant",
        ref=ref,
        trust=policy or TrustJob(),
        cache=CACHE,
    )
    with file.open("rb") as stream:
        result = import_version(job, stream.fileno())
    record = store.record("assistant", result.key)
    assert record is not None
    return record
