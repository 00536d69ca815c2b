"""Publishing: packages an ONNX or a Hugging Face folder as an MLflow model, and registers it as a version.

`publish_folder` does all of it, and only then imports MLflow.

    kinds.py         says what a folder is that is not what was asked for
    source.py        checks the folder, the options and the golden prompts
    hugging_face.py  chooses the files of a Hugging Face folder
    cleaning.py      leaves out of its configurations what no device reads
    trial.py         has the package tried in a process of its own, behind walls (trial_child.py)
    prompting.py     says what a chat template refuses, and where end tokens differ
    package.py       builds the MLflow package with its manifest and signature, and tries it once
    register.py      uploads it, registers the version, and moves the alias last
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edge_agent.publishing import kinds
from edge_agent.publishing.package import Flavor, Progress, build_package, no_progress
from edge_agent.publishing.register import Published, ReadBack, check_target, publish, reach


def publish_folder(
    source: Path,
    *,
    name: str,
    registry_uri: str,
    alias: str | None = None,
    flavor: Flavor = "onnx",
    signature: Literal["chat", "prompt"] = "chat",
    options: Mapping[str, object] | None = None,
    golden: Path | Sequence[Mapping[str, Any]] | None = None,
    sign_key: Path | None = None,
    read_back: ReadBack | None = None,
    progress: Progress = no_progress,
) -> Published:
    """Packages a folder made by the onnxruntime-genai model builder, or a Hugging Face folder, and registers it.

    Args:
        source: folder with `genai_config.json`, or with `config.json` and safetensors weights.
        name: the registered model's name; it is created if it does not exist.
        registry_uri: `http(s)://…` or `sqlite:///…`.
        alias: moved to the new version, as the last step.
        flavor: `onnx` or `transformers`.
        signature: `chat` (messages) or `prompt` (unchanged text).
        options: generation defaults, see `source.OPTIONS`; text is converted.
        golden: prompts that devices try before they use the version: a JSON file or its content.
        sign_key: PEM private key; the package gets an OpenSSF Model Signing signature.
        read_back: says before the alias moves whether a device could fetch the version (`cli.read_back`); None
            for nobody.
        progress: called with (step, bytes done, total bytes).

    Raises:
        PublishError: the folder, an option or the registry is at fault; no alias points to an incomplete version.
    """
    check_target(name=name, registry_uri=registry_uri, alias=alias)
    kinds.check(source, flavor)
    reach(registry_uri)
    with tempfile.TemporaryDirectory(prefix="edge-agent-publish-") as folder:
        package = build_package(
            source,
            Path(folder) / "package",
            name=name,
            flavor=flavor,
            signature=signature,
            options=options or {},
            golden=golden,
            sign_key=sign_key,
            progress=progress,
        )
        return publish(
            package,
            registry_uri=registry_uri,
            name=name,
            alias=alias,
            read_back=read_back,
            progress=progress,
        )
