"""A package's files under their digests, for what serves them to devices (`cache.mirrors`): `DIR/sha256/<digest>`.

They are copies. A link to the publisher's own file would change when that one is edited, and would have its mode; what
serves the folder, often another user, must be able to read it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.verify import damage_of
from edge_agent.cache.version_file import WRITE_REMEDIES, verified_chunks
from edge_agent.errors import ContentError, PublishError
from edge_agent.package.manifest import ManifestFile
from edge_agent.publishing.package import Package, Progress, no_progress

FOLDER = "sha256"
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


@dataclass(frozen=True, kw_only=True)
class Blobs:
    """What there was to do.

    Attributes:
        written: number of files that were not there, or not whole.
        kept: number of those that were.
    """

    written: int
    kept: int


def make_folder(directory: Path) -> None:
    """Makes `DIR/sha256`, and what is missing above it.

    Raises:
        PublishError: it cannot be made, or not be written to.
    """
    try:
        for folder in (*reversed(directory.absolute().parents), directory, directory / FOLDER):
            if not folder.is_dir():
                folder.mkdir()
                with suppress(PermissionError):  # see `_write`
                    folder.chmod(_FOLDER_MODE)  # whatever the umask says
    except OSError as error:
        raise PublishError(f"{error.filename} cannot be made: {error.strerror}") from error
    if not os.access(directory / FOLDER, os.W_OK):
        raise PublishError(f"{directory / FOLDER} cannot be written to: permission denied")


def write_blobs(package: Package, directory: Path, *, progress: Progress = no_progress) -> Blobs:
    """Writes each file that is not there yet; one that is there and whole is left alone.

    Args:
        directory: see `make_folder`.

    Raises:
        PublishError: a file cannot be written, or the package was changed while it was.
    """
    files = {file.sha256: file for file in (*package.manifest.files, *package.attached)}
    total, done, written = sum(file.size_bytes for file in files.values()), 0, 0
    for sha256, file in files.items():
        progress("writing blobs", done, total)
        blob = directory / FOLDER / sha256
        if damage_of(blob, file):
            _write(package.folder / file.path, blob, file)
            written += 1
        done += file.size_bytes
    progress("writing blobs", done, total)
    return Blobs(written=written, kept=len(files) - written)


def _write(source: Path, blob: Path, file: ManifestFile) -> None:
    try:
        with durable.replacing(blob, mode=_FILE_MODE) as descriptor:
            for chunk in verified_chunks(source, file):
                durable.write_all(descriptor, chunk)
            with suppress(PermissionError):  # FAT has no modes: how it is mounted says who may read
                os.fchmod(descriptor, _FILE_MODE)  # whatever the umask says
    except ContentError as error:
        raise PublishError(f"{blob}: {error.message}") from error
    except OSError as error:
        remedy = WRITE_REMEDIES.get(error.errno or 0, "")
        raise PublishError(f"{blob} cannot be written: {error.strerror}", remedy=remedy) from error
