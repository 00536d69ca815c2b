"""Brings one version into the cache, wherever its files are.

Flow: resolve → is it here already (`in_cache.py`) → manifest → may it be tried, can this host run it → reserve → fetch
what is missing → trust → stage → commit. `synchronise` and `bring` read that way. The process can be killed at any
moment: the next one continues with what was fetched, and what was not committed does not count.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from edge_agent.cache import eviction, fsck, line_use
from edge_agent.cache.record import VersionRecord, key_of
from edge_agent.cache.staging import Staging, folder_of, remove_superseded, staging
from edge_agent.cache.store import Store
from edge_agent.cache.verify import damage_of
from edge_agent.errors import ManifestError, Quarantined, VerificationError
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.package import manifest as manifests
from edge_agent.package import mlmodel, trust
from edge_agent.package.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, ManifestFile
from edge_agent.package.needs import MAX_CONFIG_BYTES
from edge_agent.package.reference import ROLLOUT_FROM_TAG, ROLLOUT_TAG, ModelRef, ModelVersion
from edge_agent.package.trust import TrustDecision
from edge_agent.sync import protocol, replay
from edge_agent.sync.fetch import fetch
from edge_agent.sync.files import Listed, Package, ReadOnce, Wanted
from edge_agent.sync.in_cache import already_here, check_host, committed, keep, known_by_tag, result_of
from edge_agent.sync.line import Line, within_bounds
from edge_agent.sync.mirrors import Mirrors
from edge_agent.sync.mirrors.places import mirrors_of
from edge_agent.sync.pace import Pace, Progress
from edge_agent.sync.protocol import Emit, Outline, SyncJob, SyncResult
from edge_agent.sync.registry import Registry

log = logging.getLogger(__name__)

MAX_TAG = 200
"""Characters of a tag that the daemon is told."""
_MAX_SIGNATURE_BYTES = 4 << 20
_BOOKKEEPING_BYTES = 1 << 20  # the record and the folders of a version, generously


def synchronise(job: SyncJob, emit: Emit, *, clock: Clock = CLOCK) -> SyncResult:
    """Brings one model up to date.

    Raises:
        EdgeAgentError: the registry, the package, the way to it, or the cache.
    """
    access = job.registry
    registry = Registry(
        access.uri, timeout_s=access.timeout_s, tls=access.tls, clock=clock, gap_s=access.gap_s
    )
    version = registry.find(ModelRef.parse(job.ref))
    tags = {"rollout": ROLLOUT_TAG, "rollout_from": ROLLOUT_FROM_TAG}
    said = {name: version.tags.get(tag, "")[:MAX_TAG] for name, tag in tags.items()}
    emit(protocol.resolved(version=version.version, **said))
    if (here := already_here(job, version)) is not None:
        return here
    version = registry.located(version)
    store = Store(Path(job.state_dir))
    scratch = folder_of(store, job.name, version.version) / "scratch"
    line = Line(job.link, book=partial(line_use.add, store))
    package = registry.package(version, scratch=scratch, dropped=line.took)
    return bring(job, version, package, emit, line=line if package.over_line else Line(), clock=clock)


def outline(job: SyncJob, *, clock: Clock = CLOCK) -> Outline:
    """What a version would take. Its manifest is fetched at most, or its listing; nothing is changed.

    Raises:
        EdgeAgentError: the registry, the package, the way to it, or the cache.
    """
    registry = Registry(job.registry.uri, timeout_s=job.registry.timeout_s, tls=job.registry.tls, clock=clock)
    version = registry.find(ModelRef.parse(job.ref))
    store = Store(Path(job.state_dir))
    if known := known_by_tag(store, job, version):
        return Outline(
            version=known.version,
            digest=known.digest,
            missing_bytes=0,
            needed_bytes=0,
            total_bytes=known.total_bytes,
        )
    version = registry.located(version)
    with tempfile.TemporaryDirectory() as scratch:
        package = registry.package(version, scratch=Path(scratch))
        wanted = read_wanted(ReadOnce(package), version, signed=False)
    known = committed(store, job, version, wanted)
    here = known is not None and not fsck.quick_check(store, [known]).damaged
    missing_bytes = 0 if here else sum(_left_to_fetch(store, job, version, wanted).values())
    place = Staging(folder_of(store, job.name, version.version))
    return Outline(
        version=version.version,
        digest=wanted.manifest.digest if wanted.manifest else "",
        missing_bytes=missing_bytes,
        needed_bytes=0 if here else room_for(store, package, wanted, place),
        total_bytes=sum(file.size_bytes for file in wanted.listing),
    )


def bring(
    job: SyncJob,
    version: ModelVersion,
    package: Package,
    emit: Emit,
    *,
    promised: Manifest | None = None,
    line: Line | None = None,
    clock: Clock = CLOCK,
) -> SyncResult:
    """The one way into the cache: a package from any source is fetched, verified, judged and committed.

    Args:
        promised: the manifest that the package must have, where it is known from somewhere else.
        line: that its files come over; None where they come from this host.

    Raises:
        EdgeAgentError: the package, the way to it, or the cache.
    """
    store = Store(Path(job.state_dir))
    with store.lock():
        store.settle()
    package = ReadOnce(package)
    wanted = read_wanted(package, version, promised)
    known = committed(store, job, version, wanted)
    whole = known if known and not fsck.quick_check(store, [known]).damaged else None
    if whole is None:
        refuse_quarantined(job, version, wanted, emit)
        refuse_replayed(store, job, package, version, wanted)
    if job.check_host and not (known and known.key == job.running):
        sizes = {file.path: file.size_bytes for file in wanted.listing}
        check_host(job, sizes, lambda path: package.read(path, MAX_CONFIG_BYTES))
    if whole:
        return keep(store, job, whole)
    mirrors = mirrors_of(
        job, store, clock=clock, awaiting=lambda seconds: emit(protocol.awaiting("a mirror", seconds))
    )
    pace = Pace(
        total_bytes=sum(_missing_sizes(store, wanted).values()),
        max_bytes_per_s=job.cache.max_bytes_per_s,
        report=Progress(emit, lambda: keep_room(store, job)),
        clock=clock,
        line=line or Line(),
    )
    bounds = within_bounds(
        pace.line,
        ask=not (wanted.manifest and mirrors.has_usable),
        left=lambda: _left_to_fetch(store, job, version, wanted),
        tell=lambda missing_bytes: emit(
            protocol.held(
                version=version.version,
                digest=wanted.manifest.digest if wanted.manifest else "",
                missing_bytes=missing_bytes,
                fetched_bytes=pace.fetched_bytes,
                mirrored_bytes=pace.mirrored_bytes,
            )
        ),
    )
    with bounds, store.fetching(), staging(store, job.name, version.version) as place:
        emit(protocol.fetching(wanted.manifest.digest if wanted.manifest else ""))
        reserve(store, job, package, wanted, place, known)
        manifest, attached = fetch_missing(store, package, place, version, wanted, pace, mirrors)
        emit(protocol.verifying(manifest.digest))
        tree = place.build_tree(store, (*manifest.files, *attached))
        decision = judge(job, version, tree, manifest)
        record = VersionRecord(
            name=job.name,
            version=version.version,
            manifest=manifest,
            attached=attached,
            registry_uri=job.registry.uri,
            source=version.source,
            run_id=version.run_id,
            trust=decision,
            created_at=time.time(),
            fallback=job.fallback,
            packaged_at=mlmodel.read(tree).created_at,
        )
        replay.refuse(store, job, record)
        new = commit(store, record, tree, place)
    return result_of(record, fetched_bytes=pace.fetched_bytes, mirrored_bytes=pace.mirrored_bytes, new=new)


def refuse_quarantined(job: SyncJob, version: ModelVersion, wanted: Wanted, emit: Emit) -> None:
    """Refuses to fetch a version again that failed here and has been removed or damaged since.

    The digest of a package without a manifest is known only once it is fetched: it comes again, and the lifecycle
    does not try it.

    Raises:
        Quarantined: this version failed before.
    """
    key = key_of(version.version, wanted.manifest) if wanted.manifest else ""
    if key in job.quarantined:
        emit(protocol.quarantined(key))
        raise Quarantined(f"version {key} is in quarantine, and is not fetched again")


def refuse_replayed(
    store: Store, job: SyncJob, package: ReadOnce, version: ModelVersion, wanted: Wanted
) -> None:
    """Refuses an old signed package under a new number, before the large files are fetched.

    Raises:
        PackageReplayed: it is one.
        PolicyError: its MLmodel cannot be read.
    """
    signature = wanted.attached.get(SIGNATURE_NAME)
    if not job.trust.public_keys or signature is None:
        return
    if mlmodel.FILE_NAME not in {file.path for file in wanted.listing}:
        return  # refused later, with everything else that is wrong
    model = package.read(mlmodel.FILE_NAME, mlmodel.MAX_BYTES)
    replay.refuse_by_its_words(
        store, job, name=version.name, version=version.version, signature=signature, model=model
    )


def read_wanted(
    package: ReadOnce, version: ModelVersion, promised: Manifest | None = None, *, signed: bool = True
) -> Wanted:
    """Reads the manifest where there is one, and takes the registry's listing otherwise.

    Args:
        signed: read its signature, too.

    Raises:
        ManifestError: the manifest breaks a rule, or names another model.
        VerificationError: it is not the one that the registry's tag promises.
    """
    listed = {file.path: file for file in package.listing()}
    attached: dict[str, bytes] = {}
    manifest = promised
    if MANIFEST_NAME in listed:
        data = attached[MANIFEST_NAME] = package.read(MANIFEST_NAME, manifests.MAX_MANIFEST_BYTES)
        _check_tag(version, data)
        manifest = manifests.parse(data)
        if manifest.name != version.name:
            raise ManifestError(f"the manifest was made for {manifest.name!r}, not for {version.name!r}")
        if promised not in (None, manifest):
            raise VerificationError(f"{MANIFEST_NAME} of {version.name!r} is not the promised one")
    elif version.manifest_sha256:
        raise VerificationError(f"version {version.version} of {version.name!r} has lost its manifest.json")
    if signed and SIGNATURE_NAME in listed:
        attached[SIGNATURE_NAME] = package.read(SIGNATURE_NAME, _MAX_SIGNATURE_BYTES)
    if manifest:
        _check_listing(version, manifest, listed)
        files = tuple(Listed(path=file.path, size_bytes=file.size_bytes) for file in manifest.files)
    else:
        files = tuple(file for path, file in listed.items() if path not in manifests.OUTSIDE_MANIFEST)
    return Wanted(manifest=manifest, listing=files, attached=attached)


def room_for(store: Store, package: Package, wanted: Wanted, place: Staging) -> int:
    """Bytes of the cache that a version takes while it is fetched, beside what is here of it."""
    sizes = _missing_sizes(store, wanted)
    needed = max(0, sum(sizes.values()) - place.fetched_bytes()) + _BOOKKEEPING_BYTES
    if package.whole_files:  # one file at a time is there twice
        to_come = [size for digest, size in sizes.items() if not place.verified(digest).exists()]
        needed += max(to_come, default=0)
    return needed


def reserve(
    store: Store,
    job: SyncJob,
    package: Package,
    wanted: Wanted,
    place: Staging,
    known: VersionRecord | None,
) -> None:
    """Makes sure that everything fits before the first byte is fetched. Removes superseded downloads first, then
    versions.

    Raises:
        StoreError: it does not fit, even after eviction.
    """
    needed = room_for(store, package, wanted, place)
    with store.lock():
        fsck.prune(store)
        if eviction.excess_bytes(store, needed, job.cache.quota_bytes, job.cache.min_free_bytes) > 0:
            remove_superseded(store, job.name, keep=place.folder)
        eviction.make_room(
            store,
            needed_bytes=needed,
            quota_bytes=job.cache.quota_bytes,
            min_free_bytes=job.cache.min_free_bytes,
            keep={(known.name, known.key)} if known else frozenset(),
        )


def keep_room(store: Store, job: SyncJob) -> None:
    """Stops a fetch before it fills the disk: others write to it, too.

    Raises:
        OSError: as on a full disk.
    """
    if store.free_bytes() < job.cache.min_free_bytes // 2:
        raise OSError(errno.ENOSPC, "less than half of cache.min_free_bytes is left on the disk")


def fetch_missing(
    store: Store,
    package: Package,
    place: Staging,
    version: ModelVersion,
    wanted: Wanted,
    pace: Pace,
    mirrors: Mirrors,
) -> tuple[Manifest, tuple[ManifestFile, ...]]:
    """Fetches and verifies each blob that is missing, once.

    Returns:
        The manifest, made on arrival if the package has none, and the attached files.
    """
    files = []
    for listed in wanted.listing:
        sha256 = wanted.sha256(listed.path)
        file = ManifestFile(path=listed.path, size_bytes=listed.size_bytes, sha256=sha256 or "")
        if not sha256 or not (_is_whole(store, file) or _is_verified(place, file)):
            file = fetch(
                package,
                place,
                path=listed.path,
                size_bytes=listed.size_bytes,
                sha256=sha256,
                pace=pace,
                mirrors=mirrors,
            )
        files.append(file)
    attached = tuple(place.keep(path, data) for path, data in sorted(wanted.attached.items()))
    return wanted.manifest or manifests.make(version.name, files), attached


def judge(job: SyncJob, version: ModelVersion, tree: Path, manifest: Manifest) -> TrustDecision:
    """Applies the code policy to the staged tree."""
    return trust.decide(tree, manifest, registered_name=version.name, **asdict(job.trust))


def commit(store: Store, record: VersionRecord, tree: Path, place: Staging) -> bool:
    """Gives everything its final name, or repairs the version if it is in the cache and damaged.

    Returns:
        True if the version had not been committed before.
    """
    with store.lock():
        in_use = {file.sha256 for known in store.versions() for file in known.files}
        for file in {file.sha256: file for file in record.files if file.sha256 in in_use}.values():
            if place.verified(
                file.sha256
            ).exists():  # its blob was lost or damaged: every version gets it back
                store.repair(place.verified(file.sha256), file)
        new = store.record(record.name, record.key) is None
        if new:
            store.commit(record, tree)
        else:
            _mend(store, record)
        place.clear()
    return new


def _mend(store: Store, record: VersionRecord) -> None:
    fsck.mend_links(store)
    damaged = {damage.path for damage in fsck.quick_check(store, [record]).of(record)}
    for path in damaged - {file.path for file in record.files}:
        store.remove_stray(record, path)
    known = store.record(record.name, record.key)
    store.rewrite(replace(record, served=known is not None and known.served))


def _is_whole(store: Store, file: ManifestFile) -> bool:
    """Reads a blob in the cache again before a new version relies on it. A damaged one is set aside."""
    if not store.has_blob(file):
        return False
    if reason := damage_of(store.blob(file.sha256), file):
        log.warning("blob damaged code=verification_failed digest=%s reason=%r", file.sha256, reason)
        with store.lock():
            fsck.set_aside_blob(store, file.sha256)
        return False
    return True


def _is_verified(place: Staging, file: ManifestFile) -> bool:
    """Hashes a part that an earlier process finished again, which costs less than a download."""
    path = place.verified(file.sha256)
    if not path.exists():
        return False
    if damage_of(path, file):
        place.drop_part(path)
        return False
    return True


def _missing_sizes(store: Store, wanted: Wanted) -> dict[str, int]:
    """The bytes to fetch: by digest, or by path where the digest is unknown."""
    sizes = {}
    for listed in wanted.listing:
        sha256 = wanted.sha256(listed.path)
        file = ManifestFile(path=listed.path, size_bytes=listed.size_bytes, sha256=sha256 or listed.path)
        if not sha256 or not store.has_blob(file):
            sizes[file.sha256] = file.size_bytes
    return sizes


def _left_to_fetch(store: Store, job: SyncJob, version: ModelVersion, wanted: Wanted) -> dict[str, int]:
    """As `_missing_sizes`, without what an earlier process left in staging."""
    place = Staging(folder_of(store, job.name, version.version))
    left = {}
    for name, size_bytes in _missing_sizes(store, wanted).items():
        if not place.verified(name).exists():
            part = place.part(path=name, sha256=name if wanted.manifest else None)
            left[name] = max(0, size_bytes - place.bytes_of(part))
    return left


def _check_tag(version: ModelVersion, data: bytes) -> None:
    promised = version.manifest_sha256
    if promised and hashlib.sha256(data).hexdigest() != promised:
        raise VerificationError(
            f"manifest.json of version {version.version} of {version.name!r} is not the published one"
        )


def _check_listing(version: ModelVersion, manifest: Manifest, listed: Mapping[str, Listed]) -> None:
    """Compares the manifest with the listing, before anything is fetched."""
    for file in manifest.files:
        if file.path not in listed:
            raise VerificationError(f"version {version.version} of {version.name!r} has lost {file.path!r}")
        if listed[file.path].size_bytes != file.size_bytes:
            raise VerificationError(
                f"{file.path!r} has {listed[file.path].size_bytes} bytes, its manifest says {file.size_bytes}"
            )
