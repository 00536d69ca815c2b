"""What a version asks of a host, read from its small files before the large ones are paid for. Pure.

Two packages can be told apart early: our wrapper's needs onnxruntime-genai and an architecture that it knows,
one of the transformers flavor needs torch and transformers. Other code says only when it runs what it needs.
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
    """One version's.

    Attributes:
        library: `GENAI`, `TRANSFORMERS`, or empty where nobody knows.
        architecture: the library's word for it, `phi3` for one; empty where there is none. It is all that anybody
            tells the library about a package that nobody has judged yet.
        weight_bytes: of all its files; a host whose memory is smaller cannot load it.
    """

    library: str
    architecture: str
    weight_bytes: int


def needs_of(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> Needs:
    """Reads a package's needs.

    Args:
        sizes: every file of the package, in bytes.
        read: gives a small file whole.

    Raises:
        PolicyError: its MLmodel is none that this agent loads.
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
        return ""  # refused later, with everything else that is wrong
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) and _ARCHITECTURE.fullmatch(found) else ""
