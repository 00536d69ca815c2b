"""What `doctor`, `publish` and `bench` look like in a real terminal of 80 and 120 columns, with and without colours."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bench_results import whole
from tests.support.processes import free_port, short_folder, to_toml
from tests.support.terminal import EDGE_AGENT, Screen

SELECT_GRAPHIC = re.compile(r"\033\[[\d;]*m")


def text_on(screen: Screen) -> str:
    """What stands there, with the lines put together again that the terminal has broken at 80 columns."""
    return "".join(f"{line:<80}" if len(line) > 79 else f"{line}\n" for line in screen.lines())


# --- doctor ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken() -> Iterator[Path]:
    """Settings of a device whose broker and registry are gone."""
    with short_folder() as folder:
        port = free_port()
        config = folder / "config.toml"
        document = {
            "state_dir": str(folder / "state"),
            "registry": {"uri": f"http://127.0.0.1:{port}"},
            "models": {"assistant": {"uri": "models:/sample@prod"}},
            "mqtt": {"host": "localhost", "port": port},
        }
        config.write_text(to_toml(document))
        yield config


@pytest.mark.parametrize(
    ("columns", "environment", "coloured"), [(80, {}, True), (120, {"NO_COLOR": "1"}, False)]
)
def test_doctor_ends_with_what_failed_and_a_verdict(
    broken: Path, columns: int, environment: dict[str, str], coloured: bool
) -> None:
    command = [*EDGE_AGENT, "--config", str(broken), "doctor"]
    with Screen(command, columns=columns, rows=60, environment=environment) as screen:
        assert screen.wait() == 1
        lines = screen.scrolled()
        colours = screen.coloured()
    assert lines[0] == "This machine", "nothing is left of the line that said what is checked"
    assert [
        line for line in lines if line in ("This machine", "Models", "Service", "Warnings", "Failures")
    ] == [
        *("This machine", "Models", "Service", "Warnings", "Failures"),
    ]
    failures = lines[lines.index("Failures") : -1]
    assert [line[:18].rstrip() for line in failures if line.startswith("fail")] == [
        "fail  broker.conne",
        "fail  registry.rea",
    ]
    assert all(re.match(r"fail  \S|ok    \S|warn  \S| {25}\S| {27}\S", line) for line in failures[1:-1])
    assert re.match(r"will not work: 2 failures(, \d+ warnings?)?\. Do what each → says", lines[-1])
    assert max(map(len, lines)) <= columns
    assert (SELECT_GRAPHIC.search(colours) is not None) is coloured
    assert ("\033[31mfail" in colours) is coloured


# --- publish ---------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A registry that takes a connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_publish_shows_the_step_it_is_at_and_an_error_in_its_place(
    sample_model: Path, silent: socket.socket
) -> None:
    uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with Screen([*EDGE_AGENT, "publish", str(sample_model), "--name", "sample", "--registry", uri]) as screen:
        connection, _ = silent.accept()
        (line,) = screen.wait_for("checking")
        assert re.fullmatch(r"\S checking \d:\d\d:\d\d", line)
        connection.close()
        silent.close()
        assert screen.wait() == 1
        said = text_on(screen)
    assert said.startswith(f"edge-agent: {uri}: could not reach the registry: ")
    assert "checking" not in said


def test_publish_leaves_its_result_on_the_screen_and_nothing_else(
    sample_model: Path, short_dir: Path
) -> None:
    model, file = short_dir / "model", short_dir / "m.tar"
    shutil.copytree(sample_model, model)
    with Screen([*EDGE_AGENT, "publish", str(model), "--name", "sample", "--to", str(file)]) as screen:
        assert screen.wait() == 0
        said = text_on(screen)
    assert re.fullmatch(
        r"sample version \d+: .* in .*/m\.tar; on a device: edge-agent models import m\.tar\n"
        r"digest \w{64}\n"
        r"build: int4 in blocks of 32; .*\n"
        r"(edge-agent: model: .*\n)+",
        said,
    )


# --- bench -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_bench_says_one_sentence_and_then_its_tables(tmp_path: Path, columns: int) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(whole(decode_ms=826, peer=True)))
    program = (
        "import json, sys; from edge_agent.bench import page; page.print_report(json.load(open(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(file)]
    with Screen(command, columns=columns, rows=80) as screen:
        assert screen.wait() == 0
        lines = screen.scrolled()
    assert lines[:2] == [
        "12.1 tokens/s, 12 % of what this memory allows; first token 0.4 s at 256 tokens",
        "llama.cpp with m.gguf: 5.0 tokens/s; first token 0.5 s at 256 tokens",
    ]
    assert max(map(len, lines)) <= columns
    heading = next(line for line in lines if line.startswith("MEASURED"))
    assert heading.split() == ["MEASURED", "GOAL", "OF", "WHAT"]
    assert any(
        re.match(r"0\.121 +>= 0\.95 +missed +decode, over MQTT / bare library", line) for line in lines
    )
    assert any(re.match(r"40 +<= 50 +reached +memory, daemon", line) for line in lines)
