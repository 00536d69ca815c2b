"""What `doctor` shows of what it found: groups, what failed last, each check once, the verdict, and how lines break."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from rich.cells import cell_len

from edge_agent import terminal
from edge_agent.cli.command import paint
from edge_agent.cli.doctor import page
from edge_agent.doctor import diagnose, host, service
from edge_agent.doctor.finding import Finding, Level, fail, ok, warn
from edge_agent.settings import Settings

PLAIN, COLOURED = terminal.Paint(colours=False), terminal.Paint(colours=True)
FOUND = [
    ok("host.cpu", "x86_64"),
    warn("host.clock", "not synchronised", "install chrony"),
    fail("broker.connect", "press:1883 cannot be reached: Connection refused", "check mqtt.host"),
    ok("registry.alias", "model a: models:/a@prod is version 1"),
    fail("registry.alias", "model b: no such alias", "set its alias"),
    ok("models.threads", "a: 2 threads"),
    ok("models.threads", "b: 4 threads"),
    ok("daemon", "ready"),
]


def shown(found: list[Finding], *, columns: int | None = None) -> list[str]:
    return list(page.lines(found, PLAIN, columns=columns))


def test_what_failed_stands_last_above_the_verdict() -> None:
    assert shown(FOUND) == [
        "This machine",
        "ok    host.cpu           x86_64",
        "",
        "Models",
        "ok    models.threads     a: 2 threads",
        "                         b: 4 threads",
        "",
        "Service",
        "ok    daemon             ready",
        "",
        "Warnings",
        "warn  host.clock         not synchronised",
        "                         → install chrony",
        "",
        "Failures",
        "fail  broker.connect     press:1883 cannot be reached: Connection refused",
        "                         → check mqtt.host",
        "fail  registry.alias     model b: no such alias",
        "                         → set its alias",
        "                         (ok) model a: models:/a@prod is version 1",
        "",
        "will not work: 2 failures, 1 warning. Do what each → says, then check again.",
    ]


def test_no_check_is_named_twice() -> None:
    names = [name for line in shown(FOUND) for name in re.findall(r"^(?:ok|warn|fail) +(\S+)", line)]
    assert sorted(names) == sorted({finding.check for finding in FOUND})


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ("", "ready. "),
        ("ok ok", "ready. "),
        ("ok warn", "ready; 1 warning. "),
        ("warn warn", "ready; 2 warnings. "),
        ("fail ok", "will not work: 1 failure. "),
        ("fail fail warn", "will not work: 2 failures, 1 warning. "),
    ],
)
def test_the_last_line_is_the_verdict_and_what_to_do(levels: str, verdict: str) -> None:
    found = [
        Finding(check=f"host.{number}", level=Level(level), message="seen", remedy="do")
        for number, level in enumerate(levels.split())
    ]
    last = shown(found, columns=80)[-1]
    assert last.startswith(verdict)
    assert len(last) > len(verdict)


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_lines_break_where_the_terminal_ends_and_hang_below_the_text(columns: int) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    found = [warn("models.memory", words, f"{words} {'/a/long/path' * 12}"), ok("host.cpu", "日本語 " * 30)]
    lines = shown(found, columns=columns)
    assert max(map(cell_len, lines)) <= columns
    hanging = lines[lines.index("Warnings") + 2 : -2]
    assert all(re.match(r"^ {25}(?=\S)|^ {25}→ \S|^ {27}\S", line) for line in hanging)
    text = " ".join(line.strip() for line in hanging)
    assert "word39 → word0" in text
    assert "/a/long/path" * 12 in text.replace(" ", "")


def test_there_are_colours_for_levels_and_nothing_else_changes_with_them() -> None:
    coloured = list(page.lines(FOUND, COLOURED, columns=80))
    assert [re.sub(r"\033\[[\d;]*m", "", line) for line in coloured] == shown(FOUND, columns=80)
    assert "\033[32mok  \033[0m" in coloured[1]
    assert any(line.startswith("\033[31mfail\033[0m  broker.connect") for line in coloured)
    assert coloured[-1].startswith("\033[1;31mwill not work")


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_for_terminals_that_want_them(
    variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint()("ok", "green") == "ok", "pytest's stdout is no terminal"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert paint()("ok", "green") == "\033[32mok\033[0m"
    monkeypatch.setenv("NO_COLOR", "")
    assert paint()("ok", "green") != "ok", "an empty one says nothing"
    monkeypatch.setenv(*variable)
    assert paint()("ok", "green") == "ok"


# --- A device that is too slow for a check's time limit ------------------------------------------------


def expire(command: list[str], **given: Any) -> None:
    raise subprocess.TimeoutExpired(command, given["timeout"])


def test_libraries_that_load_slowly_are_not_said_to_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", expire)
    (found,) = host.check_libraries(settings("a", "http://b"))
    assert (found.check, found.level) == ("host.libraries", Level.WARN)
    assert "within 60 s" in found.message and "again" in found.remedy


def test_every_check_that_runs_out_of_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", expire)
    found = {
        each.check: each.level
        for each in diagnose(lambda: settings("127.0.0.1", "http://[::1]:9"), config=None)
    }
    assert [found[check] for check in ("host.libraries", "host.walls")] == [Level.WARN] * 2


# --- Nothing is found twice ----------------------------------------------------------------------------


def settings(host_name: str, registry: str) -> Settings:
    return Settings.model_validate({"mqtt": {"host": host_name}, "registry": {"uri": registry}})


def test_a_name_is_looked_up_once_and_an_address_never(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(name: str) -> str:
        asked.append(name)
        return ""

    monkeypatch.setattr(host, "_resolve", resolve)
    (both,) = host.check_names(settings("site.example", "http://site.example:5000"))
    assert (both.level, both.message) == (
        Level.FAIL,
        "site.example (mqtt.host, registry.uri) has no address",
    )
    (none,) = host.check_names(settings("10.0.0.1", "http://[::1]:5000"))
    assert (none.level, asked) == (Level.OK, ["site.example"])
    assert [found.check for found in host.check_names(settings("a", "http://b"))] == ["host.dns"] * 2


@pytest.mark.parametrize(
    ("troubles", "broker", "said"),
    [
        ([], [], "degraded, version 1, 0 prompts queued"),
        ([("journal_unavailable", "journal: full")], [], "journal: full"),
        ([("quarantined", "model a: 7 is in quarantine")], [], "queued; see cache.state"),
        (
            [("self_test_failed", "broker: nothing comes back"), ("fallback_in_use", "model a: b")],
            ["self_test_failed"],
            "queued; see the broker, models.fallback",
        ),
    ],
)
def test_the_daemon_does_not_repeat_what_another_check_says(
    troubles: list[tuple[str, str]], broker: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.__version__", "1")
    document: dict[str, Any] = {
        "state": "degraded",
        "agent_version": "1",
        "queue_depth": 0,
        "models": [],
        "troubles": [{"code": code, "text": text} for code, text in troubles],
        "broker": {"troubles": [{"code": code} for code in broker]},
    }
    (found,) = service.check_daemon(Settings(), service.DaemonStatus(document=document))
    assert found.level is Level.WARN
    assert found.message.endswith(said)
