"""What the environment files of a package may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.errors import PolicyError
from edge_agent.package import plain_yaml, requirements
from edge_agent.publishing import hugging_face, package

pytestmark = pytest.mark.attack

PYTHON_ENV = (
    "python: 3.11.7\nbuild_dependencies:\n- pip==23.2.1\n- setuptools\ndependencies:\n- -r requirements.txt\n"
)
CONDA = """\
name: mlflow-env
channels:
- conda-forge
dependencies:
- python=3.11.7
- pip<=23.2.1
- pytorch::pytorch=2.*
- pip:
  - mlflow==3.17.2
  - -c constraints.txt
"""


def check(folder: Path, **files: str) -> None:
    names = {"requirements": "requirements.txt", "conda": "conda.yaml", "env": "python_env.yaml"}
    for kind, text in files.items():
        (folder / names[kind]).write_text(text)
    requirements.check(folder, {path.name for path in folder.iterdir()})


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# a comment: -r x",
        "mlflow",
        "mlflow==3.17.2",
        "torch==2.13.0+cpu",
        "numpy>=2.0,<3",
        "numpy >= 2.0, != 2.1.*",
        "numpy (>=2)",
        "mlflow[extras, langchain]==3.17.*  # why",
        'pywin32 ; sys_platform == "win32" and python_version < "3.12"',
        "package~=1.0",
        "-c constraints.txt",
        *hugging_face.REQUIREMENTS,
        *package.REQUIREMENTS,
    ],
)
def test_names_with_versions_are_taken(tmp_path: Path, line: str) -> None:
    check(tmp_path, requirements=f"numpy\n{line}\n", env=PYTHON_ENV, conda=CONDA)


@pytest.mark.parametrize(
    "line",
    [
        "-r /dev/zero",
        "-r/etc/passwd",
        "--requirement=/etc/passwd",
        "-c /etc/passwd",
        "--constraint x",
        "-e .",
        "--editable ./x",
        "-f https://example.org",
        "--index-url https://example.org",
        "--hash=sha256:00",
        "https://example.org/x.whl",
        "file:///etc/passwd",
        "git+https://example.org/x",
        "x @ file:///etc/passwd",
        "x@https://example.org",
        "./x.whl",
        "/etc/passwd",
        "../x",
        "folder/x.whl",
        "x ; y @ file:///etc",
        "mlflow \\",
        "${HOME}",
        "x" * 2_000,
        "\0",
    ],
)
def test_everything_else_is_refused_without_its_text(tmp_path: Path, line: str) -> None:
    with pytest.raises(PolicyError, match=r"requirements\.txt, line 2, is not a name") as caught:
        check(tmp_path, requirements=f"numpy\n{line}\n")
    assert line not in str(caught.value) or len(line) < 2
    quoted = "'" + line.replace("'", "''").replace("\0", "/") + "'"
    with pytest.raises(PolicyError, match=r"conda\.yaml"):
        check(tmp_path, requirements="", conda=f"dependencies:\n- pip:\n  - {quoted}\n")
    with pytest.raises(PolicyError, match=r"python_env\.yaml"):
        check(tmp_path, conda="", env=f"dependencies:\n- {quoted}\n")


@pytest.mark.parametrize(
    "text",
    [
        "channels:\n- https://example.org\n",
        "dependencies:\n- https://example.org/x.tar.bz2\n",
        "dependencies:\n- --file x\n",
        "dependencies:\n- /etc/passwd\n",
        "dependencies: &a [*a]\n",
        "dependencies: !!python/object:os.system {}\n",
        "[" * 5_000,
    ],
)
def test_a_conda_file_that_leads_elsewhere_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError, match=r"conda\.yaml"):
        check(tmp_path, conda=text)


def test_a_large_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"more than 262144 bytes"):
        check(tmp_path, requirements="#\n" * 200_000)
    (tmp_path / "requirements.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="not text"):
        check(tmp_path)


def test_a_number_to_the_base_of_60_is_short() -> None:
    with pytest.raises(PolicyError, match="a number of 1999 characters"):
        plain_yaml.load(b"x: " + b":".join([b"1"] * 1000), "MLmodel")
    assert plain_yaml.load(b"x: 1:30\ny: 1.5\nz: -7", "MLmodel") == {"x": 90, "y": 1.5, "z": -7}
