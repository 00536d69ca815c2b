"""What `build.sh` and the locks promise."""

from __future__ import annotations

import re
import subprocess
import textwrap
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import tests.conftest
from tests.conftest import *
tests.conftest.LEFT_PROCESSES_GRACE_S = 0.5
"""
LOCKS = ("runtime", "dev", "train", "device", "http-clients", "axe", "llama-cpp")

_PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==(\S+)", re.MULTILINE)


def lock(name: str) -> str:
    return (ROOT / ".ci" / "locks" / f"{name}.txt").read_text()


def build(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "build.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_has_a_line_for_each_command() -> None:
    result = build("help")
    assert result.returncode == 0
    for command in (
        "demo",
        "chat",
        "test",
        "long-test",
        "http-test",
        "look-test",
        "chaos",
        "powerloss",
        "attack",
        "check",
        "package",
        "boot-test",
        "machine-test",
        "fleet-test",
        "sample-model",
        "random-model",
        "real-model",
        "real-test",
        "lock",
        "help",
    ):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), command


def test_a_key_that_cannot_sign_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    command = [str(ROOT / "build.sh"), "package", "--sign-key", "key.pem"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, f"{tmp_path}/key.pem is no unencrypted private key" in result.stderr) == (
        1,
        True,
    )


def test_an_unknown_command_is_a_usage_error() -> None:
    assert build("deploy").returncode == 2


def test_build_sh_is_a_table_of_contents_and_each_script_is_well_formed() -> None:
    scripts = [ROOT / "build.sh", *(ROOT / ".ci").glob("*.sh"), *(ROOT / "tests").rglob("*.sh")]
    assert len(scripts) > 3
    for script in scripts:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, ""), script
    assert len(scripts[0].read_text().splitlines()) <= 250


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_address(name: str) -> None:
    assert not re.search(
        r"://|^\s*(-i|-f|--index|--extra-index|--find-links|--trusted-host)", lock(name), re.M
    )


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes(name: str) -> None:
    for block in re.split(r"\n(?=\S)", lock(name).strip()):
        assert "--hash=sha256:" in block, block.splitlines()[0]


@pytest.mark.parametrize("name", LOCKS)
def test_torch_stays_outside_the_locks(name: str) -> None:
    names = {pin[0] for pin in _PIN.findall(lock(name))}
    assert not {pin for pin in names if pin in ("torch", "triton") or pin.startswith("nvidia-")}


@pytest.mark.parametrize("name", ["runtime", "device"])
def test_what_is_tested_is_what_runs(name: str) -> None:
    pins = {pin for pin in _PIN.findall(lock(name)) if pin[0] != "pip"}  # it installs, and is not installed
    assert pins <= set(_PIN.findall(lock("dev")))


def test_the_locks_hold_every_direct_dependency_and_the_build_backend() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    runtime = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *extras["local-registry"],
        *extras["http"],
    ]
    transformers = [each for each in extras["transformers"] if not each.startswith("torch")]
    dev = [*runtime, *extras["s3"], *extras["signing"], *extras["dev"], *transformers]
    device = [
        *project["project"]["dependencies"],
        *extras["local-registry"],
        *extras["http"],
        *extras["s3"],
        *extras["signing"],
        "pip",
    ]
    for name, requirements in (("runtime", runtime), ("dev", dev), ("device", device)):
        locked = {pin[0] for pin in _PIN.findall(lock(name))}
        wanted = {
            re.split(r"[<>=\[; ]", each, maxsplit=1)[0].lower().replace("_", "-") for each in requirements
        }
        assert wanted <= locked, f"{name}.txt: run ./build.sh lock"


@pytest.mark.parametrize(
    "body",
    ["pytest.skip('no broker')", "pytest.importorskip('no_such_module')", "pytest.xfail('some day')"],
)
def test_a_test_that_did_not_run_makes_the_session_fail(body: str, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        textwrap.dedent(f"""
        import pytest

        def test_that_passes():
            pass

        def test_that_does_not_run():
            {body}
        """)
    )
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*skipped or expected to fail*", "*::test_that_does_not_run"])


def test_a_process_left_behind_is_ended_and_makes_the_session_fail(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import subprocess

        def test_that_starts_an_orphan():
            subprocess.run(["sh", "-c", "sleep 600 >/dev/null 2>&1 &"], check=True)
        """
    )
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*processes left behind*", "*sleep 600*"])
