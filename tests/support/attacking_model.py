"""A language model that attacks the device it runs on: a package with `attacks.py` in it, made by plain MLflow.

Its prompt is `asking`'s JSON: what to aim at and which attacks. Its answer says what became of each: an empty text for
one that succeeded, else the error that it met. The attacks run in the model's own process, one after the other.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlflow

from tests.support.attacks import ATTACKS, Scene, outcome

MODEL = "attacker"
LOOKS = ("read the journal", "read a credential", "read another package", "list the state folder")
"""Attacks that nothing stops but the wall `files`, and that change nothing where it is missing."""
_ROOT = Path(__file__).parents[2]
_CODE = ("tests/__init__.py", "tests/support/__init__.py", "tests/support/attacks.py")


class Attacking(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    def predict(self, context: Any, model_input: Any, params: Any = None) -> str:
        text = str(model_input["prompt"][0] if hasattr(model_input, "columns") else model_input["prompt"])
        if not text.startswith("{"):
            return "Whom?"  # whoever loads a model asks it something
        asked = json.loads(text)
        scene = Scene.of({**asked["scene"], "scratch": tempfile.gettempdir()})
        return json.dumps({name: outcome(ATTACKS[name], scene) for name in asked["attacks"]})


def asking(scene: Scene, attacks: Iterable[str] = ATTACKS) -> str:
    """The prompt for these attacks. Where the model may write, it knows better than the scene."""
    return json.dumps({"scene": scene.document(), "attacks": list(attacks)})


def make_package(folder: Path) -> Path:
    """Makes the package in `folder`, which must not exist yet."""
    with tempfile.TemporaryDirectory() as staging:
        for name in _CODE:
            copy = Path(staging) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_ROOT / name, copy)
        mlflow.pyfunc.save_model(
            folder,
            python_model=__file__,
            code_paths=[str(Path(staging) / "tests")],
            signature=mlflow.models.infer_signature({"prompt": "{}"}, ["{}"]),
            pip_requirements=[],
        )
    return folder


mlflow.models.set_model(Attacking())
