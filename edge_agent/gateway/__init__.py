"""The OpenAI interface: a process of its own that speaks HTTP to programs, and to the daemon over its control socket.

Owns the connections of its clients and nothing else: a prompt is the daemon's from the moment it is accepted there,
with the journal, the queue, the deadlines and the cancel that MQTT has. It parses no prompt: the daemon's parser reads
the body as it came.

    settings → doors: sockets, TLS, token → walls → a connection (bounded) → guard: Host, Origin, token → app
    app → control socket: chat → answers: OpenAI's shapes → the client, or its leaving → the control socket is closed

Before the first byte of a client is read, the process gives up all files and the network, but for its listening sockets
and the control socket. Source: docs/http.md, docs/adr/0019-a-process-for-http.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence

from edge_agent import environment
from edge_agent.gateway.app import make_app
from edge_agent.gateway.doors import Door, open_doors
from edge_agent.gateway.guard import Guard
from edge_agent.gateway.server import Server
from edge_agent.host.confinement import Confinement, confine
from edge_agent.host.memory import ProcessMemory
from edge_agent.host.seccomp import Calls, Network
from edge_agent.settings import Settings

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""Started by a connection, it ends when there was none for so long: the service manager starts it again."""


def serve(settings: Settings, *, idle_s: float = IDLE_S) -> int:
    """Serves until SIGTERM or SIGINT, or, on sockets of the service manager, until it is idle.

    Args:
        idle_s: how long without a connection is idle.

    Returns:
        The process's exit code.

    Raises:
        SettingsError: it would be open to a network without a token and TLS, or a file cannot be loaded.
        EdgeAgentError: a socket cannot be opened.
    """
    passed = environment.passed_sockets()
    doors = open_doors(settings, passed)
    memory = ProcessMemory(os.getpid())  # while it can still be read
    walls = confine(around_gateway(doors, memory))
    if walls.missing:
        log.warning(
            "walls missing code=unconfined walls=%s",
            "; ".join(f"{wall}: {why}" for wall, why in walls.missing.items()),
        )
    app = make_app(settings, own_bytes=memory.resident_bytes)
    guards = [(door, Guard(app, hosts=door.hosts, token=door.token)) for door in doors]
    log.info("listening on=%s", ",".join(str(door) for door in doors))
    for number in (signal.SIGTERM, signal.SIGINT):
        # The server has handlers of its own, and sends itself the signal again when it has ended.
        signal.signal(number, lambda *_: None)
    asyncio.run(Server(guards, idle_s=idle_s if passed else None).serve())
    log.info("stopped")
    return 0


def around_gateway(doors: Sequence[Door], memory: ProcessMemory) -> Confinement:
    """What the process keeps: what it listens on, the way to the control socket, and the sight of its own memory."""
    return Confinement(
        calls=Calls(network=Network.SERVER),
        keep=(*(door.listener.fileno() for door in doors), *memory.descriptors),
    )
