"""What this host can run: libraries, architectures that they know, memory. The number of cores refuses nothing.

Asked before a download is paid for, and by the doctor. Owns no library: a native one may take seconds, or the
process, with it, so another process asks it (`python -m edge_agent.runner.capability`). Where that one does
not answer, nothing is known, and the version is tried for real. The package has not been judged yet: the library
gets the name of its architecture, never its files, which could have it write or load something.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edge_agent.host.memory import total_bytes
from edge_agent.package.needs import GENAI, TRANSFORMERS, Needs
from edge_agent.runner.process import child_environment

UNKNOWN_ARCHITECTURE = "Unsupported model_type"
"""How onnxruntime-genai says so; it says it before it looks for the weights."""

_MODULES = {GENAI: ("onnxruntime_genai",), TRANSFORMERS: ("torch", "transformers")}
_REMEDIES = {GENAI: "install onnxruntime-genai", TRANSFORMERS: "install edge-agent[transformers]"}
_TIMEOUT_S = 120.0
_MAX_QUESTION_BYTES = 4 << 20
_MAX_PROBLEM = 300


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One way to run models on this host.

    Attributes:
        library: what it is called in a package's needs.
        version: of the library, empty where it is missing.
        problem: why it cannot be used here, with what to do; empty where it can.
    """

    library: str
    version: str
    problem: str


def flavors() -> tuple[Flavor, ...]:
    """Both ways, as far as it can be seen without loading a library: for status and the doctor."""
    return tuple(_flavor(library) for library in (GENAI, TRANSFORMERS))


def problem(needs: Needs, *, state_dir: Path) -> str:
    """Why a version cannot run on this host; empty where it can, and where nobody knows.

    Args:
        state_dir: for the environment of the process that asks the library.
    """
    if needs.library and (missing := _flavor(needs.library).problem):
        return missing
    if needs.weight_bytes > (memory_bytes := total_bytes()):
        return f"its files have {needs.weight_bytes} bytes, this host's memory {memory_bytes}"
    return _ask_library(needs, state_dir) if needs.library else ""


def _flavor(library: str) -> Flavor:
    missing = [module for module in _MODULES[library] if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"this host has no {' and no '.join(missing)}; {_REMEDIES[library]}"
        return Flavor(library=library, version="", problem=reason)
    return Flavor(library=library, version=importlib.metadata.version(library), problem="")


def _ask_library(needs: Needs, state_dir: Path) -> str:
    question = json.dumps({"library": needs.library, "architecture": needs.architecture})
    try:
        result = subprocess.run(
            [sys.executable, "-m", "edge_agent.runner.capability"],
            input=question.encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
            cwd="/",
            env={**child_environment(state_dir), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        answer = json.loads(result.stdout[:_MAX_QUESTION_BYTES])["problem"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return ""
    return str(answer)[:_MAX_PROBLEM]


def main() -> None:
    """The process: one question on stdin, the answer on stdout."""
    question = json.loads(sys.stdin.buffer.read(_MAX_QUESTION_BYTES))
    library, architecture = str(question["library"]), str(question["architecture"])
    try:
        for module in _MODULES[library]:
            importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a native library may fail in its own ways
        reason = f"{module} cannot be imported on this host ({' '.join(str(error).split())[:200]})"
        print(json.dumps({"problem": f"{reason}; {_REMEDIES[library]}"}))
        return
    known = _genai_knows if library == GENAI else _transformers_knows
    print(json.dumps({"problem": known(architecture) if architecture else ""}))


def _genai_knows(architecture: str) -> str:
    """Opens a folder without a model: an architecture is refused before a file is missed."""
    import onnxruntime_genai

    config = json.dumps({"model": {"type": architecture, "context_length": 1}})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "genai_config.json").write_text(config)
        try:
            onnxruntime_genai.Model(folder)
        except Exception as error:  # noqa: BLE001 - the model is missing, so there is one
            return f"onnxruntime-genai: {error}" if UNKNOWN_ARCHITECTURE in str(error) else ""
    return ""


def _transformers_knows(architecture: str) -> str:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ""
    return f"transformers {transformers.__version__} has no language model of the type {architecture!r}"


if __name__ == "__main__":
    main()
