"""What this host can run: its libraries, the architectures they know, its memory. The number of cores does not matter.

Checked before a large download, and by the doctor. No library is loaded here: a native one may take seconds or crash
the process, so another process asks it (`python -m edge_agent.runner.capability`). If that process does not answer,
nothing is known, and the version is tried for real. The package has not been judged yet: the library gets the name of
its architecture, but none of its files, which could make it write or load something.
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
"""What onnxruntime-genai says then, before it looks for the weights."""

_MODULES = {GENAI: ("onnxruntime_genai",), TRANSFORMERS: ("torch", "transformers")}
_REMEDIES = {GENAI: "install onnxruntime-genai", TRANSFORMERS: "install edge-agent[transformers]"}
_TIMEOUT_S = 120.0
_MAX_QUESTION_BYTES = 4 << 20
_MAX_PROBLEM = 300


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One way to run models on this host.

    Attributes:
        library: its name in a package's needs.
        version: of the library; empty if it is missing.
        problem: why it cannot be used here, and what to do; empty if it can.
    """

    library: str
    version: str
    problem: str


def flavors() -> tuple[Flavor, ...]:
    """Both flavors, as far as they are known without loading a library; for status and the doctor."""
    return tuple(_flavor(library) for library in (GENAI, TRANSFORMERS))


def problem(needs: Needs, *, state_dir: Path) -> str:
    """Why a version cannot run on this host; empty if it can, or if that is unknown.

    Args:
        state_dir: the home of the process that asks the library.
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
    """Opens a folder without a model: an unknown architecture is refused before the missing files are noticed."""
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
