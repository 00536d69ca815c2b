"""What the address of a registry may look like. Pure.

MLflow takes any text for one: an address without a scheme is a folder of this host to it.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

FORMS = "http://HOST:PORT, https://HOST or sqlite:////FOLDER/FILE"

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(?:/|$)", re.IGNORECASE)
_USER = re.compile(r"^(\s*(?:[a-z][a-z0-9+.-]*:/+)?)[^/]*@", re.IGNORECASE)
_HOST = re.compile(r"(?!https?/)(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]+)?(?:/.*)?", re.IGNORECASE)
_DATABASES = ("postgres", "mysql", "mssql", "oracle")
_NAMES = ("databricks", "databricks-uc", "uc")
"""Of registries that have no address. Source: MLflow, `is_databricks_uri`, `is_oss_unity_catalog_uri`."""


def has_credentials(uri: str) -> bool:
    """True for a name or a password before the host, with and without a scheme."""
    return _USER.match(uri) is not None


def problem_of(uri: str) -> str:
    """Why nothing can be reached at this address, and what to write; empty if it has a form that is supported.

    What it quotes is without credentials.
    """
    shown = repr(_USER.sub(r"\1", uri))
    scheme = match[1].lower() if (match := _SCHEME.match(uri)) else ""
    if scheme.startswith(_DATABASES):
        return f"{scheme!r} is a database: write the address of the MLflow server before it, http://HOST:PORT"
    if scheme == "sqlite":
        return "" if re.match(r"sqlite:///.", uri) else f"{shown} names no file: write sqlite:////FOLDER/FILE"
    if scheme in ("http", "https"):
        return "" if _has_host(uri) else f"{shown} names no host: write {scheme}://HOST:PORT"
    if scheme or uri.lower() in _NAMES:
        return f"{shown} is not supported: write {FORMS}"
    if uri.startswith("/"):
        return f"{shown} has no scheme: write sqlite:///{uri}"
    if _HOST.fullmatch(uri):
        return f"{shown} has no scheme: write http://{uri} or https://{uri}"
    return f"{shown} has no scheme: write {FORMS}"


def _has_host(uri: str) -> bool:
    try:
        url = urlsplit(uri)
        return bool(url.hostname) and url.port != 0 and "://" in uri and not re.search(r"\s", uri)
    except ValueError:  # its port is no number
        return False
