"""What people see of a device in a real terminal, and that everybody who may look sees the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import EdgeAgentError
from tests.support.lookers import GROUP, look, without_socket
from tests.support.processes import Daemon, short_folder
from tests.support.scripted_status import (
    WEIGHTS,
    ScriptedStatus,
    attempt,
    document,
    model,
    scripted_status,
)
from tests.support.terminal import EDGE_AGENT, Screen

TOOK = {"fetch": 71.4, "verify": 2.0}
BYTES = {"bytes": WEIGHTS * 3 // 5, "total_bytes": WEIGHTS, "bytes_per_s": 5_100_000.0, "eta_s": 156.9}
PINNED = {"pinned": "6-aaaaaaaaaaaa", "wanted": {"version": 6, "via": "pin"}}


# --- A daemon that says what the test wants ------------------------------------------------------------


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Path, ScriptedStatus]]:
    with short_folder() as folder, scripted_status(folder) as status:
        yield folder, status


def status_of(folder: Path, *arguments: str) -> list[str]:
    return [*EDGE_AGENT, "--config", str(folder / "config.toml"), "status", *arguments]


def test_an_update_is_watched_from_its_first_byte_to_its_first_answer(
    scripted: tuple[Path, ScriptedStatus],
) -> None:
    """Ctrl-C ends it; what stood on the screen before stands there again."""
    folder, daemon = scripted
    daemon.document = document(registry={"asking": True})
    watch = " ".join(status_of(folder, "--watch"))
    shell = ["sh", "-c", f"trap : INT; echo before; {watch}; echo ended with $?; read line"]
    with Screen(shell, columns=120, rows=20) as screen:
        screen.wait_for("being asked now, reachable, last asked")
        assert not screen.is_as_found
        daemon.document = document(model(attempt=attempt("fetch"), progress=BYTES, **PINNED))
        screen.wait_for("version 7: fetching 1.2 GB of 2.0 GB (60 %), 5.1 MB/s, 2 min 37 s left, for ")
        screen.wait_for("pinned to 6-aaaaaaaaaaaa")
        daemon.document = document(model(attempt=attempt("verify", took_s={"fetch": 71.4})))
        screen.wait_for("version 7: verifying, for ")
        daemon.document = document(model(attempt=attempt("gate", took_s=TOOK, golden={"asking": 3, "of": 8})))
        screen.wait_for("version 7: trying, golden prompt 3 of 8, for ")
        daemon.document = document(
            model(version=7, attempt=attempt("active", took_s={**TOOK, "gate": 31, "activate": 0.2}))
        )
        screen.wait_for("; fetched in 1 min 11 s; verified in 2.0 s; tried in 31 s")
        screen.press("C-c")
        assert screen.wait_for("ended with") == ["before", "ended with 130"]
        assert screen.is_as_found


@pytest.mark.parametrize("columns", [80, 120])
def test_at_any_width_the_whole_status_is_there(scripted: tuple[Path, ScriptedStatus], columns: int) -> None:
    folder, daemon = scripted
    reason = " ".join(f"word{number}" for number in range(40))
    daemon.document = document(model(reason=reason, **PINNED), model(name="other"), state="degraded")
    with Screen(status_of(folder), columns=columns, rows=40) as screen:
        assert screen.wait() == 0
        lines, coloured = screen.lines(), screen.coloured()
    assert max(map(len, lines)) <= columns
    assert lines[0] == "state     degraded   (edge-agent 1.0.0, queue 0)"
    row = next(number for number, line in enumerate(lines) if line.startswith("assistant  ready  6"))
    assert lines[row + 1].startswith("  pin     pinned to 6-aaaaaaaaaaaa; ")
    assert set(reason.split()) <= set(" ".join(lines[row:]).split()), "below its row, and all of it"
    assert any(line.startswith("other      ready  6") for line in lines[row:])
    assert "\x1b[33mdegraded" in coloured and "\x1b[32mready" in coloured


def test_without_colours_the_words_are_the_same(scripted: tuple[Path, ScriptedStatus]) -> None:
    folder, daemon = scripted
    daemon.document = document(state="degraded")
    with Screen(status_of(folder), environment={"NO_COLOR": "1"}) as screen:
        assert screen.wait() == 0
        lines = screen.lines()
        assert not re.search(r"\x1b\[[0-9;]*3[1-7]m", screen.coloured())
    piped = subprocess.run(status_of(folder), capture_output=True, text=True, timeout=60, check=True)
    assert "\x1b" not in piped.stdout
    assert piped.stdout.splitlines() == lines, "and no blanks at their ends"


def test_a_page_that_is_higher_than_the_screen_says_so_and_a_moment_without_one_ends_nothing(
    scripted: tuple[Path, ScriptedStatus],
) -> None:
    folder, daemon = scripted
    daemon.document = document(*(model(name=f"model-{number}") for number in range(30)))
    with Screen(status_of(folder, "--watch"), rows=12) as screen:
        lines = screen.wait_for("… and more")
        assert lines[0].startswith("state ")
        assert len(lines) == 12
        daemon.failure = EdgeAgentError("the daemon closed the connection")
        assert screen.wait_for("edge-agent: ") == ["edge-agent: the daemon closed the connection"]
        daemon.failure = None
        screen.wait_for("… and more")
        screen.press("C-c")
        assert screen.wait() == 130


# --- A real device -------------------------------------------------------------------------------------

LOOKS = [
    ("models", "list"),
    ("models", "list", "--json"),
    ("models", "show", "assistant"),
    ("models", "show", "assistant", "--json"),
]


@pytest.fixture(scope="module")
def pinned(agent: Daemon) -> Iterator[Daemon]:
    """The device that all share, with its model pinned. Members of a group may ask it, and read nothing."""
    assert agent.cli("models", "pin", "assistant", "1").returncode == 0
    before = agent.folder.stat().st_mode
    if os.geteuid() == 0:
        os.chown(agent.control_socket, 0, GROUP)
        agent.folder.chmod(0o755)
    try:
        yield agent
    finally:
        agent.folder.chmod(before)
        assert agent.cli("models", "unpin", "assistant").returncode == 0


def test_a_member_of_the_group_root_and_a_device_whose_daemon_is_down_say_the_same(pinned: Daemon) -> None:
    """A pin is in all of it; and the time of the last question to the registry is the same without a daemon."""
    looks = [*LOOKS, ("status",), ("status", "--json")]
    up, down = (["--config", str(path)] for path in (pinned.config_file, without_socket(pinned)))
    by_root, by_member = look(*([*where, *command] for where in (up, down) for command in looks))
    assert [seen.code for seen in by_root] == [0] * (len(looks) + len(LOOKS)) + [3, 3], by_root
    assert by_root[: len(LOOKS)] == by_member[: len(LOOKS)]
    assert by_root[: len(LOOKS)] == by_root[len(looks) : len(looks) + len(LOOKS)]
    assert [seen.out.count("pinned to 1-") for seen in by_root] == 2 * [1, 0, 1, 0, 1, 0]
    (entry,), shown, status = (json.loads(by_root[number].out) for number in (1, 3, 5))
    assert set(entry) == {"name", "version", "digest", "bytes", "state"}
    assert shown["versions"][0]["digest"] == entry["digest"] and shown["versions"][0]["pinned"]
    assert (shown["pinned"], shown["wanted"]) == (shown["active"], {"version": 1, "via": "pin"})
    assert json.loads(by_root[-1].out)["registry"] == status["registry"]
    assert status["registry"]["last_check"] > 0
    if os.geteuid() == 0:
        told = by_member[len(looks)]
        assert (told.code, told.out) == (1, "")
        assert "permission denied" in told.err.lower() and "Traceback" not in told.err


def test_a_real_device_on_a_screen(pinned: Daemon) -> None:
    with Screen([*EDGE_AGENT, "--config", str(pinned.config_file), "status"]) as screen:
        assert screen.wait() == 0
        lines = screen.lines()
    assert max(map(len, lines)) <= 80
    row = next(number for number, line in enumerate(lines) if line.startswith("assistant  ready  1"))
    assert lines[row + 1].startswith("  pin  ")
