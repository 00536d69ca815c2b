"""`models pull` before a scripted daemon: what it says while it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_agent import terminal
from edge_agent.cli import main, waiting
from edge_agent.transport.control import Call, ControlServer
from tests.support.scripted_status import attempt, document, model

PULLED = {
    "name": "assistant",
    "version": 7,
    "digest": "b" * 64,
    "state": "active",
    "bytes_fetched": 10,
    "bytes_reused": 0,
    "bytes_mirrored": 0,
    "instead": "",
}


@contextmanager
def served(folder: Path, pull: Callable[[Call], None], status: Callable[[Call], None]) -> Iterator[Path]:
    """The settings of a device whose daemon answers so."""
    file = folder / "config.toml"
    file.write_text(
        f'device_id = "dev"\nstate_dir = "{folder}/state"\ncontrol_socket = "{folder}/c.sock"\n'
        '[registry]\nuri = "http://localhost:1"\n[models.assistant]\nuri = "models:/phi3-mini@prod"\n'
    )
    server = ControlServer(folder / "c.sock", {"models": pull, "status": status})
    thread = threading.Thread(target=server.run)
    thread.start()
    yield file
    server.close()
    thread.join(60)


@pytest.fixture
def config(short_dir: Path) -> Iterator[Path]:
    """Settings of a device whose daemon is at the gate for as long as nobody has asked for its status twice."""
    looks = threading.Semaphore(0)

    def pull(call: Call) -> None:
        assert looks.acquire(timeout=60) and looks.acquire(timeout=60)
        call.send("done", result=[PULLED])

    def status(call: Call) -> None:
        call.send("done", status=document(model(attempt=attempt("gate", golden={"asking": 3, "of": 8}))))
        looks.release()

    with served(short_dir, pull, status) as file:
        yield file


def test_a_pull_says_what_becomes_of_a_version_after_its_bytes(config: Path) -> None:
    result = CliRunner().invoke(main, ["--config", str(config), "models", "pull", "assistant"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "assistant version 7: 10 B fetched, 0 B already here\n"
    assert result.stderr == "assistant version 7: trying, golden prompt 3 of 8\n", "once"


def test_a_daemon_that_says_how_far_it_is_is_not_asked(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch may take hours, and the whole status makes the daemon look at its disk."""
    asked: list[Call] = []
    looks: list[Callable[[], str]] = []
    seen: list[str] = []

    @contextmanager
    def told_while_silent(look: Callable[[], str], *_: object, **__: object) -> Iterator[None]:
        looks.append(look)
        yield

    @contextmanager
    def progress_bar() -> Iterator[Callable[..., None]]:
        yield lambda *_: seen.append(looks[0]())  # as the thread would that looks, after each word

    def pull(call: Call) -> None:
        for done in range(3):
            call.send("progress", progress={"event": "progress", "bytes": done, "total_bytes": 3})
        call.send("done", result=[PULLED])

    monkeypatch.setattr(waiting, "SILENT_S", 3600.0)
    monkeypatch.setattr(waiting, "told_while_silent", told_while_silent)
    monkeypatch.setattr(terminal, "progress_bar", progress_bar)
    with served(short_dir, pull, asked.append) as config:
        result = CliRunner().invoke(main, ["--config", str(config), "models", "pull", "assistant"])
    assert (result.exit_code, asked, seen) == (0, [], [""] * 3)
