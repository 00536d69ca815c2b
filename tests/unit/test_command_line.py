"""What a command says where what it is given, or what it writes to, is wrong. No daemon runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_agent import terminal
from edge_agent.cli import main
from edge_agent.terminal import Rows, StdoutFailed
from tests.support.processes import to_toml


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A command that works without the daemon sets handlers, in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings with one model, of which nothing is here."""
    file = tmp_path / "config.toml"
    models = {"assistant": {"uri": "models:/phi3-mini@prod"}}
    file.write_text(to_toml({"state_dir": str(tmp_path / "state"), "models": models}))
    return file


def invoke(config: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(main, ["--config", str(config), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e300"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("probe", "hi", "--timeout"),
        ("fleet", "sync", "--within"),
        ("fleet", "rollout", "assistant", "8", "--min-speed"),
    ],
)
def test_a_number_that_is_none_or_has_no_end_is_wrong_usage(
    config: Path, arguments: tuple[str, ...], number: str
) -> None:
    result = invoke(config, *arguments, number)
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[-1]}'" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("models", "show"), ("models", "pull"), ("models", "rollback"), ("models", "unpin")]
)
def test_a_name_that_no_model_has_is_4(config: Path, arguments: tuple[str, ...]) -> None:
    result = invoke(config, *arguments, "missing")
    assert result.exit_code == 4
    assert result.stderr.startswith("edge-agent: no model is called 'missing' here")


def test_a_model_without_a_version_is_not_said_to_run_one(config: Path) -> None:
    assert invoke(config, "models", "unpin", "assistant").stdout == "assistant: no version is active\n"


def test_what_is_no_version_file_is_named(config: Path, tmp_path: Path) -> None:
    result = invoke(config, "models", "import", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"edge-agent: {tmp_path} is not a regular file\n")


@pytest.mark.parametrize(
    "write",
    [
        lambda: terminal.echo("a line"),
        lambda: terminal.echo_answer("a piece of an answer"),
        lambda: terminal.print_page(["a page", Rows(("A", "TABLE"), [("of", "cells")])]),
        lambda: terminal.echo_painted(["a finding"]),
        lambda: terminal.echo("x" * 100_000),
    ],
)
def test_a_full_disk_is_said_in_one_sentence(
    write: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(StdoutFailed) as caught:
            write()
        full.flush()  # as at the end of the process
    assert str(caught.value) == "standard output cannot be written: No space left on device"


_HOLDS_A_LINE = """
import sys
from edge_agent.cli import main

@main.command()
def hold():
    sys.stderr.write("a line")

sys.stderr = open("/dev/full", "w")
main(["hold"])
"""


@pytest.mark.parametrize("stderr", ["&-", "/dev/full"])
def test_no_exit_code_depends_on_stderr(config: Path, stderr: str) -> None:
    command = f"exec '{sys.executable}' -m edge_agent --config '{config}' status >/dev/null 2>{stderr}"
    assert subprocess.run(["sh", "-c", command], timeout=60, check=False).returncode == 3


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_on_a_full_disk_is_said_in_one_sentence(option: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "edge_agent", option]
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    said = "edge-agent: standard output cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, said)


def test_a_log_that_cannot_be_written_changes_no_exit_code() -> None:
    """The gateway's, as the daemon's: what stderr holds to the end is given up."""
    ended = subprocess.run([sys.executable, "-c", _HOLDS_A_LINE], timeout=60, check=False)
    assert ended.returncode == 0


def test_a_reader_that_has_gone_is_no_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError):
            terminal.echo("a line")
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())


def test_a_command_on_a_full_disk_ends_with_1_and_a_sentence(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str, **options: object) -> None:
        if not options.get("err"):
            raise StdoutFailed("standard output cannot be written: No space left on device")
        print(text, file=sys.stderr)

    monkeypatch.setattr(terminal, "echo", fail)
    result = invoke(config, "models", "list")
    assert (result.exit_code, result.stderr) == (
        1,
        "edge-agent: standard output cannot be written: No space left on device\n",
    )
