"""What a real runner does not do for a package: open its files, print their lines, take the host's memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import LoadFailed, PolicyError, RunnerCrashed
from edge_agent.publishing.package import build_package
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Load

pytestmark = pytest.mark.attack

ROOT = Path(__file__).parents[2]
SAMPLE_HF = ROOT / "tests" / "models" / "sample_hf"
TRANSFORMERS_MLMODEL = """\
flavors:
  python_function: {loader_module: mlflow.transformers, python_version: 3.11.7}
  transformers: {model_binary: model, task: text-generation}
"""
SECRET = "correct-horse-battery-staple==1"


@pytest.fixture(scope="module")
def package(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("reads") / "package"
    return build_package(sample_model, target, name="sample", signature="chat", options={}).folder


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[RunnerProcess]:
    running = RunnerProcess(model="assistant", environment=child_environment(tmp_path))
    yield running
    running.kill()


def test_a_load_follows_no_line_of_the_requirements(
    package: Path, tmp_path: Path, runner: RunnerProcess
) -> None:
    """The pipe would hold it for ever. The policy refuses such a file; this is a version that was taken before."""
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text(SECRET)
    (folder / "requirements.txt").write_text(f"{SECRET}\n-r {tmp_path / 'secret'}\n-r {tmp_path / 'pipe'}\n")
    load = Load(folder=str(folder), context_tokens=256, max_tokens=8, threads=1)
    assert runner.load(load, timeout_s=120).signature == "chat"
    assert SECRET not in runner.last_output()


def test_a_tokenizer_that_names_a_pipe_is_refused(
    package: Path, tmp_path: Path, runner: RunnerProcess
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    os.mkfifo(tmp_path / "pipe")
    file = folder / "artifacts/onnx/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tiktoken_file": "../../../pipe"}))
    load = Load(folder=str(folder), context_tokens=256, max_tokens=8, threads=1)
    with pytest.raises(PolicyError, match="'tiktoken_file' is not allowed"):
        runner.load(load, timeout_s=120)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**12) %}a{% endfor %}",
        "{% for i in range(1000000000000) %}a{% endfor %}",
        "{% set it = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set it.x = it.x + it.x %}{% endfor %}",
    ],
    ids=["power", "range", "namespace"],
)
def test_a_template_that_takes_all_memory_is_the_packages_doing(
    package: Path, tmp_path: Path, runner: RunnerProcess, template: str
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    (folder / "artifacts/onnx/chat_template.jinja").write_text(template)
    load = Load(
        folder=str(folder),
        context_tokens=256,
        max_tokens=8,
        threads=1,
        memory_bytes=1 << 30,
        memory_is_short=True,
    )
    with pytest.raises(LoadFailed, match="the chat template refuses the messages"):
        runner.load(load, timeout_s=120)


def test_a_death_by_computing_too_long_is_a_crash_that_says_so(runner: RunnerProcess, package: Path) -> None:
    runner.load(Load(folder=str(package), context_tokens=256, max_tokens=8, threads=1), timeout_s=120)
    os.kill(runner.pid, signal.SIGPROF)
    with pytest.raises(RunnerCrashed, match="it computed too long for one step"):
        runner.receive(60)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NATIVE = "{{ (10 ** (10 ** (messages|length * 9))) % 7 }}"
WARM_UP = """
import sys
from pathlib import Path
from edge_agent.runner import bounds, loader
bounds.LOAD_LIMIT_S = 8.0
model = loader.load(Path(sys.argv[1]), context_tokens=256, max_tokens=8, threads=1)
bounds.READ_LIMIT_S = 0.5
model.warm_up()
"""


@pytest.mark.parametrize(
    ("flavor", "template"), [("onnx", ENDLESS), pytest.param("transformers", NATIVE, marks=pytest.mark.long)]
)
def test_a_template_without_end_ends_the_runner_by_a_signal_of_its_own(
    package: Path, tmp_path: Path, flavor: str, template: str
) -> None:
    """In native code: the library of the one flavor, and one operation of the other's, which sees no signal."""
    folder = tmp_path / "package"
    if flavor == "onnx":
        shutil.copytree(package, folder)
        (folder / "artifacts/onnx/chat_template.jinja").write_text(template)
    else:
        shutil.copytree(SAMPLE_HF, folder / "model")
        (folder / "MLmodel").write_text(TRANSFORMERS_MLMODEL)
        (folder / "model/chat_template.jinja").write_text(template)
    environment = {**child_environment(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", WARM_UP, str(folder)],
        env=environment, cwd=ROOT, timeout=300, check=False, capture_output=True,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGPROF, ended.stderr.decode()[-500:]
