"""Every HTTP request of a sync: where it may go, what it carries, and how much and how long an answer may be.

MLflow makes its requests through one session, and `in_use` lends it this one. Rules:

- Credentials go to the registry's scheme, host and port. Anything else gets headers that hold no secret.
- A redirect to another place is followed for an artifact only.
- A registry that is not on this device leads to no loopback or link-local address: what listens there trusts its host.
- The registry's certificate is held against `registry.ca_file` alone where there is one; of other places, against the
  public authorities as well. This device's own certificate is for the registry only.
- Headers, and answers that are read whole, have a bound in bytes and in time. An artifact's bytes have their own
  bounds, in `fetch.py` and `pace.py`. An answer that is compressed is refused: nobody asked for it.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

import certifi
import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from edge_agent.errors import EdgeAgentError, PolicyError, TransportError
from edge_agent.host.clock import Clock
from edge_agent.sync.pace import RequestGap, StallLimit
from edge_agent.sync.tls import NO_FILES, TlsFiles

MAX_ANSWER_BYTES = 4 << 20
"""Of an answer that is read whole: a listing of as many files as a package may have is a quarter of it."""
MAX_HEADER_BYTES = 64 << 10
MAX_REDIRECTS = 5
_ANSWER_TIMEOUTS = 4
_PORTS = {"http": 80, "https": 443}
_NOT_SECRET = frozenset(("accept", "accept-encoding", "connection", "if-range", "range", "user-agent"))

Origin = tuple[str, str, int | None]


def origin_of(uri: str) -> Origin:
    """Scheme, host and port. Source: RFC 6454, section 4.

    Raises:
        ValueError: the port is no number.
    """
    url = urlsplit(uri)
    return url.scheme.lower(), (url.hostname or "").rstrip("."), url.port or _PORTS.get(url.scheme.lower())


def is_local(host: str) -> bool:
    """True for a name or an address of this device's own loopback."""
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or bool(address and address.is_loopback)


class RegistrySession(requests.Session):
    """The session of one registry.

    Args:
        uri: the registry's.
        timeout_s: in which an answer's headers must be here; an answer read whole has four times as long.
        gap_s: between the starts of two requests to the registry itself.
    """

    def __init__(
        self, uri: str, *, timeout_s: float, clock: Clock, tls: TlsFiles = NO_FILES, gap_s: float = 0.0
    ) -> None:
        super().__init__()
        self._gap = RequestGap(gap_s, clock=clock)
        self._tls = tls
        self._origin = origin_of(uri)
        self._uri = uri
        self._timeout_s = timeout_s
        self._clock = clock
        self._may_go_near = self._origin[0] not in _PORTS or is_local(self._origin[1])
        registry = BoundedAdapter(timeout_s=timeout_s, clock=clock, peers=lambda address: None)
        public = self.merge_environment_settings(uri, {}, None, None, None)["verify"]
        elsewhere = BoundedAdapter(
            timeout_s=timeout_s,
            clock=clock,
            peers=self._check_peer,
            tls=tls.for_stores(public if isinstance(public, str) else certifi.where()),
        )
        self._adapters = (registry, elsewhere)

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """As a session's `send`, under this module's rules.

        Raises:
            PolicyError: the registry leads to a place that it may not lead to.
            TransportError: the answer breaks a bound.
        """
        artifact = bool(kwargs.get("stream"))
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send_once(request, **kwargs)
            target = self.get_redirect_target(response)
            if target is None or request.method not in ("GET", "HEAD"):
                break
            response.close()
            request = self._redirected(request, urljoin(request.url or "", target), artifact=artifact)
        else:
            raise TransportError(f"registry {self._uri} redirects more than {MAX_REDIRECTS} times")
        if not artifact:
            self._read_whole(response)
        return response

    def get_signed(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        """A file at an address that is its own key: what else this session knows of credentials is not sent along.

        Raises:
            PolicyError: the registry leads to a place that it may not lead to.
            OSError, ValueError: there is no answer, or no such address.
        """
        request = requests.Request("GET", url, headers=dict(headers)).prepare()
        return self.send(
            request, timeout=self._timeout_s, **self.merge_environment_settings(url, {}, True, None, None)
        )

    def close(self) -> None:
        for adapter in self._adapters:
            adapter.close()

    def _send_once(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        url = request.url or ""
        at_home = origin_of(url) == self._origin
        request = request.copy()
        request.headers.pop("Cookie", None)
        request.headers["Accept-Encoding"] = "identity"
        if not at_home:
            self._checkplace_of(url)
            for name in [name for name in request.headers if name.lower() not in _NOT_SECRET]:
                del request.headers[name]
        proxies = self.rebuild_proxies(request, kwargs.get("proxies"))
        verify, cert = kwargs.get("verify", True), kwargs.get("cert") if at_home else None
        if at_home and self._tls.ca_file:
            verify = self._tls.ca_file
        if at_home and self._tls.cert_file:
            cert = (self._tls.cert_file, self._tls.key_file)
        if at_home:
            self._gap.wait()
        response = self._adapters[0 if at_home else 1].send(
            request,
            stream=True,
            timeout=kwargs.get("timeout") or self._timeout_s,
            verify=verify,
            cert=cert,
            proxies=proxies,
        )
        response.cookies = RequestsCookieJar()
        return response

    def _redirected(
        self, request: requests.PreparedRequest, url: str, *, artifact: bool
    ) -> requests.PreparedRequest:
        place = place_of(url)
        try:
            there = origin_of(url)
        except ValueError:
            raise TransportError(f"registry {self._uri} redirects to an address that is none") from None
        if there[0] not in _PORTS:
            raise PolicyError(f"the registry redirects to {place!r}, which is not http or https")
        if there != self._origin and not artifact:
            raise TransportError(
                f"registry {self._uri} redirects to {place}, and a registry's answers are taken from itself only",
                remedy="if that is the registry, write its address into registry.uri",
            )
        following = request.copy()
        following.prepare_url(url, None)
        following.headers.pop("Host", None)
        return following

    def _checkplace_of(self, url: str) -> None:
        """Before a connection, for what stands behind a proxy; names are looked up by `_check_peer`."""
        host = origin_of(url)[1]
        address = _address(host)
        if not self._may_go_near and (is_local(host) or (address is not None and _is_near(address))):
            raise self._leads_to(host)

    def _check_peer(self, peer: str) -> None:
        address = _address(peer)
        if not self._may_go_near and address is not None and _is_near(address):
            raise self._leads_to(peer)

    def _leads_to(self, where: str) -> PolicyError:
        return PolicyError(f"registry {self._uri} leads to {where!r}, an address of this device or its link")

    def _read_whole(self, response: requests.Response) -> None:
        """The answer's content, as `requests` keeps it."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            response.close()
            raise TransportError(f"registry {self._uri} sends an answer in another encoding")
        until_s = self._clock.now_s() + _ANSWER_TIMEOUTS * self._timeout_s
        content = bytearray()
        try:
            while chunk := response.raw.read1(64 << 10, decode_content=False):
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise TransportError(
                        f"registry {self._uri} sends an answer of more than {MAX_ANSWER_BYTES} bytes"
                    )
                if self._clock.now_s() > until_s:
                    raise TransportError(f"registry {self._uri} sends its answer too slowly")
        finally:
            response.close()
        response._content, response._content_consumed = bytes(content), True


def open_session(
    uri: str, *, timeout_s: float, clock: Clock, tls: TlsFiles = NO_FILES, gap_s: float = 0.0
) -> RegistrySession:
    """The session of a registry.

    Raises:
        TransportError: its uri is no address, or a file of `tls` is gone since the daemon's start.
    """
    try:
        return RegistrySession(uri, timeout_s=timeout_s, tls=tls, clock=clock, gap_s=gap_s)
    except ValueError as error:
        raise TransportError(
            f"registry.uri {uri!r} is not an address", remedy="check registry.uri"
        ) from error
    except OSError as error:
        raise TransportError(f"registry.ca_file cannot be loaded: {error}") from error


@contextmanager
def in_use(session: requests.Session) -> Iterator[None]:
    """MLflow makes its requests through this session until the block ends."""
    from mlflow.utils import request_utils

    before = request_utils._get_request_session
    request_utils._get_request_session = lambda *args, **kwargs: session
    try:
        yield
    finally:
        request_utils._get_request_session = before


def refusal_in(error: BaseException | None) -> EdgeAgentError | None:
    """What this session raised, below whatever MLflow made of it."""
    while error is not None:
        if isinstance(error, EdgeAgentError):
            return error
        error = error.__cause__ or error.__context__
    return None


class BoundedAdapter(HTTPAdapter):
    """Connections whose answers have a limit in time, and whose peers are looked at."""

    def __init__(
        self,
        *,
        timeout_s: float,
        clock: Clock,
        peers: Callable[[str], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = {} if tls is None else {"ssl_context": tls}
        self._answers = functools.partial(_Answer, timeout_s=timeout_s, clock=clock)
        self._peers = peers
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **{**kwargs, **self._tls})
        self._watch(self.poolmanager, self._peers)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **{**kwargs, **self._tls})
        self._watch(manager, lambda peer: None)  # the peer is the operator's proxy
        return manager

    def _watch(self, manager: Any, peers: Callable[[str], None]) -> None:
        def pool(kind: Any, connection: Any, *args: Any, **kwargs: Any) -> Any:
            made = kind(*args, **kwargs)
            made.ConnectionCls = functools.partial(connection, answers=self._answers, peers=peers)
            return made

        manager.pool_classes_by_scheme = {
            "http": functools.partial(pool, HTTPConnectionPool, _Watched),
            "https": functools.partial(pool, HTTPSConnectionPool, _WatchedTls),
        }


class _Watched(HTTPConnection):
    """A connection with answers of a kind, and a peer that is looked at."""

    def __init__(self, *args: Any, answers: Any, peers: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.response_class = answers
        self._peers = peers

    def connect(self) -> None:
        """Looks once connected, and before the request: a name may mean another address at each look-up."""
        super().connect()
        try:
            self._peers(self.sock.getpeername()[0])
        except EdgeAgentError:
            self.close()
            raise


class _WatchedTls(_Watched, HTTPSConnection):
    """The same over TLS."""


class _Answer(http.client.HTTPResponse):
    """An answer whose bytes must come in time: first all its headers, then whatever a stalled transfer may take."""

    def __init__(self, sock: Any, *args: Any, timeout_s: float, clock: Clock, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _TimedReader(self.fp.detach(), timeout_s, clock)
        self.fp = io.BufferedReader(self._timed)

    def begin(self) -> None:
        super().begin()
        self._timed.headers_are_here()


class _TimedReader(io.RawIOBase):
    """A connection's bytes; one now and then does not keep it alive, wherever in an answer they are."""

    def __init__(self, raw: io.RawIOBase, timeout_s: float, clock: Clock) -> None:
        self._raw = raw
        self._timeout_s = timeout_s
        self._clock = clock
        self._until_s: float | None = clock.now_s() + timeout_s
        self._header_bytes = 0
        self._limit = StallLimit(timeout_s, clock=clock)

    def headers_are_here(self) -> None:
        self._until_s = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._until_s is None:
            count = len(self._limit.wait_for(lambda: self._read(buffer)))
            if count and self._limit.is_over:
                raise TimeoutError("timed out")
            return count
        count = len(self._read(buffer))
        self._header_bytes += count
        if self._clock.now_s() > self._until_s:
            raise TimeoutError("timed out")
        if self._header_bytes > MAX_HEADER_BYTES + io.DEFAULT_BUFFER_SIZE:
            raise http.client.HTTPException(f"an answer has more than {MAX_HEADER_BYTES} bytes of headers")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _read(self, buffer: Any) -> memoryview:
        return memoryview(buffer)[: self._raw.readinto(buffer) or 0]


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return None
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address


def _is_near(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local or address.is_unspecified


def place_of(url: str) -> str:
    """An address without its path, query and user, which may be what lets somebody in."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"[:200]
