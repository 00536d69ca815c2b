"""llama.cpp as a peer of the benchmark: how its library is used, and what is said where it is not here."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from edge_agent.bench import llama_cpp, peers
from edge_agent.bench import run as bench_module
from edge_agent.bench.line_child import BenchError, LineChild
from edge_agent.cli import main

PIECES: tuple[dict[str, Any], ...] = (
    {"role": "assistant", "content": None},
    {"content": "Once"},
    {"content": " upon"},
    {},
)
USAGE = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 2}}


class ScriptedServer:
    """The wheel's server: it notes what it is asked, and streams what OpenAI's interface streams."""

    def __init__(self, settings: Any) -> None:
        if not settings.model.path.endswith("good.gguf"):
            raise RuntimeError("Failed to init server,\nplease check")
        self.settings, self.asked = settings, list[dict[str, Any]]()

    def handle_chat_completions(self, question: dict[str, Any], take: Callable[[Any], bool]) -> None:
        self.asked.append(question)
        if question["messages"][0]["content"] == "too long":
            take({"error": {"code": 400, "message": "exceeds the context"}})
            return
        for piece in PIECES:
            assert take({"choices": [{"delta": piece}]}) is False
        take(USAGE)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("xllamacpp")

    def settings() -> SimpleNamespace:
        parts = ("model", "cpuparams", "cpuparams_batch")
        return SimpleNamespace(**{part: SimpleNamespace() for part in parts})

    module.CommonParams, module.Server = settings, ScriptedServer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xllamacpp", module)


def question(text: str) -> str:
    return json.dumps({"do": "generate", "text": text, "max_tokens": 8})


@pytest.mark.usefixtures("library")
def test_it_is_asked_as_the_bare_library_is() -> None:
    peer = llama_cpp.LlamaCpp("/a/good.gguf", threads=3, context_tokens=512)
    timing = peer.generate("Tell me.", 8)
    assert (timing["prompt_tokens"], timing["completion_tokens"]) == (30, 2)
    assert 0 < timing["first_token_ms"] <= timing["total_ms"]
    server: ScriptedServer = peer._server
    settings = server.settings
    assert (settings.cpuparams.n_threads, settings.cpuparams_batch.n_threads, settings.n_ctx) == (3, 3, 512)
    (asked,) = server.asked
    assert (asked["temperature"], asked["max_tokens"], asked["cache_prompt"]) == (0, 8, False)


@pytest.mark.usefixtures("library")
def test_what_fails_is_said_in_a_line() -> None:
    answers = list(llama_cpp.serve("/a/bad.gguf", 1, 512, iter([])))
    assert answers == [{"error": "Failed to init server, please check"}]
    loaded, fine, failed = llama_cpp.serve(
        "/a/good.gguf", 1, 512, iter(map(question, ("a", "too long", "b")))
    )
    assert (list(loaded), fine["completion_tokens"]) == (["load_ms"], 2)
    assert "exceeds the context" in failed["error"]


def test_a_child_that_reports_an_error_ends_the_benchmark(tmp_path: Path) -> None:
    """The library is not here: the process says so itself."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = (str(tmp_path), "1", "64")
    with (
        LineChild("edge_agent.bench.llama_cpp", *arguments, environment=environment, walls=False) as child,
        pytest.raises(BenchError, match="xllamacpp"),
    ):
        child.read(timeout_s=60)


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
