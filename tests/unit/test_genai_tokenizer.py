"""The tokenizer's files of an onnxruntime-genai folder: what the policy takes, and what `publish` makes of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edge_agent.errors import PolicyError, PublishError
from edge_agent.package import genai_tokenizer, trust
from edge_agent.publishing import cleaning
from tests.support.packages import make_package, manifest_of

pytestmark = pytest.mark.attack

FOLDER = "artifacts/model"
CONFIG = f"{FOLDER}/tokenizer_config.json"


def decide(folder: Path, **changes: bytes | str | None) -> None:
    files = {path.replace("__", "/"): data for path, data in changes.items()}
    make_package(folder, trust.WRAPPER, files)
    trust.decide(folder, manifest_of(folder, "phi"), registered_name="phi")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "tokenizer_config.json",
            '{"tiktoken_file": "../../../../dev/zero"}',
            "'tiktoken_file' is not allowed",
        ),
        ("tokenizer_config.json", '{"tiktoken_file": "words"}', "'tiktoken_file' is not allowed"),
        ("tokenizer_config.json", '{"tikt\\u006fken_file": "words"}', "'tiktoken_file' is not allowed"),
        ("tokenizer_config.json", '{"tiktoken_file": "a", "tiktoken_file": 1}', "appears twice"),
        ("tokenizer_config.json", '{"a": {"b": ["/etc/passwd"]}}', "'a.b' is a path"),
        ("tokenizer_config.json", '{"a": NaN}', "NaN"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "not JSON"),
        ("special_tokens_map.json", '{"eos_token": "../x"}', "'eos_token' is a path"),
        ("added_tokens.json", '{"<x>": "/x"}', "'<x>' is a path"),
        ("generation_config.json", '{"x": "/x"}', "'x' is a path"),
        ("chat_template.json", '{"chat_template": "/x"}', "'chat_template' is a path"),
        ("tokenizer_module.json", "{}", "is not allowed"),
        ("deeper/tokenizer_config.json", '{"tiktoken_file": "words"}', "'tiktoken_file' is not allowed"),
        ("tokenizer_config.json", " " * (17 << 20), "more than 16777216 bytes"),
        ("chat_template.jinja", "{# #}" * 300_000, "more than 1048576 bytes"),
    ],
)
def test_a_file_that_leads_elsewhere_is_refused_with_its_key(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        decide(tmp_path, **{f"{FOLDER}/{name}": content})
    assert reason in str(caught.value)
    assert name in str(caught.value)
    assert "passwd" not in str(caught.value)


def test_other_keys_and_files_that_nothing_reads_are_no_harm(tmp_path: Path) -> None:
    decide(
        tmp_path,
        **{
            CONFIG: '{"something": "new", "name_or_path": "/home/somebody", "tokenizer_class": "SomeTokenizer"}',
            f"{FOLDER}/preprocessor_config.json": '{"path": "/etc/passwd"}',
            "elsewhere/tokenizer_config.json": '{"tiktoken_file": "words"}',
        },
    )


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_only_regular_files_are_taken(tmp_path: Path, make: object) -> None:
    make_package(tmp_path, trust.WRAPPER, {CONFIG: "{}"})
    manifest = manifest_of(tmp_path, "phi")
    (tmp_path / CONFIG).unlink()
    assert callable(make)
    make(tmp_path / CONFIG)
    with pytest.raises(PolicyError, match="not a regular file"):
        trust.decide(tmp_path, manifest, registered_name="phi")


def rewritten(folder: Path) -> cleaning.Rewritten:
    return cleaning.rewrite(
        {path.name: path for path in folder.iterdir()},
        genai_tokenizer.CONFIGURATIONS.__contains__,
        genai_tokenizer.clean,
    )


def test_the_sample_model_stays_as_it_is(sample_model: Path) -> None:
    found = rewritten(sample_model)
    assert not found.files
    assert not found.limits


def test_publish_leaves_out_what_no_device_reads_and_says_so(tmp_path: Path, sample_model: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sample_model, folder)
    file = folder / "tokenizer_config.json"
    before = json.loads(file.read_text())
    odd = {"something": "new", "\x1b[2J": "x", "tokenizer_class": "SomeTokenizer"}
    file.write_text(json.dumps({**before, **odd}))
    found = rewritten(folder)
    assert json.loads(found.files["tokenizer_config.json"]) == {**before, "tokenizer_class": "SomeTokenizer"}
    assert found.limits == (
        "left out of tokenizer_config.json, because no device reads it: '\\x1b[2J', something",
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config.json", '{"tiktoken_file": "words"}', "'tiktoken_file' is not allowed"),
        ("tokenizer_config.json", '{"a": "/etc/passwd"}', "'a' is a path"),
        ("tokenizer.json", '{"model": {"vocab": "/etc/passwd"}}', "'model.vocab' is not a table"),
        ("tokenizer.json", '{"model": {"merges": 7}}', "'model.merges' is not a table"),
        ("added_tokens.json", "{", "is not JSON"),
    ],
)
def test_publish_refuses_what_devices_would_refuse(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PublishError, match="devices would refuse") as caught:
        rewritten(tmp_path)
    assert reason in str(caught.value)
