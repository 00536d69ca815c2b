"""A cached version as one file: out of one device's cache and into another's, under the same rules."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.cache import fsck
from edge_agent.cache.store import Store
from edge_agent.cache.version_file import BLOB_PREFIX, HEADER_NAME
from edge_agent.errors import ContentError, EdgeAgentError, PolicyError, StoreError, VerificationError
from edge_agent.package import trust
from edge_agent.sync.protocol import TrustJob
from edge_agent.sync.version_file import export_version, read_version
from tests.support.keys import make_keys
from tests.support.packages import WEIGHTS
from tests.support.version_files import MODEL, bring_in, export, write_out


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "second")


def has_nothing_final(store: Store) -> bool:
    return not store.record_files() and not list(store.blobs.glob("*"))


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "plain"])
def test_a_version_goes_through_a_file_to_another_device(
    tmp_path: Path, other: Store, manifest: bool
) -> None:
    made = export(tmp_path, manifest=manifest)
    record = bring_in(other, made.file)
    assert (record.key, record.digest) == (made.record.key, made.record.digest)
    assert (record.version, record.run_id, record.registry_uri) == (7, "run", "bundle:")
    assert record.trust.rule == trust.Rule.SHIPPED_WRAPPER
    assert fsck.verify(other).damaged == ()
    for file in made.record.files:
        there = (other.folder(record) / file.path).read_bytes()
        assert there == (made.store.folder(made.record) / file.path).read_bytes()
    assert list(other.staging_root.iterdir()) == []


def test_any_tar_shows_what_is_in_the_file(tmp_path: Path) -> None:
    made = export(tmp_path)
    with tarfile.open(made.file) as tar:
        names = tar.getnames()
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
    assert names[0] == HEADER_NAME
    weights = next(file for file in made.record.files if file.path == WEIGHTS)
    stored = members[BLOB_PREFIX + weights.sha256]
    assert stored is not None
    assert len(names) == 1 + len({file.sha256 for file in made.record.files})


def test_a_second_import_changes_nothing(tmp_path: Path, other: Store) -> None:
    made = export(tmp_path)
    first = bring_in(other, made.file)
    assert bring_in(other, made.file) == first


def test_an_import_mends_a_damaged_version(tmp_path: Path, other: Store) -> None:
    made = export(tmp_path)
    record = bring_in(other, made.file)
    other.note_served(record.name, record.key, served=True)
    weights = other.folder(record) / WEIGHTS
    weights.chmod(0o600)
    weights.write_bytes(bytes(20_000))
    with other.lock():
        fsck.set_aside(other, fsck.verify(other).damaged)
    assert bring_in(other, made.file).key == record.key
    assert [known.served for known in other.versions()] == [True], "what it was here stays known"
    assert fsck.verify(other).damaged == ()


def test_a_file_of_another_model_or_version_is_refused(tmp_path: Path, other: Store) -> None:
    made = export(tmp_path)
    for ref in ("models:/llama/7", f"models:/{MODEL}/8"):
        with pytest.raises(ContentError, match=f"'phi' version 7, not {ref}"):
            bring_in(other, made.file, ref=ref)
    assert has_nothing_final(other)


def test_the_policy_holds_for_a_file_too(tmp_path: Path, other: Store) -> None:
    made = export(tmp_path, code="print()")
    with pytest.raises(PolicyError, match="code that nobody signed"):
        bring_in(other, made.file)
    assert has_nothing_final(other)
    assert bring_in(other, made.file, policy=TrustJob(allow_unsigned_code=True)).trust.unsigned_code


def test_a_signature_travels_with_the_file(tmp_path: Path, other: Store) -> None:
    trusted, wrong = make_keys(tmp_path, "trusted"), make_keys(tmp_path, "wrong")
    made = export(tmp_path, key=trusted.private, code="print()")
    with pytest.raises(VerificationError, match="matches no configured key"):
        bring_in(other, made.file, policy=TrustJob(public_keys=(str(wrong.public),)))
    assert has_nothing_final(other)
    record = bring_in(other, made.file, policy=TrustJob(public_keys=(str(trusted.public),)))
    assert record.trust.rule == trust.Rule.SIGNED_CODE


def test_a_damaged_version_is_not_exported(tmp_path: Path) -> None:
    made = export(tmp_path)
    before = made.file.read_bytes()
    weights = made.store.folder(made.record) / WEIGHTS
    weights.chmod(0o600)
    weights.write_bytes(bytes(20_000))
    with pytest.raises(VerificationError, match=r"model\.onnx\.data"):
        write_out(made.store, made.record, made.file)
    assert made.file.read_bytes() == before
    assert list(made.file.parent.iterdir()) == [made.file]


def test_a_stick_that_is_full_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    made = export(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot be written: File too large.*FAT"):
            write_out(made.store, made.record, made.file.with_name("more.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list(made.file.parent.iterdir()) == [made.file]


def test_what_is_no_regular_file_open_the_right_way_is_refused(tmp_path: Path, other: Store) -> None:
    made = export(tmp_path)
    reader, writer = os.pipe()
    try:
        for wrong in (reader, 10_000):
            with pytest.raises(StoreError, match=r"not a regular file|no file was given"):
                read_version(wrong)
        with pytest.raises(StoreError, match="not a regular file"):
            export_version(made.store, made.record, writer)
    finally:
        os.close(reader)
        os.close(writer)
    with made.file.open("rb") as stream, pytest.raises(StoreError, match="not open for that"):
        export_version(made.store, made.record, stream.fileno())
    name = os.open(made.file, os.O_PATH)
    try:
        with pytest.raises(StoreError, match="not open for that"):
            read_version(name)
        with pytest.raises(StoreError, match="not open for that"):
            export_version(made.store, made.record, name)
    finally:
        os.close(name)


# --- Damaged and hostile files -------------------------------------------------------------------------


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path, other: Store) -> None:
    data = export(tmp_path).file.read_bytes()
    cut = tmp_path / "cut.tar"
    last_block = len(data) - 2 * tarfile.BLOCKSIZE
    for length in sorted({*range(0, last_block, 1_021), last_block - tarfile.BLOCKSIZE}):
        cut.write_bytes(data[:length])
        with pytest.raises(ContentError):
            bring_in(other, cut)
        assert has_nothing_final(other)


def test_a_flipped_bit_never_changes_what_arrives(tmp_path: Path, other: Store) -> None:
    made = export(tmp_path)
    data = made.file.read_bytes()
    spoiled = tmp_path / "spoiled.tar"
    refused = 0
    for position in range(0, len(data), 509):
        spoiled.write_bytes(data[:position] + bytes((data[position] ^ 4,)) + data[position + 1 :])
        try:
            record = bring_in(other, spoiled)
        except ContentError:
            refused += 1
            continue
        assert fsck.verify(other).damaged == ()
        assert record.manifest.files == made.record.manifest.files
        with other.lock():
            other.remove(record)
    assert refused > 40


def members_of(file: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(file) as tar:
        found = []
        for member in tar.getmembers():
            stream = tar.extractfile(member)
            assert stream is not None
            found.append((member, stream.read()))
        return found


Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, to: str = "") -> Members:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, to, len(data)
    return [(info, data)]


def other_header(members: Members, **changes: object) -> Members:
    document = json.loads(members[0][1]) | changes
    return [*member(HEADER_NAME, json.dumps(document).encode()), *members[1:]]


def with_path(members: Members, path: str) -> Members:
    document = json.loads(members[0][1])
    document["manifest"]["files"][0]["path"] = path
    return [*member(HEADER_NAME, json.dumps(document).encode()), *members[1:]]


HOSTILE: dict[str, Callable[[Members], Members]] = {
    "a path out of the folder": lambda m: [*m[:1], *member("../../escaped", b"x"), *m[1:]],
    "an absolute path": lambda m: [*m[:1], *member("/tmp/escaped", b"x"), *m[1:]],
    "a member that nobody asked for": lambda m: [*m, *member("more", b"x")],
    "a member in the place of another": lambda m: [*m[:-1], *member("more", b"x")],
    "a symbolic link": lambda m: [*m[:1], *member("a", kind=tarfile.SYMTYPE, to="/etc/passwd"), *m[1:]],
    "a blob that is a symbolic link": lambda m: [
        *m[:-1],
        *member(m[-1][0].name, kind=tarfile.SYMTYPE, to="/etc/passwd"),
    ],
    "a blob that is a hard link": lambda m: [
        *m[:-1],
        *member(m[-1][0].name, kind=tarfile.LNKTYPE, to="/etc/passwd"),
    ],
    "a device": lambda m: [*m[:-1], *member(m[-1][0].name, kind=tarfile.CHRTYPE)],
    "a folder": lambda m: [*m[:1], *member("blobs", kind=tarfile.DIRTYPE), *m[1:]],
    "an extended header": lambda m: [
        *m[:1],
        *member("x", b"20 path=../escaped\n", kind=tarfile.XHDTYPE),
        *m[1:],
    ],
    "a long name": lambda m: [*m[:1], *member("x", b"../escaped\0", kind=tarfile.GNUTYPE_LONGNAME), *m[1:]],
    "a blob twice": lambda m: [*m[:2], *m[1:]],
    "other bytes": lambda m: [*m[:-1], (m[-1][0], bytes(len(m[-1][1])))],
    "fewer bytes": lambda m: [*m[:-1], *member(m[-1][0].name, m[-1][1][:-1])],
    "no header": lambda m: m[1:],
    "the header last": lambda m: [*m[1:], m[0]],
    "a header that is no record": lambda m: [*member(HEADER_NAME, b"{}"), *m[1:]],
    "a header that is no JSON": lambda m: [*member(HEADER_NAME, b"[" * 100_000), *m[1:]],
    "a header without bound": lambda m: [*member(HEADER_NAME, bytes(5 << 20)), *m[1:]],
    "another version": lambda m: other_header(m, version=-1),
    "a version without an end": lambda m: other_header(m, version=float("inf")),
    "a version that is no number": lambda m: other_header(m, version=float("nan")),
    "a time without an end": lambda m: other_header(m, created_at=float("inf")),
    "another digest": lambda m: other_header(m, digest="0" * 64),
    "a path in the manifest": lambda m: with_path(m, "../../escaped"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_and_leaves_nothing(
    tmp_path: Path, other: Store, change: Callable[[Members], Members]
) -> None:
    made = export(tmp_path)
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in change(members_of(made.file)):
            tar.addfile(info, io.BytesIO(data))
    other.create()
    before = {path for path in tmp_path.rglob("*") if other.staging_root not in path.parents}
    with pytest.raises(ContentError) as caught:
        bring_in(other, hostile)
    assert str(caught.value)
    assert has_nothing_final(other)
    after = {path for path in tmp_path.rglob("*") if other.staging_root not in path.parents}
    assert after - before <= {other.root / "lock"}


@pytest.mark.parametrize(
    "data", [b"", b"x", random.Random(4).randbytes(10_000), bytes(10_240), b"\x1f\x8b" + bytes(600)]
)
def test_what_is_no_tar_is_refused(tmp_path: Path, other: Store, data: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(EdgeAgentError, match=r"not a version file|ends early"):
        bring_in(other, file)
