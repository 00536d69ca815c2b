"""`learned.json`: what was measured on this device and helps the next load.

For each model version (by digest) on a host (by `host.identity.of_host`): the number of threads that decodes fastest,
and the peak memory of its runners, by context. Nothing depends on it: a missing or damaged file counts as empty, and
its content is measured again. Bounded: the oldest entries go first.

Any thread and any process may use it: each change reads the file, changes one entry and replaces the whole file, under
a lock on its folder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent.cache import durable
from edge_agent.cache.locks import Lock

log = logging.getLogger(__name__)

MAX_ENTRIES = 64
MAX_PEAKS = 8
_MAX_BYTES = 1 << 18
_LOCK_WAIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version on one host.

    Attributes:
        threads: the number that was fastest, 0 when none was measured.
        tokens_per_s: what each measured number of threads decoded.
        peaks: bytes of resident memory, by the context in tokens that the runner was loaded with.
        noted_at: seconds since the epoch.
    """

    digest: str
    host: str
    threads: int = 0
    tokens_per_s: Mapping[int, float] = field(default_factory=dict)
    peaks: Mapping[int, int] = field(default_factory=dict)
    noted_at: float = 0.0


class Learned:
    """The file. Objects hold only its path, so there may be any number of them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> list[Entry]:
        """Everything that is known, oldest first."""
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError:
            return []
        try:
            if len(data) > _MAX_BYTES:
                raise ValueError("too long")
            document = json.loads(data)
            if document["format"] != 1:
                raise ValueError("format")
            return [_entry(fields) for fields in document["entries"]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            log.warning(
                "learned.json is damaged, everything is measured again code=file_damaged reason=%s",
                type(error).__name__,
            )
            return []

    def of(self, digest: str, host: str) -> Entry:
        """What is known of a version on a host; an empty entry if nothing is."""
        known = (entry for entry in self.entries() if (entry.digest, entry.host) == (digest, host))
        return next(known, Entry(digest=digest, host=host))

    def note_threads(
        self, digest: str, host: str, *, threads: int, tokens_per_s: Mapping[int, float]
    ) -> None:
        """Remembers the number of threads to take, and the speeds that it was chosen by."""
        rates = {count: round(rate, 2) for count, rate in tokens_per_s.items()}
        self._note(digest, host, lambda entry: replace(entry, threads=threads, tokens_per_s=rates))

    def note_peak(self, digest: str, host: str, *, context_tokens: int, peak_bytes: int) -> None:
        """Remembers the most memory that a runner took, unless another took more."""

        def change(entry: Entry) -> Entry:
            if peak_bytes <= entry.peaks.get(context_tokens, 0):
                return entry
            others = {tokens: peak for tokens, peak in entry.peaks.items() if tokens != context_tokens}
            kept = dict(list(others.items())[-(MAX_PEAKS - 1) :])
            return replace(entry, peaks={**kept, context_tokens: peak_bytes})

        self._note(digest, host, change)

    def _note(self, digest: str, host: str, change: Callable[[Entry], Entry]) -> None:
        try:
            durable.make_folder(self._path.parent)
            with self._locked():
                before = self.of(digest, host)
                entry = change(before)
                if entry == before:
                    return
                others = [e for e in self.entries() if (e.digest, e.host) != (digest, host)]
                entries = [*others, replace(entry, noted_at=time.time())][-MAX_ENTRIES:]
                document = {"format": 1, "entries": [_fields(each) for each in entries]}
                durable.write_file(self._path, json.dumps(document, indent=1).encode() + b"\n")
        except OSError as error:  # it is measured again at the next load
            log.warning(
                "not remembered code=cache_failed file=%s reason=%r", self._path, error.strerror or str(error)
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer among all threads and processes, because they share the temporary file's name."""
        with Lock.of_folder(self._path.parent) as lock:
            if not lock.wait_exclusive(_LOCK_WAIT_S):
                raise TimeoutError("another process has its lock")
            yield


def _fields(entry: Entry) -> dict[str, Any]:
    return {
        "digest": entry.digest,
        "host": entry.host,
        "threads": entry.threads,
        "tokens_per_s": {str(count): rate for count, rate in entry.tokens_per_s.items()},
        "peaks": {str(tokens): peak for tokens, peak in entry.peaks.items()},
        "noted_at": entry.noted_at,
    }


def _entry(fields: Any) -> Entry:
    return Entry(
        digest=str(fields["digest"]),
        host=str(fields["host"]),
        threads=_count(fields["threads"], least=0),
        tokens_per_s={_count(int(key)): float(rate) for key, rate in fields["tokens_per_s"].items()},
        peaks={_count(int(key)): _count(peak) for key, peak in fields["peaks"].items()},
        noted_at=float(fields["noted_at"]),
    )


def _count(value: object, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 62:
        raise ValueError("count")
    return value
