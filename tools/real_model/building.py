"""Folders that are made once: whole or not at all, and again when their recipe has changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.real_model.progress import say

BUILDER_TIMEOUT_S = 3600


def made(folder: Path, recipe: str, make: Callable[[Path], None]) -> Path:
    """The folder, made by `make` unless it is there from the same recipe."""
    stamp = folder.with_name(f".{folder.name}.recipe")
    if folder.is_dir() and stamp.is_file() and stamp.read_text() == recipe:
        return folder
    say(f"making {folder.name}")
    unfinished = folder.with_name(f".{folder.name}.new")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(folder)
    stamp.write_text(recipe)
    return folder


def build(hf: Path, folder: Path, precision: str, options: Sequence[str]) -> None:
    """Runs onnxruntime-genai's model builder, in a process of its own.

    Raises:
        ChildProcessError: it failed; the message ends with what it said last.
    """
    cache = folder.with_name(f"{folder.name}.cache")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(hf), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(cache), "--extra_options", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILDER_TIMEOUT_S, check=False)
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode != 0:
        raise ChildProcessError(f"the model builder failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
