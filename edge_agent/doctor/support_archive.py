"""`doctor --bundle FILE`: the support archive, one file with what somebody needs to help from a distance.

A tar.gz with the findings, status, settings, versions, host, cache contents, the last log lines, and the kernel's
messages about memory and disks. If one member cannot be made, the archive has the others.

It holds no prompts or answers (it leaves out the journal and system prompts), no keys and no passwords. Each member
is built here from known values, never copied from the disk, and every secret that this process knows is then removed
from every text.
"""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import edge_agent
from edge_agent import logs, printable
from edge_agent.cache import durable
from edge_agent.cache.store import Store
from edge_agent.doctor import cache, service
from edge_agent.doctor.finding import Finding
from edge_agent.environment import credential_path, known_secrets, search_path
from edge_agent.errors import EdgeAgentError, StoreError
from edge_agent.host import identity, memory
from edge_agent.serving.learned import Learned
from edge_agent.settings import Settings
from edge_agent.transport.credentials import read_password

REMOVED = "[removed]"
_LOG = ("--lines=5000", f"--unit={service.UNIT}")
_KERNEL_LOG = (
    *("--dmesg", "--lines=200"),
    "--grep=out of memory|oom-kill|killed process|segfault|i/o error|fs error|read-only|under-voltage|mmc.*error",
)
"""Messages about memory, power and disks: trouble that the daemon itself does not see."""
_MAX_FILES = 2_000
_MAX_LOG_BYTES = 8 << 20
_JOURNALCTL_TIMEOUT_S = 30.0
_MIN_SECRET_CHARACTERS = 4
"""A shorter one appears in every text by chance, and protects nothing."""


def write(path: Path, findings: Sequence[Finding], settings: Settings | None) -> list[str]:
    """Writes the archive atomically, readable by its owner only, and returns the members' names.

    Args:
        settings: None if they are invalid; the members that need them are then left out.

    Raises:
        EdgeAgentError: the file cannot be written.
    """
    secrets = sorted({*_secrets(settings)}, key=len, reverse=True)
    members = dict(_members(findings, settings, secrets))
    buffer = io.BytesIO()
    now_s = int(time.time())
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"edge-agent-support/{name}")
            info.size, info.mtime, info.mode = len(data), now_s, 0o600
            archive.addfile(info, io.BytesIO(data))
    try:
        with durable.replacing(path.absolute(), mode=0o600) as descriptor:
            durable.write_all(descriptor, buffer.getvalue())
    except OSError as error:
        raise EdgeAgentError(
            f"{path} cannot be written: {error.strerror}", remedy="choose another file"
        ) from error
    return list(members)


def _members(
    findings: Sequence[Finding], settings: Settings | None, secrets: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    documents: dict[str, Callable[[], Any]] = {
        "doctor.json": lambda: [asdict(finding) for finding in findings],
        "versions.json": _versions,
        "host.json": lambda: _host(settings),
    }
    if settings is not None:
        documents |= {
            "settings.json": lambda: redacted_settings(settings),
            "status.json": lambda: service.ask_daemon(settings).document or {"state": "offline"},
            "cache.json": lambda: _cache(settings),
            "files.json": lambda: _files(settings.state_dir),
        }
    documents["unit.json"] = service.unit_properties
    for name, make in documents.items():
        text = json.dumps(_without(_made(make), secrets), indent=2, ensure_ascii=False, default=str)
        yield name, printable.text(text).encode()
    for name, selection in (("log.txt", _LOG), ("kernel.txt", _KERNEL_LOG)):
        yield name, printable.text(_without(_log_lines(selection), secrets)).encode()


def _made(make: Callable[[], Any]) -> Any:
    """A member's content, or the problem that kept it from being made."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - on a broken device the other members matter all the more
        return {"problem": logs.describe(error).splitlines()}


def redacted_settings(settings: Settings) -> dict[str, Any]:
    """The effective settings without system prompts and credentials."""
    document: dict[str, Any] = settings.model_dump(mode="json")
    for model in document["models"].values():
        model["system"] = REMOVED if model["system"] else ""
    document["mqtt"]["username"] = REMOVED if document["mqtt"]["username"] else ""
    document["registry"]["uri"] = _plain_url(document["registry"]["uri"])
    return document


def _plain_url(url: str) -> str:
    """A URL without user, password and query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    host = parts.hostname or ""
    return urlunsplit((parts.scheme, f"{host}:{parts.port}" if parts.port else host, parts.path, "", ""))


def _versions() -> dict[str, Any]:
    return {
        "edge-agent": edge_agent.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            name: package.version
            for package in importlib.metadata.distributions()
            if (name := package.metadata["Name"])
        },
    }


def _host(settings: Settings | None) -> dict[str, Any]:
    """Time, load, memory and disk space."""
    document: dict[str, Any] = {
        "time": int(time.time()),
        "up_s": int(time.clock_gettime(time.CLOCK_BOOTTIME)),
        "load": os.getloadavg(),
        "identity": identity.of_host(),
        "memory_bytes": {"total": memory.total_bytes(), "available": memory.available_bytes()},
    }
    if settings is not None:
        disk = shutil.disk_usage(next(path for path in _upwards(settings.state_dir) if path.exists()))
        document["disk_bytes"] = {"total": disk.total, "free": disk.free}
    return document


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents


def _files(folder: Path) -> list[dict[str, Any]]:
    """Names, sizes and owners of the files in the state directory; no content."""
    found = []
    for path in itertools.islice(folder.rglob("*"), _MAX_FILES):
        status = path.lstat()
        found.append(
            {
                "path": str(path.relative_to(folder)),
                "bytes": status.st_size,
                "mode": stat.filemode(status.st_mode),
                "uid": status.st_uid,
                "links": status.st_nlink,
                "changed": int(status.st_mtime),
            }
        )
    return found


def _cache(settings: Settings) -> dict[str, Any]:
    """The versions in the cache, and `state.json` as this agent reads it."""
    store = Store(settings.state_dir)
    try:
        state = cache.read_state(store)
        known: Any = json.loads(state.encode()) if state is not None else None
    except StoreError as error:
        known = {"problem": error.message}
    versions = [
        {
            "name": record.name,
            "key": record.key,
            "bytes": record.total_bytes,
            "files": len(record.files),
            "registered_name": record.registered_name,
            "trust": record.trust.reason,
            "created_at": record.created_at,
        }
        for record in store.versions()
    ]
    learned = [asdict(entry) for entry in Learned(store.learned_file).entries()]
    return {"state": known, "versions": versions, "learned": learned}


def _log_lines(selection: Sequence[str]) -> str:
    """Lines of the journal, or why there are none."""
    journalctl = shutil.which("journalctl", path=search_path())
    if journalctl is None:
        return "no journalctl on this host\n"
    command = [journalctl, "--no-pager", "--output=short-iso", *selection]
    try:
        result = subprocess.run(
            command, capture_output=True, timeout=_JOURNALCTL_TIMEOUT_S, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the journal cannot be read: {error}\n"
    return (result.stdout[-_MAX_LOG_BYTES:] or result.stderr[-_MAX_LOG_BYTES:]).decode("utf-8", "replace")


def _secrets(settings: Settings | None) -> Iterator[str]:
    found = [*known_secrets()]
    if settings is not None:
        found.append(urlsplit(settings.registry.uri).query)
        found += [model.system for model in settings.models.values()]
        found.append(settings.mqtt.username)
        try:
            found.append(read_password(settings.mqtt, credential_path("mqtt-password")) or "")
        except EdgeAgentError:
            pass  # a password that this process cannot read cannot get into the archive
    lines = (line.strip() for secret in found for line in (secret, *secret.splitlines()))
    yield from (line for line in lines if len(line) >= _MIN_SECRET_CHARACTERS)


def _without(value: Any, secrets: Iterable[str]) -> Any:
    """The same value with every secret removed from its texts."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REMOVED)
        return value
    if isinstance(value, Mapping):
        return {str(key): _without(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, secrets) for item in value]
    return value
