"""Names of models: the reference in the settings (`ModelRef`) and the version that it means (`ModelVersion`).

Pure. `models:/name@alias` and `models:/name/7` are MLflow's own forms. `models:/name/latest` is refused, because
nobody could tell which version a device was told to run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edge_agent import printable
from edge_agent.errors import ManifestError, SettingsError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""A name in `[models.NAME]`: it also names a folder, and clients send it in `model`."""

_URI = re.compile(
    r"models:/(?P<name>[^/@:]{1,250})(?:@(?P<alias>[A-Za-z0-9_-]{1,255})|/(?P<version>[1-9][0-9]{0,17}))"
)
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def version_number(value: object) -> int:
    """A version's number as a registry gives it: from 1, with at most 18 digits, as every key in the cache has it.

    Raises:
        ManifestError: no version can have that number.
    """
    if not _VERSION.fullmatch(str(value)):
        raise ManifestError(f"the registry has a version {str(value)[:40]!r}, which is no version number")
    return int(str(value))


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A reference: a registered name, and either an alias or a version number."""

    name: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"

    @classmethod
    def parse(cls, uri: str) -> ModelRef:
        """Reads `models:/name@alias` or `models:/name/7`.

        Raises:
            SettingsError: the text has neither form.
        """
        match = _URI.fullmatch(uri)
        if match is None or not printable.is_line(uri):
            raise SettingsError(
                f"model uri {uri!r} is not understood",
                remedy="write models:/NAME@ALIAS or models:/NAME/VERSION",
            )
        version = match["version"]
        return cls(name=match["name"], alias=match["alias"], version=int(version) if version else None)

    def at_version(self, version: int) -> ModelRef:
        """The same registered model at a fixed version."""
        return replace(self, alias=None, version=version)


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A registered version, as the registry describes it.

    Attributes:
        name: registered name.
        version: its number, from 1.
        run_id: MLflow run that the version came from; empty if there is none.
        source: where its artifacts are, according to the registry.
        tags: the version's tags; `edge_agent.manifest_sha256` is there if `edge-agent publish` made it.
    """

    name: str
    version: int
    run_id: str
    source: str
    tags: dict[str, str]

    @property
    def manifest_sha256(self) -> str | None:
        """Digest of `manifest.json` as recorded by the publisher; None for a plain MLflow package."""
        return self.tags.get(MANIFEST_TAG) or None


MANIFEST_TAG = "edge_agent.manifest_sha256"
ROLLOUT_TAG = "edge_agent.rollout"
ROLLOUT_FROM_TAG = "edge_agent.rollout_from"
