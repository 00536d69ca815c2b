"""What a runner's process makes of a model: of a configured system prompt, and of the wrapper's refusals."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import BadRequest, PromptError, PromptTooLong
from edge_agent.host.confinement import Walls
from edge_agent.runner import bounds, child, libraries, loader
from edge_agent.runner.loader import WrapperModel
from edge_agent.runner.model import TOO_LONG, End, Lane, Model
from edge_agent.runner.protocol import (
    MAX_REPLY_BYTES,
    Checked,
    Failed,
    Frame,
    FrameReader,
    Load,
    Loaded,
    Stop,
    Tried,
    Try,
    Trying,
    encode,
)

SYSTEM = "Be brief."
SAYS = {"role": "system", "content": SYSTEM}


class ScriptedModel(Model):
    """Answers every chat with the roles of its messages, but for chats with a role that it refuses."""

    flavor, signature = "scripted", "chat"

    def __init__(self, *refused_roles: str, golden: Any = None) -> None:
        self.golden = golden
        self.asked: list[dict[str, Any]] = []
        self.closed = 0
        self._refused = set(refused_roles)

    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        self.asked.append(document)
        try:
            roles = [message["role"] for message in document.get("messages", [{"role": "prompt"}])]
            if self._refused & set(roles):
                raise BadRequest("no such role")
            yield ""
            yield " ".join(roles)
            yield End(finish_reason="stop", usage={"completion_tokens": 40})
        finally:
            self.closed += 1


of_refused_roles = pytest.mark.parametrize(
    ("refused_roles", "system", "refusal"),
    [
        ((), SYSTEM, ""),
        (("system",), SYSTEM, "no such role"),
        (("system",), "", ""),
        (("system", "user"), SYSTEM, ""),
    ],
)


@of_refused_roles
def test_a_system_prompt_is_refused_if_the_chat_is_taken_without_it(
    refused_roles: tuple[str, ...], system: str, refusal: str
) -> None:
    model = ScriptedModel(*refused_roles)
    if set(refused_roles) >= {"system", "user"}:
        with pytest.raises(BadRequest):
            model.warm_up(system)
    else:
        assert model.warm_up(system) == refusal
    assert model.closed == len(model.asked), "a stream was left open"


class KeepingModel(ScriptedModel):
    """Has a context of 100 tokens, and a system prompt that needs some of it."""

    room_tokens = 80

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self._prompt_tokens = prompt_tokens

    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        if self._prompt_tokens + document["max_tokens"] > 100 and len(document["messages"]) > 1:
            raise PromptTooLong("more than the context")
        yield from super().stream(document)


@pytest.mark.parametrize(("prompt_tokens", "room"), [(10, 80), (30, 40), (90, 10), (99, 1)])
def test_a_warm_up_runs_the_system_prompt_and_asks_for_as_much_room_as_there_is(
    prompt_tokens: int, room: int
) -> None:
    model = KeepingModel(prompt_tokens)
    assert model.warm_up(SYSTEM) == ""
    first, second = model.asked
    assert first["messages"][0] == second["messages"][0] == SAYS
    assert first["messages"][1] != second["messages"][1], "it goes on from what was kept, as a prompt will"
    assert first["max_tokens"] == second["max_tokens"] == room


def test_a_system_prompt_longer_than_the_context_is_the_contexts_fault() -> None:
    model = KeepingModel(100)
    assert model.warm_up(SYSTEM) == TOO_LONG
    assert [len(asked["messages"]) for asked in model.asked] == [1, 1], "it is warmed without one"


def test_golden_prompts_are_asked_without_a_system_prompt_that_is_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, tried = served(KeepingModel(100), load(SYSTEM), Try(), monkeypatch=monkeypatch, folder=tmp_path)
    assert isinstance(loaded, Loaded) and isinstance(tried, Tried)
    assert (loaded.system_too_long, tried.failures) == (True, [])


class PromptModel(ScriptedModel):
    """Made for prompts; takes chats, too, but for some roles."""

    signature = "prompt"


@of_refused_roles
def test_a_model_for_prompts_is_asked_whether_its_chats_take_the_system_prompt(
    refused_roles: tuple[str, ...], system: str, refusal: str
) -> None:
    model = PromptModel(*refused_roles)
    assert model.warm_up(system) == refusal
    assert "prompt" in model.asked[0]


def served(model: Model, *frames: Frame, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Frame]:
    """What the process with this model says to the daemon's frames."""
    monkeypatch.setattr(loader, "load", lambda *_, **__: model)
    monkeypatch.setattr(child, "confine", lambda _: Walls())  # it would confine the tests
    ours, theirs = socket.socketpair()
    turn = os.open(folder / "turn", os.O_RDWR | os.O_CREAT)
    try:
        with ours:
            for frame in (*frames, Stop()):
                ours.sendall(encode(frame) + (encode(Checked()) if isinstance(frame, Load) else b""))
            with theirs:
                child.Runner(theirs, turn, None).run()
            return list(frames_of(ours))
    finally:
        os.close(turn)


def frames_of(connection: socket.socket) -> Iterator[Frame]:
    reader = FrameReader(connection, limit_bytes=MAX_REPLY_BYTES)
    while True:
        try:
            frame = reader.read(5)
        except EOFError:
            return
        assert frame is not None
        yield frame


def test_a_limit_of_memory_that_the_kernel_does_not_take_is_a_load_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(limit_bytes: int) -> None:
        raise OverflowError("too large")

    monkeypatch.setattr(bounds, "limit_memory", refuse)
    (failed,) = served(ScriptedModel(), load(SYSTEM), monkeypatch=monkeypatch, folder=tmp_path)
    assert failed == Failed(message="OverflowError: too large", code="load_failed")


def load(system: str) -> Load:
    return Load(folder="/m", context_tokens=64, max_tokens=8, threads=1, system=system)


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_golden_prompts_are_asked_with_the_system_prompt_of_the_device(
    system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    question, own = {"role": "user", "content": "Who?"}, {"role": "system", "content": "Sing."}
    golden = [{"messages": [question], "expect": "^user$"}, {"messages": [own, question], "expect": "system"}]
    model = ScriptedModel(golden=golden)
    loaded, *asked, tried = served(model, load(system), Try(), monkeypatch=monkeypatch, folder=tmp_path)
    assert asked == [Trying(prompt=1, of=2), Trying(prompt=2, of=2)]
    assert isinstance(loaded, Loaded) and isinstance(tried, Tried)
    first, second = (document["messages"] for document in model.asked[-2:])
    assert first == ([SAYS, question] if system else [question])
    assert second == [own, question]
    assert len(tried.failures) == bool(system), "the answer is another one with a system prompt"


class PanicException(BaseException):
    """As pyo3 raises it where Rust code panics."""


def shown(error: type[BaseException], text: str) -> str:
    """A panic's text may quote a prompt."""
    name = error.__name__
    return f"{name}: {text}" if issubclass(error, Exception) else f"Panic: the model gave up ({name})"


@pytest.mark.parametrize("error", [ValueError, PanicException, SystemExit])
def test_whatever_a_model_raises_at_its_load_is_reported(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(system: str) -> str:
        raise error("the regular expression has no end")

    model = ScriptedModel()
    monkeypatch.setattr(model, "warm_up", fail)
    (failed,) = served(model, load(""), monkeypatch=monkeypatch, folder=tmp_path)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == (
        "load_failed",
        shown(error, "the regular expression has no end"),
    )


@pytest.mark.parametrize("error", [ValueError, PanicException, SystemExit])
def test_whatever_a_model_raises_at_a_golden_prompt_fails_the_candidate(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(document: dict[str, Any]) -> tuple[str, int]:
        raise error("no end")

    model = ScriptedModel(golden=[{"prompt": "Who?", "expect": "."}])
    monkeypatch.setattr(model, "ask", fail)
    _, _, tried = served(model, load(""), Try(), monkeypatch=monkeypatch, folder=tmp_path)
    assert isinstance(tried, Tried)
    assert tried.failures == [shown(error, "no end")]


@pytest.mark.parametrize(("refused", "said"), [((), ""), (("system",), "no such role")])
def test_a_runner_says_that_its_model_refuses_the_system_prompt(
    refused: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (loaded,) = served(ScriptedModel(*refused), load(SYSTEM), monkeypatch=monkeypatch, folder=tmp_path)
    assert isinstance(loaded, Loaded)
    assert loaded.system_refused == said


def test_a_model_that_raises_at_a_system_prompt_still_loads() -> None:
    class Raising(ScriptedModel):
        def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
            if len(document["messages"]) > 1:
                raise ValueError("system role is not supported")
            yield from super().stream(document)

    assert Raising().warm_up(SYSTEM) == "it raised ValueError"


# --- The wrapper's refusals -----------------------------------------------------------------------------


class WrapperError(ValueError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class RefusingWrapper:
    """Refuses everything in its lanes."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def unwrap_python_model(self) -> RefusingWrapper:
        return self

    def predict_streams(self, requests: Any) -> list[Any]:
        return [self]

    def __iter__(self) -> Iterator[Any]:
        yield from ()
        raise self._error

    def close(self) -> None:
        """Nothing is open."""


def started(model: WrapperModel, document: dict[str, Any], owner: str = "") -> Lane:
    lane = model.start(document, owner)
    assert lane is not None
    return lane


@pytest.mark.parametrize("way", ["stream", "start"])
@pytest.mark.parametrize(
    ("code", "said", "kind", "message"),
    [
        (
            "bad_request",
            "the chat template refuses the messages: No system! at row 1:\n{{ raise_exception('No system!') }}",
            BadRequest,
            "the chat template refuses the messages",
        ),
        ("bad_request", "n must be 1", BadRequest, "n must be 1"),
        ("prompt_too_long", "7 and 1", PromptTooLong, "7 and 1"),
    ],
)
def test_a_refusal_of_any_wrapper_comes_without_the_template(
    way: str, code: str, said: str, kind: type[PromptError], message: str
) -> None:
    model = WrapperModel(
        RefusingWrapper(WrapperError(code, said)), flavor="scripted", signature="chat", golden=None
    )
    document = {"messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(kind) as caught:
        next(model.stream(document) if way == "stream" else started(model, document))
    assert caught.value.message == message


class BoundWrapper(RefusingWrapper):
    """Answers, and says how long it may read, and run: seconds, or 0 for no limit."""

    def __init__(self) -> None:
        super().__init__(ValueError("never"))
        self.read: list[float] = []
        self.ran: list[float] = []
        self.open = 0

    def predict_streams(self, requests: Any) -> list[Any]:
        self.read.append(signal.getitimer(signal.ITIMER_PROF)[0])
        self.open += 1
        return [self]

    def __iter__(self) -> Iterator[Any]:
        self.ran.append(signal.getitimer(signal.ITIMER_PROF)[0])
        yield []
        yield [(0, "Hello")]

    def close(self) -> None:
        self.open -= 1


@pytest.mark.parametrize("signature", ["chat", "prompt"])
def test_reading_a_prompt_is_bounded_in_a_warm_up_too(signature: str) -> None:
    wrapper = BoundWrapper()
    assert WrapperModel(wrapper, flavor="scripted", signature=signature, golden=None).warm_up() == ""
    assert wrapper.read and all(wrapper.read) and not any(wrapper.ran) and wrapper.open == 0


CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1"}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "done"}


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"tools": [{}], "messages": [SAYS]}, "tools: "),
        ({"messages": [SAYS, CALLED]}, "tools, in messages[1]: "),
        ({"messages": [RESULT]}, "tools, in messages[0]: "),
    ],
)
def test_a_wrapper_that_knows_no_tools_is_never_asked_for_them(document: dict[str, Any], where: str) -> None:
    wrapper = BoundWrapper()
    model = WrapperModel(wrapper, flavor="scripted", signature="chat", golden=None)
    for start in (lambda: next(started(model, document)), lambda: next(model.stream(document))):
        with pytest.raises(BadRequest) as caught:
            start()
        assert caught.value.message == (
            f"{where}this package was published with a release that knows none: publish it again"
        )
    assert wrapper.read == []


def test_a_prompt_that_cannot_be_read_leaves_those_beside_it_alone() -> None:
    """They were all refused with its error, and what was open stayed open."""
    wrapper = BoundWrapper()
    model = WrapperModel(wrapper, flavor="scripted", signature="chat", golden=None)
    plain = {"messages": [SAYS]}
    before, odd, behind = (
        started(model, document, "a") for document in (plain, {**plain, "tools": [{}]}, plain)
    )
    with pytest.raises(BadRequest, match="tools: "):
        next(odd)
    for lane in (before, behind):
        assert [next(lane), next(lane)] == [[], ["Hello"]]
    for lane in (before, odd, behind):
        lane.close()
    assert wrapper.open == 0


def test_what_is_no_refusal_goes_on_as_it_is() -> None:
    model = WrapperModel(
        RefusingWrapper(ValueError("broken")), flavor="scripted", signature="chat", golden=None
    )
    with pytest.raises(ValueError, match="broken"):
        model.ask({"messages": []})


@pytest.mark.parametrize("shipped", [False, True])
def test_only_for_a_wrapper_of_this_agent_are_libraries_deferred(
    shipped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(libraries, "LEFT_OUT", ())  # of what other tests import
    monkeypatch.setattr(loader, "import_libraries", lambda: None)
    before = len(sys.meta_path)
    (loaded,) = served(
        ScriptedModel(), replace(load(""), shipped_wrapper=shipped), monkeypatch=monkeypatch, folder=tmp_path
    )
    assert isinstance(loaded, Loaded) and len(sys.meta_path) == before + shipped


@pytest.mark.parametrize("said", [None, Stop(), load(""), Try()])
def test_nothing_of_a_model_is_read_before_its_files_are_checked(
    said: Frame | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "load", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(child, "confine", lambda _: Walls())
    ours, theirs = socket.socketpair()
    with ours, (tmp_path / "turn").open("w+b") as turn:
        ours.sendall(encode(load("")) + (encode(said) if said else b""))
        ours.shutdown(socket.SHUT_WR)
        with theirs:
            child.Runner(theirs, turn.fileno(), None).run()
        ended = list(frames_of(ours))
    assert [type(frame) for frame in ended] == ([Failed] if isinstance(said, Load | Try) else [])
