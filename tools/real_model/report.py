"""What is measured of a set of builds: quality, which is kept for the same files, and speed, which never is."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.real_model import logits, machine, quality, speed
from tools.real_model.progress import say

Report = dict[str, Any]
"""As `table.table` takes it."""


def measure(
    hf: Path, sides: Mapping[str, Path], kept: Path, *, launches: int, threads: int, limit_s: float
) -> Report:
    """Quality and, with launches, speed.

    Args:
        hf: the original, a Hugging Face folder.
        sides: name → ONNX folder or GGUF file; one that cannot be run is left out.
        kept: a file for the quality; made, read and written.
    """
    report = _quality(hf, sides, kept)
    if launches:
        report |= {"threads": threads, "machine": machine.described()}
        runnable = {name: sides[name] for name in report["builds"]}
        measured = speed.measure(
            runnable, logits.text_tokens(hf), launches=launches, threads=threads, limit_s=limit_s, say=say
        )
        for name, figures in measured.items():
            report["builds"][name]["speed"] = figures
    return report


def _quality(hf: Path, sides: Mapping[str, Path], kept: Path) -> Report:
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    text = hashlib.sha256(logits.TEXT.read_bytes()).hexdigest() + _stamp(hf)
    found: dict[str, Any] = known.get("builds", {}) if known.get("text") == text else {}
    missing = [name for name, path in sides.items() if found.get(name, {}).get("stamp") != _stamp(path)]
    if missing:
        windows = logits.windows(hf)
        say("the original's logits")
        original = logits.of_hugging_face(hf, windows)
        known = {
            "text": text,
            "tokens": sum(len(window) - 1 for window in windows),
            "original": {"perplexity": quality.perplexity(original, windows), "bytes": _size(hf)},
        }
        for name in missing:
            say(f"comparing {name} with the original")
            read = logits.of_onnx if sides[name].is_dir() else logits.of_llama_cpp
            found.pop(name, None)
            try:
                compared = asdict(quality.compare(original, read(sides[name], windows), windows))
            except (RuntimeError, subprocess.SubprocessError) as error:
                say(f"{name} is left out: {str(error)[:200]}")
                continue
            found[name] = {**compared, "bytes": _size(sides[name]), "stamp": _stamp(sides[name])}
            kept.write_text(json.dumps({**known, "builds": found}, indent=1) + "\n")
    return {**known, "builds": {name: dict(found[name]) for name in sides if name in found}}


def _stamp(path: Path) -> str:
    """Changes when a folder, or a file, was made again."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
