"""The walls around a sync: it may write the cache and talk to the registry, and needs little else.

It parses what a registry answers and judges what a package holds, before anything else does. Not so narrow as a
runner's walls: it asks the libraries about an architecture in another process, makes blobs read-only, and finds names
the way this host finds them, for which some hosts have a socket (mDNS, systemd-resolved). What stands is enough: no
rule depends on it, because a sync runs no code of a package.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edge_agent import environment
from edge_agent.cache.store import Store
from edge_agent.host.confinement import Confinement
from edge_agent.host.seccomp import Calls, Network
from edge_agent.sync import http_session
from edge_agent.sync.mirrors.places import folder_of
from edge_agent.sync.protocol import CacheJob, SyncJob
from edge_agent.sync.tls import TlsFiles

_OF_STORES = (".netrc", ".aws", ".azure", ".config/gcloud")
"""Where clients of artifact stores look for credentials, in the home of the service's user."""


def around_sync(job: SyncJob, *, scratch: Path | None, keep: int) -> Confinement:
    """What this sync keeps.

    Args:
        scratch: its temporary folder.
        keep: the descriptor of its events.
    """
    folders = (Store(Path(job.state_dir)).root, scratch, _folder_of_database(job.registry.uri))
    return Confinement(
        read=(
            *map(Path, job.trust.public_keys),
            *_read(job.registry.uri, job.registry.tls),
            *_of_mirrors(job.cache),
        ),
        write=tuple(folder for folder in folders if folder),
        moves=True,
        calls=Calls(network=Network.INTERNET_AND_UNIX, programs=True, modes=True, locks=True),
        file_bytes=None,
        keep=(keep,) if job.version_file is None else (keep, job.version_file),
    )


def around_question(uri: str, *, tls: TlsFiles, scratch: Path) -> Confinement:
    """What a process keeps that only asks a registry.

    Args:
        scratch: its temporary folder.
    """
    folders = (scratch, _folder_of_database(uri))
    return Confinement(
        read=tuple(_read(uri, tls)),
        write=tuple(folder for folder in folders if folder),
        calls=Calls(network=Network.INTERNET_AND_UNIX),
    )


def _read(uri: str, tls: TlsFiles) -> Iterable[Path]:
    yield from (Path(file) for file in (tls.ca_file, tls.cert_file, tls.key_file) if file)
    yield from environment.named_paths()  # certificates, credentials of stores
    if home := environment.directory("HOME"):
        yield from (home / name for name in _OF_STORES)
    url = urlsplit(uri)
    if url.scheme not in ("http", "https") or http_session.is_local(url.hostname or ""):
        yield Path("/")  # a registry on this device may have its artifacts in any folder of it


def _of_mirrors(cache: CacheJob) -> Iterable[Path]:
    yield from filter(None, map(folder_of, cache.mirrors))
    if cache.mirror_ca_file:
        yield Path(cache.mirror_ca_file)


def _folder_of_database(uri: str) -> Path | None:
    """Of a registry that is a file: its journal is beside it."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path("/", unquote(uri.removeprefix("sqlite:///").split("?")[0])).parent
