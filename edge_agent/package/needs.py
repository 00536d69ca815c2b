"""A version's needs: library, architecture and memory, read from its small files before the large ones. Pure.

The needs of two kinds of packages are known early: one with this agent's wrapper needs onnxruntime-genai and an
architecture that the library knows; one of the transformers flavor needs torch and transformers. The needs of other
code show only when it runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from edge_agent.package import genai_options, mlmodel
from edge_agent.package.mlmodel import PICKLE_LOADER, TRANSFORMERS_LOADER

GENAI, TRANSFORMERS = "onnxruntime-genai", "transformers"
WRAPPER_NAME = "genai_pyfunc.py"
MAX_CONFIG_BYTES = 1 << 20
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of one version.

    Attributes:
        library: `GENAI`, `TRANSFORMERS`, or empty if not known.
        architecture: the library's name for it, such as `phi3`, or empty. The library sees nothing else of a package
            that has not passed the policy yet.
        weight_bytes: the size of all files; a host with less memory cannot load the version.
    """

    library: str
    architecture: str
    weight_bytes: int


def needs_of(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> Needs:
    """Reads a package's needs.

    Args:
        sizes: path → bytes, for every file of the package.
        read: returns the content of a small file.

    Raises:
        PolicyError: this agent does not load such an MLmodel.
    """
    package = mlmodel.parse(read(mlmodel.FILE_NAME))
    library, name = "", ""
    keys: tuple[str, ...] = ("model_type",)
    if package.loader == TRANSFORMERS_LOADER:
        library, name = TRANSFORMERS, f"{package.flavor('transformers').get('model_binary')}/config.json"
    elif package.loader != PICKLE_LOADER and package.code_file == WRAPPER_NAME:
        library, keys = GENAI, ("model", "type")
        name = next((path for path in sizes if PurePosixPath(path).name == genai_options.FILE_NAME), "")
    has_config = 0 < sizes.get(name, 0) <= MAX_CONFIG_BYTES
    architecture = _architecture(read(name), keys) if has_config else ""
    return Needs(library=library, architecture=architecture, weight_bytes=sum(sizes.values()))


def _architecture(config: bytes, keys: tuple[str, ...]) -> str:
    try:
        found: Any = json.loads(config)
    except (ValueError, RecursionError):
        return ""  # the policy refuses it later
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) and _ARCHITECTURE.fullmatch(found) else ""
