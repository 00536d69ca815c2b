"""The line that says where a command is, and what it keeps from the screen."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from edge_agent.cli.progress_line import PlainLines, progress_line, said
from tests.support.terminal import on_a_terminal

MB = 1_000_000


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 0, "uploading"),
        (0, 90_200_000, "uploading 0.0 of 90.2 MB"),
        (400_000, 90_200_000, "uploading 0.4 of 90.2 MB"),
        (90_200_000, 90_200_000, "uploading 90.2 of 90.2 MB"),
        (12, 400, "uploading 12 of 400 B"),
        (900 * MB, 2_100 * MB, "uploading 0.9 of 2.1 GB"),
    ],
)
def test_bytes_are_said_in_the_unit_of_all_of_them(done: float, total: float, text: str) -> None:
    assert said("uploading", done, total) == text


def test_without_a_terminal_each_step_is_a_line_and_a_long_one_has_several() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    lines("checking", 0, 0)
    for done in range(0, 151, 10):
        lines("hashing\x1b[2K", done * MB, 150 * MB)
    lines("registering", 0, 0)
    lines("registering", 0, 0)
    assert stream.getvalue().splitlines() == [
        "checking",
        "hashing\\u001b[2K 0.0 of 150.0 MB",
        "hashing\\u001b[2K 70.0 of 150.0 MB",
        "hashing\\u001b[2K 140.0 of 150.0 MB",
        "hashing\\u001b[2K 150.0 of 150.0 MB",
        "registering",
    ]


def test_on_a_terminal_the_line_is_replaced_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with on_a_terminal() as shown, progress_line() as report:
        report("checking", 0, 0)
        report("uploading", 1 * MB, 2 * MB)
    assert "checking" in shown[0]
    assert shown[0].count("\n") == 1, "one line at each moment"
    assert shown[0].endswith("\n\x1b[?25h\r\x1b[1A\x1b[2K"), "nothing of it stays"


def test_what_shows_no_lines_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_line(plain=False) as report:
        report("checking", 0, 0)
    assert capsys.readouterr() == ("", "")


PROGRAM = """
import os, sys, warnings
from edge_agent.cli.library_output import hidden
from edge_agent.cli.progress_line import progress_line
from edge_agent.errors import PublishError

try:
    with progress_line() as report, hidden():
        os.write(1, b"of a C++ library")
        os.write(2, b"\\x1b[0;93mW: of a C++ library")
        print("View run at")
        warnings.warn("of Python")
        report("checking", 0, 0)
        if len(sys.argv) > 1:
            raise {"ours": PublishError, "unforeseen": RuntimeError}[sys.argv[1]]("refused")
except PublishError as error:
    print(error)
print("after")
"""


def program(*how: str) -> subprocess.CompletedProcess[str]:
    """A process whose stdout and stderr are what they are for a command."""
    command = [sys.executable, "-c", PROGRAM, *how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_libraries_print_is_hidden_and_the_progress_is_not() -> None:
    done = program()
    assert (done.stdout, done.stderr) == ("after\n", "checking\n")


def test_an_error_of_ours_says_all_that_is_needed() -> None:
    done = program("ours")
    assert (done.stdout, done.stderr) == ("refused\nafter\n", "checking\n")


def test_what_was_printed_before_something_unforeseen_is_shown() -> None:
    done = program("unforeseen")
    assert (done.returncode, done.stdout) == (1, "")
    assert "\\u001b[0;93mW: of a C++ library" in done.stderr
    assert "View run at" in done.stderr
    assert done.stderr.endswith("RuntimeError: refused\n")
