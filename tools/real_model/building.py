"""Folders that are made once: whole or not at all, and again when their recipe has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tools.real_model.progress import say


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
