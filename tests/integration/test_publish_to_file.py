"""A folder becomes a version file, or blobs for a mirror, and no registry is asked."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

import pytest

from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError, PublishError
from edge_agent.package import manifest as manifests
from edge_agent.publishing import blobs as blob_folders
from edge_agent.publishing import publish_folder, write_folder
from edge_agent.publishing.blobs import Blobs
from edge_agent.publishing.package import Package, build_package
from edge_agent.publishing.version_file import write_file
from edge_agent.sync.protocol import TrustJob
from tests.support.keys import KeyPair, make_keys
from tests.support.version_files import bring_in

NAME = "from a folder"
MADE_AT_S = 1_795_772_000.0  # 2026-11-27 09:33:20 UTC


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "publisher")


@pytest.fixture(scope="module")
def built(sample_model: Path, tmp_path_factory: pytest.TempPathFactory, keys: KeyPair) -> Package:
    """Signed, with two empty files; never to be changed."""
    source = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(sample_model, source)
    (source / "empty").touch()
    (source / "empty too").touch()
    folder = tmp_path_factory.mktemp("built") / "package"
    return build_package(source, folder, name=NAME, sign_key=keys.private)


@pytest.fixture
def package(built: Package, tmp_path: Path) -> Package:
    folder = tmp_path / "package"
    shutil.copytree(built.folder, folder)
    return Package(manifest=built.manifest, folder=folder)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_a_version_file_made_of_a_folder_is_imported_under_the_devices_rules(
    package: Package, keys: KeyPair, tmp_path: Path, signed: bool
) -> None:
    if not signed:
        (package.folder / "model.sig").unlink()
    written = write_file(package, tmp_path / "stick.tar")
    assert written.bytes == (tmp_path / "stick.tar").stat().st_size
    assert written.digest == package.manifest.digest
    ref = f"models:/{NAME}/{written.version}"
    strict = TrustJob(public_keys=(str(keys.public),))
    if not signed:
        with pytest.raises(EdgeAgentError, match="is not signed"):
            bring_in(Store(tmp_path / "strict"), tmp_path / "stick.tar", ref=ref, policy=strict)
    store = Store(tmp_path / "device")
    record = bring_in(store, tmp_path / "stick.tar", ref=ref, policy=strict if signed else TrustJob())
    assert record.trust.signed == signed
    assert (record.registered_name, record.digest) == (NAME, package.manifest.digest)
    assert {file.path for file in record.attached} == {path.name for path in attached(package)}
    assert (store.folder(record) / "artifacts/onnx/empty").read_bytes() == b""


def attached(package: Package) -> list[Path]:
    return [path for path in package.folder.iterdir() if path.name in manifests.ATTACHED]


def test_its_number_is_the_time_at_which_the_package_was_made(package: Package, tmp_path: Path) -> None:
    earlier = write_file(package, tmp_path / "a.tar")
    mlmodel = package.folder / "MLmodel"
    lines = mlmodel.read_text().splitlines(keepends=True)
    mlmodel.write_text("".join(line for line in lines if not line.startswith("utc_time_created")))
    undated = Package(folder=package.folder, manifest=_manifest(package.folder))
    assert write_file(undated, tmp_path / "b.tar", clock=lambda: MADE_AT_S).version == 20261127093320
    assert 20260101000000 < earlier.version < 21000101000000


def _manifest(folder: Path) -> manifests.Manifest:
    return manifests.make(
        NAME,
        [
            manifests.ManifestFile(
                path=path.relative_to(folder).as_posix(),
                size_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in folder.rglob("*")
            if path.is_file() and path.name not in manifests.ATTACHED
        ],
    )


def test_a_package_that_changes_while_it_is_written_leaves_no_file(package: Package, tmp_path: Path) -> None:
    weights = package.folder / "artifacts/onnx/model.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(PublishError, match=r"model\.onnx\.data' of the version is damaged"):
        write_file(package, tmp_path / "out.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_file_without_a_place_is_refused_before_anything_is_read(
    sample_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(PublishError, match="is a folder; name a file in it"):
        write_folder(sample_model, name="x", file=tmp_path)
    with pytest.raises(PublishError, match="gone is not a folder"):
        write_folder(sample_model, name="x", file=tmp_path / "gone" / "x.tar")
    with pytest.raises(PublishError, match="must not contain '/'"):
        write_folder(sample_model, name="a/b", file=tmp_path / "x.tar")


def test_blobs_are_the_files_under_their_digests_for_everybody_to_read(
    package: Package, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        blob_folders.make_folder(tmp_path / "www" / "blobs")
        blobs = blob_folders.write_blobs(package, tmp_path / "www" / "blobs")
    finally:
        os.umask(before)
    folder = tmp_path / "www" / "blobs" / "sha256"
    files = {file.sha256: file for file in (*package.manifest.files, *package.attached)}
    assert {path.name for path in folder.iterdir()} == set(files)
    assert blobs == Blobs(written=len(files), kept=0)
    for path in folder.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert path.stat().st_nlink == 1, "a publisher who edits the folder does not change a blob"
    assert all(stat.S_IMODE(place.stat().st_mode) == 0o755 for place in (folder, *list(folder.parents)[:2]))


def test_whole_blobs_are_left_alone_and_damaged_ones_are_written_again(
    package: Package, tmp_path: Path
) -> None:
    blob_folders.make_folder(tmp_path)
    total = blob_folders.write_blobs(package, tmp_path).written
    large = max((tmp_path / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    cut, flipped = [
        path for path in (tmp_path / "sha256").iterdir() if path.stat().st_size > 1 and path != large
    ][:2]
    content = {path.name: path.read_bytes() for path in (tmp_path / "sha256").iterdir()}
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped.write_bytes(bytes(flipped.stat().st_size))
    untouched = large.stat()
    assert blob_folders.write_blobs(package, tmp_path) == Blobs(written=2, kept=total - 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "sha256").iterdir()} == content
    assert (large.stat().st_ino, large.stat().st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)


def test_a_folder_for_blobs_that_cannot_be_made_is_said_before_the_model_is_tried(
    sample_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PublishError, match="file cannot be made: File exists"):
        write_folder(sample_model, name="x", file=tmp_path / "x.tar", blobs=tmp_path / "file" / "blobs")
    assert not (tmp_path / "x.tar").exists()


def test_a_file_system_without_modes_takes_blobs_too(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    blob_folders.make_folder(tmp_path / "stick")
    assert blob_folders.write_blobs(package, tmp_path / "stick").kept == 0


@pytest.mark.parametrize("what", ["file", "blobs", "sign_key"])
def test_what_is_written_and_the_private_key_are_not_in_the_folder_that_is_published(
    sample_model: Path, tmp_path: Path, what: str
) -> None:
    source = tmp_path / "source"
    (source / "more").mkdir(parents=True)
    shutil.copy(sample_model / "genai_config.json", source)
    arguments: dict[str, Path] = {"file": tmp_path / "x.tar", what: source / "more" / ".." / "x"}
    with pytest.raises(PublishError, match="all of which is published; choose a place outside"):
        write_folder(source, name="x", **arguments)  # type: ignore[arg-type]
    assert {path.name for path in source.iterdir()} == {"genai_config.json", "more"}


def test_blobs_come_beside_a_registered_version(sample_model: Path, tmp_path: Path) -> None:
    published = publish_folder(
        sample_model, name="both", registry_uri=f"sqlite:///{tmp_path}/registry.db", blobs=tmp_path / "blobs"
    )
    names = {path.name for path in (tmp_path / "blobs" / "sha256").iterdir()}
    assert published.blobs == Blobs(written=len(names), kept=0)
    assert published.digest in names
