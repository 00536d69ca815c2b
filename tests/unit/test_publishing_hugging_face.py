"""Which Hugging Face folders can be published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import PublishError
from edge_agent.publishing import hugging_face, source

SAMPLE_HF = Path(__file__).parents[1] / "models" / "sample_hf"


def check(folder: Path) -> hugging_face.Checkpoint:
    return hugging_face.check_checkpoint(folder, source.list_files(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE_HF, tmp_path / "hf")
    return tmp_path / "hf"


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_the_samples_files_go_to_their_places() -> None:
    checkpoint = check(SAMPLE_HF)
    assert sorted(checkpoint.files) == [
        "components/tokenizer/chat_template.jinja",
        "components/tokenizer/tokenizer.json",
        "components/tokenizer/tokenizer_config.json",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
    ]
    assert (checkpoint.architecture, checkpoint.context_tokens) == ("Phi3ForCausalLM", 2048)
    assert checkpoint.rewritten.files == {}


def test_what_is_no_part_of_the_model_stays_here(folder: Path) -> None:
    for name in ("README.md", "modeling_phi3.py", "pytorch_model.bin", "training_args.bin", "LICENSE"):
        (folder / name).write_text("x")
    configure(folder, auto_map={"AutoConfig": "a.B"}, _name_or_path="/home/somebody")
    checkpoint = check(folder)
    assert set(checkpoint.files) - set(check(SAMPLE_HF).files) == {"LICENSE"}
    (data,) = checkpoint.rewritten.files.values()
    assert json.loads(data) == json.loads((SAMPLE_HF / "config.json").read_text())


def test_weights_in_several_files_travel_with_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = [path for path in check(folder).files if "safetensors" in path]
    assert weights == ["model/model.safetensors.index.json", "model/model-00001-of-00001.safetensors"]


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_part(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has weights, and no config.json"),
        (lambda folder: (folder / "config.json").write_text("["), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: configure(folder, architectures=None), "names no architecture"),
        (lambda folder: configure(folder, quantization_config={"bits": 4}), "quantization_config"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge it into its base model"),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "symbolic link"),
        (pickle_only, "no safetensors weights; save it again"),
        (lost_part, "'../other.safetensors', which does not exist"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_what_a_device_would_refuse_is_refused_here(
    folder: Path, edit: Callable[[Path], object], reason: str
) -> None:
    edit(folder)
    with pytest.raises(PublishError, match=reason):
        check(folder)


def configure_tokenizer(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))


def test_what_no_device_reads_is_left_out_with_a_line(folder: Path) -> None:
    configure_tokenizer(folder, something="new", sp_model_kwargs={"a": 1})
    configure(
        folder, transformers_weights="other.safetensors", rope_parameters={"rope_theta": 1e4, "note": "x"}
    )
    checkpoint = check(folder)
    tokenizer, config = sorted(checkpoint.rewritten.files)
    assert json.loads(checkpoint.rewritten.files[tokenizer]) == json.loads(
        (SAMPLE_HF / "tokenizer_config.json").read_text()
    )
    assert json.loads(checkpoint.rewritten.files[config])["rope_parameters"] == {"rope_theta": 1e4}
    assert checkpoint.rewritten.limits == (
        "left out of config.json, because no device reads it: rope_parameters.note, transformers_weights",
        "left out of tokenizer_config.json, because no device reads it: something, sp_model_kwargs",
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"vocab": "/etc/passwd"}, "vocab"),
        ({"vocab": "../../etc/passwd"}, "vocab"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs"),
        ({"a": {"b": [{"c": "x/../y"}]}}, "a.b.c"),
        ({"eos_token": {"content": "/etc/passwd"}}, "eos_token.content"),
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class"),
        ({"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer_class"),
    ],
)
def test_a_path_or_a_foreign_tokenizer_is_refused_with_its_key(
    folder: Path, changes: dict[str, Any], key: str
) -> None:
    configure_tokenizer(folder, **changes)
    with pytest.raises(
        PublishError, match=rf"devices would refuse .*tokenizer_config\.json: .*{key}"
    ) as caught:
        check(folder)
    assert "passwd" not in str(caught.value)
