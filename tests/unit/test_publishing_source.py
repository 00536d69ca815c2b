"""What may be published: options, folders, golden prompts, targets."""

from __future__ import annotations

import ast
import codecs
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent import printable
from edge_agent.cli import publish
from edge_agent.errors import PublishError
from edge_agent.package import trust
from edge_agent.package.mlmodel import GOLDEN_TOKENS, MAX_GOLDEN_TOKENS
from edge_agent.publishing import source
from edge_agent.publishing.register import check_target


def genai_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    config = {
        "model": {"type": "phi3", "context_length": 128, "decoder": {"filename": "model.onnx"}},
        "search": {"max_length": 128},
    } | changes
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "model.onnx").write_bytes(b"graph")
    return folder


def test_options_from_a_command_line_become_numbers() -> None:
    given = {"max_length": "300", "temperature": " 0.2", "top_k": 40, "top_p": 0.9}
    checked = source.check_options(given)
    assert checked == {"max_length": 300, "temperature": 0.2, "top_k": 40, "top_p": 0.9}
    assert isinstance(checked["max_length"], int)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_lenght", "300", "'max_lenght' is unknown; choose from max_length"),
        ("max_length", "many", "max_length=many is not a number"),
        ("max_length", "300.5", "is not a number"),
        ("max_length", "1", "must be from 2"),
        ("temperature", "-1", "must be from 0 to 100"),
        ("temperature", "nan", "must be from 0 to 100"),
        ("top_p", "1.5", "must be from 0 to 1"),
        ("repetition_penalty", "0", "must be from 0.01"),
        ("top_k", True, "is not a number"),
    ],
)
def test_a_wrong_option_is_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        source.check_options({name: value})


def test_a_folder_gives_its_files_sorted(tmp_path: Path) -> None:
    folder = genai_folder(tmp_path / "model")
    (folder / "more").mkdir()
    (folder / "more" / "a.txt").write_text("a")
    assert [str(path) for path in source.check_folder(folder)] == [
        "genai_config.json",
        "model.onnx",
        "more/a.txt",
    ]


def test_max_length_beyond_the_context_is_refused(tmp_path: Path) -> None:
    folder = genai_folder(tmp_path / "model")
    source.check_length(source.context_of(folder), {"max_length": 128})
    with pytest.raises(PublishError, match="max_length=129 exceeds the model's context of 128"):
        source.check_length(source.context_of(folder), {"max_length": 129})


def test_a_folder_that_is_no_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="does not exist"):
        source.check_folder(tmp_path / "nothing")
    with pytest.raises(PublishError, match=r"is empty; make the folder with"):
        source.check_folder(tmp_path)


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_or_empty_graph_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = genai_folder(tmp_path / "model")
    (folder / "model.onnx").unlink()
    if content is not None:
        (folder / "model.onnx").write_bytes(content)
    with pytest.raises(PublishError, match=r"model\.onnx"):
        source.check_folder(folder)


def test_a_key_that_devices_refuse_is_named(tmp_path: Path) -> None:
    decoder = {"filename": "model.onnx", "session_options": {"custom_ops_library": "x.so"}}
    folder = genai_folder(tmp_path / "model", model={"type": "phi3", "decoder": decoder})
    with pytest.raises(PublishError, match=r"session_options\.custom_ops_library is not allowed"):
        source.check_folder(folder)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    folder = genai_folder(tmp_path / "model")
    (folder / "link.txt").symlink_to("model.onnx")
    with pytest.raises(PublishError, match=r"link\.txt is a symbolic link; copy the folder"):
        source.check_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "empty",
        "a b",
        "50 percent",
        "größe",
        "日本",
        "a;b",
        "a&b+c=d",
        "'quoted\"",
        "x" * 255,
        ".hidden",
        "a..b",
    ],
)
def test_a_name_that_every_store_keeps_may_be_published(name: str) -> None:
    source.check_paths({f"artifacts/onnx/{name}": Path(name)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a#b", "does not keep a name with '#'"),
        ("a?b", "does not keep"),
        ("100%25", "does not keep"),
        ("file:x", "does not keep"),
        ("C:/x", "does not keep"),
        (" a", "a space at its beginning; rename it"),
        ("in a/ folder/x", "a space at its beginning"),
        ("a\\b", "has a backslash or a control character; rename it"),
        ("a\nb", "has a backslash or a control character"),
        ("a\udcffb", "is not valid text"),
        ("/".join(["x" * 250] * 3), "has more than 512 bytes"),
    ],
)
def test_a_name_that_a_device_or_a_store_loses_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(PublishError, match=re.escape(message)) as caught:
        source.check_paths({"MLmodel": Path("MLmodel"), f"artifacts/onnx/{name}": Path("/src") / name})
    assert caught.value.message.startswith(printable.line(f"/src/{name}: "))


def test_two_names_that_some_file_systems_take_for_one_are_refused() -> None:
    with pytest.raises(PublishError, match=r"'x/A\.txt' and 'x/a\.txt' differ only in case; rename one"):
        source.check_paths({"x/A.txt": Path("A.txt"), "x/a.txt": Path("a.txt")})


def test_more_files_or_folders_than_a_device_lists_are_refused() -> None:
    source.check_paths({f"{n}": Path("x") for n in range(2_000)})
    with pytest.raises(PublishError, match="has 2001 files, a package has at most 2000"):
        source.check_paths({f"{n}": Path("x") for n in range(2_001)})
    with pytest.raises(PublishError, match="more than 2000 folders"):
        source.check_paths({f"{n}/a/b": Path("x") for n in range(1_000)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "golden prompt 1 is not an object; write"),
        ({"prompt": "a"}, "has no expect"),
        ({"expect": "a"}, "needs either prompt or messages"),
        ({"prompt": "a", "messages": [], "expect": "a"}, "needs either prompt or messages"),
        ({"prompt": 1, "expect": "a"}, "prompt must be text"),
        ({"prompt": "a", "expect": "("}, "not a regular expression"),
        ({"prompt": "a", "expect": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "expect": "a", "max_tokens": 1025}, "max_tokens must be an integer from 1 to 1024"),
        (
            {"prompt": "a", "expect": "a", "temperature": 1},
            "unknown field 'temperature'; choose from prompt, messages, expect, max_tokens",
        ),
    ],
)
def test_a_wrong_golden_prompt_is_named_by_its_place(entry: Any, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        source.read_golden([entry])


def test_golden_prompts_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "golden.json"
    file.write_text('[{"prompt": "a", "expect": "b", "max_tokens": 4}]')
    assert source.read_golden(file) == [{"prompt": "a", "expect": "b", "max_tokens": 4}]
    assert source.read_golden(None) == []
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())  # as some editors write it
    assert source.read_golden(file)[0]["expect"] == "b"
    file.write_text("{")
    with pytest.raises(PublishError, match=r"golden\.json is not JSON"):
        source.read_golden(file)
    with pytest.raises(PublishError, match="cannot be read"):
        source.read_golden(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "content", [{"prompt": "a", "expect": "b"}, [], [{}] * 33], ids=["object", "none", "many"]
)
def test_golden_prompts_that_are_no_list_are_told_their_form(content: Any) -> None:
    with pytest.raises(PublishError, match=r"list of 1 to 32 entries; write \[\{"):
        source.read_golden(content)


def test_the_documented_golden_prompts_are_golden_prompts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
    in_page = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    help_text = publish.publish.help or ""
    in_help = [json.loads(line) for line in help_text.splitlines() if line.strip().startswith("[{")]
    assert len(in_page) == len(in_help) == 1
    for example in in_page + in_help:
        assert source.read_golden(example) == example
    for described in (page, help_text):
        assert all(field in described for field in source.GOLDEN_FIELDS)
        assert str(GOLDEN_TOKENS) in described and str(MAX_GOLDEN_TOKENS) in described
        assert f"1 to {source.MAX_GOLDEN} objects" in described


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "model name 'a/b' must not contain"),
        ({"alias": "v2"}, "'v2' is reserved by MLflow"),
        ({"alias": "latest"}, "reserved"),
        ({"alias": "two words"}, "must be letters"),
        ({"registry_uri": "file:/tmp/x"}, "is not supported: write http"),
        ({"registry_uri": ""}, "has no scheme"),
        (
            {"registry_uri": "127.0.0.1:5051"},
            "registry: '127.0.0.1:5051' has no scheme: write http://127.0.0.1:5051",
        ),
    ],
)
def test_a_target_that_cannot_work_is_refused_before_any_connection(
    changes: dict[str, Any], message: str
) -> None:
    target: dict[str, Any] = {"name": "phi", "registry_uri": "http://localhost:5000", "alias": "prod"}
    check_target(**target)
    with pytest.raises(PublishError, match=message):
        check_target(**(target | changes))


def test_credentials_in_an_address_are_not_repeated() -> None:
    with pytest.raises(PublishError) as caught:
        check_target(name="phi", registry_uri="ftp://me:secret@host/x", alias=None)
    assert "secret" not in str(caught.value)


def test_the_wrapper_imports_nothing_that_a_device_lacks() -> None:
    allowed = sys.stdlib_module_names | {"mlflow", "numpy", "onnxruntime_genai", "pandas"}
    for node in ast.walk(ast.parse(trust.WRAPPER.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert {name.partition(".")[0] for name in names} <= allowed
