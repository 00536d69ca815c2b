"""Another host, and another user of this one: a Python that lacks a library, and who a service may run as."""

from __future__ import annotations

import os
import site
import venv
from pathlib import Path

OTHER_USER = 65_534 if os.geteuid() == 0 else os.geteuid()  # nobody


def python_without(library: str, folder: Path) -> str:
    """Makes a virtual environment in `folder` with everything that this one has but that; gives its interpreter.

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
