"""What can be asked: chat, completion, models, health, metrics, and the page. Each is a call of the control socket.

    body, bounded in bytes and time → chat → accepted → the whole answer, or its stream → done

The status line of a stream waits for the first piece of the answer, so that what fails before has its own status. When
a client leaves, the call is closed, and the daemon cancels the prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edge_agent.chat.surfaces import Surface
from edge_agent.errors import (
    BadRequest,
    DaemonNotRunning,
    EdgeAgentError,
    PromptTooLong,
    QueueFull,
    UnknownModel,
)
from edge_agent.gateway import answers, daemon_line
from edge_agent.gateway.answers import Accepted, Stream
from edge_agent.gateway.page import Page
from edge_agent.gateway.refusals import MethodNotAllowed, NotFound, RequestSlow
from edge_agent.settings import Settings, find_control_socket

BODY_S = 30.0
"""A request has so long to arrive."""
MAX_PROMPTS = 36
"""At once: fewer than the control socket has places for one user, so that a command of somebody else still gets in."""
_AGAIN_MS = 1000
_GRACE_S = 30.0
_STATUS_S = 10.0
_CLIENT_LEFT = 499

T = TypeVar("T")
Event = Mapping[str, Any]
Events = AsyncGenerator[dict[str, Any], None]


def make_app(settings: Settings, *, own_bytes: Callable[[], int] = lambda: 0) -> Starlette:
    """The application of these settings. It reads no file.

    Args:
        own_bytes: what this process has in memory, which the daemon is told; 0 where that is not known.
    """
    gateway = _Gateway(settings, own_bytes)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
            Route("/v1/completions", gateway.completion, methods=["POST"]),
            Route("/v1/models", gateway.models),
            Route("/v1/models/{name}", gateway.model),
            Route("/healthz", gateway.health),
            Route("/metrics", gateway.metrics),
            *Page(gateway.told).routes(),
        ],
        exception_handlers={EdgeAgentError: _refused, HTTPException: _not_here, TimeoutError: _stuck},
    )
    app.router.redirect_slashes = False
    return app


class _Gateway:
    """The endpoints. A request is on its own; only how many there are is known."""

    def __init__(self, settings: Settings, own_bytes: Callable[[], int]) -> None:
        self._settings = settings
        self._own_bytes = own_bytes
        self._at_work = 0
        self._scraping = asyncio.Lock()
        limits = settings.limits
        self._body_bytes = limits.payload_bytes
        self._longest_s = max(limits.deadline_s, limits.max_deadline_s) + _GRACE_S

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, Surface.CHAT)

    async def completion(self, request: Request) -> Response:
        return await self._generate(request, Surface.COMPLETION)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(answers.models(await self._status()))})

    async def model(self, request: Request) -> Response:
        wanted = request.path_params["name"]
        for model in answers.models(await self._status()):
            if model["id"] == wanted:
                return JSONResponse(model)
        raise UnknownModel(f"no model is called {wanted[:100]!r} here")

    async def health(self, request: Request) -> Response:
        """200 while the device answers prompts."""
        state = (await self._status())["state"]
        return JSONResponse({"state": state}, 200 if state in ("ready", "degraded") else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus. That the daemon does not answer is a number, too."""
        try:
            # One at a time: the daemon looks at its disk for it.
            async with asyncio.timeout(_STATUS_S), self._scraping:
                document = await _said("metrics", self._ask("metrics"))
        except (DaemonNotRunning, TimeoutError):
            document = {}
        from edge_agent.gateway import prometheus  # its library is for those that are scraped

        body, content_type = prometheus.exposition(document, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def told(self, op: str, **fields: Any) -> Mapping[str, Any]:
        """What the daemon says to an operation with one event of that name.

        Raises:
            EdgeAgentError: it says that something failed, or nothing.
            TimeoutError: it says nothing in time.
        """
        async with asyncio.timeout(_STATUS_S):
            return await _said(op, self._ask(op, **fields))

    async def _generate(self, request: Request, surface: Surface) -> Response:
        try:
            text = await _body(request, self._body_bytes)
            key = request.headers.get("idempotency-key")
            events = self._prompt(body=text, surface=surface, key=key)
            try:
                return await until_gone(request.receive, self._begin(events, surface))
            except BaseException:
                await events.aclose()
                raise
        except (ClientLeft, ClientDisconnect):
            return Response(status_code=_CLIENT_LEFT)  # nobody gets it

    async def _begin(self, events: Events, surface: Surface) -> Response:
        """The response, as soon as its status is known.

        Raises:
            EdgeAgentError: there is no answer.
        """
        accepted = Accepted.of(await self._next(events))
        event = await self._next(events)
        if accepted.stream:
            return _EventStream(Stream(accepted, surface), event, lambda: self._next(events), events)
        await events.aclose()
        return JSONResponse(answers.whole(event, surface))

    async def _next(self, events: Events) -> Event:
        """The next event of a prompt.

        Raises:
            EdgeAgentError: it is an error, or none comes.
        """
        try:
            async with asyncio.timeout(self._longest_s):
                event = await anext(events)
        except (StopAsyncIteration, TimeoutError):
            raise _unanswered() from None
        if event["event"] == "error":
            raise answers.reported(event)
        if event["event"] == "done" and "error" in event["answer"]:
            raise answers.reported(event["answer"]["error"])
        return event

    async def _prompt(self, **fields: Any) -> Events:
        """Asks the daemon a prompt.

        Raises:
            QueueFull: too many are at work already.
        """
        if self._at_work >= MAX_PROMPTS:
            raise QueueFull(f"{self._at_work} requests are at work already", retry_after_ms=_AGAIN_MS)
        self._at_work += 1
        try:
            async with aclosing(self._ask("chat", **fields)) as events:
                async for event in events:
                    yield event
        finally:
            self._at_work -= 1

    async def _status(self) -> Mapping[str, Any]:
        return await self.told("status", brief=True)

    def _ask(self, op: str, **fields: Any) -> Events:
        path = find_control_socket(self._settings)
        if own_bytes := self._own_bytes():
            fields["gateway_memory_bytes"] = own_bytes
        return daemon_line.ask(path, op, **fields)


async def _said(key: str, events: Events) -> Mapping[str, Any]:
    """What the daemon says in one event.

    Raises:
        EdgeAgentError: it says that something failed, or nothing.
    """
    async with aclosing(events):
        async for event in events:
            if key in event:
                return dict(event[key])
            raise answers.reported(event)
    raise _unanswered()


class _EventStream(Response):
    """A streamed answer; its first event is here already."""

    media_type = "text/event-stream"

    def __init__(
        self, stream: Stream, first: Event, more: Callable[[], Awaitable[Event]], events: Events
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._first = first
        self._more = more
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(ClientLeft):
                await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(head)
        event = self._first
        while event["event"] == "delta":
            await send(_part(self._stream.delta(event["delta"]), more=True))
            try:
                event = await self._more()
            except EdgeAgentError as error:
                await send(_part(self._stream.failed(error), more=False))
                return
        await send(_part(self._stream.end(event), more=False))


def _part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


class ClientLeft(Exception):
    """Nobody waits for the response any more."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does something for a client, and stops when it leaves.

    Raises:
        ClientLeft: it has left; the work was cancelled.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit_bytes: int) -> str:
    """The body as a text.

    Raises:
        EdgeAgentError: it is too long, too slow, or no text.
        ClientDisconnect: the client has left.
    """
    given = request.headers.get("content-length", "0")
    if given.isdecimal() and int(given) > limit_bytes:
        raise PromptTooLong(f"the request has {given[:20]} bytes, at most {limit_bytes} are allowed")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise PromptTooLong(f"the request has more than {limit_bytes} bytes")
    except TimeoutError:
        raise RequestSlow(f"the request did not come within {BODY_S:.0f} s") from None
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request is not UTF-8 (byte {error.start})") from error


def _unanswered() -> DaemonNotRunning:
    return DaemonNotRunning("the daemon ended before the answer was whole", remedy="ask again")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, EdgeAgentError)
    return answers.error(error)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == MethodNotAllowed.status:
        response = answers.error(MethodNotAllowed(f"{request.method[:20]} is not allowed here"))
        response.headers.update(error.headers or {})
        return response
    return answers.error(
        NotFound(f"{request.url.path[:100]} is not served here; the agent's http.md says what is")
    )


async def _stuck(request: Request, error: Exception) -> Response:
    return answers.error(DaemonNotRunning("the daemon does not answer", remedy="see its log"))
