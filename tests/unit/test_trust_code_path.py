"""`python_function.code` is put on `sys.path`: no package that uses it passes as "the shipped wrapper only"."""

import io
import zipfile
from pathlib import Path

import pytest

from edge_agent.errors import PolicyError
from edge_agent.package import trust
from tests.support.packages import MLMODEL, WEIGHTS, make_package, manifest_of


def archive() -> bytes:
    """A zip that Python would import `onnxruntime_genai` from, in the place of the real one."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("onnxruntime_genai.py", "raise SystemExit('ran')")
    return data.getvalue()


def mlmodel_with_code(path: str) -> str:
    return MLMODEL.replace("    python_version", f"    code: {path}\n    python_version")


@pytest.mark.parametrize("prefix", [b"", b"\x00" * 64], ids=["zip", "zip behind other bytes"])
def test_an_archive_among_the_weights_is_no_folder_of_code(tmp_path: Path, prefix: bytes) -> None:
    make_package(
        tmp_path, trust.WRAPPER, {"MLmodel": mlmodel_with_code(WEIGHTS), WEIGHTS: prefix + archive()}
    )
    with pytest.raises(PolicyError, match="not a folder"):
        trust.decide(tmp_path, manifest_of(tmp_path, "phi"), registered_name="phi")


def test_a_folder_of_code_is_never_the_shipped_wrapper_only(tmp_path: Path) -> None:
    make_package(tmp_path, trust.WRAPPER, {"MLmodel": mlmodel_with_code("artifacts/model")})
    with pytest.raises(PolicyError):
        trust.decide(tmp_path, manifest_of(tmp_path, "phi"), registered_name="phi")
