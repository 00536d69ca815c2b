"""One device's cache and one registered model, for tests of the cache against a real registry."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_agent.cache.store import Store
from edge_agent.host.clock import Clock
from edge_agent.package import trust
from edge_agent.sync.bring import synchronise
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, SyncResult, TrustJob
from tests.support.packages import add_manifest, make_package, register

Changes = Mapping[str, bytes | str | None]


class Device:
    """Publishes packages under one name, and syncs them in this process.

    Args:
        uri: where packages are published.
        artifacts: where a `sqlite:///` registry keeps its files.

    Attributes:
        artifact_root: the same as a URI; empty where the registry knows.
        clock: of its syncs: by itself a real one on which nobody waits for the next attempt.
    """

    def __init__(self, uri: str, folder: Path, *, artifacts: Path | None = None) -> None:
        self.uri = uri
        self.folder = folder
        self.model = f"phi-{uuid.uuid4().hex[:8]}"
        self.store = Store(folder / "state")
        self.events: list[Mapping[str, Any]] = []
        self.artifact_root = artifacts.as_uri() if artifacts else ""
        self.clock = Clock(sleep=lambda seconds: None)
        self._count = 0

    def publish(
        self, changes: Changes | None = None, *, weights: bytes = b"", manifest: bool = True, tag: str = ""
    ) -> Path:
        """Registers a package under `@prod`; gives its folder."""
        self._count += 1
        package = make_package(
            self.folder / f"package-{self._count}", trust.WRAPPER, changes, weights=weights
        )
        made = add_manifest(package, self.model) if manifest else ""
        return self.register(package, tag=tag or made)

    def register(self, package: Path, *, tag: str = "") -> Path:
        register(self.uri, self.model, package, tag=tag, artifacts=self.artifact_root)
        return package

    def job(self, *, timeout_s: float = 10, uri: str = "", policy: TrustJob | None = None) -> SyncJob:
        return SyncJob(
            state_dir=str(self.store.root.parent),
            registry=RegistryJob(uri=uri or self.uri, timeout_s=timeout_s),
            name="assistant",
            ref=f"models:/{self.model}@prod",
            trust=policy or TrustJob(),
            cache=CacheJob(min_free_bytes=0),
        )

    def sync(self, job: SyncJob | None = None) -> SyncResult:
        self.events = []
        return synchronise(job or self.job(), self.events.append, clock=self.clock)

    def has_nothing_final(self) -> bool:
        blobs = list(self.store.blobs.iterdir()) if self.store.blobs.exists() else []
        return not blobs and not self.store.record_files() and not list(self.store.versions_root.glob("*/*"))
