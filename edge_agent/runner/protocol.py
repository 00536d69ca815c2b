"""The frames between the daemon and a runner: JSON, one a line, bounded. Pure but for `FrameReader.read`.

    daemon → runner   Load, Checked; Try, Generate, Cancel, Stop
    runner → daemon   Loaded or Failed; Trying …, Tried for Try; then, for each Generate and by its id, Delta …,
                     Called …, Done or Refused

Each side treats the other's bytes as untrusted input: an unknown type, a missing or wrong field, a number out of range,
a text, list or object over its bound or a line over the bound is a `RunnerError`. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from edge_agent.errors import RunnerError
from edge_agent.runner.lines import LineReader, strict_json

MAX_FRAME_BYTES = 20 << 20
"""To a runner: the largest request of the settings, escaped."""
MAX_REPLY_BYTES = 1 << 20
"""From a runner. JSON takes many times its length in memory, and it is read before any field can be looked at."""
MAX_DELTA_CHARACTERS = 1 << 16
"""Each is at most 12 bytes in JSON. A longer text takes several frames."""
TURN_BYTES = 4096
"""Size of the shared memory in which a runner notes whose turn it is."""
MAX_GOLDEN = 64
"""Golden prompts that a gate asks."""
OnPrompt = Callable[[int, int], None]
"""Told before each golden prompt which one it is, from 1, and of how many."""

_MAX_CHARACTERS = 4096
_MAX_ITEMS = 256
_END_OF_INTEGERS = 1 << 31
_END_OF_FLOATS = float(1 << 53)

Bytes = Annotated[int, 1 << 62]
"""Below that. Any other integer is below `_END_OF_INTEGERS`, and none is negative."""
LongText = Annotated[str, MAX_DELTA_CHARACTERS]
"""At most so many characters. Any other text has at most `_MAX_CHARACTERS`."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to load and how.

    Attributes:
        folder: the MLflow model's folder.
        context_tokens: the limit for prompt and answer together.
        max_tokens: the limit for an answer when the request names none; 0 leaves it to the package.
        threads: for one operation; 0 leaves the choice to the library.
        parallel: the most prompts that run at once.
        kv_bytes: memory for the key-value caches of running and remembered prompts together.
        system: the system prompt of chats that bring none; empty for none.
        repetition_penalty: when the request names none; 0 leaves it to the package.
        network: the model may use the network.
        read: files and folders that it may read beside its own.
        confined: it is not loaded where a wall of the minimum cannot be built around it.
        memory_bytes: the most that the runner may map for itself, which no package of this size needs; 0 for no limit.
        memory_is_short: the host has less than that, so a refused allocation may be the host's doing.
        shipped_wrapper: its only code is a wrapper of this agent, which needs a part of the libraries only.
    """

    type: ClassVar[str] = "load"
    folder: str
    context_tokens: int
    max_tokens: int
    threads: int
    parallel: int = 1
    kv_bytes: Bytes = 0
    system: LongText = ""
    repetition_penalty: float = 0.0
    network: bool = False
    read: list[str] = field(default_factory=list)
    confined: bool = True
    memory_bytes: Bytes = 0
    memory_is_short: bool = False
    shipped_wrapper: bool = False


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The files of the model that `Load` named are what they should be: from here on they may be read."""

    type: ClassVar[str] = "checked"


@dataclass(frozen=True, kw_only=True)
class Try:
    """Run the gate: answer the golden prompts as clients would ask them, and measure the speed."""

    type: ClassVar[str] = "try"


@dataclass(frozen=True, kw_only=True)
class Trying:
    """The gate asks this golden prompt now, of so many; they begin at 1."""

    type: ClassVar[str] = "trying"
    prompt: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What the gate found.

    Attributes:
        failures: what the candidate got wrong, one line each; empty if it passed.
        asked: how many golden prompts there were.
        memory_bytes: the peak of resident memory so far.
    """

    type: ClassVar[str] = "tried"
    failures: list[str]
    asked: int
    tokens_per_s: float
    memory_bytes: Bytes


@dataclass(frozen=True, kw_only=True)
class Generate:
    """One prompt: `messages` or `prompt`, and its options.

    Attributes:
        owner: whose it is, without a name. What the model has kept of another owner's prompts does not serve it.
    """

    type: ClassVar[str] = "generate"
    id: str
    document: dict[str, Any]
    owner: str = ""


@dataclass(frozen=True, kw_only=True)
class Cancel:
    type: ClassVar[str] = "cancel"
    id: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    type: ClassVar[str] = "stop"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The model is ready to answer up to `parallel` prompts at once.

    Attributes:
        system_refused: why it takes no chat with the system prompt of `Load`; empty if it does.
        system_too_long: because the context that it got does not hold it.
        walls: those that stand around the runner.
        missing_walls: those that this host cannot build, and why.
    """

    type: ClassVar[str] = "loaded"
    flavor: str
    signature: str
    load_ms: float
    parallel: int = 1
    system_refused: str = ""
    system_too_long: bool = False
    walls: list[str] = field(default_factory=list)
    missing_walls: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The model cannot be loaded; the runner ends.

    Attributes:
        code: `cannot_run` where this host lacks what it needs, `unconfined` where that is a wall,
            `code_refused` where the package has what may not run, else `load_failed`.
    """

    type: ClassVar[str] = "failed"
    message: str
    code: str = "load_failed"


@dataclass(frozen=True, kw_only=True)
class Delta:
    """More text of the answer."""

    type: ClassVar[str] = "delta"
    id: str
    text: LongText


@dataclass(frozen=True, kw_only=True)
class Called:
    """A call of a tool, which is complete; or more of the arguments of the last one.

    Attributes:
        index: of the call in its answer, from 0.
        arguments: JSON, or a part of it.
    """

    type: ClassVar[str] = "called"
    id: str
    index: int
    name: str
    arguments: LongText


@dataclass(frozen=True, kw_only=True)
class Done:
    """The answer is complete. `timings` are measured by the wrapper, in milliseconds."""

    type: ClassVar[str] = "done"
    id: str
    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The prompt gets no answer; `code` is that of a `PromptError`."""

    type: ClassVar[str] = "refused"
    id: str
    code: str
    message: str


_Reply = Loaded | Failed | Trying | Tried | Delta | Called | Done | Refused
Frame = (
    Load
    | Checked
    | Try
    | Trying
    | Tried
    | Generate
    | Cancel
    | Stop
    | Loaded
    | Failed
    | Delta
    | Called
    | Done
    | Refused
)

_KINDS: dict[str, type[Any]] = {
    kind.type: kind
    for kind in (
        Load,
        Checked,
        Try,
        Trying,
        Tried,
        Generate,
        Cancel,
        Stop,
        Loaded,
        Failed,
        Delta,
        Called,
        Done,
        Refused,
    )
}
_Hints = dict[str, Any]
_HINTS: dict[str, _Hints] = {
    name: {hint: value for hint, value in get_type_hints(kind, include_extras=True).items() if hint != "type"}
    for name, kind in _KINDS.items()
}


def with_system(document: dict[str, Any], system: str) -> dict[str, Any]:
    """Adds the configured system prompt to a chat that brings none; a raw prompt stays as it is."""
    chat = document.get("messages")
    if not system or not chat or chat[0]["role"] in ("system", "developer"):
        return document
    return {**document, "messages": [{"role": "system", "content": system}, *chat]}


def encode(frame: Frame) -> bytes:
    """One line, its newline included.

    Raises:
        RunnerError: longer than the bound.
        ValueError: a number in it is not finite; whoever reads the line would take it for no frame.
    """
    document = {"type": frame.type, **asdict(frame)}
    line = json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    limit_bytes = MAX_REPLY_BYTES if isinstance(frame, _Reply) else MAX_FRAME_BYTES
    if len(line) > limit_bytes:
        raise RunnerError(f"a {frame.type} frame has {len(line)} bytes, at most {limit_bytes} are allowed")
    return line


def decode(line: bytes) -> Frame:
    """Reads one line.

    Raises:
        RunnerError: it is no frame of this protocol.
    """
    try:
        values = strict_json(line)
        kind = _KINDS[values.pop("type")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunnerError(f"a line of {len(line)} bytes is no frame") from error
    known = {item.name for item in fields(kind)}
    if set(values) != known or not all(
        _fits(value, _HINTS[kind.type][name]) for name, value in values.items()
    ):
        raise RunnerError(f"a {kind.type} frame has missing, unknown or wrong fields")
    frame: Frame = kind(**values)
    return frame


def encode_turn(prompts: Iterable[str]) -> bytes:
    """The ids of the prompts whose turn it is, `TURN_BYTES` long."""
    return " ".join(prompts).encode()[:TURN_BYTES].ljust(TURN_BYTES, b"\0")


def decode_turn(memory: bytes) -> frozenset[str]:
    """The ids that `encode_turn` wrote. Anything else in the memory is no error: it matches no id."""
    return frozenset(memory.rstrip(b"\0").decode("utf-8", "replace").split())


class FrameReader:
    """Reads frames from a stream socket. One owner thread.

    Args:
        connection: a connected stream socket; `read` changes its timeout.
        limit_bytes: of a frame: `MAX_FRAME_BYTES` at a runner, `MAX_REPLY_BYTES` at the daemon.
    """

    def __init__(self, connection: socket.socket, *, limit_bytes: int) -> None:
        self._connection = connection
        self._lines = LineReader(
            limit_bytes=limit_bytes,
            broken=lambda reason: RunnerError(f"instead of a frame there came {reason}"),
        )

    def read(self, timeout_s: float | None) -> Frame | None:
        """The next frame, or None if none is complete within `timeout_s` (0: only what has arrived already).

        Raises:
            EOFError: the other side has closed.
            RunnerError: bytes that are no frame.
        """
        until_s = time.monotonic() + (timeout_s or 0.0)
        while True:
            line = self._lines.line()
            if line is not None:
                return decode(line)
            try:
                # For all of it, not for each piece: the other side may send a byte now and then.
                left_s = None if timeout_s is None else max(0.0, until_s - time.monotonic())
                self._connection.settimeout(left_s)
                data = self._connection.recv(1 << 16)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError as error:
                raise EOFError(str(error)) from error
            if not data:
                raise EOFError("the other side has closed")
            self._lines.add(data)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the hint's type and within its bound. Compares only: no number of JSON makes it raise."""
    bound = None
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is str:
        return isinstance(value, str) and len(value) <= (bound or _MAX_CHARACTERS)
    if hint is int:
        return isinstance(value, int) and 0 <= value < (bound or _END_OF_INTEGERS)
    if hint is float:
        return isinstance(value, int | float) and 0 <= value < _END_OF_FLOATS
    if get_origin(hint) is list:
        return isinstance(value, list) and _all_fit(value, get_args(hint)[0])
    name, inner = get_args(hint)
    if not isinstance(value, dict) or inner is Any:  # a request, which was checked where it came in
        return isinstance(value, dict)
    return _all_fit(value.keys(), name) and _all_fit(value.values(), inner)


def _all_fit(values: Collection[object], hint: Any) -> bool:
    return len(values) <= _MAX_ITEMS and all(_fits(value, hint) for value in values)
