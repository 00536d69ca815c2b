"""The messages between the daemon and a sync: one job on stdin, then events on stdout, one JSON object a line.

Pure. The kinds of events, by their field `event`:

    resolved      version, rollout, rollout_from: what the reference means now
    fetching      digest: the version is fetched, as far as it is missing; empty where the digest is not known yet
    verifying     digest: all of its bytes are here
    progress      bytes, total_bytes, bytes_per_s, eta_s: at most five a second
    awaiting      what, seconds: nothing is fetched before it is there, for so long at most
    quarantined   key: this version is not fetched; an error with that code follows
    held          version, digest, missing_bytes, fetched_bytes, mirrored_bytes: it is not fetched now, or not to its
                  end; the digest is empty where it is not known yet; an error with the code link_held follows
    done          the fields of `SyncResult`, and the process ends
    outlined      the fields of `Outline`, and the process ends
    error         code, message, remedy, and the process ends

Each side treats the other's bytes as untrusted input: jobs and lines have a bound, and an event with missing or wrong
fields is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from edge_agent.errors import (
    CannotRun,
    ContentError,
    EdgeAgentError,
    LinkHeld,
    RegistryRefused,
    SettingsError,
    StoreError,
    TransportError,
    UnknownReference,
    error_of,
)
from edge_agent.sync.tls import NO_FILES, TlsFiles

MAX_JOB_BYTES = 256 << 10
MAX_LINE_BYTES = 64 << 10
MAX_EVENTS = 1_000_000
_MAX_TEXT = 2_000

_FAMILIES = (
    CannotRun,
    ContentError,
    LinkHeld,
    RegistryRefused,
    SettingsError,
    StoreError,
    TransportError,
    UnknownReference,
)
"""The families of errors that a sync may report; any other code becomes an `EdgeAgentError`."""

Event = Mapping[str, Any]
Emit = Callable[[Event], None]
"""Takes the events of a sync in order."""


@dataclass(frozen=True, kw_only=True)
class RegistryJob:
    """Which registry, and how long one request or one stalled read may take."""

    uri: str
    timeout_s: float = 30.0
    tls: TlsFiles = NO_FILES


@dataclass(frozen=True, kw_only=True)
class TrustJob:
    """`[trust]` of the settings."""

    public_keys: tuple[str, ...] = ()
    allow_unsigned_code: bool = False


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """The part of the settings' `[cache]` that a sync needs."""

    quota_bytes: int = 20_000_000_000
    min_free_bytes: int = 500_000_000
    max_bytes_per_s: int = 0
    mirrors: tuple[str, ...] = ()
    mirror_patience_s: float = 0.0
    mirror_ca_file: str = ""


@dataclass(frozen=True, kw_only=True)
class LinkJob:
    """What a sync may take of the line.

    Attributes:
        allowed_bytes: None for no bound; 0 for nothing but what a check needs.
        since_s, until_s: seconds since 1970; outside of them nothing is fetched. None for no bound.
        ahead_bytes: so many are counted before they come; 0 where nobody counts.
    """

    allowed_bytes: int | None = None
    since_s: float = 0.0
    until_s: float | None = None
    ahead_bytes: int = 0


NO_BOUNDS = LinkJob()


@dataclass(frozen=True, kw_only=True)
class SyncJob:
    """One model to bring up to date.

    Attributes:
        name: the settings' model name.
        ref: what to resolve, `models:/…`.
        version_file: descriptor of an open version file, or None if the version comes from the registry.
        fallback: `ref` is the model's fallback.
        check_host: check that this host can run the version before it is fetched.
        running: key of the active version, which this host can run; empty for none.
        quarantined: keys of versions not to fetch, because they would not be tried.
        allow_older: an operator takes a package that is older than what was active here, under a higher number.
        outline: only say what the version would take; nothing is brought.
    """

    state_dir: str
    registry: RegistryJob
    name: str
    ref: str
    trust: TrustJob = TrustJob()
    cache: CacheJob = CacheJob()
    link: LinkJob = NO_BOUNDS
    version_file: int | None = None
    fallback: bool = False
    check_host: bool = False
    running: str = ""
    quarantined: tuple[str, ...] = ()
    allow_older: bool = False
    outline: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, data: bytes) -> SyncJob:
        """Reads what `encode` wrote.

        Raises:
            SettingsError: it is too large or has other fields.
        """
        if len(data) > MAX_JOB_BYTES:
            raise SettingsError(f"the sync job has more than {MAX_JOB_BYTES} bytes")
        try:
            fields = json.loads(data)
            trust, registry = fields.pop("trust", {}), fields.pop("registry")
            tls, cache = TlsFiles(**registry.pop("tls", {})), fields.pop("cache", {})
            return cls(
                registry=RegistryJob(**registry, tls=tls),
                trust=TrustJob(**{**trust, "public_keys": tuple(trust.get("public_keys", ()))}),
                cache=CacheJob(**{**cache, "mirrors": tuple(cache.get("mirrors", ()))}),
                link=LinkJob(**fields.pop("link", {})),
                quarantined=tuple(fields.pop("quarantined", ())),
                **fields,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SettingsError(f"the sync job is not understood: {error}") from error


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """A version that is complete, verified and committed.

    Attributes:
        key: names the version in `state.json` and in the store.
        bytes_fetched: fetched by this sync, from the registry and from mirrors.
        bytes_mirrored: those of them that came from mirrors.
        bytes_reused: already in the cache.
        new: False if the version had been committed before.
    """

    name: str
    version: int
    digest: str
    key: str
    bytes: int
    bytes_fetched: int
    bytes_mirrored: int
    bytes_reused: int
    new: bool


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a version would take, by its manifest or its listing.

    Attributes:
        digest: of its manifest; empty where it has none.
        missing_bytes: to fetch.
        needed_bytes: room in the cache while they are fetched; 0 where nothing is missing.
        total_bytes: of all its files.
    """

    version: int
    digest: str
    missing_bytes: int
    needed_bytes: int
    total_bytes: int


_EVENT_TYPES: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "resolved": {"version": (int,), "rollout": (str,), "rollout_from": (str,)},
    "fetching": {"digest": (str,)},
    "verifying": {"digest": (str,)},
    "progress": {
        "bytes": (int,),
        "total_bytes": (int,),
        "bytes_per_s": (int,),
        "eta_s": (float, int, type(None)),
    },
    "awaiting": {"what": (str,), "seconds": (int,)},
    "quarantined": {"key": (str,)},
    "held": {
        "version": (int,),
        "digest": (str,),
        "missing_bytes": (int,),
        "fetched_bytes": (int,),
        "mirrored_bytes": (int,),
    },
}
"""The fields of the events before the last one."""


def resolved(*, version: int, rollout: str = "", rollout_from: str = "") -> Event:
    return {"event": "resolved", "version": version, "rollout": rollout, "rollout_from": rollout_from}


def fetching(digest: str) -> Event:
    return {"event": "fetching", "digest": digest}


def verifying(digest: str) -> Event:
    return {"event": "verifying", "digest": digest}


def progress(*, have_bytes: int, total_bytes: int, bytes_per_s: float, eta_s: float | None) -> Event:
    return {
        "event": "progress",
        "bytes": min(have_bytes, total_bytes),
        "total_bytes": total_bytes,
        "bytes_per_s": round(bytes_per_s),
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }


def awaiting(what: str, seconds: float) -> Event:
    return {"event": "awaiting", "what": what, "seconds": round(seconds)}


def quarantined(key: str) -> Event:
    return {"event": "quarantined", "key": key}


def held(
    *, version: int, digest: str, missing_bytes: int, fetched_bytes: int, mirrored_bytes: int = 0
) -> Event:
    return {
        "event": "held",
        "version": version,
        "digest": digest,
        "missing_bytes": missing_bytes,
        "fetched_bytes": fetched_bytes,
        "mirrored_bytes": mirrored_bytes,
    }


def done(result: SyncResult) -> Event:
    return {"event": "done", **asdict(result)}


def outlined(outline: Outline) -> Event:
    return {"event": "outlined", **asdict(outline)}


def failed(error: EdgeAgentError) -> Event:
    return {
        "event": "error",
        "code": error.code,
        "message": error.message[:_MAX_TEXT],
        "remedy": error.remedy[:_MAX_TEXT],
    }


def encode(event: Event) -> bytes:
    """One line, its newline included."""
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def outcome_of(event: Event) -> SyncResult | Outline | EdgeAgentError | None:
    """The result or error in a last event, or None for any other event.

    Raises:
        EdgeAgentError: an event of a known kind has missing or wrong fields.
    """
    for name, types in _EVENT_TYPES.get(str(event.get("event")), {}).items():
        if type(event.get(name)) not in types or name not in event:
            raise EdgeAgentError(f"the sync's event {event['event']!r} has no {name}, or a wrong one")
    if event.get("event") == "error":
        message, remedy = event.get("message", "the sync failed"), event.get("remedy", "")
        return error_of(event.get("code"), message, remedy=remedy, among=_FAMILIES, otherwise=EdgeAgentError)
    kind = _LAST.get(str(event.get("event")))
    if kind is None:
        return None
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {name: event.get(name) for name in hints}
    wrong = [name for name, value in fields.items() if type(value) is not hints[name]]
    if wrong:
        raise EdgeAgentError(f"the sync's last event has no {', '.join(wrong)}, or a wrong one")
    return kind(**fields)


_LAST: Mapping[str, type[SyncResult] | type[Outline]] = {"done": SyncResult, "outlined": Outline}
"""What a process ends with that has not failed."""
