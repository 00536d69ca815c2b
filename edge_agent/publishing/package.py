"""The MLflow package: the wrapper and the ONNX folder, or a Hugging Face folder, with manifest and signature.

Owns a package's content. The package contains no path of this machine, and must pass the policy that devices
apply. Flow (`build_package`):
    source.check_*      checks folder, options and golden prompts
    _save               MLflow writes MLmodel, wrapper, input example and requirements
                        (hugging_face.py does so for the transformers flavor)
    cleaning.rewrite    leaves out of the configurations what no device reads
    _add_files          adds the folder's files, as hard links where the file system allows it
    trial.try_out       asks the model once, and the golden prompts; tries its chat template
    _write_manifest     lists every file with size and sha256; then the package is signed
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_agent.errors import ContentError, PublishError
from edge_agent.package import genai_tokenizer, trust
from edge_agent.package import manifest as manifests
from edge_agent.package.manifest import Manifest, ManifestFile
from edge_agent.package.onnx_graph import OnnxGraph
from edge_agent.publishing import build, cleaning, hugging_face, trial
from edge_agent.publishing import source as sources
from edge_agent.publishing.description import Description, describe

Flavor = Literal["onnx", "transformers"]
Progress = Callable[[str, int, int], None]
"""Called with the step's name, bytes done and total bytes (0: not known)."""

GOLDEN_KEY = "edge_agent.golden"
ARTIFACT = "onnx"
"""The wrapper's name for the ONNX folder."""
REQUIREMENTS = (
    "mlflow-skinny==3.17.*",
    "onnxruntime-genai==0.18.*",
    "numpy>=2.0",
    "pandas>=2.2",
)
_CHUNK_BYTES = 1 << 20

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]},
    "prompt": {
        "prompt": "<|system|>You are a stand-up comedian.<|end|>"
        "<|user|>Tell me a joke about atom<|end|><|assistant|>"
    },
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A finished package on disk.

    Attributes:
        limits: what does not make it useless, and its publisher should know; one sentence each.
        description: what it is, for a person; None for a package that was not built and tried here.
        graph: how its decoder was built; None for a Hugging Face folder, and where that cannot be read.
    """

    manifest: Manifest
    folder: Path
    limits: tuple[str, ...] = ()
    description: Description | None = None
    graph: OnnxGraph | None = None

    @property
    def attached(self) -> tuple[ManifestFile, ...]:
        """The files that describe the package, and that its manifest does not list."""
        found = sorted(path for path in self.folder.iterdir() if path.name in manifests.ATTACHED)
        return tuple(_listed(self.folder, found, 0, no_progress))


def no_progress(step: str, done_bytes: int, total_bytes: int) -> None:
    """Shows nothing."""


def build_package(
    source_dir: Path,
    destination: Path,
    *,
    name: str,
    flavor: Flavor = "onnx",
    signature: Literal["chat", "prompt"] = "chat",
    options: Mapping[str, object] | None = None,
    golden: Path | Sequence[Mapping[str, Any]] | None = None,
    sign_key: Path | None = None,
    progress: Progress = no_progress,
) -> Package:
    """Builds a package in `destination`, which must not exist yet.

    Args:
        source_dir: folder made by the model builder (`onnx`) or by `save_pretrained` (`transformers`).
        flavor: `onnx` or `transformers`.
        options: see `source.OPTIONS`.
        golden: see `source.read_golden`.
        sign_key: PEM private key; the package gets `model.sig`.

    Raises:
        PublishError: the package would be useless on a device; for example, it answers a golden prompt wrongly.
    """
    if sign_key is not None:
        _signing()
        if not sign_key.is_file():
            raise PublishError(f"signing key {sign_key} is not a file")
    prompts = sources.read_golden(golden)
    limits = list(
        assemble(
            source_dir,
            destination,
            name=name,
            flavor=flavor,
            signature=signature,
            options=options,
            golden=prompts,
            progress=progress,
        )
    )
    progress("trying in a runner", 0, 0)
    limits += trial.try_out(destination, EXAMPLES[signature], prompts, flavor=flavor)
    if flavor == "onnx":
        limits += trial.compare_ends(source_dir)
    manifest = _write_manifest(name, destination, progress)
    try:
        trust.decide(destination, manifest, registered_name=name)
    except ContentError as error:
        raise PublishError(f"devices would refuse the package: {error}") from error
    if sign_key is not None:
        _sign(destination, sign_key)
    return Package(
        manifest=manifest,
        folder=destination,
        limits=tuple(limits),
        description=describe(destination, manifest),
        graph=build.read(source_dir) if flavor == "onnx" else None,
    )


def assemble(
    source_dir: Path,
    destination: Path,
    *,
    name: str,
    flavor: Flavor = "onnx",
    signature: Literal["chat", "prompt"] = "chat",
    options: Mapping[str, object] | None = None,
    golden: Sequence[Mapping[str, Any]] = (),
    progress: Progress = no_progress,
) -> tuple[str, ...]:
    """Puts the files of a package together in `destination`, which must not exist yet. Nobody has tried it.

    Args:
        golden: as `source.read_golden` returns them; otherwise as for `build_package`.

    Returns:
        What its configurations lost on the way, one sentence each.

    Raises:
        PublishError: the folder or an option is at fault.
    """
    if signature not in EXAMPLES:
        raise PublishError(f"signature {signature!r} must be chat or prompt")
    checked, prompts = sources.check_options(options or {}), list(golden)
    if flavor == "transformers":
        trial.need_transformers()
        checkpoint = hugging_face.check_checkpoint(source_dir, sources.list_files(source_dir))
        sources.check_length(checkpoint.context_tokens, checked)
        _save_checkpoint(destination, checkpoint, signature=signature, options=checked, golden=prompts)
        files, rewritten = checkpoint.files, checkpoint.rewritten
    else:
        found = sources.check_folder(source_dir)
        sources.check_length(sources.context_of(source_dir), checked)
        files = {f"artifacts/{ARTIFACT}/{path.as_posix()}": source_dir / path for path in found}
        sources.check_paths(files)
        rewritten = cleaning.rewrite(
            files, genai_tokenizer.CONFIGURATIONS.__contains__, genai_tokenizer.clean
        )
        _save(destination, name=name, signature=signature, options=checked, golden=prompts)
    _add_files(files, rewritten.files, destination, progress)
    return tuple(rewritten.limits)


def _save(
    destination: Path,
    *,
    name: str,
    signature: str,
    options: Mapping[str, int | float],
    golden: list[Mapping[str, Any]],
) -> None:
    trial.calm_libraries()  # save_model imports the wrapper, and with it onnxruntime-genai
    import mlflow.exceptions
    import mlflow.pyfunc
    from mlflow.models import Model

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # INFO goes to stderr

    from edge_agent.publishing.signature import model_signature

    # A loader can override only keys that the package has: 0 stands for "not given".
    unset = ("context_tokens", "max_length", "max_tokens", "threads", "kv_bytes")
    defaults = {"model": name, **dict.fromkeys(unset, 0), "repetition_penalty": 0.0}
    try:
        mlflow.pyfunc.save_model(
            destination,
            python_model=str(trust.WRAPPER),
            signature=model_signature(signature),
            input_example=dict(EXAMPLES[signature]),
            metadata={GOLDEN_KEY: golden} if golden else None,
            model_config={**defaults, "temperature": 0.0, **options},
            pip_requirements=list(REQUIREMENTS),
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise PublishError(f"MLflow could not make the package: {error}") from error
    model = Model.load(str(destination))
    model.model_size_bytes = None  # MLflow did not count the ONNX folder
    pyfunc = model.flavors["python_function"]
    pyfunc.pop("cloudpickle_version", None)  # nothing is pickled
    pyfunc["model_code_path"] = trust.WRAPPER.name  # MLflow wrote the file's path on this machine
    pyfunc["artifacts"] = {ARTIFACT: {"path": f"artifacts/{ARTIFACT}", "uri": ARTIFACT}}
    example = model.saved_input_example_info or {}
    own = {"MLmodel", trust.WRAPPER.name, "conda.yaml", "python_env.yaml", "requirements.txt"}
    own |= {str(example.get(key)) for key in ("artifact_path", "serving_input_path")}
    for path in destination.iterdir():
        if path.name not in own:  # MLflow copies pyproject.toml and uv.lock of the current folder
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    model.save(str(destination / "MLmodel"))


def _save_checkpoint(
    destination: Path,
    checkpoint: hugging_face.Checkpoint,
    *,
    signature: str,
    options: Mapping[str, int | float],
    golden: list[Mapping[str, Any]],
) -> None:
    trial.calm_libraries()
    from edge_agent.publishing.signature import seed_signature

    hugging_face.save(
        destination,
        checkpoint,
        signature=seed_signature(signature),
        chat=signature == "chat",
        options=options,
        metadata={GOLDEN_KEY: golden} if golden else None,
    )


def _add_files(
    files: Mapping[str, Path], rewritten: Mapping[str, bytes], destination: Path, report: Progress
) -> None:
    """Links or copies each file to its place in the package, or writes its new content."""
    total = sum(path.stat().st_size for path in files.values())
    done = 0
    for target, path in files.items():
        report("copying", done, total)
        (destination / target).parent.mkdir(parents=True, exist_ok=True)
        try:
            if target in rewritten:
                (destination / target).write_bytes(rewritten[target])
            else:
                _link_or_copy(path, destination / target)
        except OSError as error:
            raise PublishError(f"{path} cannot be copied: {error.strerror}") from error
        done += path.stat().st_size
    report("copying", done, total)


def _link_or_copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # another file system, another user's file, no hard links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _write_manifest(name: str, folder: Path, report: Progress) -> Manifest:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    try:
        manifest = manifests.make(name, _listed(folder, paths, total, report))
        manifests.parse(manifest.encode())  # its own size has a bound, too
    except ContentError as error:
        raise PublishError(f"the package breaks a rule of the manifest: {error.message}") from error
    (folder / manifests.MANIFEST_NAME).write_bytes(manifest.encode())
    return manifest


def _listed(folder: Path, paths: Sequence[Path], total: int, report: Progress) -> Iterator[ManifestFile]:
    done = 0
    for path in paths:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                report("hashing", done + size, total)
                digest.update(chunk)
                size += len(chunk)
        done += size
        yield ManifestFile(
            path=path.relative_to(folder).as_posix(), size_bytes=size, sha256=digest.hexdigest()
        )
    report("hashing", done, total)


def _sign(folder: Path, key: Path) -> None:
    hashing, signing = _signing()
    signature = folder / manifests.SIGNATURE_NAME
    try:
        files = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
        signer = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(files)
        signer.sign(folder, signature)
    except (ValueError, TypeError, OSError) as error:
        raise PublishError(
            f"signing with {key} failed: {error}",
            remedy="the key must be an unencrypted PEM key on a NIST curve",
        ) from error


def _signing() -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise PublishError(
            "signing needs the library model-signing", remedy="install edge-agent[signing]"
        ) from error
    return hashing, signing
