"""What all runners of this process may take together, and which is unloaded when another one needs room.

Flow of `admit`: the need (measured, else estimated) is compared with what is free → the model that has been unused for
longest gives up its runner, and so on; one that is answering gives it up afterwards → the context is made smaller,
with a warning → the load is refused only if the weights alone do not fit. An admitted load keeps its need reserved
until its runner is loaded.

One condition orders the decisions. A model that is asked to give up memory takes its own lock; no model may ask for
memory while it holds that lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.cache.record import VersionRecord
from edge_agent.errors import AgentStopping, MemoryShort
from edge_agent.host import identity
from edge_agent.host.memory import available_bytes, total_bytes
from edge_agent.serving.footprint import LEAST_CONTEXT_TOKENS, Footprint, footprint_of
from edge_agent.serving.learned import Learned

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""For others to finish a load or a prompt; then the load goes on with a warning."""
LIMIT_FACTOR, LIMIT_EXTRA_BYTES = 4, 2 << 30
"""How far a runner may go beyond what its version is expected to need before that is the version's own doing."""
_POLL_S = 0.1


class MemoryUser(Protocol):
    """A model whose runners take memory."""

    name: str

    def resident_bytes(self) -> int:
        """What its runners have in memory now."""
        ...

    def last_used_s(self) -> float:
        """Monotonic seconds."""
        ...

    def give_up_memory(self) -> bool:
        """Stops the runner: now, or after the prompts that it answers now. The next prompt loads it again.

        Returns:
            True when it was stopped.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Admission:
    """How a version may be loaded.

    Attributes:
        warning: why the context is smaller than wanted, or memory may not suffice; empty when all is well.
        spare_bytes: what is free beyond that, for more prompts and for remembered ones.
        limit_bytes: no package of this size needs more, and this host has no more.
        is_short: the host has less than that, so a refused allocation may be the host's doing.
    """

    context_tokens: int
    warning: str = ""
    spare_bytes: int = 0
    limit_bytes: int = 0
    is_short: bool = False


class MemoryBudget:
    """Any thread.

    Args:
        limit_bytes: for all runners together; 0 leaves it to the host and its control groups.
        available: what the host has left now, in bytes.
        total: what it has at all.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        learned: Learned,
        available: Callable[[], int] = available_bytes,
        total: Callable[[], int] = total_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._learned = learned
        self._available = available
        self._total = total
        self._clock = clock
        self._host = identity.of_host()
        self._deciding = threading.Condition()
        self._models: list[MemoryUser] = []
        self._reserved: dict[object, int] = {}

    def join(self, model: MemoryUser) -> None:
        with self._deciding:
            self._models.append(model)

    def leave(self, model: MemoryUser) -> None:
        """The model is closed: it waits for no memory any more."""
        with self._deciding:
            self._models = [each for each in self._models if each is not model]
            self._deciding.notify_all()

    def fits_beside(self, record: VersionRecord, folder: Path, context_tokens: int) -> bool:
        """Whether a version fits beside all that is loaded now."""
        with self._deciding:
            return self.expected_bytes(record, folder, context_tokens) <= self._free()

    def expected_bytes(self, record: VersionRecord, folder: Path, context_tokens: int) -> int:
        """What a runner of this version is likely to take: what one took here, else the estimate."""
        return self._need(record, footprint_of(record, folder), context_tokens)

    def attainable_bytes(self) -> int:
        """The most that a runner could have: what is free, and what everything else holds."""
        with self._deciding:
            return self._attainable()

    def check_weights(self, record: VersionRecord) -> None:
        """Refuses what could not be loaded even if everything else stopped.

        Raises:
            MemoryShort: the weights alone take more.
        """
        with self._deciding:
            self._refuse_weights(record, self._attainable())

    @contextmanager
    def admit(
        self, model: MemoryUser, record: VersionRecord, folder: Path, context_tokens: int
    ) -> Iterator[Admission]:
        """Makes room for a version and keeps it reserved for the block.

        Args:
            context_tokens: what the settings want.

        Raises:
            MemoryShort: the weights alone do not fit.
        """
        load = object()
        with self._deciding:
            footprint = footprint_of(record, folder)
            need = self._need(record, footprint, context_tokens)
            self._make_room(model, self._worth_making(need, record, footprint))
            free = self._free()
            self._refuse_weights(record, free)
            tokens, warning = context_tokens, ""
            if need > free:
                tokens = footprint.context_that_fits(free, context_tokens)
                warning = _warning(need, free, context_tokens, tokens)
            expected_bytes = max(need, footprint.needed_bytes(context_tokens))
            limit_bytes = min(expected_bytes * LIMIT_FACTOR + LIMIT_EXTRA_BYTES, self._total())
            admission = Admission(
                context_tokens=tokens,
                warning=warning,
                spare_bytes=max(0, free - need),
                limit_bytes=limit_bytes,
                is_short=free < limit_bytes,
            )
            if warning:
                log.warning(
                    "memory code=memory_short model=%s version=%s %s",
                    record.name,
                    record.key,
                    admission.warning,
                )
            self._reserved[load] = min(need, free)
        try:
            yield admission
        finally:
            with self._deciding:
                del self._reserved[load]
                self._deciding.notify_all()

    def note_peak(self, record: VersionRecord, *, context_tokens: int, peak_bytes: int) -> None:
        """Remembers what a runner really took. From now on that replaces the estimate."""
        self._learned.note_peak(
            record.digest, self._host, context_tokens=context_tokens, peak_bytes=peak_bytes
        )

    def _need(self, record: VersionRecord, footprint: Footprint, context_tokens: int) -> int:
        known = self._learned.of(record.digest, self._host).peaks.get(context_tokens)
        return known or footprint.needed_bytes(context_tokens)

    def _worth_making(self, need: int, record: VersionRecord, footprint: Footprint) -> int:
        """How much room to make. Where an estimate would not come true on an empty host, not even with the shortest
        context, nobody has to go for it: for the weights alone, which are really there."""
        least = min(need, footprint.needed_bytes(LEAST_CONTEXT_TOKENS))
        return need if least <= self._attainable() else record.total_bytes

    def _free(self) -> int:
        """Bytes for another runner. A part of what is reserved may be in use already; it is subtracted all the same."""
        free = self._available()
        if self._limit_bytes:
            held = sum(model.resident_bytes() for model in self._models)
            free = min(free, self._limit_bytes - held)
        return max(0, free - sum(self._reserved.values()))

    def _attainable(self) -> int:
        return self._free() + sum(each.resident_bytes() for each in self._models)

    def _make_room(self, model: MemoryUser, need: int) -> None:
        """Waits, and has other models unloaded, as long as that may help. Releases the lock while it waits.

        Raises:
            AgentStopping: the model was closed.
        """
        limit_s = self._clock() + WAIT_S
        while need > self._free():
            if model not in self._models:
                raise AgentStopping
            others = [each for each in self._models if each is not model and each.resident_bytes()]
            oldest = min(others, key=lambda each: each.last_used_s(), default=None)
            if oldest is not None and oldest.give_up_memory():
                log.info("unloaded to make room model=%s for=%s", oldest.name, model.name)
            elif self._clock() > limit_s or not (others or self._reserved):
                return
            else:
                self._deciding.wait(_POLL_S)

    def _refuse_weights(self, record: VersionRecord, free: int) -> None:
        if record.total_bytes > free:
            raise MemoryShort(
                f"version {record.version} of {record.name} has {record.total_bytes} bytes of weights, "
                f"and {free} bytes of memory are free for it",
                remedy="use a smaller model, stop other programs, or raise inference.memory_limit_bytes "
                "and the service's MemoryMax",
            )


def _warning(need: int, free: int, wanted_tokens: int, tokens: int) -> str:
    what = f"about {need >> 20} MiB of memory are needed, {free >> 20} MiB are free"
    return (
        what if tokens == wanted_tokens else f"{what}: context of {tokens} tokens instead of {wanted_tokens}"
    )
