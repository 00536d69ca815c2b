"""What a process with this project's logs writes to stderr, in each of their forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPT = "planted-prompt"
LOGS = {
    "text": "logs.configure('text', journal=False)",
    "journal": "logs.configure('text', journal=True)",
    "json": "logs.configure('json', journal=False)",
}
FAILING = f"""
import logging, threading
from edge_agent import logs
CONFIGURE

def deep():
    raise ValueError("cannot understand {PROMPT}") from OSError(28, "{PROMPT}", "{PROMPT}")

def work():
    try:
        deep()
    finally:
        raise KeyError("{PROMPT}")

def recur():
    recur()
"""


def stderr_of(program: str, form: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", FAILING.replace("CONFIGURE", LOGS[form]) + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return result.stderr


LOGGED = """
try:
    work()
except KeyError:
    logging.getLogger("part").exception("part failed request=%s", "r1")
"""
ENDS_THREAD = "thread = threading.Thread(target=work, name='worker'); thread.start(); thread.join()"


@pytest.mark.parametrize("form", LOGS)
@pytest.mark.parametrize("program", [LOGGED, ENDS_THREAD, "work()"], ids=["logged", "thread", "process"])
def test_an_unforeseen_exception_is_logged_with_its_places_and_without_its_words(
    program: str, form: str
) -> None:
    seen = stderr_of(program, form)
    assert "builtins.KeyError" in seen
    assert "caused by builtins.ValueError" in seen
    assert "caused by builtins.OSError ENOSPC" in seen
    assert ":work" in seen and ":deep" in seen
    assert PROMPT not in seen


def test_each_line_of_it_has_its_priority_in_the_journal_and_is_one_object_in_json() -> None:
    assert all(line.startswith("<3>") for line in stderr_of(LOGGED, "journal").splitlines())
    assert "request=r1" in json.loads(stderr_of(LOGGED, "json"))["message"]


def test_a_recursion_without_end_fits_into_the_log() -> None:
    seen = stderr_of("recur()", "text")
    assert "RecursionError" in seen
    assert len(seen.splitlines()) < 40


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_that_cannot_be_written_does_not_change_the_exit_code(stream: str, tmp_path: Path) -> None:
    program = f"""
import resource, sys
from edge_agent import terminal
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
print("held back", end="", file=sys.{stream})
terminal.let_go() if sys.argv[1:] else None
"""
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("ab") as file:
        codes = [
            subprocess.run(
                [sys.executable, "-c", program, *go], stdout=file, stderr=file, env=buffered, check=False
            ).returncode
            for go in ((), ("go",))
        ]
    assert codes == [120, 0]
