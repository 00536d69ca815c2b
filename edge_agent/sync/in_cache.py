"""A version that is in the cache already: recognised, held to the settings as they are now, and kept.

Most checks end here. `already_here` is the short way: it needs nothing from the registry but what a reference means,
where the publisher's tag says which manifest the version has. `bring.py` comes here, too, once it has read a manifest
or a listing. What either way concludes is the same, because both use `keep`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from edge_agent.cache import fsck
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.staging import folder_of, remove_staging
from edge_agent.cache.store import Store
from edge_agent.errors import CannotRun
from edge_agent.package import mlmodel, trust
from edge_agent.package.manifest import MANIFEST_NAME
from edge_agent.package.needs import MAX_CONFIG_BYTES, needs_of
from edge_agent.package.reference import ModelVersion
from edge_agent.runner import capability
from edge_agent.sync import replay
from edge_agent.sync.files import Wanted
from edge_agent.sync.protocol import SyncJob, SyncResult


class _Damaged(Exception):
    """A file is not what was verified once."""


def already_here(job: SyncJob, version: ModelVersion) -> SyncResult | None:
    """What `bring` would conclude, where the registry has said enough: its tag names a manifest that is here, whole.

    The version's own files stand for those at the registry, for they are the same bytes. A package without that tag is
    known by its listing only.

    Returns:
        None where the registry has to be asked for more.

    Raises:
        CannotRun, PolicyError, PackageReplayed: the version is here, and may not run.
        StoreError: the cache cannot be read or written.
    """
    store = Store(Path(job.state_dir))
    known = known_by_tag(store, job, version)
    if known is None:
        return None
    with store.lock():
        store.settle()
    if job.check_host and known.key != job.running:
        sizes = {file.path: file.size_bytes for file in known.manifest.files}
        try:
            check_host(job, sizes, lambda path: _verified(store, known, path))
        except (_Damaged, OSError):
            return None
    return keep(store, job, known)


def known_by_tag(store: Store, job: SyncJob, version: ModelVersion) -> VersionRecord | None:
    """The version's record, where the registry's tag names its manifest, and it is here, whole."""
    known = next((record for record in store.versions(job.name) if _is_promised(record, version)), None)
    return known if known and not fsck.quick_check(store, [known]).damaged else None


def _is_promised(record: VersionRecord, version: ModelVersion) -> bool:
    digests = {file.path: file.sha256 for file in record.attached}
    return (
        (record.version, record.registered_name) == (version.version, version.name)
        and version.manifest_sha256 is not None
        and digests.get(MANIFEST_NAME) == version.manifest_sha256
    )


def _verified(store: Store, known: VersionRecord, path: str) -> bytes:
    """A small file's content, hashed again: what is decided from it must not be a bad disk's word.

    Raises:
        OSError, _Damaged: it is not there as it was verified.
    """
    digest = next(file.sha256 for file in known.manifest.files if file.path == path)
    with (store.folder(known) / path).open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if hashlib.sha256(data).hexdigest() != digest:
        raise _Damaged(path)
    return data


def keep(store: Store, job: SyncJob, known: VersionRecord) -> SyncResult:
    """A version that is here, whole, and may still run.

    Raises:
        PolicyError, PackageReplayed: it may not any more.
    """
    record = hold_to_policy(store, job, known)
    replay.refuse(store, job, record)
    remove_staging(folder_of(store, job.name, known.version))  # of a process that died after the commit
    return result_of(record, fetched_bytes=0, new=False)


def check_host(job: SyncJob, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> None:
    """Checks what the version needs against this host, before the large files are fetched.

    Args:
        sizes: bytes of each of its files.
        read: gives the content of a small one.

    Raises:
        CannotRun: this host lacks something.
        PolicyError: the agent does not load packages of this kind.
    """
    if mlmodel.FILE_NAME not in sizes:
        return  # refused later, with everything else that is wrong
    needs = needs_of(sizes, read)
    if problem := capability.problem(needs, state_dir=Path(job.state_dir)):
        raise CannotRun(f"this host cannot run {job.ref}: {problem}")


def committed(store: Store, job: SyncJob, version: ModelVersion, wanted: Wanted) -> VersionRecord | None:
    """The version's record, if it is in the cache.

    Without a manifest, the same origin, version and sizes must suffice: nothing else is known before fetching.
    """
    sizes = {(file.path, file.size_bytes) for file in wanted.listing}
    for record in store.versions(job.name):
        if (record.version, record.registered_name) != (version.version, version.name):
            continue
        if wanted.manifest:
            if record.manifest == wanted.manifest:
                return record
        elif (record.registry_uri, record.source, record.run_id) == (
            job.registry.uri,
            version.source,
            version.run_id,
        ) and sizes == {(file.path, file.size_bytes) for file in record.manifest.files}:
            return record
    return None


def hold_to_policy(store: Store, job: SyncJob, record: VersionRecord) -> VersionRecord:
    """Holds a version that is in the cache to the settings as they are now.

    Raises:
        PolicyError: it may no longer run.
    """
    policy = asdict(job.trust)
    decision, packaged_at = record.trust, record.packaged_at
    if packaged_at is None:  # an earlier release wrote the record
        packaged_at = mlmodel.read(store.folder(record)).created_at
    if not trust.still_holds(decision, **policy):
        decision = trust.decide(
            store.folder(record), record.manifest, registered_name=record.registered_name, **policy
        )
    elif record.fallback == job.fallback and record.packaged_at == packaged_at:
        return record
    record = replace(record, trust=decision, fallback=job.fallback, packaged_at=packaged_at)
    with store.lock():
        store.rewrite(record)
    return record


def result_of(record: VersionRecord, *, fetched_bytes: int, new: bool, mirrored_bytes: int = 0) -> SyncResult:
    return SyncResult(
        name=record.name,
        version=record.version,
        digest=record.digest,
        key=record.key,
        bytes=record.total_bytes,
        bytes_fetched=fetched_bytes,
        bytes_mirrored=mirrored_bytes,
        bytes_reused=max(0, record.total_bytes - fetched_bytes),
        new=new,
    )
