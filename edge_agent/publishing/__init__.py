"""Publishing: an ONNX or a Hugging Face folder becomes an MLflow model package, and that a registered version.

`publish_folder` is the whole of it. MLflow is imported only when it runs.

    source.py     is the folder one that devices can run; are options and golden prompts right
    hugging_face.py  which files of a Hugging Face folder travel
    package.py    the MLflow package with its manifest and signature, tried out once
    register.py   upload, version, and the alias last
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edge_agent.publishing.package import Flavor, Package, Progress, build_package, no_progress
from edge_agent.publishing.register import Published, check_target, publish

__all__ = ["Package", "Progress", "Published", "build_package", "publish", "publish_folder"]


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
    progress: Progress | None = None,
) -> Published:
    """Packages a folder made by the onnxruntime-genai model builder, or a Hugging Face folder, and registers it.

    Args:
        source: folder with `genai_config.json`, or with `config.json` and safetensors weights.
        name: registered model's name; made when it is not there.
        registry_uri: `http(s)://…` or `sqlite:///…`.
        alias: moved to the new version, as the last step.
        flavor: which of the two: `onnx` or `transformers`.
        signature: `chat` (messages) or `prompt` (text as it stands).
        options: generation defaults, see `source.OPTIONS`; text is converted.
        golden: prompts that devices try before they use the version: a JSON file or its content.
        sign_key: PEM private key for an OpenSSF Model Signing bundle.
        progress: called with (step, bytes done, bytes in all).

    Raises:
        PublishError: the folder, an option or the registry is at fault; nothing points to a half of it.
    """
    check_target(name=name, registry_uri=registry_uri, alias=alias)
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
            package, registry_uri=registry_uri, name=name, alias=alias, progress=progress or no_progress
        )
