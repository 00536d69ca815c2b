"""One prompt while it runs: its text so far, and the chunks and the answer that are made of it.

Owns nothing but the run's own state and does no I/O; when a chunk is sent and when the answer is committed is up to
the dispatcher.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_agent.chat import messages, tools
from edge_agent.chat.clock import Moment
from edge_agent.chat.prompt import Answer, Prompt
from edge_agent.errors import PromptError
from edge_agent.metrics.recent import Took
from edge_agent.runner.protocol import Called, Delta, Done, Refused

CHUNK_INTERVAL_S = 0.05
"""At most 20 chunks a second: a message for each token costs three times the CPU of the generation itself."""


class Runner(Protocol):
    """What a dispatcher needs of a loaded model.

    Attributes:
        suspects: once it has died, the prompts whose turn it was.
    """

    suspects: frozenset[str]

    def fileno(self) -> int: ...

    def start(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float, owner: str = ""
    ) -> None: ...

    def receive(self, timeout_s: float) -> Delta | Called | Done | Refused | None: ...

    def cancel(self, prompt_id: str) -> None: ...


class Lease(Protocol):
    """A runner for one prompt, and the version that it runs."""

    @property
    def runner(self) -> Runner: ...

    @property
    def version(self) -> int: ...

    @property
    def parallel(self) -> int: ...

    @property
    def system_refused(self) -> str: ...

    @property
    def report_crash(self) -> Callable[[frozenset[bytes]], None]: ...


@dataclass(kw_only=True, eq=False)
class Run:
    """A prompt that runs. Only the dispatcher's thread touches it, but for `abandoned`.

    Attributes:
        lease: kept until the prompt is settled.
        release: gives the lease back.
        abandoned: the prompt was answered by somebody else; what the runner still says is void.
        answer: its terminal answer, None while it runs.
        took: what the metrics hear of it, if it is an answer with text.
        put_back: it goes back into the queue instead.
        settle_at_boot_s: when the journal is told next.
    """

    prompt: Prompt
    lease: Lease
    release: ExitStack
    started_boot_s: float
    abandoned: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    took: Took | None = None
    put_back: bool = False
    settle_at_boot_s: float = 0.0
    _first_boot_s: float | None = None
    _sent_boot_s: float = 0.0
    _seq: int = 0
    _text: list[str] = field(default_factory=list)
    _pending: list[str] = field(default_factory=list)
    _called: list[dict[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The request's id, for the runner's log, made unique for each row and attempt: a late cancel of an
        earlier prompt can never hit this one."""
        return f"{self.prompt.id}.{self.prompt.row}.{self.prompt.attempts}"

    @property
    def live(self) -> bool:
        """The runner has it and has not ended it."""
        return self.answer is None and not self.put_back

    @property
    def digest(self) -> bytes:
        """Tells one prompt from another without keeping its text."""
        return hashlib.sha256(json.dumps(self.prompt.document, sort_keys=True).encode()).digest()

    def take_text(self, text: str, now_s: float) -> dict[str, Any] | None:
        """Adds text. Gives the chunk that is due, if one is."""
        if self._first_boot_s is None:
            self._first_boot_s = now_s
        self._text.append(text)
        self._pending.append(text)
        if now_s - self._sent_boot_s < CHUNK_INTERVAL_S:
            return None
        self._sent_boot_s = now_s
        return self.chunk(None)

    def take_call(self, called: Called) -> None:
        """Adds a call of a tool, or more of its arguments."""
        if called.index == len(self._called):
            self._called.append({"name": called.name, "arguments": ""})
        self._called[called.index]["arguments"] += called.arguments

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of the answer, the same ones when the prompt runs again."""
        return tools.with_ids(self._called, answer=f"{self.prompt.id}.{self.prompt.row}")

    def chunk(self, finish_reason: str | None, *, calls: bool = False) -> dict[str, Any] | None:
        """What no chunk has carried yet; None where nobody wants chunks (any more).

        Args:
            calls: the answer's calls, too.
        """
        if not self.prompt.stream or self.abandoned.is_set():
            return None
        document = messages.chunk(
            request_id=self.prompt.id,
            created_s=int(self.prompt.accepted_wall_s),
            model=self.prompt.model,
            seq=self._seq,
            text="".join(self._pending),
            finish_reason=finish_reason,
            tool_calls=self.tool_calls if calls else (),
        )
        self._seq += 1
        self._pending.clear()
        return document

    def timings(self, done: Done, ended_s: float) -> dict[str, float]:
        """The `timings` of the answer, in milliseconds and tokens a second."""
        return messages.timings(
            queued_s=self.prompt.accepted_boot_s,
            started_s=self.started_boot_s,
            first_s=self._first_s(ended_s),
            ended_s=ended_s,
            tokens=done.usage.get("completion_tokens", 0),
            measured=done.timings,
        )

    def measured(self, done: Done, ended_s: float) -> Took:
        """The same for the metrics, unrounded."""
        queued_s, first_s, usage = self.prompt.accepted_boot_s, self._first_s(ended_s), done.usage
        tokens = usage.get("completion_tokens", 0)
        return Took(
            queue_s=max(0.0, self.started_boot_s - queued_s),
            first_token_s=max(0.0, first_s - queued_s),
            request_s=max(0.0, ended_s - queued_s),
            per_token_s=messages.per_token_s(
                decode_s=ended_s - first_s, tokens=tokens, measured=done.timings
            ),
            input_tokens=usage.get("prompt_tokens", 0),
            output_tokens=tokens,
            cached_tokens=usage.get("cached_tokens", 0),
        )

    def completion(self, done: Done, timings: dict[str, float], now: Moment) -> Answer:
        """The answer with all the text."""
        document = messages.completion(
            request_id=self.prompt.id,
            created_s=int(now.wall_s),
            model=self.prompt.model,
            text="".join(self._text),
            finish_reason=done.finish_reason,
            usage=done.usage,
            timings=timings,
            tool_calls=self.tool_calls,
        )
        return Answer.of(document, self.prompt.form, status=200, **self._properties)

    def refusal(self, error: PromptError) -> Answer:
        """The answer that says why there is no text."""
        return Answer.of_error(self.prompt.id, self.prompt.form, error, **self._properties)

    def _first_s(self, ended_s: float) -> float:
        """When its first text came; that of an answer without any is its end."""
        return self._first_boot_s if self._first_boot_s is not None else ended_s

    @property
    def _properties(self) -> dict[str, str]:
        return {"model": self.prompt.model, "version": str(self.lease.version)}
