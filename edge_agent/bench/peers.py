"""llama.cpp as a peer of the benchmark: whether it is here and can run the file, and the side that runs it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from edge_agent.bench.http_client import Answer, HttpClient
from edge_agent.bench.line_child import BenchError, LineChild
from edge_agent.bench.sides import ANSWER_TIMEOUT_S, LOAD_TIMEOUT_S, Subject
from edge_agent.bench.timing import Timing

LIBRARY = "xllamacpp"
_IMPORT_S = 120.0
_MAX_REASON = 300


class LlamaCppSide:
    """llama.cpp's server in a process of its own, asked over HTTP.

    Attributes:
        load_ms: until it listens, without the start of the process.
        pid: its process.
    """

    def __init__(self, child: LineChild) -> None:
        ready = child.read(timeout_s=LOAD_TIMEOUT_S)
        port = urlsplit(ready["address"]).port or 0
        self._client = HttpClient("llama.cpp", port, api_key=ready["api_key"], timeout_s=ANSWER_TIMEOUT_S)
        self.load_ms = float(ready["load_ms"])
        self.pid = child.pid

    def ask(self, text: str, max_tokens: int) -> Timing:
        return self.answer(text, max_tokens).timing

    def answer(self, text: str, max_tokens: int) -> Answer:
        return self._client.ask(text, max_tokens)

    def answer_at_once(self, texts: Sequence[str], max_tokens: int) -> list[Answer]:
        """It has as many slots, or lets some of them wait."""
        return self._client.ask_at_once(texts, max_tokens)


@contextlib.contextmanager
def llama_cpp(subject: Subject, gguf: Path, *, slots: int = 1) -> Iterator[LlamaCppSide]:
    """llama.cpp with a model of its own.

    Args:
        slots: how many prompts it answers at once. Each has keys and values for the whole context.
    """
    arguments = (str(gguf), str(subject.threads), str(subject.context_tokens), str(slots))
    module = "edge_agent.bench.llama_cpp"
    with LineChild(module, *arguments, environment=subject.environment, walls=False) as child:
        yield LlamaCppSide(child)


def check(gguf: Path, environment: Mapping[str, str]) -> None:
    """
    Args:
        environment: of the process that will run it.

    Raises:
        BenchError: the file is no GGUF file, or that process would not find the library; the remedy says what to do.
    """
    from edge_agent.publishing.kinds import GGUF_MAGIC  # a second, which no other benchmark has to wait for

    try:
        with gguf.open("rb") as stream:
            begin = stream.read(len(GGUF_MAGIC))
    except OSError as error:
        raise BenchError(f"{gguf} cannot be read: {error.strerror}") from error
    if begin != GGUF_MAGIC:
        raise BenchError(f"{gguf} is no GGUF file", remedy="llama.cpp runs GGUF files only")
    _check_library(environment)


def _check_library(environment: Mapping[str, str]) -> None:
    """Imports it as its process will. It may be seen here only (PYTHONPATH), or be there and not load."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", f"import {LIBRARY}"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{LIBRARY} does not load within {_IMPORT_S:.0f} s") from error
    if found.returncode == 0:
        return
    install = f"{shlex.quote(sys.executable)} -m pip install {LIBRARY}"
    (last,) = found.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ("it says nothing",)
    if last != f"ModuleNotFoundError: No module named '{LIBRARY}'":
        raise BenchError(
            f"{LIBRARY}, through which llama.cpp is measured, cannot be loaded: {last[:_MAX_REASON]}",
            remedy=install,
        )
    where = (
        "is not installed in the agent's environment, and the processes that are measured get no PYTHONPATH"
        if importlib.util.find_spec(LIBRARY)
        else "is not installed"
    )
    raise BenchError(
        f"llama.cpp is measured through the Python package {LIBRARY}, which {where}", remedy=install
    )


def described(gguf: Path) -> dict[str, str]:
    """For the document."""
    return {
        "peer": "llama.cpp",
        "file": gguf.name,
        "library": f"{LIBRARY} {importlib.metadata.version(LIBRARY)}",
    }
