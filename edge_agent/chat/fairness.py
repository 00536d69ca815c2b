"""Whose prompt is next, and how much of the queue one client may have. Pure rules.

A client is a name that the broker's rules bind to an identity, or one of those below. Nobody waits for more than one
prompt of each other client, however many of them wait.
"""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Callable, Mapping

from edge_agent.errors import QueueFull

LOCAL = "@local"
"""All users of the control socket. No client over MQTT can have this name, the next one, or that of `ANONYMOUS`."""
HTTP = "@http"
"""All users of the OpenAI interface."""
MAX_CLIENTS = 1024
HARD_LIMIT = 2
"""The queue has at most this many times `queue_depth` prompts, however many clients want their share of it."""


class Turns:
    """Who had a turn when. One thread at a time.

    A client has the next turn if the fewest of its prompts run; among those, if it has waited longest: since its last
    turn, or since its prompt came if it had none. So a thousand new names are not before one that is known.
    """

    def __init__(self) -> None:
        self._last: collections.OrderedDict[object, int] = collections.OrderedDict()
        self._newest = 0

    def choose(self, waiting: Mapping[object, int], running: Mapping[object, int]) -> object:
        """The client whose turn it is; its turn is noted.

        Args:
            waiting: client → the row of its oldest prompt; at least one. Rows count up, so they are the clock here.
            running: client → how many of its prompts run.
        """

        def place(client: object) -> tuple[int, int, bool]:
            return (
                running.get(client, 0),
                self._last.get(client, waiting[client]),
                client in self._last,
            )

        client = min(waiting, key=place)
        self._newest = max(self._newest, *waiting.values())
        self._last[client] = self._newest
        self._last.move_to_end(client)
        while len(self._last) > MAX_CLIENTS:
            self._last.popitem(last=False)
        return client


def check_share(
    unanswered: Mapping[object, int], client: str, *, queue_depth: int, retry_after_ms: int
) -> None:
    """Whether there is a place in the queue for one more prompt of a client.

    A client that is alone may have the whole queue. While others have prompts in it, each may have an equal share, and
    finds room for it even in a queue that somebody has filled before.

    Args:
        unanswered: client → how many prompts of it wait or run.

    Raises:
        QueueFull: there is none.
    """
    total, own = sum(unanswered.values()), unanswered.get(client, 0)
    clients = len(unanswered.keys() | {client})
    if clients == 1:
        if total >= queue_depth:
            raise QueueFull(f"{total} prompts wait already", retry_after_ms=retry_after_ms)
        return
    share = max(1, queue_depth // clients)
    if own >= share:
        raise QueueFull(
            f"{own} prompts of this client wait already; while others wait, its share of the queue is {share}",
            retry_after_ms=retry_after_ms,
        )
    if total >= HARD_LIMIT * queue_depth:
        raise QueueFull(f"{total} prompts of {clients} clients wait already", retry_after_ms=retry_after_ms)


def owner_names() -> Callable[[str], str]:
    """Gives each client a name that says nothing to the model's process, and another one after each start."""
    key = os.urandom(16)
    return lambda client: hashlib.blake2b(client.encode(), key=key, digest_size=16).hexdigest()
