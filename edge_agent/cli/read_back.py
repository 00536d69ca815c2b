"""What `publish` asks before an alias moves: could a device fetch this version?

The registry is asked as a sync asks it: the same client, listing, and rules for paths, sizes and the manifest. Files up
to 1 MiB are read and hashed. Of a larger one the listing says the size, and no more: a wrong byte in it is found by the
first device that fetches it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_agent.errors import VerificationError
from edge_agent.package.manifest import Manifest, ManifestFile
from edge_agent.package.reference import ModelRef
from edge_agent.sync.bring import read_wanted
from edge_agent.sync.files import Package, ReadOnce, is_of
from edge_agent.sync.registry import Registry

MAX_READ_BYTES = 1 << 20
_TIMEOUT_S = 30.0


def read_back(
    registry_uri: str, ref: ModelRef, *, manifest: Manifest, attached: Sequence[ManifestFile]
) -> None:
    """Looks at a registered version as a device does before it fetches it, and reads its small files.

    Imports MLflow, and leaves the sync's variables for it in the environment.

    Args:
        ref: the version, by its number.
        manifest: what the version must have.
        attached: the files beside it, `manifest.json` among them.

    Raises:
        EdgeAgentError: a device could not fetch it, for this reason.
    """
    registry = Registry(registry_uri, timeout_s=_TIMEOUT_S)
    version = registry.resolve(ref)
    with tempfile.TemporaryDirectory(prefix="edge-agent-read-back-") as scratch:
        package = registry.package(version, scratch=Path(scratch) / "whole")
        wanted = read_wanted(ReadOnce(package), version)
        if wanted.manifest != manifest:
            raise VerificationError(f"version {version.version} of {version.name!r} has another manifest")
        if lost := [file.path for file in attached if file.path not in wanted.attached]:
            raise VerificationError(f"version {version.version} of {version.name!r} has lost {lost[0]!r}")
        for file in (*attached, *manifest.files):
            if file.size_bytes <= MAX_READ_BYTES:
                _compare(package, file)


def _compare(package: Package, file: ManifestFile) -> None:
    with package.open(file.path) as stream:
        if not is_of(stream, size_bytes=file.size_bytes, sha256=file.sha256):
            raise VerificationError(f"{file.path!r} is not what was uploaded")
