"""The settings of the OpenAI interface, `[http]`. What opens it to a network is checked where it is opened: the token
may be a credential that only its own service sees."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%a-z]+)\]|(?P<name>[^\[\]:]+)):(?P<port>\d{1,5})")
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen: an IP address, never a name that somebody else may define."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `127.0.0.1:8080`, `[::1]:8080` or `localhost:8080`.

        Raises:
            ValueError: it is none of these.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None or not 1 <= int(match["port"]) <= 65_535:
            raise ValueError("must be ADDRESS:PORT, as 127.0.0.1:8080 or [::1]:8080")
        host = match["six"] or match["name"]
        host = _LOCALHOST if host == "localhost" else host
        try:
            ipaddress.ip_address(host)
        except ValueError as error:
            raise ValueError(f"{host[:100]!r} is no IP address: give one, not a name") from error
        return cls(host=host, port=int(match["port"]))


class HttpSettings(BaseModel):
    """The OpenAI interface, `edge-agent serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = Field(default="127.0.0.1:8080", description="ADDRESS:PORT; empty: the socket only")
    socket: str = Field(default="", description="its Unix socket; default: http.sock beside control_socket")
    token_file: str = Field(default="", description="or the systemd credential http-token")
    cert_file: str = Field(default="", description="PEM; set it to use TLS")
    key_file: str = Field(default="", description="PEM, its key")
    allowed_hosts: tuple[str, ...] = Field(
        default=(), max_length=64, description="names in Host and Origin beside localhost and `listen`"
    )

    @field_validator("listen")
    @classmethod
    def _address(cls, listen: str) -> str:
        if listen:
            Address.parse(listen)
        return listen

    @field_validator("socket")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if path and (not path.startswith("/") or "\0" in path or len(path.encode()) > 107):
            raise ValueError("must be an absolute path of at most 107 bytes")
        return path

    @field_validator("allowed_hosts")
    @classmethod
    def _plain_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host[:100]!r} must be a name or an IP address, without scheme and port")
        return tuple(host.lower() for host in hosts)

    @model_validator(mode="after")
    def _pairs(self) -> HttpSettings:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        return self

    @property
    def address(self) -> Address | None:
        """Where it listens for TCP; None for nowhere."""
        return Address.parse(self.listen) if self.listen else None
