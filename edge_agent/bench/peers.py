"""llama.cpp as a peer of the benchmark: whether it is here, and whether what it shall run is a model of its."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import sys
from pathlib import Path

from edge_agent.bench.line_child import BenchError

LIBRARY = "xllamacpp"


def check(gguf: Path) -> None:
    """
    Raises:
        BenchError: the library is not installed, or the file is no GGUF file; the remedy says what to do.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise BenchError(
            f"llama.cpp is measured through the Python package {LIBRARY}, which is not installed",
            remedy=f"{shlex.quote(sys.executable)} -m pip install {LIBRARY}",
        )
    from edge_agent.publishing.kinds import GGUF_MAGIC  # a second, which no other benchmark has to wait for

    try:
        with gguf.open("rb") as stream:
            begin = stream.read(len(GGUF_MAGIC))
    except OSError as error:
        raise BenchError(f"{gguf} cannot be read: {error.strerror}") from error
    if begin != GGUF_MAGIC:
        raise BenchError(f"{gguf} is no GGUF file", remedy="llama.cpp runs GGUF files only")


def described(gguf: Path) -> dict[str, str]:
    """For the document."""
    return {
        "peer": "llama.cpp",
        "file": gguf.name,
        "library": f"{LIBRARY} {importlib.metadata.version(LIBRARY)}",
    }
