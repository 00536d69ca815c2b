"""Small MLflow packages for cache tests: real files and real digests, no real model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_agent.package import manifest as manifests
from edge_agent.package.manifest import MANIFEST_NAME, OUTSIDE_MANIFEST, Manifest, ManifestFile
from edge_agent.package.reference import MANIFEST_TAG
from edge_agent.publishing.package import Package, build_package
from edge_agent.publishing.register import Published, publish

WEIGHTS = "artifacts/model/model.onnx.data"
GENAI_CONFIG = "artifacts/model/genai_config.json"
WRAPPER_NAME = "genai_pyfunc.py"
MLMODEL = f"""\
flavors:
  python_function:
    artifacts:
      model:
        path: artifacts/model
        uri: /somewhere/else
    loader_module: mlflow.pyfunc.loaders.code_model
    model_code_path: {WRAPPER_NAME}
    python_version: 3.11.7
    streamable: true
mlflow_version: 3.17.2
"""
CONFIG = {
    "model": {
        "type": "phi3",
        "context_length": 2048,
        "eos_token_id": [1, 2],
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "inputs": {"input_ids": "input_ids"},
        },
    },
    "search": {"max_length": 2048, "past_present_share_buffer": True},
}


def make_package(
    folder: Path,
    wrapper: Path,
    changes: Mapping[str, bytes | str | None] | None = None,
    *,
    weights: bytes = b"",
) -> Path:
    """Writes a package as `publish` lays it out, without manifest.

    Args:
        wrapper: the code file to put in.
        changes: path → content to write, or None to leave the file out.
    """
    content: dict[str, bytes | str | None] = {
        "MLmodel": MLMODEL,
        WRAPPER_NAME: wrapper.read_bytes(),
        GENAI_CONFIG: json.dumps(CONFIG),
        "artifacts/model/model.onnx": b"graph " * 100,
        WEIGHTS: weights or b"weights " * 1000,
        "requirements.txt": "mlflow\n",
        **(changes or {}),
    }
    for path, data in content.items():
        if data is None:
            continue
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def manifest_of(folder: Path, name: str) -> Manifest:
    """The manifest of a folder's files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return manifests.make(
        name,
        (
            ManifestFile(
                path=path.relative_to(folder).as_posix(),
                size_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in files
            if path.relative_to(folder).as_posix() not in OUTSIDE_MANIFEST
        ),
    )


def add_manifest(folder: Path, name: str) -> str:
    """Writes `manifest.json`; gives its sha256 for the version's tag."""
    data = manifest_of(folder, name).encode()
    (folder / MANIFEST_NAME).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def register(
    uri: str, name: str, folder: Path, *, alias: str = "prod", tag: str = "", artifacts: str = ""
) -> int:
    """Logs a folder into a run, makes a version of it, sets the alias and the manifest's tag.

    Args:
        artifacts: URI of the place where a `sqlite:///` registry keeps its artifacts.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name(f"exp-{name}")
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(f"exp-{name}", artifact_location=artifacts or None)
    )
    run = client.create_run(experiment_id)
    client.log_artifacts(run.info.run_id, str(folder), "package")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(name, f"{run.info.artifact_uri}/package", run.info.run_id)
    client.set_registered_model_alias(name, alias, version.version)
    if tag:
        client.set_model_version_tag(name, version.version, MANIFEST_TAG, tag)
    return int(version.version)


def publish_broken(
    source: Path,
    edit: Callable[[Path], None],
    folder: Path,
    *,
    registry_uri: str,
    name: str,
    alias: str | None,
) -> Published:
    """Registers a package whose content was changed after it was tried out: what a broken pipeline does."""
    package = build_package(source, folder, name=name, options={})
    edit(package.folder)
    (package.folder / MANIFEST_NAME).unlink()
    add_manifest(package.folder, name)
    changed = Package(folder=package.folder, manifest=manifest_of(package.folder, name))
    return publish(changed, registry_uri=registry_uri, name=name, alias=alias)


def copy_package(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
