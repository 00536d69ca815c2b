"""A runner's main: `python -m edge_agent.runner.child FD`.

Owns one loaded model and the socket to the daemon. One thread does everything: between two items of an answer
it looks for a frame, so a cancel is seen within one decode step or one prefill slice, and a daemon that died
is noticed by the end of its socket. Refuses nothing on its own: a prompt's errors go to the daemon by code.

    Load → Loaded | Failed;  Try → Tried;  Generate → Delta … Done | Refused;  Stop or end of file → exit
"""

from __future__ import annotations

import gc
import resource
import socket
import sys
import time
import traceback
from pathlib import Path

from edge_agent.errors import (
    BadRequest,
    Cancelled,
    CannotRun,
    EdgeAgentError,
    LoadFailed,
    ModelFailed,
    PromptError,
    PromptTooLong,
    RunnerError,
)
from edge_agent.runner import gate, loader
from edge_agent.runner.protocol import (
    Cancel,
    Delta,
    Done,
    Failed,
    Frame,
    FrameReader,
    Generate,
    Load,
    Loaded,
    Refused,
    Stop,
    Tried,
    Try,
    encode,
)

_REQUEST_ERRORS = {"bad_request": BadRequest, "prompt_too_long": PromptTooLong}
_MAX_MESSAGE = 500


class _Ended(Exception):
    """The daemon said stop, or is gone."""


class Runner:
    """One connection to the daemon and the model that answers on it. One thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader(connection)

    def run(self) -> None:
        """Serves until the daemon says stop or is gone."""
        try:
            model = self._load()
            while True:
                frame = self._next()
                if isinstance(frame, Generate):
                    self._answer(model, frame)
                elif isinstance(frame, Try):
                    self._try_out(model)
        except (_Ended, EOFError):
            return

    def _load(self) -> loader.Model:
        request = self._next()
        if not isinstance(request, Load):
            raise RunnerError("the first frame is not a load")
        started_s = time.monotonic()
        try:
            model = loader.load(
                Path(request.folder),
                context_tokens=request.context_tokens,
                max_tokens=request.max_tokens,
                threads=request.threads,
            )
            model.warm_up()
        except Exception as error:
            _print_frames(error)
            code = CannotRun.code if isinstance(error, CannotRun) else LoadFailed.code
            self._send(Failed(message=_describe(error), code=code))
            raise _Ended from error
        gc.collect()
        gc.freeze()  # what a load leaves stays; later collections need not walk it
        load_ms = (time.monotonic() - started_s) * 1000
        self._send(Loaded(flavor=model.flavor, signature=model.signature, load_ms=load_ms))
        return model

    def _try_out(self, model: loader.Model) -> None:
        try:
            failures, tokens_per_s = gate.try_out(model.golden, signature=model.signature, ask=model.ask)
        except Exception as error:  # noqa: BLE001 - a candidate may fail in any way; the daemon decides
            _print_frames(error)
            failures, tokens_per_s = [_describe(error)], 0.0
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._send(Tried(failures=failures, tokens_per_s=tokens_per_s, memory_bytes=peak_bytes))

    def _answer(self, model: loader.Model, request: Generate) -> None:
        try:
            self._stream(model, request)
        except PromptError as error:
            self._send(Refused(id=request.id, code=error.code, message=error.message[:_MAX_MESSAGE]))

    def _stream(self, model: loader.Model, request: Generate) -> None:
        items = model.stream(request.document)
        try:
            for item in items:
                if isinstance(item, loader.End):
                    self._send(
                        Done(
                            id=request.id,
                            finish_reason=item.finish_reason,
                            usage=item.usage,
                            timings=item.timings,
                        )
                    )
                    return
                if item:
                    self._send(Delta(id=request.id, text=item))
                self._look_for_cancel(request.id)
        except (PromptError, _Ended, EOFError):
            raise
        except Exception as error:  # model code may raise anything
            code = str(getattr(error, "code", ""))
            if code in _REQUEST_ERRORS:
                raise _REQUEST_ERRORS[code](str(error).removeprefix(f"{code}: ")) from error
            _print_frames(error, request.id)
            if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                # MLflow's schema check; its text has the prompt in it.
                raise BadRequest("the model's signature does not admit this request") from error
            raise ModelFailed(f"the model raised {type(error).__name__}") from error
        finally:
            items.close()
        raise ModelFailed("the model's stream ended without usage and finish_reason")

    def _look_for_cancel(self, prompt_id: str) -> None:
        frame = self._reader.read(0)
        if isinstance(frame, Stop):
            raise _Ended
        if isinstance(frame, Cancel) and frame.id == prompt_id:
            raise Cancelled("the prompt was cancelled")
        if frame is not None and not isinstance(frame, Cancel):
            raise RunnerError(f"a {frame.type} frame came while a prompt was running")

    def _next(self) -> Frame:
        frame = self._reader.read(None)
        if isinstance(frame, Stop) or frame is None:
            raise _Ended
        return frame

    def _send(self, frame: Frame) -> None:
        self._connection.settimeout(None)
        try:
            self._connection.sendall(encode(frame))
        except OSError as error:
            raise _Ended from error


def _print_frames(error: BaseException, request: str = "-") -> None:
    """Where it went wrong, without the message: that may have the prompt in it, and this output is logged."""
    print(
        f"request={request} {type(error).__name__}",
        *traceback.format_tb(error.__traceback__),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = text if isinstance(error, EdgeAgentError) else f"{type(error).__name__}: {text}"
    return named[:_MAX_MESSAGE]


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        Runner(connection).run()


if __name__ == "__main__":
    main()
