"""The daemon's side of a runner: start, load, generate, cancel, stop, kill.

Owns one child process, its socket and the memory in which it notes whose turn it is. Does not trust the child: every
frame is checked, every wait is bounded, and a child that breaks the protocol, hangs or dies is killed and
reported as a `RunnerError`. The owner of this object then starts another.

    RunnerProcess(…) → load() → start(), start() → receive(), receive() … → stop()
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent import environment
from edge_agent.errors import (
    Cancelled,
    CannotRun,
    DeadlineExceeded,
    EdgeAgentError,
    LoadFailed,
    ModelFailed,
    PolicyError,
    PromptError,
    PromptTooLong,
    RunnerCrashed,
    RunnerError,
    error_of,
)
from edge_agent.host import cpus, memory
from edge_agent.runner.output import OutputTail
from edge_agent.runner.protocol import (
    MAX_GOLDEN,
    MAX_REPLY_BYTES,
    TURN_BYTES,
    Called,
    Cancel,
    Checked,
    Delta,
    Done,
    Failed,
    Frame,
    FrameReader,
    Generate,
    Load,
    Loaded,
    OnPrompt,
    Refused,
    Stop,
    Tried,
    Try,
    Trying,
    decode_turn,
    encode,
)
from edge_agent.runner.scratch import make_scratch, remove_scratch

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
KILL_WAIT_S = 10.0
CANCEL_GRACE_S = 30.0
"""How long a cancelled prompt may take to end: up to one prefill slice of a large model on a slow device."""

MAX_ANSWER_CHARACTERS = 4 << 20

_OWN_SIGNALS = frozenset(
    (
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGTRAP,
        signal.SIGPROF,
    )
)
"""Signals that a process causes itself; SIGPROF by `bounds.computing`. SIGKILL may come from the kernel when memory
runs out."""
_COMPUTING = 0.75
"""Of the time that it had: a process that used the processor for so long waited for no slow disk and no busy host."""
_SEND_TIMEOUT_S = 30.0
_SEND_BYTES = 1 << 16


_LARGEST_HUGE_PAGE_BYTES = 32 << 20

_ENVIRONMENT_NAMES = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")


def child_environment(state_dir: Path) -> dict[str, str]:
    """A runner's whole environment: an allow-list of the daemon's variables, no credentials, no telemetry.

    A runner behind its walls has another home, and another folder for temporary files: its own.

    Each token reads all weights, and in pages of 4 KiB looking up where they are costs about a tenth of the time. So
    glibc (2.35 or newer) asks the kernel for huge pages, where the kernel gives them to who asks (`madvise`). It then
    takes memory in whole ones, so not where one alone is as large as a model.
    """
    worth_it = memory.huge_page_bytes() <= _LARGEST_HUGE_PAGE_BYTES
    return {
        **environment.inherited_environment(*_ENVIRONMENT_NAMES),
        **({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if worth_it else {}),
        "HOME": str(state_dir),
        "ORT_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
    }


@dataclass(kw_only=True)
class _Open:
    """A prompt that the child is working on.

    Attributes:
        until_s: its deadline.
        late: it was stopped because of that.
        kill_s: when the child is killed, because it was told to stop this prompt and has not.
    """

    until_s: float
    late: bool = False
    kill_s: float = math.inf
    characters: int = 0

    def next_s(self) -> float:
        """When there is something to do for it."""
        return self.kill_s if self.late else min(self.until_s, self.kill_s)


class RunnerProcess:
    """One child process. One thread loads, starts and receives; `cancel` and `kill` may come from any thread.

    Args:
        model: configured name, for logs.
        environment: the child's whole environment.

    Attributes:
        suspects: after its death, the prompts whose turn it was, as far as the child noted it.

    Raises:
        RunnerError: the host cannot start another process.
    """

    def __init__(self, *, model: str, environment: dict[str, str]) -> None:
        self.model = model
        self.suspects: frozenset[str] = frozenset()
        self._open: dict[str, _Open] = {}
        self._send_lock = threading.Lock()  # never held while somebody waits
        self._unsent = bytearray()
        with contextlib.ExitStack() as undoing:
            try:
                self._begin(environment, undoing)
            except (OSError, RuntimeError) as error:  # no descriptors, no memory, no thread
                raise RunnerError(f"no process can be started for model {model}: {error}") from error
            undoing.pop_all()

    def _begin(self, environment: dict[str, str], undoing: contextlib.ExitStack) -> None:
        """Starts the child.

        Args:
            undoing: ends what is there already, if the rest is not to be had.
        """
        ours, theirs = socket.socketpair()
        undoing.enter_context(ours)
        with theirs:
            self._socket, self._reader = ours, FrameReader(ours, limit_bytes=MAX_REPLY_BYTES)
            # A second object for the same socket, because a sender must not wait for the reader's timeout.
            self._sender = undoing.enter_context(ours.dup())
            self._sender.setblocking(False)
            self._turn = _turn_memory()
            undoing.callback(os.close, self._turn)
            self._scratch = make_scratch()
            undoing.callback(remove_scratch, self._scratch)
            numbers = (theirs.fileno(), self._turn)
            scratch = [str(self._scratch)] if self._scratch else []
            if self._scratch:
                environment = {**environment, "HOME": str(self._scratch), "TMPDIR": str(self._scratch)}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent.runner.child", *map(str, numbers), *scratch],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                pass_fds=numbers,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        undoing.callback(self._process.stdout.close)
        undoing.callback(self._process.wait)
        undoing.callback(self._process.kill)
        self._memory = memory.ProcessMemory(self.pid)  # while it can still be seen
        undoing.callback(self._memory.close)
        self._output = OutputTail(self._process.stdout, name=f"runner-output-{self.model}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def load(self, request: Load, *, timeout_s: float, check: Callable[[], None] = lambda: None) -> Loaded:
        """Loads the model; blocks until it answers. The child reads none of its files before `check` of them has
        returned, and imports its libraries meanwhile.

        Raises:
            RunnerError: it failed, died, or took longer than `timeout_s`; the child is dead then.
        """
        self._write(encode(request))
        check()
        with contextlib.suppress(RunnerError):  # a child that is gone has said why
            self._write(encode(Checked()))
        frame = self._receive(time.monotonic() + timeout_s)
        if isinstance(frame, Loaded):
            return frame
        if isinstance(frame, Failed):
            self.kill()
            raise _load_error(frame)
        raise self._without_answer(frame, "did not load", timeout_s)

    def try_out(self, *, timeout_s: float, on_prompt: OnPrompt = lambda prompt, of: None) -> Tried:
        """Runs the gate on the loaded model; blocks until it has answered. `on_prompt` hears how far it is.

        Raises:
            RunnerError: it died, or took longer than `timeout_s`; the child is dead then.
        """
        self._write(encode(Try()))
        until_s = time.monotonic() + timeout_s
        frame = _gone_through(lambda: self._receive(until_s), on_prompt)
        if isinstance(frame, Tried):
            return frame
        raise self._without_answer(frame, "was not through the gate", timeout_s)

    def _without_answer(self, frame: Frame | None, what: str, timeout_s: float) -> RunnerError:
        """Kills a child that did not answer; gives the error. One that computed all the time is itself to blame."""
        used_s = cpus.used_s(self.pid)
        self.kill()
        if frame is not None:
            return RunnerError("runner spoke out of turn")
        kind = LoadFailed if used_s >= timeout_s * _COMPUTING else RunnerError
        return kind(f"model {what} within {timeout_s:.0f} s, and computed for {used_s:.0f} s")

    def fileno(self) -> int:
        """For `select`. It becomes readable when a frame arrives, not for one that was read already."""
        return self._socket.fileno()

    def start(self, prompt_id: str, document: dict[str, Any], *, timeout_s: float, owner: str = "") -> None:
        """Gives the child a prompt of an owner, as in `Generate`. `receive` tells what becomes of it.

        Args:
            prompt_id: not given before.
            timeout_s: until the prompt is stopped.

        Raises:
            PromptTooLong: the prompt does not fit a frame.
            RunnerError: the child is gone, or took nothing for `_SEND_TIMEOUT_S`.
        """
        try:
            line = encode(Generate(id=prompt_id, document=document, owner=owner))
        except RunnerError as error:
            raise PromptTooLong("the request is more than a runner takes") from error
        self._open[prompt_id] = _Open(until_s=time.monotonic() + timeout_s)
        self._write(line)

    def receive(self, timeout_s: float) -> Delta | Called | Done | Refused | None:
        """The next frame of any prompt, or None if none comes within `timeout_s`. Done and Refused end a prompt.

        Raises:
            RunnerError: the child died, hung or broke the protocol. It is dead then, and every prompt is lost.
        """
        limit_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(RunnerError):  # a child that is gone is seen at the end of what it said
                self._send_rest()
            self._stop_the_late()
            first_s = min((prompt.next_s() for prompt in self._open.values()), default=limit_s)
            frame = self._receive(min(limit_s, first_s))
            if frame is not None:
                return self._checked(frame)
            if time.monotonic() >= limit_s:
                return None

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]:
        """Streams the text of an answer to a prompt while no other is running. The last item is `Done`. See `start`.

        Raises:
            PromptError: the model refused the prompt, it was cancelled, or `timeout_s` passed.
            RunnerError: the child died, hung or broke the protocol; it is dead then.
        """
        self.start(prompt_id, document, timeout_s=timeout_s)
        while True:
            frame = self.receive(1.0)
            if isinstance(frame, Refused):
                raise error_of(frame.code, frame.message, among=(PromptError,), otherwise=ModelFailed)
            if isinstance(frame, Delta | Done):
                yield frame
            if isinstance(frame, Done):
                return

    def cancel(self, prompt_id: str) -> None:
        """Asks the child to end a prompt, which is then refused as cancelled. No other prompt is affected, unless the
        child does not do it within `CANCEL_GRACE_S`: then `receive` kills it.

        Never waits: if the child takes nothing now, the next `receive` sends the request.
        """
        if prompt := self._open.get(prompt_id):
            prompt.kill_s = min(prompt.kill_s, time.monotonic() + CANCEL_GRACE_S)
        with contextlib.suppress(RunnerError):  # a dead child is reported by `receive`
            self._post(encode(Cancel(id=prompt_id)))

    def stop(self) -> None:
        """Lets the child end, or kills it after a grace period, together with everything it started."""
        with contextlib.suppress(RunnerError):
            self._post(encode(Stop()))
        with contextlib.suppress(OSError):  # a child that waits for its frames to be read sees the end
            self._socket.shutdown(socket.SHUT_RD)
        # WNOWAIT leaves a zombie: while it exists, its process group's number cannot be reused.
        limit_s = time.monotonic() + STOP_GRACE_S
        while self._process.returncode is None and time.monotonic() < limit_s:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.01)
        else:
            log.warning("runner did not stop code=runner_failed model=%s pid=%d", self.model, self.pid)
        self.kill()

    def kill(self) -> None:
        """Kills the child and everything it started, at once. May be called again."""
        if self._process.returncode is None:  # not reaped: its number, and its group's, are still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            log.error("runner cannot be killed code=runner_failed model=%s pid=%d", self.model, self.pid)
        with self._send_lock:
            if self._socket.fileno() >= 0:  # not killed before
                self.suspects = decode_turn(os.pread(self._turn, TURN_BYTES, 0))
                os.close(self._turn)
            self._socket.close()
            self._sender.close()
        self._memory.close()
        remove_scratch(self._scratch)
        self._output.wait(1.0)

    def last_output(self) -> str:
        """The end of what the child printed. Not to be logged once it has had a prompt: model code may print it."""
        return self._output.text

    def _write(self, line: bytes) -> None:
        """Returns when the child has taken the line."""
        limit_s = time.monotonic() + _SEND_TIMEOUT_S
        self._post(line)
        while self._unsent:
            if time.monotonic() > limit_s:
                self.kill()  # it may have half of the line, and could not read what follows as a frame
                raise RunnerError(f"runner took nothing for {_SEND_TIMEOUT_S:.0f} s")
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile: the next line finds out
                select.select([], [self._sender], [], 0.1)
            self._send_rest()

    def _post(self, line: bytes) -> None:
        """Sends as much as the child takes now. The rest is sent before anything else."""
        with self._send_lock:
            self._unsent += line
        self._send_rest()

    def _send_rest(self) -> None:
        with self._send_lock:
            try:
                while self._unsent:
                    sent = self._sender.send(self._unsent[:_SEND_BYTES], socket.MSG_NOSIGNAL)
                    del self._unsent[:sent]
            except BlockingIOError:
                return
            except OSError as error:
                self._unsent.clear()
                raise RunnerError(f"runner is gone ({self.exit_text()})") from error

    def _receive(self, deadline_s: float) -> Frame | None:
        """The next frame, or None at the deadline."""
        try:
            return self._reader.read(max(0.0, deadline_s - time.monotonic()))
        except EOFError as error:
            self.kill()
            kind = RunnerCrashed if -(self._process.returncode or 0) in _OWN_SIGNALS else RunnerError
            raise kind(f"runner died ({self.exit_text()})") from error
        except RunnerError:
            self.kill()
            raise

    def _stop_the_late(self) -> None:
        """Stops prompts whose time is over. A child that does not stop one is killed."""
        now_s = time.monotonic()
        for prompt_id, prompt in self._open.items():
            if now_s >= prompt.kill_s:
                self.kill()
                raise RunnerError("runner did not stop when it was told to")
            if now_s >= prompt.until_s and not prompt.late:
                prompt.late = True
                self.cancel(prompt_id)

    def _checked(self, frame: Frame) -> Delta | Called | Done | Refused:
        prompt = self._open.get(frame.id) if isinstance(frame, Delta | Called | Done | Refused) else None
        if prompt is None or not isinstance(frame, Delta | Called | Done | Refused):
            self.kill()
            raise RunnerError("runner spoke out of turn")
        if isinstance(frame, Delta | Called):
            text = frame.text if isinstance(frame, Delta) else frame.name + frame.arguments
            prompt.characters += len(text) + 1  # a frame without text takes room, too
            if prompt.characters > MAX_ANSWER_CHARACTERS:
                self.kill()
                raise RunnerError(f"the answer has more than {MAX_ANSWER_CHARACTERS} characters")
            return frame
        del self._open[frame.id]
        if prompt.late and isinstance(frame, Refused) and frame.code == Cancelled.code:
            late = DeadlineExceeded("the deadline passed before the answer was whole")
            return Refused(id=frame.id, code=late.code, message=late.message)
        return frame

    def resident_bytes(self) -> int:
        """What the child has in memory now; 0 when it is gone."""
        return self._memory.resident_bytes()

    def peak_bytes(self) -> int:
        """The most that the child has had in memory at once; 0 when it is gone."""
        return self._memory.peak_bytes() if self.alive else 0

    def exit_text(self) -> str:
        """How the child ended, without anything that it printed."""
        code = self._process.poll()
        if code is None:
            return "connection closed"
        how = ", because it computed too long for one step" if code == -signal.SIGPROF else ""
        return f"signal {-code}{how}" if code < 0 else f"exit code {code}"


def _gone_through(receive: Callable[[], Frame | None], on_prompt: OnPrompt) -> Frame | None:
    """Hears which golden prompts are asked, one after the other; gives the frame that comes instead of the next."""
    frame = receive()
    for number in range(1, MAX_GOLDEN + 2):  # one more stands for those that are too many
        if not (isinstance(frame, Trying) and number == frame.prompt <= frame.of <= MAX_GOLDEN + 1):
            break
        on_prompt(frame.prompt, frame.of)
        frame = receive()
    return frame


def _load_error(frame: Failed) -> EdgeAgentError:
    message = f"model does not load: {frame.message}"
    return error_of(frame.code, message, among=(CannotRun, LoadFailed, PolicyError), otherwise=LoadFailed)


def _turn_memory() -> int:
    """Descriptor of `TURN_BYTES` shared with the child, which can neither grow nor shrink them."""
    descriptor = os.memfd_create("turn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, TURN_BYTES)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return descriptor
