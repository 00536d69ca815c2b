"""Publishing: packages an ONNX or a Hugging Face folder, or a GGUF file, as an MLflow model, and registers a version.

`publish_folder` does all of it, `write_folder` makes a version file instead; only then MLflow is imported.

    kinds.py         says what a folder is that is not what was asked for
    gguf/            makes an ONNX folder from a GGUF file
    source.py        checks the folder, the options and the golden prompts
    hugging_face.py  chooses the files of a Hugging Face folder
    cleaning.py      leaves out of its configurations what no device reads
    trial.py         has the package tried in a process of its own, behind walls (trial_child.py)
    prompting.py     says what a chat template refuses, and where end tokens differ
    package.py       builds the MLflow package with its manifest and signature, and tries it once
    description.py   says what it is, for a person who looks at it in MLflow
    blobs.py         copies its files into a folder from which devices fetch them
    register.py      uploads it, registers the version, and moves the alias last
    failures.py      says what a registry's failure means
    version_file.py  writes it into a file for `models import`
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from edge_agent.errors import PublishError
from edge_agent.publishing import blobs as blob_folders
from edge_agent.publishing import kinds
from edge_agent.publishing.blobs import Blobs
from edge_agent.publishing.package import Flavor, Package, Progress, build_package, no_progress
from edge_agent.publishing.register import Published, ReadBack, check_name, check_target, publish, reach
from edge_agent.publishing.version_file import Written, check_file, write_file


class Making(TypedDict, total=False):
    """How a package is made.

    Attributes:
        flavor: `onnx` or `transformers`.
        signature: `chat` (messages) or `prompt` (unchanged text).
        options: generation defaults, see `source.OPTIONS`; text is converted.
        golden: prompts that devices try before they use the version: a JSON file or its content.
        sign_key: PEM private key; the package gets an OpenSSF Model Signing signature.
        progress: called with (step, bytes done, total bytes).
    """

    flavor: Flavor
    signature: Literal["chat", "prompt"]
    options: Mapping[str, object] | None
    golden: Path | Sequence[Mapping[str, Any]] | None
    sign_key: Path | None
    progress: Progress


def publish_folder(
    source: Path,
    *,
    name: str,
    registry_uri: str,
    alias: str | None = None,
    blobs: Path | None = None,
    read_back: ReadBack | None = None,
    **making: Unpack[Making],
) -> Published:
    """Packages a folder made by the onnxruntime-genai model builder, a Hugging Face folder or a GGUF file.

    Then it registers that as a version.

    Args:
        source: folder with `genai_config.json`, or with `config.json` and safetensors weights; or a GGUF file.
        name: the registered model's name; it is created if it does not exist.
        registry_uri: `http(s)://…` or `sqlite:///…`.
        alias: moved to the new version, as the last step.
        blobs: folder that gets the package's files under their digests, before the version is registered.
        read_back: says before the alias moves whether a device could fetch the version (`cli.read_back`); None
            for nobody.

    Raises:
        PublishError: the folder, an option or the registry is at fault; no alias points to an incomplete version.
    """
    progress = making.get("progress", no_progress)
    progress("checking", 0, 0)
    check_target(name=name, registry_uri=registry_uri, alias=alias)
    kinds.check(source, making.get("flavor", "onnx"))
    _check_outside(source, making, blobs)
    reach(registry_uri)
    with _packaged(source, name, blobs, making) as (package, copied):
        published = publish(
            package,
            registry_uri=registry_uri,
            name=name,
            alias=alias,
            read_back=read_back,
            progress=progress,
        )
    return replace(published, blobs=copied)


def write_folder(
    source: Path, *, name: str, file: Path, blobs: Path | None = None, **making: Unpack[Making]
) -> Written:
    """The same into a version file for `edge-agent models import`, without any registry.

    Raises:
        PublishError: the folder or an option is at fault, or the file cannot be written.
    """
    progress = making.get("progress", no_progress)
    progress("checking", 0, 0)
    check_name(name)
    check_file(file)
    kinds.check(source, making.get("flavor", "onnx"))
    _check_outside(source, making, file, blobs)
    with _packaged(source, name, blobs, making) as (package, copied):
        return replace(write_file(package, file, progress=progress), blobs=copied)


def _check_outside(source: Path, making: Making, *places: Path | None) -> None:
    """Refuses what would become a part of the package, now or the next time: what is written, and the private key.

    Raises:
        PublishError: one of them is in the folder.
    """
    if making.get("flavor", "onnx") != "onnx":
        return  # of a Hugging Face folder, known files are taken only
    for place in (*places, making.get("sign_key")):
        if place is not None and place.resolve().is_relative_to(source.resolve()):
            raise PublishError(
                f"{place} is in {source}, all of which is published", remedy="choose a place outside of it"
            )


@contextmanager
def _packaged(
    source: Path, name: str, blobs: Path | None, making: Making
) -> Iterator[tuple[Package, Blobs | None]]:
    """A finished package in a temporary folder, and what was written of it into the folder of blobs."""
    if blobs is not None:
        blob_folders.make_folder(blobs)
    with tempfile.TemporaryDirectory(prefix="edge-agent-publish-") as folder:
        model = model_folder(source, Path(folder), progress=making.get("progress", no_progress))
        package = build_package(model, Path(folder) / "package", name=name, **making)
        copied = None
        if blobs is not None:
            copied = blob_folders.write_blobs(package, blobs, progress=making.get("progress", no_progress))
        yield package, copied


def model_folder(source: Path, temporary: Path, *, progress: Progress = no_progress) -> Path:
    """The folder itself, or what is made of a GGUF file, in a temporary folder.

    Raises:
        PublishError: the GGUF file cannot be converted.
    """
    if not kinds.is_gguf(source):
        return source
    from edge_agent.publishing import gguf  # with numpy

    progress("converting", 0, 0)
    made = temporary / "onnx"
    made.mkdir()
    try:
        gguf.convert(source, made)
    except OSError as error:
        raise PublishError(f"{source} cannot be converted in {temporary}: {error.strerror}") from error
    return made
