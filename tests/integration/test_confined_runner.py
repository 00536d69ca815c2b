"""A runner behind its walls, with somebody else's code in it: what it can do, what not, and where it does not start."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from edge_agent.errors import PublishError, Unconfined
from edge_agent.host.confinement import Wall
from edge_agent.publishing import trial
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.protocol import Delta, Load, Loaded
from edge_agent.runner.scratch import PREFIX
from tests.support import attacking_model
from tests.support.attacks import ATTACKS, Scene, staged

pytestmark = pytest.mark.attack

MODEL = Path(__file__).parents[1] / "support" / "curious_model.py"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import mlflow
    from mlflow.models import infer_signature

    folder = tmp_path_factory.mktemp("curious") / "package"
    signature = infer_signature({"prompt": "read x"}, ["x"])
    mlflow.pyfunc.save_model(folder, python_model=MODEL, signature=signature, pip_requirements=[])
    return folder


def load(folder: Path, **options: object) -> Load:
    return Load(folder=str(folder), context_tokens=64, max_tokens=8, threads=1, **options)  # type: ignore[arg-type]


def ask(runner: RunnerProcess, prompt: str) -> str:
    frames = runner.generate(prompt, {"prompt": prompt}, timeout_s=60)
    return "".join(frame.text for frame in frames if isinstance(frame, Delta))


@pytest.fixture
def scratches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the temporary folders of runners are made."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


class Curious:
    """A runner with the curious model."""

    def __init__(self, package: Path, state: Path, **options: object) -> None:
        self.runner = RunnerProcess(model="curious", environment=child_environment(state))
        self.loaded: Loaded = self.runner.load(load(package, **options), timeout_s=120)

    def __call__(self, prompt: str) -> str:
        return ask(self.runner, prompt)


@pytest.fixture
def curious(package: Path, tmp_path: Path, scratches: Path) -> Iterator[Curious]:
    made = Curious(package, tmp_path)
    yield made
    made.runner.stop()


def test_it_says_that_every_wall_stands(curious: Curious) -> None:
    assert curious.loaded.walls == list(Wall)
    assert curious.loaded.missing_walls == {}


def test_what_a_model_does_for_itself_works(curious: Curious, scratches: Path) -> None:
    assert curious("thread") == "done"
    assert curious("loop") == "done"
    (scratch,) = scratches.iterdir()
    assert scratch.name.startswith(PREFIX)
    assert curious("scratch") == f"done in {scratch}"
    assert (scratch / "left").exists()
    curious.runner.stop()
    assert list(scratches.iterdir()) == [], "nothing is left"


def test_what_reaches_outside_does_not(curious: Curious, package: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_text("secret prompts")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "control.sock"))
        control.listen()
        prompts = [
            f"read {tmp_path / 'journal.db'}", f"write {tmp_path / 'journal.db'}", f"write {package / 'MLmodel'}",
            f"connect {server.getsockname()[1]}", f"connect {tmp_path / 'control.sock'}", "kill", "fork",
            "run /bin/true", "environment",
        ]  # fmt: skip
        assert {prompt: curious(prompt)[:15] for prompt in prompts} == dict.fromkeys(
            prompts, "PermissionError"
        )
    assert (tmp_path / "journal.db").read_text() == "secret prompts"
    assert curious("thread") == "done", "and the model goes on"


def test_a_model_gets_what_its_settings_give_it(package: Path, tmp_path: Path, scratches: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "table").write_text("a table")
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = Curious(package, tmp_path, network=True, read=[str(tmp_path / "given")])
        try:
            assert set(given.loaded.walls) == set(Wall) - {Wall.TCP}
            assert given.loaded.missing_walls == {}, "what the settings open is not missing"
            assert given(f"connect {server.getsockname()[1]}") == "done"
            assert given(f"read {tmp_path / 'given' / 'table'}") == "a table"
            assert given(f"write {tmp_path / 'given' / 'table'}").startswith("PermissionError")
        finally:
            given.runner.stop()


def test_its_memory_is_known_and_it_volunteers_when_memory_is_short(curious: Curious) -> None:
    assert curious.runner.peak_bytes() >= curious.runner.resident_bytes() > 10 << 20
    assert Path(f"/proc/{curious.runner.pid}/oom_score_adj").read_text().strip() == "500"
    status = curious("score")
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    curious.runner.stop()
    assert curious.runner.peak_bytes() == curious.runner.resident_bytes() == 0


def test_a_full_disk_leaves_a_runner_without_a_folder_of_its_own(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    made = Curious(package, tmp_path)
    try:
        assert made("thread") == "done"
        assert not made("scratch").startswith("done")
    finally:
        made.runner.stop()


def on_an_old_kernel(folder: Path, lacks: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """From now on runners start on a kernel that lacks something; gives their environment."""
    program = folder / "python"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m tests.support.old_kernel {lacks} {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return {**child_environment(folder), "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize(("lacks", "wall"), [("landlock", Wall.FILES), ("seccomp", Wall.SYSTEM_CALLS)])
def test_where_a_wall_of_the_minimum_is_missing_code_runs_only_if_it_may(
    lacks: str, wall: Wall, package: Path, tmp_path: Path, scratches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = on_an_old_kernel(tmp_path, lacks, monkeypatch)
    refused = RunnerProcess(model="curious", environment=environment)
    with pytest.raises(Unconfined, match=f"cannot confine \\({wall}: .*trust.unconfined_code = true"):
        refused.load(load(package), timeout_s=120)
    assert not refused.alive
    allowed = RunnerProcess(model="curious", environment=environment)
    try:
        loaded = allowed.load(load(package, confined=False), timeout_s=120)
        assert wall in loaded.missing_walls
        assert set(loaded.walls) | set(loaded.missing_walls) == set(Wall)
        assert ask(allowed, "thread") == "done"
    finally:
        allowed.stop()
    assert os.listdir(scratches) == []  # noqa: PTH208


def test_a_publishers_trial_has_the_same_walls(package: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the key")
    refused = [
        {"prompt": prompt, "expect": "^PermissionError"}
        for prompt in (f"read {secret}", f"write {secret}", f"write {package / 'MLmodel'}", "kill", "fork")
    ]
    works = [{"prompt": "thread", "expect": "^done$"}, {"prompt": "scratch", "expect": "^done in "}]
    assert trial.try_out(package, {"prompt": "thread"}, [*refused, *works]) == []
    with pytest.raises(PublishError, match=r"golden prompt 1 expects 'the key' and the model answers .Perm"):
        trial.try_out(package, {"prompt": "thread"}, [{"prompt": f"read {secret}", "expect": "the key"}])
    assert secret.read_text() == "the key"


# --- The attacks of test_walls.py, from inside a package -------------------------------------------------


@pytest.fixture(scope="module")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attacking_model.make_package(tmp_path_factory.mktemp("attacker") / "package")


def attack(runner: RunnerProcess, scene: Scene, attacks: Iterable[str] = ATTACKS) -> dict[str, str]:
    found: dict[str, str] = json.loads(ask(runner, attacking_model.asking(scene, attacks)))
    return found


def test_every_attack_from_inside_a_package_fails(attacker: Path, tmp_path: Path, scratches: Path) -> None:
    attacks = [name for name, each in ATTACKS.items() if os.geteuid() != 0 or not each.ordinary]
    runner = RunnerProcess(model="attacker", environment=child_environment(tmp_path))
    with staged(tmp_path / "device") as scene:
        try:
            runner.load(load(attacker), timeout_s=120)
            found = attack(runner, scene, attacks)
        finally:
            runner.stop()
    assert len(found) == len(attacks) > 70
    assert [name for name, outcome in found.items() if not outcome] == []


def test_a_package_notices_that_a_wall_is_missing(
    attacker: Path, tmp_path: Path, scratches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = RunnerProcess(model="attacker", environment=on_an_old_kernel(tmp_path, "landlock", monkeypatch))
    with staged(tmp_path / "device") as scene:
        try:
            runner.load(load(attacker, confined=False), timeout_s=120)
            found = attack(runner, scene, attacking_model.LOOKS)
        finally:
            runner.stop()
    assert found == dict.fromkeys(attacking_model.LOOKS, "")
