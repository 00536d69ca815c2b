"""What transformers may see of a Hugging Face folder's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import PolicyError
from edge_agent.package import transformers_options as options
from edge_agent.package.transformers_options import clean

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("text", ["/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "~/x"])
def test_a_path_that_leads_out_is_known(text: str) -> None:
    assert options.is_path_outside(text)


@pytest.mark.parametrize(
    "text",
    ["", "x", "a/b", "</s>", "[/INST]", "...", "a..b", "..b/c", "~", "<|/think|>", "/" + "x" * 5000, "\\"],
)
def test_other_texts_are_not(text: str) -> None:
    assert not options.is_path_outside(text)


def test_numbers_stay_under_any_key_of_a_configuration_and_texts_under_known_ones() -> None:
    given: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 8,
        "a_new_size": [1, [2, None]],
        "layer_types": ["full_attention", None],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "file": "x"}},
        "id2label": {"0": "yes"},
        "fusion_config": {"x": True},
        "transformers_weights": "x",
        "_name_or_path": "/home/somebody",
        "auto_map": {"AutoConfig": "x.Y"},
    }
    cleaned = clean("config.json", given)
    assert cleaned.document == {
        "model_type": "llama",
        "hidden_size": 8,
        "a_new_size": [1, [2, None]],
        "layer_types": ["full_attention", None],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "id2label": {"0": "yes"},
    }
    assert cleaned.dropped == ("rope_parameters.full_attention.file", "fusion_config", "transformers_weights")


def test_a_tokenizer_keeps_its_tokens_without_foreign_fields() -> None:
    token = {"__type": "AddedToken", "content": "<x>", "special": True, "file": "x"}
    kept = {"__type": "AddedToken", "content": "<x>", "special": True}
    given: dict[str, Any] = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "eos_token": token,
        "image_token": "<img>",
        "additional_special_tokens": [token, "<y>"],
        "added_tokens_decoder": {"7": token},
        "extra_special_tokens": {"x_token": "<x>"},
        "chat_template": [{"name": "default", "template": "{{ x }}"}],
        "pad_token": 7,
        "vocab": {"a": 0},
        "init_inputs": ["x"],
        "number": 1,
    }
    cleaned = clean("tokenizer_config.json", given)
    assert cleaned.document == {
        "tokenizer_class": "Qwen2TokenizerFast",
        "eos_token": kept,
        "image_token": "<img>",
        "additional_special_tokens": [kept, "<y>"],
        "added_tokens_decoder": {"7": kept},
        "extra_special_tokens": {"x_token": "<x>"},
        "chat_template": [{"name": "default", "template": "{{ x }}"}],
    }
    assert cleaned.dropped == ("pad_token", "vocab", "init_inputs", "number")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("special_tokens_map.json", {"eos_token": "<x>", "vocab": "x"}, {"eos_token": "<x>"}),
        ("added_tokens.json", {"<x>": 7, "<y>": "x"}, {"<x>": 7}),
        (
            "generation_config.json",
            {"eos_token_id": [1], "cache_config": {}, "new": 1},
            {"eos_token_id": [1]},
        ),
        (
            "model.safetensors.index.json",
            {"metadata": {"total_size": 1, "x": "y"}, "weight_map": {"a": "b"}, "c": "d"},
            {"metadata": {"total_size": 1}, "weight_map": {"a": "b"}},
        ),
    ],
)
def test_other_files_keep_what_is_read(name: str, given: dict[str, Any], kept: dict[str, Any]) -> None:
    assert clean(name, given).document == kept


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_path_is_refused_under_any_key_at_any_depth(name: str) -> None:
    with pytest.raises(PolicyError, match=r"'a\.b' is a path"):
        clean(name, {"a": [{"b": "/etc/passwd"}]})
    nested: Any = "x"
    for _ in range(100):
        nested = [nested]
    with pytest.raises(PolicyError, match="nested too deeply"):
        clean(name, {"a": nested})


@pytest.mark.parametrize("name", ["BertTokenizer", "MPNetTokenizerFast", "MistralCommonBackend", "", 7])
def test_a_tokenizer_that_reads_other_files_is_refused(name: object) -> None:
    with pytest.raises(PolicyError, match=r"read from tokenizer\.json alone"):
        options.tokenizer_class({"tokenizer_class": name})


def test_a_configuration_of_many_megabytes_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}" + " " * (17 << 20))
    with pytest.raises(PolicyError, match="more than 16777216 bytes"):
        options.read(file)
