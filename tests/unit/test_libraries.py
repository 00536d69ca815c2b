"""Modules that are imported when they are used: what they show before and after, and what a runner of ours imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edge_agent.runner import libraries
from edge_agent.runner.libraries.deferred import Deferred

LIBRARY = {
    "__init__.py": "from heavy.shapes import Box\nANSWER = 42\n",
    "shapes.py": "import heavy\nclass Box:\n    sides = 6\n    def __init__(self, name):\n        self.name = name\n",
    "light.py": "HERE = True\n",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules, and an import system that is as before when the test ends."""
    (tmp_path / "heavy").mkdir()
    for name, text in LIBRARY.items():
        (tmp_path / "heavy" / name).write_text(text)
    (tmp_path / "broken.py").write_text("import absent_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("heavy", "broken")]:
        del sys.modules[name]


def deferred(**classes: tuple[str, ...]) -> None:
    sys.meta_path.insert(0, Deferred(classes))


def imported(name: str) -> Any:
    return importlib.import_module(name)


def test_a_deferred_module_is_imported_at_the_first_look_at_it(place: Path) -> None:
    deferred(heavy=())
    heavy = imported("heavy")
    assert "heavy.shapes" not in sys.modules
    assert (heavy.ANSWER, heavy.Box("a").name) == (42, "a")
    assert sys.modules["heavy"] is heavy
    assert isinstance(heavy, ModuleType) and heavy.__spec__ is not None
    assert heavy.__spec__.loader is heavy.__loader__ and not hasattr(heavy, "absent")


def test_a_submodule_alone_does_not_need_its_package(place: Path) -> None:
    deferred(heavy=())
    assert imported("heavy.light").HERE and "heavy.shapes" not in sys.modules
    assert imported("heavy").light.HERE and imported("heavy").ANSWER == 42


def test_a_class_has_a_stand_in_for_annotations_until_it_is_made(place: Path) -> None:
    deferred(heavy=("Box",))
    heavy = imported("heavy")
    stand_in = heavy.Box
    assert int | stand_in and not isinstance(3, stand_in) and not hasattr(stand_in, "__origin__")
    assert "heavy.shapes" not in sys.modules
    box = stand_in("b")
    assert type(box) is heavy.Box is imported("heavy.shapes").Box is not stand_in
    assert isinstance(box, stand_in) and stand_in.sides == 6


def test_no_submodule_sees_a_stand_in(place: Path) -> None:
    deferred(heavy=("Box",))
    stand_in = imported("heavy").Box
    shapes = imported("heavy.shapes")
    assert sys.modules["heavy"].Box is shapes.Box is not stand_in
    assert sys.modules["heavy"].shapes is sys.modules["heavy.shapes"] is shapes


def test_what_cannot_be_imported_says_so_at_each_look(place: Path) -> None:
    deferred(broken=())
    broken = imported("broken")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="absent_library"):
            broken.anything  # noqa: B018


def test_a_module_that_is_not_installed_stays_absent(place: Path) -> None:
    deferred(absent_library=())
    with pytest.raises(ModuleNotFoundError, match="absent_library"):
        imported("absent_library")


LIGHT = """
import sys
from edge_agent.runner import libraries
libraries.lighten()
import mlflow.pyfunc
needless = ("mlflow.genai.judges", "fastapi", "pandas.core", "pyarrow.lib", "scipy.sparse", "sklearn", "matplotlib")
print([name for name in needless if name in sys.modules])
import pandas
frame = pandas.DataFrame({"a": [1, 2]})
print(isinstance(frame, mlflow.models.utils.pd.DataFrame), frame.a.sum(), callable(mlflow.genai.evaluate))
"""


def test_mlflow_is_imported_without_what_no_answer_needs_and_all_of_it_is_there_all_the_same() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIGHT], capture_output=True, text=True, check=True, timeout=120
    )
    assert ended.stdout.splitlines() == ["[]", "True 3 True"], ended.stderr


def test_what_is_imported_already_stays_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "DEFERRED", {"heavy": ("Box",)})
    monkeypatch.setattr(libraries, "LEFT_OUT", ("heavy.shapes", "heavy.absent"))
    box = imported("heavy").Box
    libraries.lighten()
    assert imported("heavy").Box is box is imported("heavy.shapes").Box
    with pytest.raises(ModuleNotFoundError):
        imported("heavy.absent")
