"""What others wrote is shown without control characters: in errors, logs, status, documents and commands' output."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import logs, printable, terminal
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.chat import messages
from edge_agent.cli import main, status_page
from edge_agent.cli.doctor import page
from edge_agent.device_status import DeviceStatus
from edge_agent.doctor import support_archive
from edge_agent.doctor.finding import fail, warn
from edge_agent.errors import (
    BadRequest,
    EdgeAgentError,
    ModelFailed,
    PolicyError,
    SettingsError,
    StoreError,
    error_of,
)
from edge_agent.package import mlmodel
from edge_agent.package.manifest import ManifestFile, check_path, make
from edge_agent.package.reference import ModelRef
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.updates.check import Outlook
from edge_agent.updates.choice import Wanted
from edge_agent.updates.waiting import Waiting
from tests.support.committed import commit, fault
from tests.support.processes import to_toml
from tests.support.terminal import on_a_terminal

pytestmark = pytest.mark.attack

PACKAGE = Path(printable.__file__).parent
WINDOW_TITLE = "\x1b]0;owned\x07"
HOSTILE = [
    *(WINDOW_TITLE, "\x1b[2J", "\x9b31m", "\x9d", "\x90", "\x85", "\x00", "\x07", "\x08", "\r", "\x7f"),
    *("\u202e", "\u202a", "\u2066", "\u2069", "\u200e", "\u200f", "\u061c", "\u2028", "\u2029", "\udc9b"),
]
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI


def controls(text: str) -> set[str]:
    """The control characters that a terminal would get, tabs and line feeds excepted."""
    return {character for character in text if is_control(character)} - {"\t", "\n"}


# --- The rule -----------------------------------------------------------------------------------------------


@given(st.text())
def test_only_tabs_and_line_feeds_are_left_of_a_texts_controls(value: str) -> None:
    shown = printable.text(value)
    assert controls(shown) == set()
    assert printable.text(shown) == shown
    if controls(value) == set():
        assert shown == value


@given(st.text())
def test_a_line_is_one_line_whatever_it_quotes(value: str) -> None:
    shown = printable.line(value)
    assert len(shown.splitlines()) <= 1
    assert not any(map(is_control, shown))
    assert printable.is_line(value) == (shown == value)


@given(st.text() | st.dictionaries(st.text(), st.text() | st.lists(st.text())))
def test_json_is_the_same_document_afterwards(value: Any) -> None:
    assert json.loads(printable.text(json.dumps(value, ensure_ascii=False))) == value


def test_every_string_of_a_document_is_cleaned_and_nothing_else_is_changed() -> None:
    document = {"a\x1b": ["\x9b", 1, None, True, {"b": ("\u202e", 2.5)}], "plain": "Straße \u200d 🙂"}
    assert printable.document(document) == {
        "a\\u001b": ["\\u009b", 1, None, True, {"b": ["\\u202e", 2.5]}],
        "plain": "Straße \u200d 🙂",
    }


# --- Where it is applied ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_error_quotes_nothing_that_a_terminal_obeys(hostile: str) -> None:
    for error in (
        EdgeAgentError(f"key {hostile}", remedy=f"do {hostile}"),
        error_of(
            "code_refused", f"key {hostile}", remedy=hostile, among=(PolicyError,), otherwise=StoreError
        ),
    ):
        assert controls(f"{error}{error.message}{error.remedy}{error.args}") == set()
        assert "\\u" in error.message and "\\u" in error.remedy


@pytest.mark.parametrize("hostile", HOSTILE)
def test_the_reason_that_goes_to_a_client_is_clean(hostile: str) -> None:
    document = messages.error_document("r1", ModelFailed(f"the template says {hostile}"))
    assert controls(document["error"]["message"]) == set()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_field_that_a_client_named_is_shown_escaped(hostile: str) -> None:
    name = json.dumps(f"field{hostile}")
    for body in (f'{{"prompt": "x", {name}: 1}}', f'{{"messages": [{{"role": "user", {name}: 1}}]}}'):
        with pytest.raises(BadRequest) as refused:
            messages.parse(body.encode(), limit_bytes=1_000)
        document = messages.error_document("r1", refused.value)
        assert controls(document["error"]["message"]) == set()
        for form in messages.Form:
            assert controls(messages.encode_answer(document, form).decode()) == set()


@pytest.mark.parametrize("hostile", [*HOSTILE, "\nstate     ready"])
def test_status_for_people_has_a_line_for_each_trouble(
    hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lifecycle = scripted_lifecycle(reason=hostile)
    document = status_of(lifecycle).full(
        broker={"host": "b", "port": 1, "connected": False, "problem": hostile}
    )
    document["troubles"] = [{"code": "internal", "text": hostile}]
    terminal.print_page(status_page.page(document, now=0.0))
    shown = capsys.readouterr().out
    assert controls(shown) == set()
    assert [line for line in shown.splitlines() if line.startswith("state ")] == [shown.splitlines()[0]]


@pytest.mark.parametrize("hostile", [one for one in HOSTILE if not "\ud800" <= one[0] <= "\udfff"])
def test_a_key_of_mlmodel_is_refused_in_words_that_can_be_shown(hostile: str) -> None:
    key = json.dumps(f"key{hostile}")
    text = (
        f"flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.loaders.code_model\n    {key}: 1\n"
    )
    with pytest.raises(PolicyError) as refused:
        mlmodel.check(mlmodel.parse(text.encode()), set())
    assert controls(str(refused.value)) == set()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_path_and_no_name_has_a_control_character(hostile: str) -> None:
    file = ManifestFile(path="MLmodel", size_bytes=1, sha256="0" * 64)
    attempts: list[Callable[[], object]] = [
        lambda: check_path(f"artifacts/{hostile}"),
        lambda: make(f"phi{hostile}", [file]),
        lambda: ModelRef.parse(f"models:/phi{hostile}@prod"),
    ]
    for attempt in attempts:
        with pytest.raises((PolicyError.__base__ or PolicyError, SettingsError)) as refused:
            attempt()
        assert controls(str(refused.value)) == set()


@pytest.mark.parametrize("hostile", [*HOSTILE, "\n<2>forged", "\tforged"])
@pytest.mark.parametrize(
    ("form", "journal"), [("text", False), ("text", True), ("json", False)], ids=["text", "journal", "json"]
)
def test_an_event_is_one_line_of_the_log(
    form: Any, journal: bool, hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept_logging():
        logs.configure(form, journal=journal)
        logging.getLogger("part").warning("record unreadable file=%s reason=%s", hostile, hostile)
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert not any(map(is_control, line))
    assert "record unreadable" in line


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_finding_and_a_table_show_it_escaped(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    finding = warn("cache", f"seen {hostile}\nok  forged", f"do {hostile}")
    terminal.echo_painted(page.lines([finding], terminal.Paint(colours=False), columns=80))
    terminal.print_page([terminal.Rows(("NAME",), [(f"cell {hostile}",)])])
    terminal.echo(hostile, err=True)
    seen = capsys.readouterr()
    assert controls(seen.out + seen.err) == set()
    assert not any(line.startswith("ok") for line in seen.out.splitlines())


def test_a_models_answer_is_escaped_on_a_terminal_and_nowhere_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = f"Madrid {WINDOW_TITLE}\x9b2J\n"
    terminal.echo_answer(answer)
    assert capsys.readouterr().out == answer
    with on_a_terminal() as shown:
        terminal.echo_answer(answer)
    assert shown[0].splitlines() == ["Madrid \\u001b]0;owned\\u0007\\u009b2J"]


def test_a_further_line_of_a_message_does_not_look_like_one_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise EdgeAgentError("the template says x\nedge-agent: all is well\x1b[2K", remedy="look")

    monkeypatch.setattr("edge_agent.cli.models.operate", refuse)
    result = CliRunner().invoke(main, ["--config", str(config_in(tmp_path)), "models", "prune"])
    assert result.stderr == (
        "edge-agent: the template says x\n            edge-agent: all is well\\u001b[2K\n            look\n"
    )


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_version_file_that_lies_about_its_origin_does_not_reach_the_terminal(
    tmp_path: Path, as_json: bool
) -> None:
    config = config_in(tmp_path)
    store = Store(tmp_path / "state")
    store.create()
    record = commit(store, 1)
    lies = json.loads(store.record_file(record).read_bytes())
    lies |= {"run_id": WINDOW_TITLE, "registry_uri": "\x9b2J\n  trust           signed by the owner"}
    store.record_file(record).write_text(json.dumps(lies))
    for command in (("show", "assistant"), ("list",)):
        arguments = ["--config", str(config), "models", *command, *(["--json"] if as_json else [])]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        assert controls(result.output) == set()
        assert len([line for line in result.output.splitlines() if line.startswith("  trust")]) <= 1
    if as_json:  # a program gets what is there
        shown = CliRunner().invoke(main, ["--config", str(config), "models", "show", "assistant", "--json"])
        assert json.loads(shown.output)["versions"][0]["run_id"] == WINDOW_TITLE


def test_the_status_document_has_none_whoever_wrote_its_reasons() -> None:
    status = status_of(scripted_lifecycle(reason=WINDOW_TITLE))
    document = status.document()
    for shown in (document, status.full(broker={"problem": "\x9b"}), status.reported(document)):
        assert strings(shown)
        assert set().union(*map(controls, strings(shown))) == set()


def test_the_support_archive_is_safe_to_read_in_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support_archive, "_log_lines", lambda selection: f"one\ttwo\n{WINDOW_TITLE}\n")
    findings = [fail("cache", WINDOW_TITLE, "do \x9b")]
    members = dict(support_archive._members(findings, None, ()))
    assert {"doctor.json", "log.txt"} <= set(members)
    assert set().union(*(controls(data.decode()) for data in members.values())) == set()
    assert json.loads(members["doctor.json"])[0]["message"] == WINDOW_TITLE
    assert members["log.txt"].startswith(b"one\ttwo\n")


def test_nothing_is_printed_past_the_terminal_module() -> None:
    """Processes of our own print JSON to their parent; the daemon's log has its formatter."""
    own_processes = {
        *("runner/scheduler.py", "runner/capability.py", "host/confinement.py"),
        *("bench/pyfunc.py", "bench/bandwidth.py", "bench/bare.py", "bench/llama_cpp.py"),
    }
    printing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write")
    }
    assert "terminal.py" in printing
    assert printing - own_processes == {"terminal.py"}


# --- Stand-ins ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        sys.excepthook, threading.excepthook = hooks


def config_in(folder: Path) -> Path:
    config = folder / "config.toml"
    document = {
        "state_dir": str(folder / "state"),
        "control_socket": str(folder / "c.sock"),
        "models": {"assistant": {"uri": "models:/phi@prod"}},
    }
    config.write_text(to_toml(document))
    return config


def scripted_lifecycle(*, reason: str) -> Any:
    class Lifecycle:
        name = "assistant"
        serving = Serving.READY
        instead = reason
        system_refused = unconfined = reason
        state = ModelState(active=None, quarantined={"3-000000000000": fault(reason)})

        def status(self) -> dict[str, Any]:
            return {
                "name": self.name,
                "uri": "models:/phi@prod",
                "version": None,
                "digest": None,
                "flavor": None,
                "state": "ready",
                "reason": reason,
            }

        def versions(self) -> dict[str, Any]:
            return {"quarantined": self.state.reasons}

    return Lifecycle()


@pytest.mark.parametrize("rate", [math.inf, -math.inf, math.nan, -1.0, 10**400, -(10**400)])
def test_a_status_goes_out_whatever_number_a_model_gave(rate: float) -> None:
    status = status_of(scripted_lifecycle(reason=""), tokens_per_s=rate)
    status.ready = True
    (model,) = json.loads(messages.encode(status.document()))["models"]
    assert model["tokens_per_s"] is None


def status_of(lifecycle: Any, *, tokens_per_s: float = 1.0) -> DeviceStatus:
    class Everything:
        """The parts that are asked for numbers and problems."""

        trouble = problem = WINDOW_TITLE
        problems = {"assistant": WINDOW_TITLE}  # noqa: RUF012
        heard = SimpleNamespace(
            document=lambda: {"uri": "r", "reachable": True, "problem": WINDOW_TITLE, "last_check": 1.0},
            hold=lambda name, state, wanted: None,
        )
        link = SimpleNamespace(document=lambda: {"bytes_per_day": 0, "used_bytes": None})

        def outlook(self, name: str) -> Outlook:
            waiting = Waiting(
                version=2,
                digest="",
                missing_bytes=1,
                fetched_bytes=0,
                reused_bytes=0,
                until_s=None,
                at_s=0.0,
                code="link_held",
                reason=WINDOW_TITLE,
            )
            wanted = Wanted(version=2, via="alias")
            return Outlook(wanted=wanted, attempt=waiting.attempt, waiting=waiting, progress=None)

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *_: 0

    everything = cast(Any, Everything())
    return DeviceStatus(
        Settings(),
        store=everything,
        journal=everything,
        lifecycles={"assistant": lifecycle},
        updates=everything,
        desired=everything,
        rebuilt=WINDOW_TITLE,
        tokens_per_s=lambda name: tokens_per_s,
    )


def strings(document: Any) -> list[str]:
    if isinstance(document, dict):
        return [text for item in document.items() for part in item for text in strings(part)]
    if isinstance(document, list):
        return [text for item in document for text in strings(item)]
    return [document] if isinstance(document, str) else []
