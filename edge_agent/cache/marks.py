"""High-water marks: how new a signed package has been here, for each key and registered name. The file `marks.json`.

A signature binds a package's name and files, not its number in the registry. Whoever can write to the registry could
register an old signed package anew, under the next number. So the highest version that was active here is remembered
with the newest time that a signed `MLmodel` of it named: a package with a higher number must not be older than that.

The caller of `note_active` has no lock; it is taken here, and the file is replaced with one rename. A file that is
missing or damaged is made again from the versions that have served and are in the cache.
Decision: docs/adr/0012-high-water-mark.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from edge_agent.cache import disk, durable
from edge_agent.cache.record import DIGEST, VersionRecord, seconds, whole
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError

log = logging.getLogger(__name__)

MAX_MARKS = 256
"""Keys times names; the one that was raised longest ago is dropped first."""
_MAX_BYTES = 1 << 20
_MAX_NAME = 250


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Of one key and name.

    Attributes:
        key: sha256 of the public key's file.
        name: the registered model's.
        version: the highest number in the registry that was active here; 0 for none.
        packaged_at: the newest time that a package of it names, in seconds since the epoch; 0 for none.
    """

    key: str
    name: str
    version: int = 0
    packaged_at: float = 0.0

    def refuses(self, version: int, packaged_at: float) -> bool:
        """True for a package that is older than the mark, under a number that is higher."""
        return version > self.version and packaged_at < self.packaged_at

    def raised(self, version: int, packaged_at: float) -> Mark:
        """The mark after this version became active.

        One that the mark refuses becomes active only where an operator says so: from then on its time counts, or
        every later version would have to be allowed in the same way. The same package under a higher number raises
        nothing: else whatever was refused under the numbers between would be taken.
        """
        if not self.refuses(version, packaged_at):
            if self.version and packaged_at <= self.packaged_at:
                return self
            packaged_at = max(packaged_at, self.packaged_at)
        return replace(self, version=max(version, self.version), packaged_at=packaged_at)


def mark_of(store: Store, *, key: str, name: str) -> Mark:
    """The mark of a key and a name; an empty one where nothing was active yet."""
    return _of(_read(store), key, name)


def note_active(store: Store, record: VersionRecord) -> None:
    """Raises the mark of a signed version that has become the active one, durably; of an unsigned one there is none.

    Raises:
        StoreError: the file cannot be written, or somebody else has the lock.
    """
    key, name = record.trust.signed_by, record.registered_name
    if not key:
        return
    if record.packaged_at is None:  # a sync may have looked since the caller read the record
        record = store.record(record.name, record.key) or record
    written = _written(store)
    if written is not None and _raise(known := _of(written, key, name), record) == known:
        return
    with store.lock():
        marks = _read(store)
        mark = _raise(_of(marks, key, name), record)
        others = [other for other in marks if (other.key, other.name) != (key, name)]
        document = {"format": 1, "marks": [asdict(each) for each in [*others, mark][-MAX_MARKS:]]}
        with disk.store_errors("write", store.marks_file):
            durable.write_file(store.marks_file, json.dumps(document, indent=1).encode() + b"\n")


def _raise(mark: Mark, record: VersionRecord) -> Mark:
    return mark.raised(record.version, record.packaged_at or 0.0)


def _of(marks: Iterable[Mark], key: str, name: str) -> Mark:
    return next((mark for mark in marks if (mark.key, mark.name) == (key, name)), Mark(key=key, name=name))


def _read(store: Store) -> tuple[Mark, ...]:
    """What the file says, or what the cache does where there is none."""
    marks = _written(store)
    return _of_records(store.versions()) if marks is None else marks


def _written(store: Store) -> tuple[Mark, ...] | None:
    data = disk.read_bounded(store.marks_file, _MAX_BYTES)
    if data is None:
        return None
    try:
        return parse(data)
    except StoreError as error:
        log.warning(
            "marks made again from the cache code=file_damaged file=%s reason=%r",
            store.marks_file,
            error.message,
        )
        return None


def parse(data: bytes) -> tuple[Mark, ...]:
    """Reads `marks.json`.

    Raises:
        StoreError: it is not what this agent writes.
    """
    try:
        document = json.loads(data.decode("utf-8"))
        if document["format"] != 1 or len(document["marks"]) > MAX_MARKS:
            raise ValueError("format")
        marks = tuple(
            Mark(
                key=str(fields["key"]),
                name=str(fields["name"])[:_MAX_NAME],
                version=whole(fields["version"]),
                packaged_at=seconds(fields["packaged_at"]),
            )
            for fields in document["marks"]
        )
        if not all(DIGEST.fullmatch(mark.key) for mark in marks):
            raise ValueError("key")
        return marks
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"marks.json is damaged ({type(error).__name__})") from error


def _of_records(records: Iterable[VersionRecord]) -> tuple[Mark, ...]:
    """From the signed versions that were active here, as far as they are still in the cache."""
    active: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        if record.served and record.trust.signed_by:
            place = (record.trust.signed_by, record.registered_name)
            active.setdefault(place, []).append((record.version, record.packaged_at or 0.0))
    return tuple(_of_active(key, name, versions) for (key, name), versions in active.items())


def _of_active(key: str, name: str, versions: list[tuple[int, float]]) -> Mark:
    """The lowest mark that refuses none of them."""
    newest = max(at_s for _, at_s in versions)
    first = min(version for version, at_s in versions if at_s == newest)
    version = max([first, *(version for version, at_s in versions if at_s < newest)])
    return Mark(key=key, name=name, version=version, packaged_at=newest)
