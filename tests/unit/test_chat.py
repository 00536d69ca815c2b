"""`edge-agent chat`: what a conversation keeps, what a person sees, and how an answer is stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_agent.cli import main
from edge_agent.cli.chat import screen as screens
from edge_agent.cli.chat.conversation import STOPPED, Answer, Conversation, Message, OnText
from edge_agent.cli.chat.partners import RunnerPartner
from edge_agent.errors import Cancelled, ModelFailed, PromptTooLong, RunnerError
from edge_agent.runner.protocol import Delta, Done, Loaded, Refused
from edge_agent.transport.control import Call, ControlServer
from tests.support.processes import to_toml

USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


class Echo:
    """Repeats the question, if there are at most so many messages."""

    name = "echo"

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.heard: list[list[Message]] = []
        self.reason = "stop"
        self.error: Exception | None = None

    def answer(self, messages: list[Message], *, on_text: OnText) -> Answer:
        self.heard.append(messages)
        if self.error:
            raise self.error
        if len(messages) > self.most:
            raise PromptTooLong("too long")
        text = f"re {messages[-1]['content']}" if messages[-1]["content"] != "nothing" else ""
        on_text(text)
        return Answer(text=text, finish_reason=self.reason, usage=USAGE)


def nowhere(text: str) -> None:
    """Shows nothing."""


def contents(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


def test_every_question_brings_what_was_said_before_it() -> None:
    echo, conversation = Echo(), Conversation(system="Be brief.")
    conversation.ask("one", echo, on_text=nowhere)
    conversation.ask("two", echo, on_text=nowhere)
    assert contents(echo.heard[-1]) == ["Be brief.", "one", "re one", "two"]
    assert [message["role"] for message in echo.heard[-1]] == ["system", "user", "assistant", "user"]


def test_the_partners_own_system_prompt_is_left_to_it() -> None:
    echo = Echo()
    Conversation().ask("one", echo, on_text=nowhere)
    assert contents(echo.heard[-1]) == ["one"]


def test_the_oldest_exchanges_are_left_out_when_the_context_is_full() -> None:
    echo, conversation = Echo(most=4), Conversation(system="Be brief.")
    for question in ("one", "two"):
        assert conversation.ask(question, echo, on_text=nowhere).forgotten == 0
    assert conversation.ask("three", echo, on_text=nowhere).forgotten == 1
    assert contents(echo.heard[-1]) == ["Be brief.", "two", "re two", "three"]
    assert conversation.ask("four", echo, on_text=nowhere).forgotten == 1


def test_a_question_that_is_too_long_by_itself_is_refused_and_changes_nothing() -> None:
    echo, conversation = Echo(), Conversation()
    conversation.ask("one", echo, on_text=nowhere)
    before, echo.most = list(conversation.exchanges), 0
    with pytest.raises(PromptTooLong):
        conversation.ask("two", echo, on_text=nowhere)
    assert conversation.exchanges == before


def test_an_answer_without_a_word_is_not_kept_with_its_question() -> None:
    echo, conversation = Echo(), Conversation()
    conversation.ask("nothing", echo, on_text=nowhere)
    conversation.ask("two", echo, on_text=nowhere)
    assert contents(echo.heard[-1]) == ["two"]


# --- What a person sees -------------------------------------------------------------------------------------


class Typed:
    """Lines, and interrupts where there is None."""

    def __init__(self, *lines: str | None, interactive: bool = True) -> None:
        self.interactive = interactive
        self._lines = iter(lines)

    def read(self) -> str | None:
        line = next(self._lines, "EOF")
        if line is None:
            raise KeyboardInterrupt
        return None if line == "EOF" else line


def test_answers_are_on_stdout_and_everything_else_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    screens.converse(Conversation(), Echo(), Typed("one", "", "  ", None, "/help", "/nothing", "two"))
    out, err = capsys.readouterr()
    assert out == "re one\nre two\n"
    assert "talking to echo" in err
    assert "Ctrl-D" in err
    assert all(command in err for command in screens.COMMANDS)
    assert "there is no command /nothing" in err


def test_the_commands_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    screens.converse(
        Conversation(),
        echo,
        Typed(
            "one",
            "/clear",
            "two",
            "/system Be brief.",
            "three",
            "/system",
            "/etc/fstab: what is it?",
            "/bye",
            "no",
        ),
    )
    assert [contents(heard) for heard in echo.heard] == [
        ["one"],
        ["two"],
        ["Be brief.", "three"],
        ["/etc/fstab: what is it?"],
    ]


@pytest.mark.parametrize(
    ("reason", "note"), [("length", "the answer was cut at 7 tokens"), (STOPPED, "stopped"), ("stop", "")]
)
def test_an_answer_that_is_not_whole_is_said_to_be_so(
    reason: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    echo.reason = reason
    screens.converse(Conversation(), echo, Typed("one", interactive=False))
    assert capsys.readouterr().err == (f"edge-agent: {note}\n" if note else "")


def test_what_is_forgotten_and_an_empty_answer_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    screens.converse(Conversation(), Echo(most=2), Typed("one", "two", "nothing", interactive=False))
    err = capsys.readouterr().err
    assert "the first exchange is forgotten" in err
    assert "empty answer" in err


def test_a_refusal_ends_a_pipe_and_only_a_turn_of_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    echo.error = ModelFailed("it broke", remedy="mend it")
    with pytest.raises(ModelFailed):
        screens.converse(Conversation(), echo, Typed("one", interactive=False))
    screens.converse(Conversation(), echo, Typed("one"))
    err = capsys.readouterr().err
    assert "it broke" in err
    assert "mend it" in err
    echo.error = RunnerError("it died")
    with pytest.raises(RunnerError):
        screens.converse(Conversation(), echo, Typed("one"))


def test_the_history_of_what_was_typed_is_this_users_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = screens.history_file()
    assert file is not None
    assert file.stat().st_mode & 0o077 == 0
    entry = "\n# 2026-01-01 00:00:00\n+What is this?\n"
    file.write_text(entry * (screens.MAX_HISTORY_BYTES // len(entry) + 1))
    assert screens.history_file() == file
    assert screens.MAX_HISTORY_BYTES // 4 < file.stat().st_size < screens.MAX_HISTORY_BYTES
    assert file.read_text().startswith(entry)
    assert file.read_text().endswith(entry)


def test_no_place_for_a_history_is_no_reason_not_to_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edge-agent").write_text("a file, where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert screens.history_file() is None


# --- Stopping an answer -------------------------------------------------------------------------------------


class Talkative:
    """A runner that would never end its answer. Ctrl-C comes after its first words."""

    def __init__(self) -> None:
        self.prompt = ""
        self.cancelled = False
        self.said = 0

    def start(self, prompt_id: str, document: dict[str, Any], *, timeout_s: float, owner: str = "") -> None:
        self.prompt = prompt_id

    def receive(self, timeout_s: float) -> Delta | Done | Refused | None:
        if self.cancelled:
            return Refused(id=self.prompt, code=Cancelled.code, message="cancelled")
        self.said += 1
        if self.said == 2:
            os.kill(os.getpid(), signal.SIGINT)
        assert self.said < 100
        return Delta(id=self.prompt, text="word ")

    def cancel(self, prompt_id: str) -> None:
        assert prompt_id == self.prompt
        self.cancelled = True


def test_ctrl_c_stops_a_runners_answer_and_keeps_what_was_said() -> None:
    handler = signal.getsignal(signal.SIGINT)
    loaded = Loaded(flavor="scripted", signature="chat", load_ms=1.0)
    partner = RunnerPartner(Talkative(), loaded, name="it")  # type: ignore[arg-type]
    answer = partner.answer([{"role": "user", "content": "Hi"}], on_text=nowhere)
    assert answer.finish_reason == STOPPED
    assert answer.text.startswith("word word")
    assert signal.getsignal(signal.SIGINT) is handler


class Daemon:
    """Scripted. Answers with what it was asked last, or says one word and waits until its client has gone."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[list[Message]] = []
        self.endless = False
        self.left = threading.Event()
        socket = folder / "c.sock"
        self.config = folder / "config.toml"
        self.config.write_text(to_toml({"state_dir": str(folder / "state"), "control_socket": str(socket)}))
        self.server = ControlServer(socket, {"probe": self._answer, "status": self._status})

    def _status(self, call: Call) -> None:
        call.send("done", status={"models": [{"name": "assistant"}]})

    def _answer(self, call: Call) -> None:
        self.asked.append(call.request["messages"])
        text = str(len(self.asked))
        call.send("delta", text=text)
        if self.endless:
            os.kill(os.getpid(), signal.SIGINT)
            try:
                while True:
                    call.check()
            finally:
                self.left.set()
        message = {"message": {"content": text}, "finish_reason": "stop"}
        timings = {"first_token_ms": 3.0, "tokens_per_s": 100.0}
        answer = {"model": "assistant", "choices": [message], "usage": USAGE, "timings": timings}
        call.send("done", answer=answer, version="1", flavor="scripted")

    def chat(self, *arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(main, ["--config", str(self.config), "chat", *arguments], input=stdin)


@pytest.fixture
def daemon(short_dir: Path) -> Iterator[Daemon]:
    made = Daemon(short_dir)
    thread = threading.Thread(target=made.server.run)
    thread.start()
    yield made
    made.server.close()
    thread.join(60)


def test_the_daemon_is_asked_with_everything_that_was_said(daemon: Daemon) -> None:
    result = daemon.chat("--system", "Be brief.", stdin="a\nb\n")
    assert (result.exit_code, result.stdout) == (0, "1\n2\n"), result.output
    assert [contents(asked) for asked in daemon.asked] == [["Be brief.", "a"], ["Be brief.", "a", "1", "b"]]


def test_ctrl_c_hangs_up_on_the_daemon_which_then_cancels(daemon: Daemon) -> None:
    daemon.endless = True
    result = daemon.chat(stdin="a\n")
    assert result.exit_code == 0, result.output
    assert "stopped" in result.stderr
    assert daemon.left.wait(20)


def test_who_cannot_answer_is_said_before_the_first_line(daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.chat("--model", "nobody").exit_code == 4
    assert daemon.chat("--model", "assistant", "--direct", str(tmp_path)).exit_code == 2
    daemon.server.close()
    result = daemon.chat(stdin="a\n")
    assert result.exit_code == 3
    assert "edge-agent run" in result.stderr


@pytest.mark.parametrize(
    ("called", "here"),
    [("ps", "status"), ("pull", "models pull"), ("list", "models list"), ("rm", "models rm")],
)
def test_commands_of_other_programs_are_told_by_their_name_here(called: str, here: str) -> None:
    result = CliRunner().invoke(main, [called])
    assert result.exit_code == 2
    assert f"`edge-agent {here}`" in result.stderr
    words = here.split()
    assert CliRunner().invoke(main, [*words, "--help"]).exit_code == 0
