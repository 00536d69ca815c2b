"""What the model builder is asked for, and what of it is left."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tools.build_model import arguments, main

HF = Path(__file__).parents[1] / "models/sample_hf"

CONFIG = {"num_hidden_layers": 2, "tie_word_embeddings": True}


def weights(config: dict[str, Any], *, small: bool) -> dict[str, Any]:
    given = arguments(config, small=small)
    options = json.loads(given[given.index("--target_options") + 1])
    found: dict[str, Any] = options["quant_config"]["weights"]
    return found


def int8(config: dict[str, Any], *, small: bool) -> list[str]:
    return [
        each["match"]["name"] for each in weights(config, small=small)["overrides"] if each["type"] == "int8"
    ]


def test_as_the_original_every_matrix_of_every_layer_is_int8() -> None:
    names = int8(CONFIG, small=False)
    assert len(names) == len(set(names)) == 1 + 2 * 5
    assert {"/lm_head/MatMul", "/model/layers.1/mlp/up_proj/MatMul"} <= set(names)


def test_small_keeps_in_int8_what_costs_most() -> None:
    assert int8(CONFIG, small=True) == [
        "/lm_head/MatMul",
        "/model/layers.0/attn/qkv_proj/MatMul",
        "/model/layers.0/mlp/down_proj/MatMul",
        "/model/layers.1/attn/qkv_proj/MatMul",
        "/model/layers.1/mlp/down_proj/MatMul",
    ]


@pytest.mark.parametrize("small", [False, True])
def test_a_table_that_is_not_the_head_is_not_quantized(small: bool) -> None:
    assert weights(CONFIG, small=small)["op_types"] == ["MatMul", "Gather"]
    assert weights({**CONFIG, "tie_word_embeddings": False}, small=small)["op_types"] == ["MatMul"]
    assert weights({"num_hidden_layers": 2}, small=small)["op_types"] == ["MatMul"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in; the builder is a script that makes `model.onnx`, or fails where `work/fail` is."""
    builder = tmp_path / "builder"
    builder.write_text(
        "#!/bin/sh\n"
        f"touch {tmp_path}/started\n"
        'while [ "$1" != -o ]; do shift; done\n'
        'mkdir -p "$2" && touch "$2/model.onnx"\n'
        f"! [ -e {tmp_path}/fail ]\n"
    )
    builder.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(builder))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["build_model", str(HF), str(out), *options])
    main()


def test_the_whole_folder_is_at_its_place_and_nothing_beside_it(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, work / "made/small", "--small")
    assert [file.relative_to(work / "made") for file in (work / "made").rglob("*")] == [
        Path("small"),
        Path("small/model.onnx"),
    ]


def test_a_failed_build_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "fail").touch()
    with pytest.raises(SystemExit, match="the model builder failed"):
        run(monkeypatch, work / "made/small", "--small")
    assert not list((work / "made").iterdir())


def test_a_refused_calibration_leaves_no_folder_that_is_not_calibrated(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = ModuleType("onnx")  # what its file says; the package is not among the tests'
    onnx.load = lambda _: SimpleNamespace(graph=SimpleNamespace(node=[]))  # type: ignore[attr-defined]
    onnx.__spec__ = ModuleSpec("onnx", None)  # transformers looks for one
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    (work / "text").write_text("The sun rises in the east. " * 200)
    with pytest.raises(SystemExit, match="nothing is int4"):
        run(monkeypatch, work / "made/small", "--small", "--calibrate", str(work / "text"))
    assert (work / "started").exists()
    assert not list((work / "made").iterdir())


def test_texts_that_are_too_short_are_refused_before_the_builder_runs(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "text").write_text("The sun rises in the east.")
    with pytest.raises(SystemExit, match="tokens, and 512 are needed"):
        run(monkeypatch, work / "made/small", "--small", "--calibrate", str(work / "text"))
    assert not (work / "started").exists()
    assert not list((work / "made").iterdir())


def test_a_folder_that_is_there_is_not_built_over(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "small").mkdir()
    (work / "small/notes").touch()
    with pytest.raises(SystemExit):
        run(monkeypatch, work / "small", "--small")
    assert "small is there already" in capsys.readouterr().err
    assert not (work / "started").exists()
