"""The record of one committed version: what it is, where it came from, and why it may run here.

Pure. Writing the record is what commits a version: it is written last, and a folder without one does not count.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from edge_agent.errors import ManifestError, StoreError
from edge_agent.package import manifest as manifests
from edge_agent.package.manifest import Manifest, ManifestFile
from edge_agent.package.reference import MODEL_NAME
from edge_agent.package.trust import TrustDecision

KEY = re.compile(r"[1-9][0-9]{0,17}-[0-9a-f]{12}")
"""`<version>-<first 12 hex digits of its digest>`: a version's folder, and its name in state.json."""
DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_SECONDS = 1e12


@dataclass(frozen=True, kw_only=True)
class VersionRecord:
    """One version in the cache.

    Attributes:
        name: the settings' model name.
        version: number in the registry.
        manifest: every file of the package, and the registered name.
        attached: `manifest.json` and `model.sig` where the package has them: kept, but not in the manifest.
        registry_uri: where it came from.
        source: where the registry said its artifacts were.
        run_id: MLflow run, or empty.
        trust: the decision that its content may run here.
        created_at: seconds since the epoch, when it was committed.
        fallback: it was found through the model's `fallback`, not through its own reference.
        served: it has been the active version here, and has not been quarantined since.
        packaged_at: seconds since the epoch, when its MLmodel says that it was made; 0 where it does not say, None
            where nobody has looked.
    """

    name: str
    version: int
    manifest: Manifest
    attached: tuple[ManifestFile, ...]
    registry_uri: str
    source: str
    run_id: str
    trust: TrustDecision
    created_at: float
    fallback: bool = False
    served: bool = False
    packaged_at: float | None = None

    @property
    def digest(self) -> str:
        """The manifest's digest: the package's identity."""
        return self.manifest.digest

    @property
    def key(self) -> str:
        return key_of(self.version, self.manifest)

    @property
    def registered_name(self) -> str:
        return self.manifest.name

    @property
    def files(self) -> tuple[ManifestFile, ...]:
        """Every file in the version's folder, attached files included."""
        return (*self.manifest.files, *self.attached)

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def encode(self) -> bytes:
        document = {
            "format": 1,
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "manifest": json.loads(self.manifest.encode()),
            "attached": [{"path": f.path, "size": f.size_bytes, "sha256": f.sha256} for f in self.attached],
            "registry_uri": self.registry_uri,
            "source": self.source,
            "run_id": self.run_id,
            "trust": asdict(self.trust),
            "created_at": self.created_at,
            "fallback": self.fallback,
            "served": self.served,
            "packaged_at": self.packaged_at,
        }
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def key_of(version: int, manifest: Manifest) -> str:
    return f"{version}-{manifest.digest[:12]}"


def version_of(key: str) -> int:
    """The version's number in the registry."""
    return int(key.split("-")[0])


def parse(data: bytes) -> VersionRecord:
    """Reads a version's `.json`.

    Raises:
        StoreError: it is not what this agent wrote.
    """
    try:
        document = json.loads(data.decode("utf-8"))
        if document["format"] != 1 or not MODEL_NAME.fullmatch(document["name"]):
            raise ValueError("format or name")
        record = VersionRecord(
            name=document["name"],
            version=whole(document["version"], least=1),
            manifest=manifests.of_document(document["manifest"]),
            attached=tuple(_attached(fields) for fields in document["attached"]),
            registry_uri=str(document["registry_uri"]),
            source=str(document["source"]),
            run_id=str(document["run_id"]),
            trust=TrustDecision(**document["trust"]),
            created_at=seconds(document["created_at"]),
            fallback=bool(document.get("fallback", False)),
            served=bool(document.get("served", False)),
            packaged_at=None if document.get("packaged_at") is None else seconds(document["packaged_at"]),
        )
        if record.digest != document["digest"] or not KEY.fullmatch(record.key):
            raise ValueError("digest or version")
        return record
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ManifestError) as error:
        raise StoreError(f"the version's record is damaged ({type(error).__name__})") from error


def _attached(fields: Any) -> ManifestFile:
    file = ManifestFile(path=fields["path"], size_bytes=whole(fields["size"]), sha256=fields["sha256"])
    if file.path not in manifests.ATTACHED or not DIGEST.fullmatch(file.sha256):
        raise ValueError("attached")
    return file


def whole(value: object, *, least: int = 0) -> int:
    """A whole number of a JSON document, which may as well say `Infinity`, `NaN`, `1e999` or `true` there.

    Raises:
        ValueError: it is something else, or out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 62:
        raise ValueError("not a whole number")
    return value


def seconds(value: object) -> float:
    """Seconds since the epoch. NaN would be neither before nor after another version.

    Raises:
        ValueError: it is something else, or no time.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _MOST_SECONDS:
        raise ValueError("not a time")
    return float(value)
