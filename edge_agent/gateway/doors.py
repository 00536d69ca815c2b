"""Where clients come in: the listening sockets, and what each asks of those who use it.

Owns the rule that nobody opens the interface to a network by accident: on any address but a loopback one it takes a
token and TLS, wherever the socket comes from. The Unix socket asks for neither: its file says who may connect.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent import environment
from edge_agent.documents import page
from edge_agent.errors import SettingsError, settings_error
from edge_agent.gateway.refusals import CannotListen
from edge_agent.settings import Settings
from edge_agent.settings.http import Address, HttpSettings
from edge_agent.transport import control

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
TOKEN_CREDENTIAL = "http-token"
MIN_TOKEN_CHARACTERS = 16
_BACKLOG = 128
_UNSENT_MS = 30_000
"""The kernel ends a connection whose client takes nothing for so long: see tcp(7), TCP_USER_TIMEOUT."""


@dataclass(frozen=True, kw_only=True)
class Door:
    """One listening socket.

    Attributes:
        hosts: the names by which clients may call it.
        token: what each request must bring; empty for nothing.
        tls: None for plain HTTP.
    """

    listener: socket.socket
    hosts: frozenset[str]
    token: str = ""
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        where = self.listener.getsockname()
        if not isinstance(where, tuple):
            return f"unix:{where}"
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
        return f"{'https' if self.tls else 'http'}://{host}:{where[1]}"


def open_doors(settings: Settings, passed: Sequence[int] = ()) -> list[Door]:
    """Opens all listening sockets, or takes those of the service manager.

    Args:
        passed: their descriptors.

    Raises:
        SettingsError: a socket would be open to a network without token and TLS, or a file cannot be loaded.
        EdgeAgentError: a socket cannot be opened.
    """
    http = settings.http
    token, tls = _token(http), _tls(http)
    if http.address is not None and not passed:
        _check_open(http.address.host, token, tls)
    doors = []
    with contextlib.ExitStack() as opened:
        for listener in map(_taken_over, passed) if passed else _listeners(settings):
            opened.enter_context(listener)
            listener.setblocking(False)
            if listener.family == socket.AF_UNIX:
                doors.append(Door(listener=listener, hosts=_hosts(http)))
                continue
            host = listener.getsockname()[0]
            _check_open(host, token, tls)
            # Its connections inherit both. asyncio sets the second only where the socket was made with its protocol.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_MS)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            doors.append(Door(listener=listener, hosts=_hosts(http, host), token=token, tls=tls))
        opened.pop_all()
    return doors


def _taken_over(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


def _check_open(host: str, token: str, tls: ssl.SSLContext | None) -> None:
    """
    Raises:
        SettingsError: this address may be reached from a network, and what that takes is missing.
    """
    if ipaddress.ip_address(host).is_loopback:
        return
    missing = [
        *([] if token else [f"http.token_file (or the credential {TOKEN_CREDENTIAL})"]),
        *([] if tls else ["http.cert_file and http.key_file"]),
    ]
    if missing:
        raise SettingsError(
            f"http.listen: {host} may be reached from a network: {' and '.join(missing)} must be set",
            remedy=f"{page('http.md')} says how to open it safely",
        )


def _hosts(http: HttpSettings, host: str = "") -> frozenset[str]:
    listen = {http.address.host} if http.address else set()
    return LOCAL_HOSTS | set(http.allowed_hosts) | listen | ({host} if host else set())


def _token(http: HttpSettings) -> str:
    path = Path(http.token_file) if http.token_file else environment.credential_path(TOKEN_CREDENTIAL)
    if path is None:
        return ""
    try:
        token = environment.read_credential(path)
    except SettingsError as error:
        raise type(error)(f"http.token_file: {error.message}", remedy=error.remedy) from error
    if (
        len(token) < MIN_TOKEN_CHARACTERS
        or not token.isascii()
        or any(not char.isprintable() for char in token)
    ):
        raise SettingsError(
            f"http.token_file: the token must have at least {MIN_TOKEN_CHARACTERS} ASCII characters",
            remedy="make one with `openssl rand -hex 32`",
        )
    return token


def _tls(http: HttpSettings) -> ssl.SSLContext | None:
    if not http.cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(http.cert_file, http.key_file, password=lambda: "")
    except OSError as error:
        reason = environment.unreadable(http.cert_file, http.key_file) or error
        raise settings_error(f"http.cert_file, http.key_file: cannot be loaded: {reason}", error) from error
    return context


def _listeners(settings: Settings) -> Iterator[socket.socket]:
    if (address := settings.http.address) is not None:
        yield _listen(address)
    path = Path(settings.http.socket or settings.control_socket.with_name("http.sock"))
    yield control.listen(path, key="http.socket")


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise CannotListen(
            f"http.listen: {address.host} port {address.port} cannot be opened: {error.strerror or error}",
            remedy="set http.listen to another port, or end what listens there",
        ) from error
