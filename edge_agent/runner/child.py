"""A runner's main: `python -m edge_agent.runner.child FD`.

Owns one loaded model and the socket to the daemon. One thread does everything: between two items of an answer
it looks for a frame, so a cancel is seen within one decode step or one prefill slice, and a daemon that died
is noticed by the end of its socket. Refuses nothing on its own: a prompt's errors go to the daemon by code.

    Load → Loaded | Failed;  Generate → Delta … Done | Refused;  Stop or end of file → exit
"""

from __future__ import annotations

import gc
import socket
import sys
import time
import traceback
from pathlib import Path

from edge_agent.errors import BadRequest, Cancelled, ModelFailed, PromptError, PromptTooLong, RunnerError
from edge_agent.runner import loader
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
        except (_Ended, EOFError, BrokenPipeError, ConnectionResetError):
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
            traceback.print_exc()
            self._send(Failed(message=_describe(error)))
            raise _Ended from error
        gc.collect()
        gc.freeze()  # what a load leaves stays; later collections need not walk it
        load_ms = (time.monotonic() - started_s) * 1000
        self._send(Loaded(flavor=model.flavor, signature=model.signature, load_ms=load_ms))
        return model

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
        except (PromptError, _Ended, EOFError, OSError):
            raise
        except Exception as error:  # model code may raise anything
            code = str(getattr(error, "code", ""))
            if code in _REQUEST_ERRORS:
                raise _REQUEST_ERRORS[code](str(error).removeprefix(f"{code}: ")) from error
            traceback.print_exc()
            raise ModelFailed(_describe(error)) from error
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
        self._connection.sendall(encode(frame))


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MAX_MESSAGE]


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        Runner(connection).run()


if __name__ == "__main__":
    main()
