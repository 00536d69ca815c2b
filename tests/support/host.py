"""A host that lacks a library: a virtual environment with everything that this one has but that."""

from __future__ import annotations

import site
import venv
from pathlib import Path


def python_without(library: str, folder: Path) -> str:
    """Makes the environment in `folder`; gives its interpreter.

    Args:
        library: as it is imported; its metadata goes with it.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    (target,) = folder.glob("lib/python*/site-packages")
    left_out = 0
    for source in map(Path, site.getsitepackages()):
        for entry in source.iterdir():
            if entry.name.split("-")[0].split(".")[0] == library:
                left_out += 1
            elif not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    assert left_out, f"{library} is not installed here"
    return str(folder / "bin" / "python")
