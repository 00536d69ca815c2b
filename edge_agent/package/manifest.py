"""The manifest of a package: its files with their sizes and sha256, and the rules for them.

Pure: no file is opened here. A manifest comes from the package (`manifest.json`, written by `edge-agent publish`),
or is made on arrival for a package logged with plain MLflow. Its digest is the sha256 of its canonical JSON, and
names the version's folder in the cache.

Paths are relative and normalised, without `..`, backslash, control characters or case-folding collisions; no path
is a folder of another; count and sizes are bounded. The manifest does not list `manifest.json` and `model.sig`,
which describe the package, nor `registered_model_meta`, which MLflow adds to every download.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edge_agent import printable
from edge_agent.errors import ManifestError

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
ATTACHED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
"""Files of a package that the manifest does not list."""
OUTSIDE_MANIFEST = ATTACHED | {"registered_model_meta"}

MAX_FILES = 2_000
MAX_PATH_BYTES = 512
MAX_PART_BYTES = 255
MAX_FILE_BYTES = 1 << 40
MAX_MANIFEST_BYTES = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, order=True)
class ManifestFile:
    """One file: its path in the package with `/` between parts, size in bytes, sha256 in lower-case hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All files of one package, sorted by path.

    Attributes:
        name: the registered model's name; a signed package may be used under this name only.
        files: at least one, sorted by path; their paths are checked.
    """

    name: str
    files: tuple[ManifestFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the package's identity. Lower-case hex."""
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """Canonical JSON (sorted keys, no spaces, UTF-8): equal manifests are equal bytes."""
        document = {
            "format": 1,
            "name": self.name,
            "files": [{"path": f.path, "size": f.size_bytes, "sha256": f.sha256} for f in self.files],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def make(name: str, files: Iterable[ManifestFile]) -> Manifest:
    """Builds a manifest and checks every rule.

    Raises:
        ManifestError: a rule is broken; the message names the path.
    """
    ordered = tuple(sorted(files))
    _check_name(name)
    if not ordered:
        raise ManifestError("the package has no files")
    if len(ordered) > MAX_FILES:
        raise ManifestError(f"the package has {len(ordered)} files, at most {MAX_FILES} are allowed")
    check_paths(file.path for file in ordered)
    for file in ordered:
        if not 0 <= file.size_bytes <= MAX_FILE_BYTES:
            raise ManifestError(f"size {file.size_bytes} of {file.path!r} is out of range")
        if not _DIGEST.fullmatch(file.sha256):
            raise ManifestError(f"sha256 of {file.path!r} is not 64 lower-case hex digits")
    return Manifest(name=name, files=ordered)


def parse(data: bytes) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        ManifestError: too large, not JSON, unknown or missing fields, or a rule is broken.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"manifest.json has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"manifest.json is not JSON ({type(error).__name__})") from error
    return of_document(document)


def of_document(document: object) -> Manifest:
    """The manifest that a JSON document is, however long it is written: the bounds on its files hold.

    Raises:
        ManifestError: unknown or missing fields, or a rule is broken.
    """
    fields = _object(document, "manifest.json", {"format", "name", "files"})
    if fields["format"] != 1:
        raise ManifestError(f"manifest.json has format {fields['format']!r}; this agent reads format 1")
    if not isinstance(fields["files"], list):
        raise ManifestError("files in manifest.json is not a list")
    if len(fields["files"]) > MAX_FILES:
        raise ManifestError(f"the package has {len(fields['files'])} files, at most {MAX_FILES} are allowed")
    return make(fields["name"], (_file(entry) for entry in fields["files"]))


def check_paths(paths: Iterable[str]) -> None:
    """Checks each path by itself, then collisions between them.

    Raises:
        ManifestError: a rule is broken; the message names the path.
    """
    folded: dict[str, str] = {}
    folders: set[str] = set()
    for path in paths:
        check_path(path)
        key = path.casefold()
        if key in folded:
            raise ManifestError(f"paths {folded[key]!r} and {path!r} differ only in case")
        folded[key] = path
        parts = key.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    for key, path in folded.items():
        if key in folders:
            raise ManifestError(f"path {path!r} is both a file and a folder")


def check_path(path: object) -> str:
    """Checks one path and returns it.

    Raises:
        ManifestError: the path could lead outside the package, or mean different files on different systems.
    """
    if not isinstance(path, str) or not path:
        raise ManifestError(f"path {path!r} is not a non-empty string")
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ManifestError(f"path {path!r} is not valid text") from error
    if len(encoded) > MAX_PATH_BYTES:
        raise ManifestError(f"path {path[:80]!r}… has more than {MAX_PATH_BYTES} bytes")
    if "\\" in path or not printable.is_line(path):
        raise ManifestError(f"path {path!r} has a backslash or a control character")
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise ManifestError(f"path {path!r} is not relative and normalised")
        if len(part.encode()) > MAX_PART_BYTES:
            raise ManifestError(f"path {path[:80]!r}… has a part of more than {MAX_PART_BYTES} bytes")
    return path


def _file(entry: object) -> ManifestFile:
    fields = _object(entry, "an entry of files", {"path", "size", "sha256"})
    size, sha256 = fields["size"], fields["sha256"]
    if not isinstance(size, int) or isinstance(size, bool) or not isinstance(sha256, str):
        raise ManifestError(f"the entry for {fields['path']!r} has a size or sha256 of the wrong type")
    return ManifestFile(path=check_path(fields["path"]), size_bytes=size, sha256=sha256)


def _object(value: object, what: str, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{what} is not an object")
    if set(value) != keys:
        raise ManifestError(f"{what} must have exactly the fields {sorted(keys)}")
    return value


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 250 or not printable.is_line(name):
        raise ManifestError(f"model name {name!r} must be 1 to 250 printable characters")
