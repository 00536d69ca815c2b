"""Documents that messages name: each is in `docs/`, has the heading, goes into the wheel, and is found where that is
installed."""

from __future__ import annotations

import ast
import re
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from edge_agent import documents
from edge_agent.documents import SHARE, folder, page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = sorted((ROOT / "edge_agent").rglob("*.py"))
INSTALLED = "/opt/edge-agent/current/share/doc/edge-agent/"


def named() -> Iterator[tuple[str, list[str]]]:
    """(where, what) of each call that names a document."""
    for path in SOURCES:
        if "import page\n" not in path.read_text():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "page":
                assert not node.keywords
                assert all(isinstance(argument, ast.Constant) for argument in node.args), path
                yield f"{path.relative_to(ROOT)}:{node.lineno}", [ast.literal_eval(of) for of in node.args]


def headings(name: str) -> set[str]:
    """Of a document, without what only looks like one in its examples."""
    text = re.sub(r"^```.*?^```", "", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))


def test_each_document_and_heading_that_a_message_names_exists() -> None:
    found = list(named())
    assert len(found) > 10, "the calls were not found"
    wrong = [
        (where, *what)
        for where, what in found
        if not (DOCS / what[0]).is_file() or not set(what[1:]) <= headings(what[0])
    ]
    assert wrong == []


def test_no_message_names_a_document_by_a_path_that_only_a_checkout_has() -> None:
    wrong = []
    for path in SOURCES:
        if path.name == "documents.py":
            continue
        tree = ast.parse(path.read_text())
        silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        helps = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any("command" in ast.unparse(of) or "group" in ast.unparse(of) for of in node.decorator_list)
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or "docs/" not in str(node.value):
                continue
            if id(node) not in silent or id(node) in helps:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_what_install_sh_puts_onto_a_device_names_documents_there() -> None:
    found = []
    for path in filter(Path.is_file, (ROOT / "systemd").rglob("*")):
        assert "docs/" not in path.read_text(), path
        found += re.findall(re.escape(INSTALLED) + r"(\w[\w.-]*\.md)", path.read_text())
    assert {"settings.md", "operating.md", "http.md"} <= set(found)
    assert all((DOCS / name).is_file() for name in found)


def test_the_wheel_brings_every_document(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        brought = {name.partition(f".data/data/{SHARE}/")[2] for name in archive.namelist()} - {""}
    assert brought == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*") if path.is_file()}


def environment(folder: Path, monkeypatch: pytest.MonkeyPatch, *, documents: bool = True) -> Path:
    """Where pip has installed the package; gives its folder."""
    if documents:
        (folder / SHARE).mkdir(parents=True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    package = folder / "lib" / "site-packages" / "edge_agent"
    package.mkdir(parents=True)
    return package


def test_an_environment_has_them_in_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = environment(tmp_path / "venv", monkeypatch)
    assert folder(package) == tmp_path / "venv" / SHARE
    monkeypatch.setattr(documents, "_PACKAGE", package)
    assert page("operating.md", "Walls") == f"{tmp_path}/venv/{SHARE}/operating.md, 'Walls'"


def test_a_device_names_them_by_the_link_that_outlives_an_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = environment(tmp_path / "0.1.0", monkeypatch)
    (tmp_path / "current").symlink_to("0.1.0")
    assert folder(package) == tmp_path / "current" / SHARE
    (tmp_path / "current").unlink()
    (tmp_path / "0.2.0").mkdir()
    (tmp_path / "current").symlink_to("0.2.0")  # it is not the version that runs
    assert folder(package) == tmp_path / "0.1.0" / SHARE


def test_pip_with_a_target_puts_them_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(tmp_path / "venv", monkeypatch, documents=False)
    (tmp_path / "target" / SHARE).mkdir(parents=True)
    assert folder(tmp_path / "target" / "edge_agent") == tmp_path / "target" / SHARE


def test_a_checkout_has_them_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert page("operating.md") == "docs/operating.md"
    monkeypatch.chdir(tmp_path)
    assert page("operating.md") == str(DOCS / "operating.md")


def test_where_they_are_not_their_name_is_still_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = environment(tmp_path / "venv", monkeypatch, documents=False)
    monkeypatch.setattr(documents, "_PACKAGE", package)
    assert (folder(package), page("broker.md")) == (None, "docs/broker.md")
