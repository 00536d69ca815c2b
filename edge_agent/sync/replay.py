"""An old signed package that was registered anew under a higher number: refused, before its files are fetched.

Which key signed a package is known for certain only when all of its files are here. But its signature names the key,
and `MLmodel` is small: so a package that is too old by its own words is refused at once, at each poll anew, for the
price of a few requests. What was fetched is held against the mark once more, with the key that did sign it.
Decision: docs/adr/0012-high-water-mark.md.
"""

from __future__ import annotations

from datetime import UTC, datetime

from edge_agent.cache import marks
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import PackageReplayed
from edge_agent.package import mlmodel, trust
from edge_agent.sync.protocol import SyncJob


def refuse_by_its_words(
    store: Store, job: SyncJob, *, name: str, version: int, signature: bytes, model: bytes
) -> None:
    """Before the files are fetched.

    Args:
        name, version: as they are registered.
        signature, model: the content of `model.sig` and of `MLmodel`.

    Raises:
        PackageReplayed: see `refuse`.
        PolicyError: `MLmodel` cannot be read.
    """
    key = trust.claimed_signer(signature, job.trust.public_keys)
    if key:
        _refuse(store, job, key=key, name=name, version=version, at_s=mlmodel.parse(model).created_at)


def refuse(store: Store, job: SyncJob, record: VersionRecord) -> None:
    """With everything verified, before a version is committed or taken up again.

    Raises:
        PackageReplayed: it is older than what was active here, and its number in the registry is higher; no operator
            has allowed that.
    """
    if record.trust.signed_by:
        _refuse(
            store,
            job,
            key=record.trust.signed_by,
            name=record.registered_name,
            version=record.version,
            at_s=record.packaged_at or 0.0,
        )


def _refuse(store: Store, job: SyncJob, *, key: str, name: str, version: int, at_s: float) -> None:
    mark = marks.mark_of(store, key=key, name=name)
    if job.allow_older or not mark.refuses(version, at_s):
        return
    made = f"was packaged at {_shown(at_s)}" if at_s else "does not say when it was packaged"
    raise PackageReplayed(
        f"version {version} of {name!r} {made}, but version {mark.version}, which was active here, has a package of "
        f"{_shown(mark.packaged_at)}: an old package was registered anew",
        remedy="publish it again, or move the alias back to the old version; `models pull NAME --allow-older`, or "
        "`models import`, takes it all the same",
    )


def _shown(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a year that no calendar here has
        return f"{at_s:.0f} s after 1970"
