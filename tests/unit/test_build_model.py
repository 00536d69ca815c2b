"""What the model builder is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.build_model import arguments

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
