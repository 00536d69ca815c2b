"""llama.cpp as a peer of the benchmark: how its server is asked, and what is said where it is not here."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from edge_agent.bench import llama_cpp, peers
from edge_agent.bench import run as bench_module
from edge_agent.bench.http_client import HttpClient
from edge_agent.bench.line_child import BenchError
from edge_agent.bench.measurements import PeerTogether, Prompts, measure_peer_together
from edge_agent.cli import main
from tests.support import scripted_llama_cpp

PACKAGE = Path(__file__).parents[2]
CONTEXT_TOKENS = 512


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", scripted_llama_cpp)


@pytest.fixture
def server() -> Iterator[scripted_llama_cpp.Server]:
    settings = scripted_llama_cpp.CommonParams()
    settings.model.path, settings.n_parallel, settings.api_keys = "/a/good.gguf", 1, ["secret"]
    server = scripted_llama_cpp.Server(settings)
    yield server
    server.close()


def client(
    server: scripted_llama_cpp.Server, *, api_key: str = "secret", timeout_s: float = 60
) -> HttpClient:
    port = int(server.listening_address.rpartition(":")[2])
    return HttpClient("llama.cpp", port, api_key=api_key, timeout_s=timeout_s)


def test_it_is_asked_as_the_bare_library_is(server: scripted_llama_cpp.Server) -> None:
    answer = client(server).ask("Tell me.", 8)
    assert answer.text == "Once upon"
    assert (answer.timing.prompt_tokens, answer.timing.completion_tokens) == (30, 2)
    assert 0 < answer.timing.first_token_ms <= answer.timing.total_ms
    (asked,) = server.asked
    assert (asked["temperature"], asked["max_tokens"], asked["cache_prompt"]) == (0, 8, False)


def test_thoughts_are_text_too(server: scripted_llama_cpp.Server) -> None:
    """A model that thinks has begun with them, and its tokens are counted."""
    assert client(server).ask("thinks", 8).text == "Hm. Once upon"


def test_the_first_token_is_the_first_text(server: scripted_llama_cpp.Server) -> None:
    """Neither what comes before it nor what comes after."""

    def go_on() -> None:
        server.stalling.wait(60)
        time.sleep(1)  # what is measured is a time
        server.stalled.set()

    pausing = threading.Thread(target=go_on)
    pausing.start()
    timing = client(server).ask("stalls", 8).timing
    pausing.join()
    assert timing.total_ms - timing.first_token_ms > 100


@pytest.mark.parametrize(
    ("text", "api_key", "said"),
    [
        ("too long", "secret", "refuses a prompt: .*exceeds the available context size"),
        ("fails", "secret", "refuses a prompt: .*Compute error"),
        ("breaks off", "secret", "broke an answer off"),
        ("Tell me.", "guessed", "refuses a prompt: .*Invalid API Key"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    server: scripted_llama_cpp.Server, text: str, api_key: str, said: str
) -> None:
    with pytest.raises(BenchError, match=f"^llama.cpp {said}"):
        client(server, api_key=api_key).ask(text, 8)


def test_a_server_that_stands_still_or_is_gone_ends_the_benchmark(server: scripted_llama_cpp.Server) -> None:
    with pytest.raises(BenchError, match=r"^llama.cpp did not answer: timed out$"):
        client(server, timeout_s=0.2).ask("stalls", 8)
    server.close()
    with pytest.raises(BenchError, match="refused"):
        client(server).ask("Tell me.", 8)


def test_an_answer_that_fails_does_not_wait_for_those_beside_it(server: scripted_llama_cpp.Server) -> None:
    with pytest.raises(BenchError, match="exceeds the available context size"):
        client(server).ask_at_once(["too long", "stalls"], 8)
    assert not server.gave_up, "the other answer had ended by then"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("slots", [1, 4])
def test_each_slot_has_the_whole_context(slots: int) -> None:
    server = llama_cpp.start(
        "/a/good.gguf", threads=3, context_tokens=CONTEXT_TOKENS, slots=slots, api_key="secret"
    )
    server.close()
    given = server.settings
    assert (given.cpuparams.n_threads, given.cpuparams_batch.n_threads) == (3, 3)
    assert (given.n_parallel, given.n_ctx) == (slots, slots * CONTEXT_TOKENS)
    assert given.api_keys == ["secret"], "it answers nobody else"


@pytest.mark.usefixtures("library")
def test_a_file_that_cannot_be_loaded_is_said_in_a_line() -> None:
    answers = list(llama_cpp.serve("/a/bad.gguf", 1, CONTEXT_TOKENS, 1, []))
    assert answers == [{"error": "Failed to init server, please check"}]


@pytest.fixture
def subject(tmp_path: Path) -> Any:
    """For a process that finds the scripted server where it looks for the library."""
    (tmp_path / "xllamacpp.py").write_text("from tests.support.scripted_llama_cpp import *\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{PACKAGE}"}
    return SimpleNamespace(threads=1, context_tokens=CONTEXT_TOKENS, environment=environment)


def test_four_at_once_are_the_prompts_of_the_agent_and_beside_what_they_are_alone(subject: Any) -> None:
    texts = [f"question {number}" for number in range(15)]
    texts[5] += " wavers"
    prompts = Prompts(by_length={}, short=texts, prefix=None)
    assert prompts.at_once(4) == texts[3:7], "behind one, and two at once"
    found = PeerTogether()
    with peers.llama_cpp(subject, Path("/a/good.gguf"), slots=4) as side:
        assert side.load_ms > 0
        measure_peer_together(side, prompts, 8, found)
    assert found.equal == [True, True, False, True]
    assert len(found.first_token_ms) == 4
    assert found.tokens_per_s[0] > 0


def test_a_process_that_reports_an_error_ends_the_benchmark(tmp_path: Path, subject: Any) -> None:
    with (
        pytest.raises(BenchError, match="Failed to init server, please check"),
        peers.llama_cpp(subject, tmp_path / "bad.gguf"),
    ):
        pass
    subject.environment = {"PYTHONPATH": str(PACKAGE)}  # the library is not there
    with pytest.raises(BenchError, match="xllamacpp"), peers.llama_cpp(subject, tmp_path / "good.gguf"):
        pass


def bench(folder: Path, file: Path) -> Any:
    config = folder / "config.toml"
    config.write_text(f'state_dir = "{folder}/state"\n[models.assistant]\nuri = "models:/sample@prod"\n')
    return CliRunner().invoke(main, ["--config", str(config), "bench", "--against", "llama.cpp", str(file)])


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF\x03")
    return file


def test_the_command_says_how_to_get_the_library(tmp_path: Path, gguf: Path) -> None:
    done = bench(tmp_path, gguf)
    assert done.exit_code == 1
    assert "xllamacpp, which is not installed" in done.stderr
    assert f"{sys.executable} -m pip install xllamacpp" in done.stderr


def test_a_file_that_is_no_gguf_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert "No such file" in bench(tmp_path, file).stderr
    file.write_bytes(b"PK\x03\x04")
    assert "is no GGUF file" in bench(tmp_path, file).stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not installed$"),
        ("", ""),
        ("import a_part_of_it", "cannot be loaded: ModuleNotFoundError: No module named 'a_part_of_it'$"),
        ("import os; os.abort()", "cannot be loaded: it says nothing$"),
    ],
)
def test_the_library_is_looked_for_as_its_process_will_find_it(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    (tmp_path / "here").mkdir()
    if content is not None:
        (tmp_path / "here" / "xllamacpp.py").write_text(content)
    environment = {"PYTHONPATH": str(tmp_path / "here")}
    with pytest.raises(BenchError) if said else contextlib.nullcontext() as caught:
        peers.check(gguf, environment)
    assert caught is None or re.search(said, caught.value.message)
    if content == "":
        monkeypatch.setattr(bench_module, "child_environment", lambda state_dir: environment)
        assert bench(tmp_path, gguf).exit_code == 4, "no model is in the cache"


def test_a_library_that_only_this_process_sees_is_missing(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xllamacpp.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    said = bench(tmp_path, gguf).stderr
    assert (
        "not installed in the agent's environment, and the processes that are measured get no PYTHONPATH"
        in said
    )
