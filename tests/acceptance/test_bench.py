"""`edge-agent bench`: the shape of its document and that its figures can be; no figure is judged here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.bench import page, report
from edge_agent.package import onnx_graph
from edge_agent.settings import Settings
from tests.support.keys import make_keys
from tests.support.processes import clean_environment

TOKENS = 4
SIDES = {"bare", "bare_default_threads", "pyfunc", "runner", "mqtt"}


def bench(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_agent", "--config", str(config), "bench", *arguments]
    environment = clean_environment({"HOME": str(config.parent)})
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.long
def test_every_layer_is_measured_and_nothing_is_left_behind(
    pulled: Settings, sample_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pulled.state_dir.parent / "config.toml"
    before = sorted(path.name for path in pulled.state_dir.iterdir())
    result = bench(config, "--launches", "1", "--tokens", str(TOKENS), "--json")
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)

    assert (document["model"], document["version"], document["launches"]) == ("assistant", 1, 1)
    assert document["notes"] == []
    assert set(document["sides"]) == SIDES
    for lengths in document["sides"].values():
        assert set(lengths) == {"32", "256", "1024"}
        for length, values in lengths.items():
            assert int(length) / 2 < values["prompt_tokens"] <= int(length)
            assert 0 < values["first_token_ms"] <= values["total_ms"]
            assert values["prefill_tokens_per_s"] > 0
    prompt_tokens = {
        name: [values["prompt_tokens"] for values in lengths.values()]
        for name, lengths in document["sides"].items()
    }
    assert len({tuple(tokens) for tokens in prompt_tokens.values()}) == 1, "every side gets the same prompts"

    assert set(document["at_once"]) == {"1", "2", "4", "8"}
    assert all(row["tokens_per_s"] > 0 for row in document["at_once"].values())
    assert document["newcomer"]["first_token_ms_p50"] <= document["newcomer"]["first_token_ms_p95"]
    assert document["prefix"]["cold_ms"] > 0
    for name in SIDES:
        assert 20e6 < document["memory"][name]["resident_bytes"] <= document["memory"][name]["peak_bytes"]
    assert 20e6 < document["memory"]["daemon"]["resident_bytes"] < 200e6
    assert 20e6 < document["memory"]["gateway"]["resident_bytes"] < 200e6
    assert min(document["over_http"].values()) > 0
    weights = (sample_model / "model.onnx.data").stat().st_size
    embeddings = onnx_graph.read(sample_model / "model.onnx").embedding_bytes
    assert weights - embeddings <= document["roofline"]["model_bytes"] < weights
    assert document["roofline"]["bandwidth_bytes_per_s"] > 1e7
    for ratio in document["ratios"]:
        assert set(ratio) == {"name", "value", "goal", "reached", "left", "right", "unit"}
    assert len(document["ratios"]) >= 7

    page.print_report(document)
    printed = capsys.readouterr().out
    assert re.match(
        r"\d+\.\d tokens/s, \d+ % of what this memory allows.*; first token \S+ m?s at 256 tokens\n", printed
    )
    assert all(report.SIDE_NAMES[name] in printed for name in SIDES)
    assert "bench: launch 1 of 1: over MQTT" in result.stderr
    assert sorted(path.name for path in pulled.state_dir.iterdir()) == before


def test_what_may_not_run_is_not_measured(pulled: Settings, short_dir: Path) -> None:
    state, config, ran = short_dir / "state", short_dir / "config.toml", short_dir / "ran"
    shutil.copytree(pulled.state_dir, state)
    own = (pulled.state_dir.parent / "config.toml").read_text().replace(str(pulled.state_dir), str(state))
    config.write_text(own)
    (wrapper,) = state.glob("models/versions/*/*/*.py")
    code = wrapper.read_text()
    wrapper.chmod(0o600)
    wrapper.write_text(f"{code}\nopen({str(ran)!r}, 'w').close()\n")
    result = bench(config, "--launches", "1", "--tokens", "2")
    assert (result.returncode, ran.exists()) == (1, False)
    assert wrapper.name in result.stderr

    wrapper.write_text(code)
    key = make_keys(short_dir, "signer").public
    config.write_text(f'{own}\n[trust]\npublic_keys = ["{key}"]\n')
    result = bench(config, "--launches", "1", "--tokens", "2")
    assert result.returncode == 1
    assert "[trust] no longer allows" in result.stderr


def test_a_device_without_a_model_has_nothing_to_measure(short_dir: Path) -> None:
    config = short_dir / "config.toml"
    config.write_text(f'state_dir = "{short_dir}/state"\n[models.assistant]\nuri = "models:/sample@prod"\n')
    result = bench(config)
    assert result.returncode == 4
    assert "no active version" in result.stderr
    assert bench(config, "--model", "other").returncode == 4
