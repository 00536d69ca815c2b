"""What an operator does to the cache: `edge-agent models …`, in the daemon or, when none runs, beside it.

Each operation gives the document that the command prints with `--json`. It decides nothing: the lifecycle,
the store and the updates do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_agent.cache import eviction, fsck
from edge_agent.cache.record import VersionRecord, version_of
from edge_agent.cache.state import CacheState, ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import ActivationHeld, EdgeAgentError, StoreError, UnknownModel, VersionHeld
from edge_agent.package.reference import MODEL_NAME
from edge_agent.serving.lifecycle import ModelLifecycle, budget_of, lifecycles_of
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings
from edge_agent.sync import version_file
from edge_agent.sync.protocol import SyncResult
from edge_agent.updates import choice
from edge_agent.updates.heard import Heard
from edge_agent.updates.updates import Updates

OnEvent = Callable[[Mapping[str, Any]], None]

_PROGRESS_INTERVAL_S = 0.2


class Operations:
    """The operator's side of all models. Any thread; the parts below take turns.

    Args:
        lifecycles: by configured name.
    """

    def __init__(
        self, settings: Settings, store: Store, lifecycles: Mapping[str, ModelLifecycle], updates: Updates
    ) -> None:
        self._settings = settings
        self._store = store
        self._lifecycles = lifecycles
        self._updates = updates

    def inventory(self) -> list[dict[str, Any]]:
        """See the function."""
        return inventory(self._settings, self._store, self._updates.heard)

    def pull(
        self,
        name: str | None,
        on_event: OnEvent = lambda event: None,
        *,
        allow_older: bool = False,
        now: bool = False,
    ) -> list[dict[str, Any]]:
        """Brings one model, or all, up to date. What must wait for its time is in the state `held`.

        Args:
            allow_older, now: see `Updates.check`.

        Raises:
            EdgeAgentError: no registry is configured, or the registry, a package, the cache or the gate says no.
        """
        names = [name] if name else list(self._lifecycles)
        for one in names:
            self._lifecycle(one)
        return [self._pulled(one, on_event, allow_older=allow_older, now=now) for one in names]

    def export(
        self, name: str, version: int, file: int | None, on_event: OnEvent = lambda event: None
    ) -> dict[str, Any]:
        """Writes a cached version into an open file, verified on its way.

        Args:
            file: descriptor of an empty file, open for writing.
        """
        record = self._version(name, version)
        next_at_s = 0.0

        def report(done: int, total: int) -> None:
            nonlocal next_at_s
            if (now_s := time.monotonic()) >= next_at_s or done == total:
                next_at_s = now_s + _PROGRESS_INTERVAL_S
                on_event({"event": "progress", "bytes": done, "total_bytes": total})

        size_bytes = version_file.export_version(self._store, record, _given(file), report=report)
        return {"name": name, "version": version, "digest": record.digest, "bytes": size_bytes}

    def take_in(
        self,
        name: str | None,
        file: int | None,
        on_event: OnEvent = lambda event: None,
        *,
        allow_older: bool = False,
    ) -> dict[str, Any]:
        """Brings the version in an open version file into the cache, and through the gate as an update would be.

        Args:
            name: which model takes it; None where only one follows the file's registered model.
            file: descriptor of the version file, open for reading.
            allow_older: see `Updates.check`.
        """
        if name is not None:
            self._lifecycle(name)
        waits = _Waits(on_event)
        try:
            result = self._updates.take_in(
                _given(file), name=name, on_event=waits.hear, allow_older=allow_older
            )
        except ActivationHeld:
            return {**waits.document(), "pinned": self._lifecycle(waits.model).state.pinned}
        state = self._lifecycle(result.name).state
        return {**_brought(result), "state": state.role(result.key), "pinned": state.pinned}

    def activate(self, name: str, version: int) -> dict[str, Any]:
        """Makes a cached version active through the gate, and pins it."""
        lifecycle, record = self._lifecycle(name), self._version(name, version)
        lifecycle.activate(record.key)
        return self._described(lifecycle)

    def rollback(self, name: str) -> dict[str, Any]:
        """Makes the previous version active again, and pins it."""
        lifecycle = self._lifecycle(name)
        lifecycle.go_back()
        return self._described(lifecycle)

    def pin(self, name: str, version: int) -> dict[str, Any]:
        """Fixes the version that runs; it becomes active if it is not."""
        return self.activate(name, version)

    def unpin(self, name: str) -> dict[str, Any]:
        """Lets a model follow its reference again."""
        lifecycle = self._lifecycle(name)
        lifecycle.pin(None)
        self._updates.check_now()
        return self._described(lifecycle)

    def remove(self, name: str, version: int) -> dict[str, Any]:
        """Removes a cached version that is not in use; of one that is only in quarantine, forgets that."""
        if forgotten := self._only_quarantined(name, version):
            for key in forgotten:
                self._forget(name, key)
            return {"name": name, "version": version, "bytes_freed": 0, "forgotten": forgotten}
        record = self._version(name, version)
        with self._store.lock():  # what it is to its model cannot change meanwhile
            state = self._store.state_locked().model(name)
            if record.key in (state.active, state.candidate, state.pinned):
                raise StoreError(
                    f"version {version} of {name} is {state.role(record.key)}",
                    remedy="activate another one first",
                )
            freed = self._store.remove(record)
        self._forget(name, record.key)
        return {"name": name, "version": version, "bytes_freed": freed, "forgotten": []}

    def prune(self) -> dict[str, Any]:
        """Removes every version that nothing needs, downloads that do not go on now, and what crashes left."""
        removed = []
        with self._store.lock():
            freed = fsck.prune(self._store, all_partial=True)
            for record in eviction.evictable(self._store):
                freed += self._store.remove(record)
                removed.append({"name": record.name, "version": record.version})
        return {"bytes_freed": freed, "removed": removed}

    def verify(self, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
        """Reads every byte; sets damaged blobs aside, and fetches them again where the registry can be reached."""
        found = fsck.verify(self._store)
        document: dict[str, Any] = {
            "checked": found.checked,
            "damaged": [
                {"name": d.name, "version": version_of(d.key), "path": d.path, "reason": d.reason}
                for d in found.damaged
            ],
            "repaired": [],
        }
        if not found.damaged:
            return document
        problems = self._updates.repair(found.damaged, on_event)
        if self._settings.registry.uri:
            document["problems"] = problems
        left = fsck.verify(self._store).damaged
        remaining = {(damage.name, damage.key, damage.path) for damage in left}
        for damage, entry in zip(found.damaged, list(document["damaged"]), strict=True):
            if (damage.name, damage.key, damage.path) not in remaining:
                document["damaged"].remove(entry)
                document["repaired"].append(entry)
        return document

    def _pulled(self, name: str, on_event: OnEvent, *, allow_older: bool, now: bool) -> dict[str, Any]:
        waits = _Waits(on_event)
        lifecycle = self._lifecycle(name)
        try:
            result = self._updates.check(name, waits.hear, asked_for=True, allow_older=allow_older, now=now)
        except VersionHeld as error:
            return {**waits.document(), "reason": str(error), "instead": lifecycle.instead}
        state = lifecycle.state.role(result.key)
        return {**_brought(result), "state": state, "instead": lifecycle.instead}

    def _only_quarantined(self, name: str, version: int) -> list[str]:
        """Keys in quarantine of a version number that the cache has not, any more."""
        if any(record.version == version for record in self._store.versions(name)):
            return []
        quarantined = self._store.state().model(name).quarantined
        return [key for key in quarantined if version_of(key) == version]

    def _forget(self, name: str, key: str) -> None:
        if (lifecycle := self._lifecycles.get(name)) is not None:
            lifecycle.forget(key)
        else:
            self._store.change_state(name, lambda model: model.without(key))

    def _lifecycle(self, name: str) -> ModelLifecycle:
        lifecycle = self._lifecycles.get(name)
        if lifecycle is None:
            known = ", ".join(self._lifecycles) or "none"
            raise UnknownModel(f"no model is called {name!r} here; there are: {known}")
        return lifecycle

    def _version(self, name: str, version: int) -> VersionRecord:
        """The newest commit of a version number."""
        found = [record for record in self._store.versions(name) if record.version == version]
        if not found:
            raise StoreError(
                f"version {version} of {name} is not in the cache", remedy="see `edge-agent models list`"
            )
        return found[-1]

    def _described(self, lifecycle: ModelLifecycle) -> dict[str, Any]:
        return {**lifecycle.status(), **lifecycle.state.others()}


def inventory(
    settings: Settings, store: Store, heard: Heard, *, state: CacheState | None = None
) -> list[dict[str, Any]]:
    """What is in the cache, and what should run, for `models list` and `models show`: the same whoever looks.

    Args:
        state: of the cache; None reads it, and has one that is damaged made again.

    Returns:
        An entry for each model of the settings, in their order, and then for each that only the cache has.

    Raises:
        StoreError: the cache cannot be read.
    """
    state = state or store.state()
    records: dict[str, list[VersionRecord]] = {name: [] for name in settings.models}
    for record in store.versions():
        records.setdefault(record.name, []).append(record)
    return [
        _model(name, settings.models.get(name), state.model(name), versions, heard)
        for name, versions in records.items()
    ]


def _model(
    name: str,
    configured: ModelSettings | None,
    state: ModelState,
    versions: Sequence[VersionRecord],
    heard: Heard,
) -> dict[str, Any]:
    wanted = choice.wanted_version(configured.ref, state) if configured else None
    hold = heard.hold(name, state, wanted) if wanted else None
    return {
        "name": name,
        "uri": configured.uri if configured else None,
        "active": state.active,
        **state.others(),
        "desired": state.desired or None,
        "wanted": wanted.document() if wanted else None,
        "held": hold.document() if hold else None,
        "versions": [
            {
                "version": record.version,
                "digest": record.digest,
                "bytes": record.total_bytes,
                "files": len(record.files),
                "state": state.role(record.key),
                "pinned": record.key == state.pinned,
                "registered_name": record.registered_name,
                "registry_uri": record.registry_uri,
                "run_id": record.run_id,
                "trust": record.trust.reason,
            }
            for record in versions
        ],
    }


class _Waits:
    """Hears what must wait for its time, and passes everything on."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._waiting: Mapping[str, Any] = {}

    @property
    def model(self) -> str:
        """The settings' name."""
        return str(self._waiting["model"])

    def hear(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "waits":
            self._waiting = event
        self._on_event(event)

    def document(self) -> dict[str, Any]:
        """What `pull` and `import` say of it."""
        waiting = self._waiting
        return {
            "name": self.model,
            "version": waiting["version"],
            "digest": waiting["digest"],
            "bytes_fetched": waiting["fetched_bytes"],
            "bytes_mirrored": waiting["mirrored_bytes"],
            "bytes_reused": waiting["reused_bytes"],
            "state": "held",
            "code": waiting["code"],
            "reason": waiting["reason"],
            "missing_bytes": waiting["missing_bytes"],
            "held_until": waiting["held_until"],
        }


def _brought(result: SyncResult) -> dict[str, Any]:
    """What `pull` and `import` say of a version."""
    return {
        "name": result.name,
        "version": result.version,
        "digest": result.digest,
        "bytes_fetched": result.bytes_fetched,
        "bytes_mirrored": result.bytes_mirrored,
        "bytes_reused": result.bytes_reused,
    }


def _given(file: int | None) -> int:
    if file is None:
        raise StoreError("no file was given")
    return file


def run_operation(
    operations: Operations,
    do: str,
    *,
    name: object,
    version: object,
    file: int | None = None,
    allow_older: object = None,
    now: object = None,
    on_event: OnEvent = lambda event: None,
) -> Any:
    """Runs one operation by its name, as the control socket asks for it.

    Args:
        name, version, allow_older, now: from outside; checked here.
        file: descriptor of an open file, where the operation has one.

    Raises:
        EdgeAgentError: the operation is unknown, its arguments are wrong, or it failed.
    """
    if name is not None and not (isinstance(name, str) and MODEL_NAME.fullmatch(name)):
        raise UnknownModel(f"{str(name)[:80]!r} is no name of a model")
    if do == "list":
        return operations.inventory()
    if do == "pull":
        return operations.pull(name, on_event, allow_older=allow_older is True, now=now is True)
    if do == "prune":
        return operations.prune()
    if do == "verify":
        return operations.verify(on_event)
    if do == "import":
        return operations.take_in(name, file, on_event, allow_older=allow_older is True)
    if name is None:
        raise UnknownModel("name the model")
    if do == "rollback":
        return operations.rollback(name)
    if do == "unpin":
        return operations.unpin(name)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError("the version is a whole number from 1")
    if do == "export":
        return operations.export(name, version, file, on_event)
    numbered = {"activate": operations.activate, "pin": operations.pin, "rm": operations.remove}
    if do not in numbered:
        raise EdgeAgentError(f"unknown operation {do!r}")
    return numbered[do](name, version)


def without_daemon(settings: Settings) -> tuple[Operations, Mapping[str, ModelLifecycle]]:
    """The same operations in this process, which acts as the cache's owner; the caller closes the lifecycles."""
    store = Store(settings.state_dir)
    store.create()
    lifecycles = lifecycles_of(settings, store, budget_of(settings, store))
    return Operations(settings, store, lifecycles, Updates(settings, store, lifecycles)), lifecycles
