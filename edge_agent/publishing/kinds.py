"""What a folder is that cannot be published as it was asked for, and what to do with it.

It looks at names and at the first bytes of a file, and reads nothing else. What is published:

    onnx            a model builder's folder: genai_config.json; or a GGUF file, which is made into one
    transformers    a Hugging Face folder: config.json and safetensors
"""

from __future__ import annotations

import shlex
from pathlib import Path

from edge_agent.documents import page
from edge_agent.errors import PublishError
from edge_agent.package import genai_options, mlmodel

HF_CONFIG = "config.json"
BUILD = (
    "python -m onnxruntime_genai.models.builder -i {source} -o OUT -c CACHE -p int8 -e cpu "
    "--extra_options accuracy_level=4 block_size=32"
)
"""The recommended command of docs/models.md."""
GGUF_MAGIC = b"GGUF"
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z")
_ARCHIVE_STARTS = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_TAR_MAGIC = (257, b"ustar")


def check(folder: Path, flavor: str) -> None:
    """Refuses what is plainly something else than the flavor needs.

    Args:
        flavor: `onnx` or `transformers`.

    Raises:
        PublishError: it says what the folder is, and how to publish that.
    """
    try:
        if flavor == "onnx" and is_gguf(folder):
            return
        if not folder.is_dir():
            raise _not_a_folder(folder)
        names = {path.name for path in folder.iterdir()}
        if not names:
            raise PublishError(f"{folder} is empty", remedy=_wanted(flavor))
        needed = genai_options.FILE_NAME if flavor == "onnx" else HF_CONFIG
        if needed in names:
            return
        if mlmodel.FILE_NAME in names:
            raise _mlflow_package(folder)
        if inner := sorted(path.parent.name for path in folder.glob(f"*/{needed}")):
            raise PublishError(
                f"{folder} has no {needed}, and its folder {inner[0]!r} has one",
                remedy=f"give {shlex.quote(str(folder / inner[0]))}",
            )
    except OSError as error:
        raise PublishError(f"{folder} cannot be read: {error.strerror}") from error
    raise _another_kind(folder, names, flavor)


def is_gguf(path: Path) -> bool:
    """Whether it is a GGUF file, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a Hugging Face folder, and no model builder's, which has both files."""
    return (folder / HF_CONFIG).is_file() and not (folder / genai_options.FILE_NAME).is_file()


def _another_kind(folder: Path, names: set[str], flavor: str) -> PublishError:
    suffixes = {Path(name).suffix.lower() for name in names}
    build = BUILD.format(source=shlex.quote(str(folder)))
    if genai_options.FILE_NAME in names:
        return PublishError(
            f"{folder} is a model builder's folder, not a Hugging Face folder",
            remedy="publish it without --flavor transformers",
        )
    if "adapter_config.json" in names:
        return PublishError(
            f"{folder} holds an adapter, not a model",
            remedy="merge it into its base model first: peft's merge_and_unload() and save_pretrained(DIR)",
        )
    if HF_CONFIG in names and suffixes & {".safetensors", *_PICKLED}:
        return PublishError(
            f"{folder} is a Hugging Face folder, not one of the model builder",
            remedy=f"build ONNX from it: {build}; or publish it as it is, for larger devices: --flavor transformers",
        )
    if found := sorted(name for name in names if name.lower().endswith(".gguf")):
        return _gguf(folder, folder / found[0])
    if ".onnx" in suffixes:
        return PublishError(
            f"{folder} is an ONNX model without {genai_options.FILE_NAME}: onnxruntime-genai cannot run it",
            remedy=f"build it again from its Hugging Face folder: {BUILD.format(source='HF_FOLDER')}",
        )
    if ".safetensors" in suffixes:
        return PublishError(
            f"{folder} has weights, and no {HF_CONFIG} that says of what",
            remedy="take the whole folder: hf download ORGANISATION/NAME --local-dir DIR",
        )
    if found := sorted(name for name in names if name.lower().endswith(_ARCHIVES)):
        return PublishError(
            f"{folder} holds an archive, {found[0]!r}", remedy="unpack it, and give that folder"
        )
    return PublishError(
        f"{folder} has no {genai_options.FILE_NAME if flavor == 'onnx' else HF_CONFIG}",
        remedy=_wanted(flavor),
    )


def _not_a_folder(path: Path) -> PublishError:
    if not path.exists():
        return PublishError(f"{path} does not exist")
    if not path.is_file():
        return PublishError(f"{path} is not a folder", remedy=_wanted("onnx"))
    with path.open("rb") as stream:
        start = stream.read(512)
    place, magic = _TAR_MAGIC
    if start.startswith(GGUF_MAGIC):
        return _gguf(path, path)
    if start.startswith(_ARCHIVE_STARTS) or start[place:].startswith(magic):
        return PublishError(f"{path} is an archive, not a folder", remedy="unpack it, and give its folder")
    return PublishError(
        f"{path} is a file, not a folder", remedy=f"give its folder: {shlex.quote(str(path.parent))}"
    )


def _gguf(path: Path, file: Path) -> PublishError:
    return PublishError(
        f"{path} is a GGUF model",
        remedy=f"give the file, without --flavor transformers: {shlex.quote(str(file))}",
    )


def _mlflow_package(folder: Path) -> PublishError:
    if inner := sorted(folder.glob(f"artifacts/*/{genai_options.FILE_NAME}")):
        remedy = f"give the model in it: {shlex.quote(str(inner[0].parent))}"
    else:
        remedy = (
            "register it with MLflow itself: MlflowClient().log_artifacts(RUN_ID, DIR, 'model') and "
            f"create_model_version(NAME, SOURCE); devices run it under the rules of {page('security.md')}"
        )
    return PublishError(f"{folder} is an MLflow package already", remedy=remedy)


def _wanted(flavor: str) -> str:
    if flavor == "transformers":
        return "give a Hugging Face folder: hf download ORGANISATION/NAME --local-dir DIR"
    return f"make the folder with {BUILD.format(source='HF_FOLDER')}"
