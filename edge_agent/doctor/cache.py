"""The cache: permissions, hard links, free space, and whether its files are complete.

It creates one file and one link to it, removes both, and changes nothing else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edge_agent.cache import durable, fsck
from edge_agent.cache import state as states
from edge_agent.cache.state import CacheState
from edge_agent.cache.store import Store
from edge_agent.doctor.finding import Finding, fail, failed, ok, warn
from edge_agent.errors import StoreError
from edge_agent.settings import Settings
from edge_agent.terminal import human_bytes

_MAX_STATE_BYTES = 1 << 20


def check(settings: Settings) -> Iterator[Finding]:
    store = Store(settings.state_dir)
    if not store.root.exists():
        yield ok("cache.folder", f"{store.root} does not exist yet; the daemon creates it when it starts")
        return
    if not os.access(store.root, os.R_OK | os.W_OK | os.X_OK):
        yield warn(
            "cache.folder",
            f"{store.root}: permission denied",
            "run doctor as root: sudo edge-agent doctor",
        )
        return
    yield _check_owner(store)
    yield _check_hard_links(store)
    yield _check_room(settings, store)
    yield _check_content(store)
    yield from _check_state(settings, store)


def read_state(store: Store) -> CacheState | None:
    """Reads `state.json`; None if there is none. Unlike `Store.state` it repairs nothing.

    Raises:
        StoreError: the file is damaged or cannot be read.
    """
    path = store.root / "state.json"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        return states.parse(file.read(_MAX_STATE_BYTES))


def state_or_empty(store: Store) -> CacheState:
    """The same for other checks; a damaged state counts as empty, because it is already a finding."""
    try:
        return read_state(store) or CacheState()
    except StoreError:
        return CacheState()


def _check_owner(store: Store) -> Finding:
    """Finds files that root created beside the daemon and that the daemon's user cannot use."""
    state_dir = store.root.parent
    owner = state_dir.stat().st_uid
    strangers = [path for path in _tree(state_dir) if path.lstat().st_uid != owner]
    if strangers:
        return fail(
            "cache.folder",
            f"{len(strangers)} files do not belong to the owner of {state_dir}, for example {strangers[0]}",
            f"chown -R --reference={state_dir} {state_dir}",
        )
    return ok("cache.folder", f"{state_dir}: one user owns all files")


def _check_hard_links(store: Store) -> Finding:
    first = store.root / f".doctor-{os.getpid()}{durable.TEMPORARY_SUFFIX}"
    second = first.with_suffix(f".link{durable.TEMPORARY_SUFFIX}")
    try:
        first.touch(mode=0o600, exist_ok=False)
        second.hardlink_to(first)
        if not second.samefile(first):
            return fail(
                "cache.hard_links",
                "the file system copied instead of linking",
                "put state_dir on ext4, xfs or btrfs",
            )
    except OSError as error:
        return fail(
            "cache.hard_links",
            f"{store.root}: {error.strerror}",
            "put state_dir on a writable file system with hard links (ext4, xfs, btrfs)",
        )
    finally:
        for path in (second, first):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return ok("cache.hard_links", "the file system supports them")


def _check_room(settings: Settings, store: Store) -> Finding:
    used, quota = store.used_bytes(), settings.cache.quota_bytes
    free, wanted = store.free_bytes(), settings.cache.min_free_bytes
    line = f"{human_bytes(used)} of {human_bytes(quota)} used, {human_bytes(free)} free on the disk"
    if used > quota:
        return warn(
            "cache.room", f"{line}: over the quota", "`edge-agent models prune`, or raise cache.quota_bytes"
        )
    if free < wanted:
        return warn(
            "cache.room",
            f"{line}, less than cache.min_free_bytes ({human_bytes(wanted)}): updates cannot be downloaded",
            "`edge-agent models prune`, or free some space",
        )
    return ok("cache.room", line)


def _check_content(store: Store) -> Finding:
    found = fsck.quick_check(store)
    if found.damaged:
        first = found.damaged[0]
        return fail(
            "cache.content",
            f"{len(found.damaged)} of {found.checked} files are damaged; "
            f"{first.name} {first.key}: {first.path} {first.reason}",
            "`edge-agent models verify` downloads them again",
        )
    return ok(
        "cache.content",
        f"all have the sizes and links of their commit: files {found.checked}, versions {len(store.versions())}",
    )


def _check_state(settings: Settings, store: Store) -> Iterator[Finding]:
    try:
        state = read_state(store)
    except StoreError as error:
        yield failed(
            "cache.state", error, "the daemon rebuilds it when it starts: `systemctl restart edge-agent`"
        )
        return
    if state is None:
        yield ok("cache.state", "no state.json yet")
        return
    for name in settings.models:
        model = state.model(name)
        for key, reason in model.reasons.items():
            yield warn(
                "cache.state",
                f"model {name}: version {key} is in quarantine: {reason}",
                f"publish a version that works, or `edge-agent models activate {name} {key.split('-')[0]}`",
            )
        pinned = f", pinned to {model.pinned}" if model.pinned else ""
        yield ok(
            "cache.state",
            f"model {name}: active {model.active or 'none'}, previous {model.previous or 'none'}{pinned}",
        )


def _tree(folder: Path) -> Iterator[Path]:
    for inner, folders, names in os.walk(folder):
        yield from (Path(inner) / name for name in (*folders, *names))
