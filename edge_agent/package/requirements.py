"""Checks the files in which MLflow writes what a package needs: `requirements.txt`, `conda.yaml`, `python_env.yaml`.

A device installs nothing, but other programs read these files and follow them: `-r` and `-c` open another file, be it a
pipe or `/dev/zero`, and a URL is fetched. So a line is a name with versions, or the package is refused. The files are
read as text, up to a bound, and nothing is opened through them; a message has a line's number, never its text.
Source: PEP 508; `mlflow.utils.requirements_utils` of 3.17.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from pathlib import Path

from edge_agent.errors import PolicyError
from edge_agent.package import plain_yaml

MAX_BYTES = 256 << 10
MAX_LINE_CHARACTERS = 1_000

_VERSION = r"\s*(?:===?|[<>!~]=|[<>=])\s*[\w.*+!-]+\s*"
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][\w.-]*"  # name
    r"(?:\s*\[[\w.,\s-]*\])?"  # extras
    rf"(?:\s*\(?{_VERSION}(?:,{_VERSION})*\)?)?"
    r"(?:\s*;[^@\\/]*)?"  # environment markers
    r"(?:\s+#.*)?"
)
_CONDA = re.compile(r"(?:[\w.-]+::)?[A-Za-z0-9_][\w.-]*[\w.,|<>=!~*\s+-]*")
_OWN = frozenset({"-r requirements.txt", "-c constraints.txt"})
"""What MLflow itself writes: files of the package, which are checked here as well."""


def check(tree: Path, paths: Set[str]) -> None:
    """Checks those of the files that a package has.

    Raises:
        PolicyError: a line is no plain requirement, or a file is too large.
    """
    for name in ("requirements.txt", "constraints.txt"):
        if name in paths:
            for number, line in enumerate(_text(tree, name).splitlines(), 1):
                text = line.strip()
                if text and not text.startswith("#") and not _is_requirement(text):
                    raise _refusal(f"{name}, line {number},")
    if "python_env.yaml" in paths:
        for text in _texts(_yaml(tree, "python_env.yaml"), "build_dependencies", "dependencies"):
            if not _is_requirement(text):
                raise _refusal("python_env.yaml")
    if "conda.yaml" in paths:
        _check_conda(_yaml(tree, "conda.yaml"))


def _check_conda(document: object) -> None:
    for text in _texts(document, "dependencies"):
        if len(text) > MAX_LINE_CHARACTERS or not _CONDA.fullmatch(text):
            raise _refusal("conda.yaml")
    listed = document.get("dependencies") if isinstance(document, dict) else None
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and not all(map(_is_requirement, _texts(entry, *map(str, entry)))):
            raise _refusal("conda.yaml")
    if any("://" in channel for channel in _texts(document, "channels")):
        raise _refusal("conda.yaml")


def _is_requirement(text: str) -> bool:
    if text in _OWN:
        return True
    return len(text) <= MAX_LINE_CHARACTERS and _REQUIREMENT.fullmatch(text) is not None


def _texts(document: object, *keys: str) -> Iterator[str]:
    """The texts in the lists under some keys."""
    for key in keys:
        entries = document.get(key) if isinstance(document, dict) else None
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, str):
                yield entry


def _yaml(tree: Path, name: str) -> object:
    return plain_yaml.load(_text(tree, name).encode(), name)


def _text(tree: Path, name: str) -> str:
    if (tree / name).lstat().st_size > MAX_BYTES:
        raise PolicyError(f"{name} has more than {MAX_BYTES} bytes")
    try:
        return (tree / name).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{name} is not text") from error


def _refusal(where: str) -> PolicyError:
    return PolicyError(
        f"{where} is not a name with versions: -r, -e, options, paths and URLs are not allowed",
        remedy="log the model again with plain pip_requirements",
    )
