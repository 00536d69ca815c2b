"""`edge-agent probe`: what it asks the daemon, and where it writes what. The daemon itself is scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_agent.cli import main, waiting
from edge_agent.errors import EdgeAgentError, NoModel, TransportError
from edge_agent.transport.control import Call, ControlServer
from tests.support.processes import to_toml

TEXT = "The capital of Spain is Madrid."


class Daemon:
    """Answers every prompt with the same text.

    Attributes:
        asked: the prompts, as they came.
        finish_reason: of the next answers.
        queue_ms: of the next answers.
        refusal: in place of the next answers.
        status: what is said of the models.
        waits: the next answers begin when somebody has asked for the status again: the first one has been told by then.
    """

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.finish_reason = "stop"
        self.queue_ms = 0.0
        self.refusal: EdgeAgentError | None = None
        self.status: dict[str, Any] = {"models": [], "queue_depth": 1}
        self.waits = False
        self._looks = threading.Semaphore(0)
        socket = folder / "c.sock"
        self.config = folder / "config.toml"
        self.config.write_text(to_toml({"state_dir": str(folder / "state"), "control_socket": str(socket)}))
        self.server = ControlServer(socket, {"probe": self._answer, "status": self._look})

    def _answer(self, call: Call) -> None:
        self.asked.append(call.request["text"])
        if self.refusal:
            raise self.refusal
        if self.waits:
            assert self._looks.acquire(timeout=60) and self._looks.acquire(timeout=60), "nobody looked twice"
        call.send("delta", text=TEXT)
        answer: dict[str, Any] = {
            "model": "assistant",
            "choices": [{"message": {"content": TEXT}, "finish_reason": self.finish_reason}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16},
            "timings": {"queue_ms": self.queue_ms, "first_token_ms": 3003.0, "tokens_per_s": 100.0},
        }
        call.send("done", answer=answer, version="1", flavor="scripted")

    def _look(self, call: Call) -> None:
        call.send("done", status=self.status)
        self._looks.release()

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


def test_the_time_in_the_queue_is_told_from_the_first_token(daemon: Daemon) -> None:
    assert "first token 3003 ms, 100.0 tokens/s" in daemon.probe("Hello").stdout
    daemon.queue_ms = 2500.0
    assert "first token 3003 ms (2500 ms of it in the queue), 100.0 tokens/s" in daemon.probe("Hello").stdout
    document = json.loads(daemon.probe("Hello", "--json").stdout)
    assert (document["queue_ms"], document["first_token_ms"]) == (2500.0, 3003.0)


# --- A model that is not there yet ----------------------------------------------------------------------

PROGRESS = {"bytes": 940_000_000, "total_bytes": 2_350_000_000, "bytes_per_s": 1e7, "eta_s": 141.0}


def entry(state: str, **more: Any) -> dict[str, Any]:
    return {"name": "assistant", "state": state, "reason": "", "update_problem": "", "progress": None, **more}


def attempt(step: str, code: str | None = None) -> dict[str, Any]:
    return {"version": 7, "digest": "", "step": step, "code": code, "at": 0}


@pytest.mark.parametrize(
    ("model", "queue", "said"),
    [
        (entry("absent", progress=PROGRESS), 1, "fetching, 40 % of 2.4 GB, 2 min 21 s left"),
        (entry("absent", progress={**PROGRESS, "eta_s": None}), 1, "fetching, 40 % of 2.4 GB"),
        (entry("absent", progress={**PROGRESS, "total_bytes": 0, "eta_s": None}), 1, "fetching"),
        (
            entry("loading", progress=PROGRESS, reason="it loads"),
            1,
            "fetching, 40 % of 2.4 GB, 2 min 21 s left",
        ),
        (entry("absent", attempt=attempt("verify")), 1, "verifying version 7"),
        (entry("loading", attempt=attempt("gate")), 1, "trying version 7"),
        (entry("loading", attempt=attempt("gate", "gate_failed"), reason="why"), 1, "loading: why"),
        (entry("loading", attempt=attempt("active")), 1, "loading"),
        (entry("absent", update_problem="no registry answers"), 1, "absent: no registry answers"),
        (entry("ready", progress=PROGRESS), 1, ""),
        (entry("ready"), 4, "3 other prompts wait or run"),
    ],
)
def test_what_a_prompt_waits_for_is_said_in_words(model: dict[str, Any], queue: int, said: str) -> None:
    status = {"models": [{**entry("ready"), "name": "other"}, model], "queue_depth": queue}
    assert waiting.obstacle(status, "assistant") == said
    assert waiting.obstacle({**status, "models": [model]}, None) == said


def test_a_device_without_the_model_yet_says_how_far_it_is(daemon: Daemon) -> None:
    daemon.refusal = NoModel("model 'assistant' cannot answer now: no version is in the cache")
    daemon.status["models"] = [entry("absent", progress=PROGRESS, attempt=attempt("fetch"))]
    result = daemon.probe("Hello", "--json")
    assert (result.exit_code, result.stdout) == (4, "")
    *_, first, second = result.stderr.splitlines()  # a slow answer is waited for in words
    assert first == "edge-agent: model 'assistant' is not here yet: fetching, 40 % of 2.4 GB, 2 min 21 s left"
    assert "status --watch" in second


def test_a_device_whose_model_does_not_come_says_why(daemon: Daemon) -> None:
    daemon.refusal = NoModel("model 'assistant' cannot answer now: no version is in the cache")
    daemon.status["models"] = [entry("absent", update_problem="the registry cannot be reached")]
    result = daemon.probe("Hello")
    assert result.exit_code == 4
    assert "no version is in the cache; the registry cannot be reached" in result.stderr


def test_a_command_that_hears_nothing_says_what_it_waits_for(daemon: Daemon) -> None:
    daemon.waits = True
    daemon.status["models"] = [entry("loading", reason="version 7 is being loaded")]
    result = daemon.probe("Hello")
    assert result.stdout.startswith(TEXT)
    assert result.stderr == "edge-agent: the model: loading: version 7 is being loaded\n"


def test_what_is_waited_for_is_told_when_it_changes_and_not_after_the_first_word() -> None:
    told: list[str] = []
    looks = iter(["", "fetching, 40 %", "fetching, 40 %"])
    looked = threading.Event()

    def look() -> str:
        text = next(looks, None)
        if text is None:
            looked.set()
            raise TransportError("gone")
        return text

    with waiting.told_while_silent(look, told.append, silent_s=0.001, again_s=0.0) as heard:
        assert looked.wait(60)
        heard()
    assert told == ["fetching, 40 %"]
