"""Versions in a cache without a registry: real files and real digests, committed as a sync commits them."""

from __future__ import annotations

import os
from dataclasses import replace

from edge_agent.cache.attempt import Fault
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.package import trust
from edge_agent.package.manifest import Manifest
from edge_agent.package.trust import TrustDecision
from tests.support.packages import make_package, manifest_of

DECISION = TrustDecision(rule=trust.Rule.NO_CODE, signed_by="", unsigned_code=False, reason="a test")


def fault(reason: str, code: str = "gate_failed") -> Fault:
    """Why a version is in quarantine."""
    return Fault(code=code, reason=reason)


def make_record(manifest: Manifest, version: int, *, name: str = "assistant", at: float = 0) -> VersionRecord:
    return VersionRecord(
        name=name,
        version=version,
        manifest=manifest,
        attached=(),
        registry_uri="sqlite:///x",
        source="file:///x",
        run_id="",
        trust=DECISION,
        created_at=at or 1_000.0 + version,
    )


def commit(
    store: Store,
    version: int,
    *,
    weights: bytes = b"",
    name: str = "assistant",
    fallback: bool = False,
    decision: TrustDecision = DECISION,
) -> VersionRecord:
    """Commits a small package; its files are those of every other version but for the weights.

    Args:
        fallback: it came by the model's `fallback`.
        decision: why it was let in.
    """
    tree = store.staging_root / f"{name}-{version}" / "tree"
    make_package(tree, trust.WRAPPER, weights=weights)
    made = make_record(manifest_of(tree, "other" if fallback else "phi"), version, name=name)
    record = replace(made, fallback=fallback, trust=decision)
    with store.lock():
        store.commit(record, tree)
    os.utime(store.record_file(record), (record.created_at, record.created_at))
    return record
