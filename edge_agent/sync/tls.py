"""The files of the settings with which the registry is reached over TLS: who vouches for it, and who this device is.

Owned by the settings' `[registry]`, handed to the sync process by their paths, and loaded in both: at the daemon's
start, to name a wrong key before READY, and for each connection.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import Protocol

from edge_agent import environment
from edge_agent.errors import settings_error


class RegistryFiles(Protocol):
    """What the settings say."""

    @property
    def ca_file(self) -> str: ...
    @property
    def cert_file(self) -> str: ...
    @property
    def key_file(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files; empty for none.

    Attributes:
        ca_file: the only authorities that may vouch for the registry. A store that it leads to may have a public one.
        cert_file, key_file: this device's own, which the registry alone gets to see.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def of(cls, settings: RegistryFiles) -> TlsFiles:
        return cls(ca_file=settings.ca_file, cert_file=settings.cert_file, key_file=settings.key_file)

    def check(self, *, section: str = "registry.") -> None:
        """Loads everything once.

        Args:
            section: what the keys in the settings begin with.

        Raises:
            SettingsError: a file cannot be loaded; its key is named.
        """
        key, files = f"{section}ca_file", [self.ca_file]
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if self.ca_file:
                context.load_verify_locations(cafile=self.ca_file)
            key, files = f"{section}cert_file, {section}key_file", [self.cert_file, self.key_file]
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "")
        except OSError as error:
            reason = environment.unreadable(*files) or error
            raise settings_error(f"{key}: cannot be loaded: {reason}", error) from error

    def for_stores(self, public: str) -> ssl.SSLContext | None:
        """What vouches for places that the registry leads to: its own authorities and the public ones.

        Args:
            public: file or folder of the public ones.

        Returns:
            None for the public ones alone.
        """
        if not self.ca_file:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=self.ca_file)
        if os.path.isdir(public):  # noqa: PTH112 - as it stands in a variable
            context.load_verify_locations(capath=public)
        else:
            context.load_verify_locations(cafile=public)
        return context


NO_FILES = TlsFiles()
