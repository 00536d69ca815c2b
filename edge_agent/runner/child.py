"""A runner's main: `python -m edge_agent.runner.child FD TURN_FD [SCRATCH]`.

Owns one loaded model and the socket to the daemon. Before it reads a byte of the package, or imports a library that
starts threads, it builds the walls around itself that this host can build, and tells the daemon which ones stand.
It reads none before the daemon has said that it is what it should be, and imports the wrapper's libraries meanwhile.
SCRATCH is the only folder where it may write.

One thread does everything: it looks for frames between two steps of an answer, so it sees a cancel within one decode
step or one prefill slice, and notices at the end of the socket that the daemon has died. A prompt's errors go to the
daemon by code. Whose turn it is stands in the memory behind TURN_FD, where the daemon finds it even if this process is
killed in the middle of a turn.

    Load → confined → libraries → Checked → Loaded | Failed
    Try → Trying …, Tried;  Generate → Delta …, Called …, Done | Refused
    Stop or end of file → exit
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edge_agent.errors import CannotRun, EdgeAgentError, LoadFailed, PolicyError, RunnerError, Unconfined
from edge_agent.host import memory
from edge_agent.host.confinement import Confinement, Walls, confine
from edge_agent.host.seccomp import Calls, Network
from edge_agent.runner import bounds, golden, libraries, loader
from edge_agent.runner.model import TOO_LONG
from edge_agent.runner.protocol import (
    MAX_FRAME_BYTES,
    Cancel,
    Checked,
    Failed,
    Frame,
    FrameReader,
    Generate,
    Load,
    Loaded,
    Stop,
    Tried,
    Try,
    Trying,
    encode,
    encode_turn,
    with_system,
)
from edge_agent.runner.scheduler import MAX_MESSAGE, Scheduler, print_frames


class _Ended(Exception):
    """The daemon said stop, or is gone."""


class Runner:
    """One connection to the daemon and the model that answers on it. One thread.

    Args:
        turn: descriptor of the memory where the daemon reads whose turn it is.
        scratch: the folder where this process may write; None for nowhere.
    """

    def __init__(self, connection: socket.socket, turn: int, scratch: Path | None) -> None:
        self._scratch = scratch
        self._memory = memory.ProcessMemory(os.getpid())
        self._connection = connection
        self._reader = FrameReader(connection, limit_bytes=MAX_FRAME_BYTES)
        self._turn = turn
        self._announced: Sequence[str] = ()
        self._system = ""

    def run(self) -> None:
        """Serves until the daemon says stop or is gone."""
        try:
            model, limit = self._load()
            scheduler = Scheduler(model, limit=limit, send=self._send, announce=self._announce)
            while True:
                frame = self._next() if scheduler.idle else self._reader.read(0)
                while frame is not None:
                    self._handle(frame, model, scheduler)
                    frame = self._reader.read(0)
                scheduler.step()
        except (_Ended, EOFError):
            return

    def _handle(self, frame: Frame, model: loader.Model, scheduler: Scheduler) -> None:
        if isinstance(frame, Generate):
            scheduler.add(frame)
        elif isinstance(frame, Cancel):
            scheduler.cancel(frame.id)
        elif isinstance(frame, Stop):
            raise _Ended
        elif isinstance(frame, Try) and scheduler.idle:
            self._try_out(model)
        else:
            raise RunnerError(f"a {frame.type} frame came out of turn")

    def _load(self) -> tuple[loader.Model, int]:
        request = self._next()
        if not isinstance(request, Load):
            raise RunnerError("the first frame is not a load")
        started_s = time.monotonic()
        try:
            bounds.limit_memory(request.memory_bytes)
            walls = self._confine(request)
            if request.shipped_wrapper:
                libraries.lighten()
                loader.import_libraries()
            started_s += self._await_check()
            with bounds.panics_caught():
                model = loader.load(
                    Path(request.folder),
                    context_tokens=request.context_tokens,
                    max_tokens=request.max_tokens,
                    threads=request.threads,
                    kv_bytes=request.kv_bytes,
                    repetition_penalty=request.repetition_penalty,
                )
                system_refused = model.warm_up(request.system)
        except _Ended:
            raise
        except Exception as error:
            print_frames(error)
            self._send(_failed(error, request))
            raise _Ended from error
        gc.collect()
        gc.freeze()  # what a load leaves behind stays; later collections need not walk it
        memory.end_huge_pages()  # the weights have theirs
        load_ms = (time.monotonic() - started_s) * 1000
        limit = request.parallel if model.answers_several else 1
        self._send(
            Loaded(
                flavor=model.flavor,
                signature=model.signature,
                load_ms=load_ms,
                parallel=limit,
                system_refused=system_refused[:MAX_MESSAGE],
                system_too_long=system_refused == TOO_LONG,
                walls=list(walls.stand),
                missing_walls=dict(walls.missing),
            )
        )
        self._system = "" if system_refused == TOO_LONG else request.system
        return model, limit

    def _await_check(self) -> float:
        """Returns when the model's files may be read, and gives the seconds until then."""
        since_s = time.monotonic()
        try:
            frame = self._next()
        except EOFError as error:  # not one of the model's
            raise _Ended from error
        if not isinstance(frame, Checked):
            raise RunnerError("the frame after a load does not say that its files are checked")
        return time.monotonic() - since_s

    def _confine(self, request: Load) -> Walls:
        """
        Raises:
            Unconfined: the request asks for walls that this host cannot build.
        """
        walls = confine(
            Confinement(
                read=(Path(request.folder), *map(Path, request.read)),
                write=(self._scratch,) if self._scratch else (),
                calls=Calls(network=Network.INTERNET if request.network else Network.NONE),
                keep=(self._connection.fileno(), self._turn, *self._memory.descriptors),
            )
        )
        if request.confined and (lacking := walls.lacking()):
            raise Unconfined(
                f"the model runs code of its own, which this host cannot confine ({lacking})",
                remedy="use a kernel with Landlock (5.13 or newer) and seccomp, or set trust.unconfined_code = true",
            )
        return walls

    def _try_out(self, model: loader.Model) -> None:
        try:
            with bounds.panics_caught():
                failures, asked, tokens_per_s = golden.try_out(
                    model.golden,
                    signature=model.signature,
                    ask=lambda document: model.ask(with_system(document, self._system)),
                    on_prompt=lambda prompt, of: self._send(Trying(prompt=prompt, of=of)),
                )
        except Exception as error:  # noqa: BLE001 - a candidate may fail in any way; the daemon decides
            print_frames(error)
            failures, asked, tokens_per_s = [_describe(error)], 1, 0.0
        # Not getrusage: its peak starts with the parent's, whose memory this process shared until exec.
        peak_bytes = self._memory.peak_bytes()
        failures = [failure[:MAX_MESSAGE] for failure in failures]
        self._send(Tried(failures=failures, asked=asked, tokens_per_s=tokens_per_s, memory_bytes=peak_bytes))

    def _next(self) -> Frame:
        frame = self._reader.read(None)
        if isinstance(frame, Stop) or frame is None:
            raise _Ended
        return frame

    def _announce(self, prompts: Sequence[str]) -> None:
        if prompts != self._announced:
            os.pwrite(self._turn, encode_turn(prompts), 0)
            self._announced = prompts

    def _send(self, frame: Frame) -> None:
        self._connection.settimeout(None)
        try:
            self._connection.sendall(encode(frame))
        except OSError as error:
            raise _Ended from error


def _failed(error: Exception, request: Load) -> Failed:
    """What the daemon is told of a load that failed, and whose doing it is."""
    code, message = LoadFailed.code, _describe(error)
    if isinstance(error, CannotRun | PolicyError):
        code = error.code
    elif bounds.is_memory_error(error):
        code = CannotRun.code if request.memory_is_short else LoadFailed.code
        limit = (
            f"its limit is {request.memory_bytes >> 20} MiB" if request.memory_bytes else "it has no limit"
        )
        message = f"memory was refused to it ({limit}): {message}"[:MAX_MESSAGE]
    return Failed(message=message, code=code)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = text if isinstance(error, EdgeAgentError) else f"{type(error).__name__}: {text}"
    return named[:MAX_MESSAGE]


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        scratch = Path(sys.argv[3]) if len(sys.argv) > 3 else None
        Runner(connection, int(sys.argv[2]), scratch).run()


if __name__ == "__main__":
    main()
