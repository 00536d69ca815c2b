"""Whose turn it is: the prompts that run in a runner take turns, one step of a lane each. One thread.

Owns the lanes (a prompt that the model answers, each with a generator of its own) and the prompts that wait for
memory. Knows nothing of tokens. Why it is this policy: docs/adr/0006.

    add → waits → model.start: a lane → step, step, … → Delta …, Called …, Done | Refused

- The first text of an answer goes at once. While nobody else has a turn, later text waits for `TEXT_INTERVAL_S`: each
  frame wakes the daemon on a processor that the model computes on, and a client gets no more chunks than that.
- A newcomer has the next turn, and then one in each round: it waits for a step of each lane, never for an answer.
- Memory goes in the order in which prompts came: a small one does not overtake a large one for ever.
- A cancelled prompt has ended when the model computes nothing more for it, and not before: the daemon, which waits for
  that end, kills a process that does not stop, and the prompt behind it is not to blame.
"""

from __future__ import annotations

import collections
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_agent.errors import BadRequest, Cancelled, ModelFailed, PromptError, PromptTooLong, by_code
from edge_agent.runner import bounds
from edge_agent.runner.model import End, Lane, Model, ToolCall
from edge_agent.runner.protocol import MAX_DELTA_CHARACTERS, Called, Delta, Done, Generate, Refused

MAX_MESSAGE = 500
TEXT_INTERVAL_S = 0.055
"""A little more than the daemon leaves between two chunks: what came before one is due would wait for the next."""
_TICK_S = 0.05


@dataclass(kw_only=True)
class _Running:
    """A prompt that is answered, and its lane.

    Attributes:
        held: text that no frame has carried yet.
        due_s: when the next frame may go.
    """

    lane: Lane
    request: Generate
    held: str = ""
    due_s: float = -math.inf


class Scheduler:
    """The prompts of one runner, waiting and running. One thread.

    Args:
        limit: prompts that run at once, at most.
        send: takes the frames for the daemon.
        announce: told before each turn whose turn it is: they are the suspects if the process dies in it.
        now: monotonic, in seconds.
    """

    def __init__(
        self,
        model: Model,
        *,
        limit: int,
        send: Callable[[Delta | Called | Done | Refused], None],
        announce: Callable[[Sequence[str]], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._limit = limit
        self._send = send
        self._announce = announce
        self._now = now
        self._waiting: collections.deque[Generate] = collections.deque()
        self._lanes: collections.deque[_Running] = collections.deque()
        self._stopping: list[Generate] = []
        self._may_start = False

    @property
    def idle(self) -> bool:
        """True when nobody waits and nothing runs."""
        return not self._waiting and not self._lanes and not self._stopping

    def add(self, request: Generate) -> None:
        """A prompt came."""
        for running in self._lanes:  # its turn may be long
            self._send_text(running)
        self._waiting.append(request)
        self._may_start = True

    def cancel(self, prompt_id: str) -> None:
        """Refuses a prompt, waiting or running, as soon as the model has stopped; unknown ids are ignored."""
        for request in list(self._waiting):
            if request.id == prompt_id:
                self._waiting.remove(request)
                self._refuse(request, _cancelled())
        for running in list(self._lanes):
            if running.request.id == prompt_id:
                self._lanes.remove(running)
                self._send_text(running)
                self._close(running)
                self._stopping.append(running.request)
                self._refuse_stopped(0)

    def step(self) -> None:
        """One turn: starts who can start, then one step of the lane whose turn it is. While the model has not stopped
        for a cancelled prompt, a short wait instead."""
        if self._stopping and not self._refuse_stopped(_TICK_S):
            return
        if self._may_start and self._waiting:
            self._may_start = False
            self._start()
        if not self._lanes:
            return
        running = self._lanes.popleft()
        request = running.request
        self._announce([request.id])
        try:
            with bounds.panics_caught():
                items = next(running.lane)
        except StopIteration:
            self._end(running, ModelFailed("the model's stream ended without usage and finish_reason"))
            return
        except Exception as error:  # noqa: BLE001 - model code may raise anything
            self._end(running, refusal_of(error, [request.id]))
            return
        for item in items:
            if isinstance(item, End):
                self._send_text(running)
                self._send_calls(request.id, item.tool_calls)
                self._send(
                    Done(
                        id=request.id,
                        finish_reason=item.finish_reason,
                        usage=item.usage,
                        timings=item.timings,
                    )
                )
                self._close(running)
                return
            running.held += item
        if self._lanes or self._waiting or self._now() >= running.due_s:
            self._send_text(running)
        self._lanes.append(running)

    def _send_text(self, running: _Running) -> None:
        text, running.held = running.held, ""
        for start in range(0, len(text), MAX_DELTA_CHARACTERS):
            self._send(Delta(id=running.request.id, text=text[start : start + MAX_DELTA_CHARACTERS]))
        if text:
            running.due_s = self._now() + TEXT_INTERVAL_S

    def _send_calls(self, prompt_id: str, calls: Sequence[ToolCall]) -> None:
        for index, call in enumerate(calls):
            for start in range(0, max(1, len(call.arguments)), MAX_DELTA_CHARACTERS):
                part = call.arguments[start : start + MAX_DELTA_CHARACTERS]
                self._send(Called(id=prompt_id, index=index, name=call.name, arguments=part))

    def close(self) -> None:
        """Ends every lane."""
        for running in self._lanes:
            running.lane.close()
        self._lanes.clear()

    def _start(self) -> None:
        room = self._limit - len(self._lanes)
        if room <= 0:
            return
        started: list[_Running] = []
        for _ in range(min(room, len(self._waiting))):
            request = self._waiting.popleft()
            # One by one: reading a prompt may end the process, which is no fault of those that came with it.
            self._announce([request.id])
            try:
                with bounds.panics_caught():
                    lane = self._model.start(request.document, request.owner)
            except Exception as error:  # noqa: BLE001 - model code may raise anything
                self._refuse(request, refusal_of(error, [request.id]))
                self._may_start = True
                continue
            if lane is None:
                self._waiting.appendleft(request)
                break
            started.append(_Running(lane=lane, request=request))
        self._lanes.extendleft(reversed(started))

    def _refuse_stopped(self, timeout_s: float) -> bool:
        if not self._model.stopped(timeout_s):
            return False
        for request in self._stopping:
            self._refuse(request, _cancelled())
        self._stopping.clear()
        return True

    def _end(self, running: _Running, error: PromptError) -> None:
        self._send_text(running)
        self._refuse(running.request, error)
        self._close(running)

    def _close(self, running: _Running) -> None:
        running.lane.close()
        self._may_start = True  # there is memory again

    def _refuse(self, request: Generate, error: PromptError) -> None:
        self._send(Refused(id=request.id, code=error.code, message=error.message[:MAX_MESSAGE]))


def _cancelled() -> Cancelled:
    return Cancelled("the prompt was cancelled")


def refusal_of(error: Exception, prompts: Sequence[str]) -> PromptError:
    """What prompts get for what model code raised: its own refusal by code, else `model_failed` without its text."""
    if isinstance(error, PromptError):
        return error
    code = str(getattr(error, "code", ""))
    if kind := by_code(BadRequest, PromptTooLong, ModelFailed).get(code):
        return kind(str(error).removeprefix(f"{code}: "))
    print_frames(error, *prompts)
    if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
        # MLflow's schema check; its text has the prompt in it.
        return BadRequest("the model's signature does not admit this request")
    return ModelFailed(f"the model raised {type(error).__name__}")


def print_frames(error: BaseException, *prompts: str) -> None:
    """Where it went wrong, without the message: that may have the prompt in it, and this output is logged."""
    print(
        f"request={','.join(prompts) or '-'} {type(error).__name__}",
        *traceback.format_tb(error.__traceback__),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
