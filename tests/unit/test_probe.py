"""`edge-agent probe`: what it asks the daemon, and where it writes what. The daemon itself is scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_agent.cli import main
from edge_agent.transport.control import Call, ControlServer
from tests.support.processes import to_toml

TEXT = "The capital of Spain is Madrid."


class Daemon:
    """Answers every prompt with the same text.

    Attributes:
        asked: the prompts, as they came.
        finish_reason: of the next answers.
    """

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.finish_reason = "stop"
        socket = folder / "c.sock"
        self.config = folder / "config.toml"
        self.config.write_text(to_toml({"state_dir": str(folder / "state"), "control_socket": str(socket)}))
        self.server = ControlServer(socket, {"probe": self._answer})

    def _answer(self, call: Call) -> None:
        self.asked.append(call.request["text"])
        call.send("delta", text=TEXT)
        answer: dict[str, Any] = {
            "model": "assistant",
            "choices": [{"message": {"content": TEXT}, "finish_reason": self.finish_reason}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16},
            "timings": {"first_token_ms": 3.0, "tokens_per_s": 100.0},
        }
        call.send("done", answer=answer, version="1", flavor="scripted")

    def probe(self, *arguments: str, stdin: bytes = b"") -> Result:
        return CliRunner().invoke(main, ["--config", str(self.config), "probe", *arguments], input=stdin)


@pytest.fixture
def daemon(short_dir: Path) -> Iterator[Daemon]:
    made = Daemon(short_dir)
    thread = threading.Thread(target=made.server.run)
    thread.start()
    yield made
    made.server.close()
    thread.join(60)


@pytest.mark.parametrize(
    ("stdin", "asked"),
    [
        (b"Hello", "Hello"),
        (b"Hello\n", "Hello"),
        (b"Hello\r\n", "Hello"),
        (b"Hello\n\n", "Hello\n"),
        (b"\n  Hello \r\n\r\n", "\n  Hello \r\n"),
        (b"Hello\r", "Hello\r"),
        (b"\xef\xbb\xbfHello\r\n", "Hello"),
    ],
)
def test_the_one_newline_that_a_shell_adds_is_no_part_of_the_prompt(
    daemon: Daemon, stdin: bytes, asked: str
) -> None:
    result = daemon.probe("-", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert daemon.asked == [asked]


def test_a_prompt_on_the_command_line_is_asked_as_it_stands(daemon: Daemon) -> None:
    assert daemon.probe("Hello\n").exit_code == 0
    assert daemon.asked == ["Hello\n"]


def test_words_without_quotes_are_one_prompt(daemon: Daemon) -> None:
    assert daemon.probe("What", "is", "up", "--json").exit_code == 0
    assert daemon.asked == ["What is up"]


@pytest.mark.parametrize("stdin", [b"", b"\n", b"\xef\xbb\xbf\r\n", "\u00a0\n".encode(), b"\xff"])
def test_no_prompt_at_all_is_wrong_usage(daemon: Daemon, stdin: bytes) -> None:
    assert daemon.probe("-", stdin=stdin).exit_code == 2
    assert daemon.asked == []


def test_a_cut_answer_is_reported_on_standard_error_only(daemon: Daemon) -> None:
    whole = daemon.probe("Hello")
    daemon.finish_reason = "length"
    cut = daemon.probe("Hello")
    assert cut.stdout == whole.stdout
    assert (whole.stderr, cut.stderr) == ("", "edge-agent: the answer was cut at 7 tokens\n")


def test_one_document_says_it_in_its_own_field(daemon: Daemon) -> None:
    daemon.finish_reason = "length"
    result = daemon.probe("Hello", "--json")
    assert json.loads(result.stdout)["finish_reason"] == "length"
    assert result.stderr == ""
