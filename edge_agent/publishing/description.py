"""What a version is, for a person who looks at it in MLflow: tags and a description.

Everything comes from the package itself, or from its trial; what these do not say is left out. No device believes it:
who may write to the registry can change tags, and a device looks into the package.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent import __version__, terminal
from edge_agent.errors import ContentError
from edge_agent.package import genai_options, mlmodel, onnx_graph, trust
from edge_agent.package.manifest import Manifest

PREFIX = "edge_agent."

_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_HEADER_BYTES = 64 << 20
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a package; empty or 0 stands for unknown.

    Attributes:
        architecture: the library's word for it: `llama`, `LlamaForCausalLM`.
        parameters: number of weights in the package. A table that a build holds twice counts twice.
        quantization: such as `int4`, `int4, int8` or `bfloat16`; the first is what most weights have.
        block_size: weights that share one scale.
        context_tokens: the model's longest context.
        size_bytes: of the files in the manifest.
        requires_agent: versions that take the wrapper in the package, as PEP 440 writes them: `>=0.2.0`.
        golden: golden prompts, all of which were answered as expected when the package was made.
    """

    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    block_size: int = 0
    context_tokens: int = 0
    size_bytes: int
    requires_agent: str = ""
    golden: int = 0

    @property
    def tags(self) -> dict[str, str]:
        """Tag → text, for what is known."""
        known = {
            "architecture": self.architecture,
            "parameters": self.parameters,
            "quantization": self.quantization,
            "block_size": self.block_size,
            "context_tokens": self.context_tokens,
            "size_bytes": self.size_bytes,
            "requires_agent": self.requires_agent,
            "golden": f"{self.golden} of {self.golden}" if self.golden else "",
        }
        return {f"{PREFIX}{name}": str(value) for name, value in known.items() if value}

    @property
    def text(self) -> str:
        """A few sentences."""
        blocks = f" in blocks of {self.block_size}" if self.block_size else ""
        parts = (
            self.architecture,
            f"{_short(self.parameters)} parameters" if self.parameters else "",
            f"{self.quantization.replace(', ', ' and ')}{blocks}" if self.quantization else "",
            f"context of {self.context_tokens:,} tokens" if self.context_tokens else "",
            terminal.human_bytes(self.size_bytes),
        )
        lines = [", ".join(part for part in parts if part) + "."]
        if self.golden:
            lines.append(f"Golden prompts when it was published: {self.golden} of {self.golden} as expected.")
        needs = f"; devices need edge-agent {self.requires_agent}" if self.requires_agent else ""
        lines.append(f"Published by edge-agent {__version__}{needs}.")
        return "\n\n".join(lines)


def describe(folder: Path, manifest: Manifest) -> Description:
    """Reads a finished package.

    Raises:
        PolicyError: its MLmodel cannot be read.
    """
    model = mlmodel.read(folder)
    golden = model.golden if isinstance(model.golden, list) else []
    known = _of_genai(folder, manifest) or _of_checkpoint(folder, manifest) or {}
    return Description(
        size_bytes=manifest.total_bytes,
        golden=len(golden),
        requires_agent=_required(folder / model.code_file) if model.code_file else "",
        **known,
    )


def _of_genai(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """What a model builder's folder in the package says."""
    config_file = _file_called(folder, manifest, genai_options.FILE_NAME)
    if config_file is None:
        return None
    model = _mapping(_json(config_file).get("model"))
    graphs = genai_options.graphs(config_file, config_file.name)
    try:
        (name,) = graphs  # a model in several graphs would be counted in part
        graph = onnx_graph.read(config_file.parent / name)
    except (ValueError, ContentError):
        return {
            "architecture": _word(model.get("type")),
            "context_tokens": _number(model.get("context_length")),
        }
    bits: Counter[int] = Counter()
    blocks: Counter[int] = Counter()
    for matmul in graph.matmuls:
        bits[matmul.bits] += matmul.weights
        blocks[matmul.block_size] += matmul.weights
    return {
        "architecture": _word(model.get("type")),
        "context_tokens": _number(model.get("context_length")),
        "parameters": graph.weights,
        "quantization": ", ".join(f"int{size}" for size, _ in bits.most_common()) or graph.float_type,
        "block_size": blocks.most_common(1)[0][0] if len(blocks) == 1 else 0,
    }


def _of_checkpoint(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """What a Hugging Face folder in the package says."""
    config_file = _file_called(folder, manifest, "config.json")
    if config_file is None:
        return None
    config = _json(config_file)
    architectures = config.get("architectures")
    types = _tensors(sorted(config_file.parent.glob("*.safetensors")))
    return {
        "architecture": _word(architectures[0]) if isinstance(architectures, list) and architectures else "",
        "context_tokens": _number(config.get("max_position_embeddings")),
        "parameters": sum(types.values()),
        "quantization": ", ".join(_FLOATS.get(kind, kind.lower()) for kind, _ in types.most_common(1)),
    }


def _tensors(files: Sequence[Path]) -> Counter[str]:
    """Type → elements of all tensors; empty if a file is not understood. Source: safetensors, *Format*."""
    found: Counter[str] = Counter()
    try:
        for file in files:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
            for name, tensor in header.items():
                if name != "__metadata__":
                    found[str(tensor["dtype"])] += math.prod(tensor["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return Counter()
    return found


def _required(wrapper: Path) -> str:
    """The agents that take this wrapper without a signature: the release that brought it, and later ones."""
    if release := trust.SHIPPED_WRAPPERS.get(hashlib.sha256(wrapper.read_bytes()).hexdigest()):
        return f">={release}"
    released = __version__ in trust.SHIPPED_WRAPPERS.values()  # this wrapper is newer than that release
    return f">{__version__}" if released else f">={__version__}"


def _file_called(folder: Path, manifest: Manifest, name: str) -> Path | None:
    """The only file of the package with this name."""
    found = [file.path for file in manifest.files if file.path.rpartition("/")[2] == name]
    return folder / found[0] if len(found) == 1 else None


def _json(file: Path) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(file.read_bytes()))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _word(value: object) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else ""


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _short(count: int) -> str:
    """135 million, 3.8 billion."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return str(count)
