"""Who answers: the daemon over its control socket, or a runner of this command's own.

A folder's model is put together as a package in a temporary folder (hard links where the file system allows it) and
loaded in a runner, behind the walls that a device has. Nothing of it is registered, cached or remembered, and its
golden prompts, if any, are not asked.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from edge_agent import terminal
from edge_agent.cli import asking
from edge_agent.cli.chat.conversation import STOPPED, Answer, Message, OnText
from edge_agent.cli.command import said_by_daemon
from edge_agent.errors import (
    Cancelled,
    MemoryShort,
    ModelFailed,
    PromptError,
    UnknownModel,
    error_of,
)
from edge_agent.host import cpus, memory
from edge_agent.package import genai_options
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Done, Load, Loaded, Refused
from edge_agent.serving.footprint import LEAST_CONTEXT_TOKENS, Footprint, footprint_of_files
from edge_agent.serving.runner import Runner
from edge_agent.settings import Settings

CONTEXT_TOKENS = 4096
"""Of a folder's model, where it supports so many and memory holds them."""
MAX_TOKENS = 1024
"""Of one answer of a folder's model."""
REPETITION_PENALTY = 1.1
"""Of a folder's model: without one, the greedy answers of a small model soon go in circles."""
_LOAD_TIMEOUT_S = 600.0
_ANSWER_TIMEOUT_S = 3600.0
"""For one answer of a folder's model: a person waits in front of it, and has Ctrl-C."""
_LOOK_S = 0.1


class DaemonPartner:
    """The running daemon.

    Args:
        model: a configured name; None for the default one.
    """

    def __init__(self, settings: Settings, model: str | None) -> None:
        self._settings = settings
        self._model = model
        self.name = model or settings.default_model or "the daemon"

    def answer(self, messages: list[Message], *, on_text: OnText) -> Answer:
        """See `Partner.answer`. A prompt that is stopped is cancelled by the daemon, which sees its client leave."""
        texts: list[str] = []

        def take(text: str) -> None:
            texts.append(text)
            on_text(text)

        try:
            done = asking.prompt_daemon(
                self._settings, {"messages": messages}, model=self._model, on_text=take
            )
        except KeyboardInterrupt:
            return Answer(text="".join(texts), finish_reason=STOPPED)
        answer = done["answer"]
        choice = answer["choices"][0]
        return Answer(
            text=choice["message"]["content"],
            finish_reason=choice["finish_reason"],
            model={"model": answer["model"], "version": done["version"], "flavor": done["flavor"]},
            usage=answer["usage"],
            timings=answer["timings"],
        )


class RunnerPartner:
    """A runner with one model loaded, which belongs to this command."""

    def __init__(self, runner: Runner, loaded: Loaded, *, name: str) -> None:
        self._runner = runner
        self._loaded = loaded
        self.name = name

    def answer(self, messages: list[Message], *, on_text: OnText) -> Answer:
        """See `Partner.answer`.

        Raises:
            RunnerError: the runner died; there is no partner any more.
        """
        texts: list[str] = []
        started_s = time.monotonic()
        first_s: float | None = None
        prompt_id = uuid.uuid4().hex
        with _interrupts() as interrupted:
            self._runner.start(prompt_id, {"messages": messages}, timeout_s=_ANSWER_TIMEOUT_S)
            asked_to_stop = False
            while True:
                if interrupted.is_set() and not asked_to_stop:
                    asked_to_stop = True
                    self._runner.cancel(prompt_id)
                frame = self._runner.receive(_LOOK_S)
                if isinstance(frame, Delta):
                    first_s = first_s or time.monotonic()
                    texts.append(frame.text)
                    on_text(frame.text)
                elif isinstance(frame, Refused):
                    if asked_to_stop and frame.code == Cancelled.code:
                        return Answer(text="".join(texts), finish_reason=STOPPED)
                    raise error_of(frame.code, frame.message, among=(PromptError,), otherwise=ModelFailed)
                elif isinstance(frame, Done):
                    return self._answer(frame, "".join(texts), started_s, first_s)

    def _answer(self, done: Done, text: str, started_s: float, first_s: float | None) -> Answer:
        return Answer(
            text=text,
            finish_reason=done.finish_reason,
            model={"model": self.name, "version": None, "flavor": self._loaded.flavor},
            usage=done.usage,
            timings=asking.timings_now(done, started_s=started_s, first_s=first_s),
        )


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event while the block runs: it must not tear a frame of the runner apart."""
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def of_daemon(settings: Settings, model: str | None) -> DaemonPartner:
    """The running daemon.

    Raises:
        DaemonNotRunning: nothing answers on the control socket.
        UnknownModel: it has no model of this name.
    """
    names = [each["name"] for each in said_by_daemon(settings, "status")["models"]]
    if model is not None and model not in names:
        raise UnknownModel(f"no model is called {model!r} here; there are {', '.join(names)}")
    return DaemonPartner(settings, model)


@contextlib.contextmanager
def of_folder(folder: Path) -> Iterator[RunnerPartner]:
    """Loads the model in a folder, or in a GGUF file, for the time of the block.

    Raises:
        PublishError: it is no model's folder, or a device would refuse it.
        MemoryShort: the model does not fit this host's memory.
        RunnerError: it does not load.
    """
    from edge_agent.publishing import kinds, model_folder
    from edge_agent.publishing.package import Flavor, assemble

    flavor: Flavor = "transformers" if kinds.is_checkpoint(folder) else "onnx"
    kinds.check(folder, flavor)
    name = folder.resolve().name
    with tempfile.TemporaryDirectory(prefix="edge-agent-chat-") as temporary:
        package = Path(temporary) / "package"
        terminal.echo(f"edge-agent: loading {folder}", err=True)
        folder = model_folder(folder, Path(temporary))
        assemble(folder, package, name="chat", flavor=flavor)
        request = _load_of(package, folder / genai_options.FILE_NAME if flavor == "onnx" else None)
        runner = RunnerProcess(model=name, environment=child_environment(Path(temporary)))
        try:
            yield RunnerPartner(runner, runner.load(request, timeout_s=_LOAD_TIMEOUT_S), name=name)
        finally:
            runner.stop()


def _load_of(package: Path, options: Path | None) -> Load:
    """How a package is loaded: with the longest context up to `CONTEXT_TOKENS` that memory holds.

    Raises:
        MemoryShort: memory does not hold it at all.
    """
    weights = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    footprint = footprint_of_files(weights, options)
    free = memory.available_bytes()
    if footprint.needed_bytes(LEAST_CONTEXT_TOKENS) > free:
        raise MemoryShort(
            f"the model needs {terminal.human_bytes(footprint.needed_bytes(LEAST_CONTEXT_TOKENS))} of memory, and "
            f"{terminal.human_bytes(free)} are free",
            remedy="end other programs, or take a smaller model",
        )
    context = footprint.context_that_fits(free, _wanted_tokens(footprint))
    return Load(
        folder=str(package),
        context_tokens=context,
        max_tokens=min(MAX_TOKENS, max(1, context // 2)),
        threads=cpus.thread_counts()[0],
        kv_bytes=context * footprint.kv_bytes_per_token,
        repetition_penalty=REPETITION_PENALTY,
    )


def _wanted_tokens(footprint: Footprint) -> int:
    return min(CONTEXT_TOKENS, footprint.model_tokens) if footprint.model_tokens else CONTEXT_TOKENS
