"""Where the documents lie that messages name: with the program, so that they are where somebody reads the message.

The wheel has `docs/` as data: in an environment they are in `share/doc/edge-agent`, so on a device that `install.sh`
has set up in `/opt/edge-agent/current/share/doc/edge-agent`. A checkout has them in `docs`. A test holds every document
and heading that a message names against the files.
"""

from __future__ import annotations

import site
import sysconfig
from pathlib import Path

SHARE = Path("share", "doc", "edge-agent")
_PACKAGE = Path(__file__).parent


def page(name: str, heading: str = "") -> str:
    """The place of a document, as messages write it.

    Args:
        name: as in `docs/`.
        heading: of the part of it that is meant.
    """
    place = folder(_PACKAGE)
    path = str(place / name) if place else f"docs/{name}"
    return f"{path}, '{heading}'" if heading else path


def folder(package: Path) -> Path | None:
    """The folder of all documents; None where they were not installed.

    Args:
        package: the folder of this package.
    """
    root = package.parent
    if _is_there(root / "pyproject.toml") and _is_there(root / "docs"):
        return Path("docs") if _is_here(root) else root / "docs"
    places = [Path(sysconfig.get_path("data")), root]  # an environment's, or that of `pip install --target`
    if site.ENABLE_USER_SITE:
        places.append(Path(site.getuserbase()))
    return next((_lasting(place) / SHARE for place in places if _is_there(place / SHARE)), None)


def _lasting(prefix: Path) -> Path:
    """The same place by the name that it keeps when the next version is installed."""
    current = prefix.parent / "current"
    return current if _is_there(current) and current.resolve() == prefix.resolve() else prefix


def _is_here(root: Path) -> bool:
    try:
        return root.samefile(".")
    except OSError:  # the working directory is gone
        return False


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError:  # or it cannot be read, which is no better
        return False
    return True
