"""A sync that has no process, no network and no cache: it says what a registry with a few references would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.errors import EdgeAgentError, LinkHeld, Quarantined, SyncStopped, UnknownReference
from edge_agent.sync import protocol
from edge_agent.sync.protocol import SyncJob, SyncResult
from edge_agent.updates.syncs import OnEvent


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a reference means now.

    Attributes:
        rollout, rollout_from: the version's tags.
        new: it is not in the cache yet.
        fails: what the sync ends with once it has begun to fetch.
    """

    version: int
    digest: str = "a" * 12
    rollout: str = ""
    rollout_from: str = ""
    new: bool = True
    fails: EdgeAgentError | None = None

    @property
    def key(self) -> str:
        return f"{self.version}-{self.digest}"


@dataclass
class ScriptedSync:
    """Stands where `run_sync` does.

    Attributes:
        offers: by reference, its version, or what the sync ends with.
        amid: called in each sync once the reference is resolved, with the reference; then the sync ends if it should.
        jobs: all that were asked for, in order.
        have: the bytes that are here of a version, by its key.
    """

    offers: dict[str, Offer | Exception] = field(default_factory=dict)
    amid: Callable[[str], None] = lambda ref: None
    jobs: list[SyncJob] = field(default_factory=list)
    have: dict[str, int] = field(default_factory=dict)

    def __call__(
        self, job: SyncJob, *, timeout_s: float, on_event: OnEvent, should_stop: Callable[[], bool]
    ) -> SyncResult:
        self.jobs.append(job)
        offer = self.offers.get(job.ref, UnknownReference(f"the registry has no {job.ref}"))
        if isinstance(offer, Exception):
            raise offer
        on_event(
            protocol.resolved(version=offer.version, rollout=offer.rollout, rollout_from=offer.rollout_from)
        )
        self.amid(job.ref)
        if should_stop():
            raise SyncStopped(f"the sync of {job.name} was stopped")
        if offer.key in job.quarantined:
            on_event({"event": "quarantined", "key": offer.key})
            raise Quarantined(f"version {offer.key} is in quarantine, and is not fetched again")
        size_bytes = 1_000
        if offer.new:
            on_event(protocol.fetching(offer.digest))
            if offer.fails:
                raise offer.fails
            self._take(job, offer, size_bytes, on_event)
            on_event(protocol.verifying(offer.digest))
        on_event(
            {
                "event": "progress",
                "bytes": size_bytes,
                "total_bytes": size_bytes,
                "bytes_per_s": 500,
                "eta_s": 0.0,
            }
        )
        return SyncResult(
            name=job.name,
            version=offer.version,
            digest=offer.digest,
            key=offer.key,
            bytes=size_bytes,
            bytes_fetched=size_bytes if offer.new else 0,
            bytes_mirrored=0,
            bytes_reused=0 if offer.new else size_bytes,
            new=offer.new,
        )

    def _take(self, job: SyncJob, offer: Offer, size_bytes: int, on_event: OnEvent) -> None:
        """As much of a version as the line gives; what came stays for the next sync."""
        left = size_bytes - self.have.get(offer.key, 0)
        allowed = left if job.link.allowed_bytes is None else min(left, job.link.allowed_bytes)
        self.have[offer.key] = size_bytes - left + allowed
        if allowed < left:
            on_event(
                protocol.held(
                    version=offer.version,
                    digest=offer.digest,
                    missing_bytes=left - allowed,
                    fetched_bytes=allowed,
                )
            )
            raise LinkHeld("the line is not to be used now")

    @property
    def refs(self) -> list[str]:
        """What was asked for, in order."""
        return [job.ref for job in self.jobs]
