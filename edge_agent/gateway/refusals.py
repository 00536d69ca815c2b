"""What the OpenAI interface itself refuses, before the daemon hears of it. Each has HTTP's status."""

from __future__ import annotations

from typing import ClassVar

from edge_agent.errors import EdgeAgentError


class HttpRefusal(EdgeAgentError):
    """A request that goes no further.

    Attributes:
        status: HTTP's.
    """

    status: ClassVar[int] = 400


class Unauthorized(HttpRefusal):
    code, status = "unauthorized", 401


class OriginRefused(HttpRefusal):
    code, status = "origin_refused", 403


class NotFound(HttpRefusal):
    code, status = "not_found", 404


class MethodNotAllowed(HttpRefusal):
    code, status = "method_not_allowed", 405


class RequestSlow(HttpRefusal):
    code, status = "request_slow", 408


class HostRefused(HttpRefusal):
    code, status = "host_refused", 421


class CannotListen(EdgeAgentError):
    """The address of `http.listen` cannot be opened."""

    code = "cannot_listen"
