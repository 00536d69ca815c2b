"""Files and names that stores trip over: published for real, and pulled by a device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.errors import PublishError
from edge_agent.publishing import publish_folder
from tests.support.device import Device
from tests.support.mlflow_server import Server

EMPTY = ("empty", "more/also empty")
NAMES = (
    "with space",
    "größe",
    "日本",
    "a;b&c=d+e",
    'it\'s "quoted"',
    "[x]*{y}",
    "x" * 255,
    "deep/er/x",
    "a~",
    ".dot",
)


def folder_with(source: Path, folder: Path, names: dict[str, bytes]) -> Path:
    shutil.copytree(source, folder)
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_empty_files_and_unusual_names_arrive_on_a_device(
    mlflow_server: Server, sample_model: Path, tmp_path: Path
) -> None:
    mlflow_server.start()
    device = Device(mlflow_server.uri, tmp_path)
    contents = {**dict.fromkeys(EMPTY, b""), **{name: name.encode() for name in NAMES}}
    source = folder_with(sample_model, tmp_path / "source", contents)
    (source / "empty folder").mkdir()
    published = publish_folder(source, name=device.model, registry_uri=mlflow_server.uri, alias="prod")
    result = device.sync()
    assert result.digest == published.digest
    (record,) = device.store.versions()
    pulled = device.store.folder(record) / "artifacts" / "onnx"
    assert {name: (pulled / name).read_bytes() for name in contents} == contents
    assert not (pulled / "empty folder").exists()
    assert not device.sync().new


def test_a_plain_mlflow_package_with_an_empty_file_arrives(mlflow_server: Server, tmp_path: Path) -> None:
    mlflow_server.start()
    device = Device(mlflow_server.uri, tmp_path)
    device.publish({"artifacts/model/empty": b""}, manifest=False)
    device.sync()
    (record,) = device.store.versions()
    assert (device.store.folder(record) / "artifacts/model/empty").read_bytes() == b""


def test_a_name_that_a_store_loses_is_refused_before_anything_is_made(
    sample_model: Path, tmp_path: Path
) -> None:
    source = folder_with(sample_model, tmp_path / "source", {"notes #2.txt": b"x"})
    with pytest.raises(PublishError, match=r"notes #2\.txt: MLflow does not keep a name"):
        publish_folder(source, name="named", registry_uri=f"sqlite:///{tmp_path}/registry.db", alias="prod")
    assert not (tmp_path / "registry.db").exists()
