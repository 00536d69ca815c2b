"""`install.sh` as an operator uses it: real Pythons, real pip, real environments, below a folder of the test.

The bundles are real, and small. The agent itself, with systemd and as root, is installed by `./build.sh boot-test`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.installing import PYTHON, Host
from tests.support.keys import KeyPair, make_keys
from tests.support.processes import clean_environment, short_folder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

import bundle  # noqa: E402

UNITS = {"edge-agent.service", "edge-agent-http.socket", "edge-agent-http.service"}
SETTLE = "edge-agent-settle.service"
"""It stays from the first switch on, and does nothing while no switch was cut."""


@pytest.fixture
def host() -> Iterator[Host]:
    with short_folder() as folder:
        folder.chmod(0o755)
        yield Host(folder)


def test_from_the_first_version_to_the_third_and_back_and_away(host: Host) -> None:
    first = host.bundle("1.0.0")
    assert host.install(first) == "edge-agent, version 1.0.0"
    packages = next(host.base.glob("1.0.0/lib/*/site-packages"))
    compiled = {path.name.partition(".")[0] for path in packages.rglob("*.pyc")}
    assert compiled == {"edge_agent", "onnxruntime_genai", "__init__", "pyfunc"}, (
        "nobody runs a package's tests"
    )
    assert "[mqtt]" in host.config.read_text()
    assert host.units() == UNITS
    host.config.write_text('device_id = "mine"\n')
    assert host.install(host.bundle("1.1.0")) == "edge-agent, version 1.1.0"
    assert host.config.read_text() == 'device_id = "mine"\n'
    assert host.install(host.bundle("1.2.0")) == "edge-agent, version 1.2.0"
    assert host.versions() == ["1.1.0", "1.2.0"], "the present one and the one before it"

    own = host.base / "current"
    assert host.run(own, "use", "1.1.0", "--root", str(host.root)).returncode == 0
    assert host.version() == "edge-agent, version 1.1.0"
    assert "installed versions: 1.1.0 1.2.0" in host.run(own, "use", "1.0.0", "--root", str(host.root)).stderr
    before = (host.base / "current").resolve()
    assert host.install(host.bundle("1.1.0", program="print('another build')")) == "another build"
    assert before.is_dir(), "what runs does not change under the daemon"
    assert (host.base / "current").resolve() != before

    state = host.root / "var" / "lib" / "edge-agent" / "journal.db"
    state.parent.mkdir(parents=True)
    state.touch()
    assert host.run(own, "uninstall", "--root", str(host.root)).returncode == 0
    assert (host.base.exists(), state.exists(), host.config.exists()) == (False, True, True)
    assert host.units() == set()
    assert host.run(first, "uninstall", "--purge", "--root", str(host.root)).returncode == 0
    assert (state.exists(), host.config.exists()) == (False, False)


def test_what_fails_leaves_the_running_version_as_it_is(host: Host) -> None:
    host.install(host.bundle("1.0.0"))
    damaged = host.bundle("1.1.0")
    with next((damaged / "wheels").glob("edge_agent-*")).open("ab") as file:
        file.write(b"x")
    assert "the bundle is damaged" in host.refuse(damaged)
    assert "this bundle is for Linux on sparc" in host.refuse(host.bundle("1.1.0", arch="sparc"))
    assert "this bundle supports Python 2.7" in host.refuse(host.bundle("1.1.0", python="2.7"))
    broken = host.refuse(host.bundle("1.1.0", program="raise SystemExit('no such luck')"))
    assert "no such luck" in broken
    assert "version 1.0.0 stays as it is" in broken
    assert (host.version(), host.versions()) == ("edge-agent, version 1.0.0", ["1.0.0"])


def test_nothing_of_the_current_folder_or_the_environment_is_run(host: Host) -> None:
    """An administrator may start it wherever somebody has put a module or a program for him."""
    trap, sprung = host.folder / "downloads", host.folder / "sprung"
    trap.mkdir()
    module = f"open({str(sprung)!r}, 'a').write(__name__)\n"
    for name in (
        "ssl",
        "venv",
        "pip",
        "ctypes",
        "sqlite3",
        "compileall",
        "site",
        "sitecustomize",
        "encodings",
    ):
        (trap / f"{name}.py").write_text(module)
    (trap / "mlflow").mkdir()
    (trap / "mlflow" / "__init__.py").write_text(module)
    for name in ("bash", "python3", "dirname", "readlink", "flock", "sha256sum", "SHA256SUMS", "startup"):
        (trap / name).write_text(f"#!/bin/sh\necho {name} >> {sprung}\n")
        (trap / name).chmod(0o755)
    first, second = host.bundle("1.0.0"), host.bundle("1.1.0")
    hostile = {"PATH": f".:{host.path}", "PYTHONPATH": str(trap), "BASH_ENV": str(trap / "startup")}
    for folder, arguments in (
        (first, ()),
        (second, ("install",)),
        (host.base / "current", ("list",)),
        (host.base / "current", ("use", "1.0.0")),
        (host.base / "current", ("uninstall",)),
    ):
        result = host.run(folder, *arguments, "--root", str(host.root), cwd=trap, variables=hostile)
        assert result.returncode == 0, result.stdout + result.stderr
        assert not sprung.exists(), f"{arguments}: {sprung.read_text()}"
    assert not host.base.exists()


# --- Signed bundles ------------------------------------------------------------------------------------


def signed(host: Host, version: str, key: KeyPair, **changes: str) -> Path:
    made = host.bundle(version, **changes)
    bundle.sign(made / "SHA256SUMS", key.private)
    return made


def test_a_signed_bundle_is_installed_from_a_copy_by_the_script_that_is_there(host: Host) -> None:
    key = make_keys(host.folder, "release")
    first = signed(host, "1.0.0", key)
    beside = host.run(first, "--root", str(host.root), "--verify-key", "release.pub", cwd=host.folder)
    assert beside.returncode == 0, beside.stderr
    assert f"signed with {host.folder}/release.pub" in beside.stdout
    second = signed(host, "1.1.0", key)
    stray = second / "wheels" / "stray-1.0-py3-none-any.whl"
    stray.write_text("no part of the bundle: it is left behind")
    installed = host.base / "current"
    arguments = ("--from", second.name, "--verify-key", "release.pub", "--root", str(host.root))
    result = host.run(installed, *arguments, cwd=host.folder)
    assert (result.returncode, host.version()) == (0, "edge-agent, version 1.1.0"), result.stderr
    left = sorted(path.name for path in host.base.glob(".*"))
    assert left == [".lock", ".previous", ".settle"], "no copy is left"


def forge(host: Host, made: Path) -> None:
    """Another agent in the bundle, with sums that fit."""
    shutil.rmtree(made / "wheels")
    shutil.copytree(host.bundle("1.1.0", program="print('forged')") / "wheels", made / "wheels")
    add_up(made)


def unsign(host: Host, made: Path) -> None:
    (made / "SHA256SUMS.sig").unlink()


def sign_by_another(host: Host, made: Path) -> None:
    bundle.sign(made / "SHA256SUMS", make_keys(host.folder, "another").private)


def add_a_python(host: Host, made: Path) -> None:
    """Wheels for this Python that the sums do not name; what was signed is for another one."""
    (made / f"requirements-{PYTHON}.txt").write_text("edge-agent==1.1.0 --hash=sha256:" + "0" * 64)


def link(host: Host, made: Path) -> None:
    """What is checked could be exchanged before it is installed."""
    (made / "config.toml").rename(host.folder / "config.toml")
    (made / "config.toml").symlink_to(host.folder / "config.toml")


def lose(host: Host, made: Path) -> None:
    (made / "config.toml").unlink()


def damage(host: Host, made: Path) -> None:
    with (made / "config.toml").open("a") as file:
        file.write("# and more")


def cut_signature(host: Host, made: Path) -> None:
    (made / "SHA256SUMS.sig").write_bytes(b"")


FORGERIES: dict[Callable[[Host, Path], None], str] = {
    forge: "was not signed with",
    unsign: "has no SHA256SUMS.sig",
    sign_by_another: "was not signed with",
    cut_signature: "was not signed with",
    add_a_python: "this bundle supports Python 2.7",
    link: "has a link",
    lose: "lacks a file",
    damage: "the bundle is damaged",
}


def test_what_was_not_signed_is_neither_run_nor_installed(host: Host) -> None:
    key = make_keys(host.folder, "release")
    host.install(host.bundle("1.0.0"))
    sprung = host.folder / "sprung"
    for change, reason in FORGERIES.items():
        made = signed(host, "1.1.0", key, python="2.7" if change is add_a_python else PYTHON)
        change(host, made)
        if "signed" in reason:
            (made / "install.sh").write_text(f"#!/bin/sh\n: >{sprung}\n")
        arguments = ("--from", str(made), "--verify-key", str(key.public), "--root", str(host.root))
        result = host.run(host.base / "current", *arguments)
        assert (result.returncode, reason in result.stderr) == (1, True), (
            f"{change.__name__}: {result.stderr}"
        )
        assert (host.version(), host.versions()) == ("edge-agent, version 1.0.0", ["1.0.0"])
        assert not sprung.exists()
        assert not list(host.base.glob(".bundle*"))


def test_without_openssl_or_a_key_nothing_is_verified_and_nothing_installed(host: Host) -> None:
    key = make_keys(host.folder, "release")
    made = signed(host, "1.0.0", key)
    root = ("--root", str(host.root))
    programs = host.folder / "without"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for path in Path(folder).iterdir():
            if path.name != "openssl" and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    without = host.run(made, "--verify-key", str(key.public), *root, variables={"PATH": str(programs)})
    assert (without.returncode, "needs openssl" in without.stderr) == (1, True), without.stderr
    for wrong in ("/nowhere", str(host.folder), ""):
        refused = host.run(made, "--verify-key", wrong, *root)
        assert (refused.returncode, "needs a file with a public key" in refused.stderr) == (1, True)
    for unfit in (key.private, made / "config.toml"):
        assert "was not signed with" in host.run(made, "--verify-key", str(unfit), *root).stderr
    assert host.run(made, "use", "1.0.0", "--verify-key", str(key.public), *root).returncode == 1
    assert host.versions() == []


def test_models_that_will_not_run_are_named_before_the_switch(host: Host) -> None:
    host.install(host.bundle("1.0.0"))
    result = host.run(host.bundle("1.1.0", stops="it stops:"), "--root", str(host.root))
    lines = result.stdout.splitlines()
    said = f"install.sh: attention: it stops: {host.config} {host.root}/var/lib/edge-agent /"
    assert (result.returncode, said in lines) == (0, True), result.stdout
    assert lines.index(said) < next(n for n, line in enumerate(lines) if "1.1.0 is installed" in line)
    assert host.version() == "edge-agent, version 1.1.0", "and the version is installed all the same"


def test_only_root_installs_a_service(host: Host) -> None:
    nobody = 65_534 if os.geteuid() == 0 else None
    result = host.run(host.bundle("1.0.0"), user=nobody)
    assert (result.returncode, "only root" in result.stderr) == (1, True)


def test_help_and_wrong_usage() -> None:
    script = ROOT / "systemd" / "install.sh"
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert (shown.returncode, "Examples:" in shown.stdout) == (0, True)
    wrong = subprocess.run([script, "--force"], capture_output=True, text=True, timeout=120, check=False)
    assert wrong.returncode == 2


def test_a_script_without_its_bundle_says_where_it_belongs(host: Host) -> None:
    script = host.folder / "install.sh"
    shutil.copy(ROOT / "systemd" / "install.sh", script)
    assert "there is no bundle" in host.refuse(host.folder)


# --- Cut half way ---------------------------------------------------------------------------------------


def cut_install(
    host: Host, folder: Path, program: str, pattern: str, before: str = ":", command: str = "install"
) -> None:
    """
    Args:
        command: with its arguments.
    """
    fired = host.cut_at(program, pattern, before)
    result = subprocess.run(
        [str(folder / "install.sh"), *command.split(), "--root", str(host.root)],
        capture_output=True,
        timeout=120,
        check=False,
        env=clean_environment({"PATH": host.path}),
        start_new_session=True,
    )
    assert (result.returncode, fired.exists()) == (-9, True), result.stderr
    fired.unlink()
    (host.folder / "bin" / program).unlink()


def test_an_install_that_is_cut_at_any_step_leaves_a_whole_version_and_goes_on_the_next_time(
    host: Host,
) -> None:
    first, second = host.bundle("1.0.0"), host.bundle("1.1.0")
    (second / "edge-agent.service").write_text("[Unit]\nDescription=the second\n")
    add_up(second)
    host.install(first)
    unit = host.root / "etc/systemd/system/edge-agent.service"
    units = unit.read_text(), (second / "edge-agent.service").read_text()
    for program, pattern, before in (
        ("install", "*share/edge-agent/*", ":"),  # the environment is there, and not complete
        ("ln", "*.current", ":"),
        ("mv", "*.current*", ":"),
        ("install", "*edge-agent.service.new", 'for last; do :; done; : >"$last"'),  # an empty file
        ("mv", "*edge-agent.service.new*", ":"),
    ):
        cut_install(host, second, program, pattern, before)
        current = (host.base / "current").resolve().name
        assert host.version() == f"edge-agent, version {current}"
        assert unit.read_text() in units
        assert set(listed(host)) <= {"1.0.0", "1.1.0"}
        assert ("1.1.0" in listed(host)) == (pattern != "*share/edge-agent/*")
        assert host.on_trial() == ("" if program == "install" and "share" in pattern else "1.0.0")
        if host.on_trial():
            assert host.enabled(SETTLE) == "enabled", "the next boot goes on here"
    assert host.install(second) == "edge-agent, version 1.1.0"
    assert unit.read_text() == units[1]
    assert (host.versions(), host.on_trial()) == (["1.0.0", "1.1.0"], "")


def test_what_never_started_does_not_become_what_is_gone_back_to(host: Host) -> None:
    host.install(host.bundle("1.0.0"))
    for version in ("1.1.0", "1.2.0"):
        cut_install(host, host.bundle(version), "systemctl", r"*\ enable\ edge-agent.service*")
        assert (host.version(), host.on_trial()) == (f"edge-agent, version {version}", "1.0.0")
    assert host.versions() == ["1.0.0", "1.1.0", "1.2.0"]


def test_a_way_back_to_a_version_that_knows_no_trial_is_ended_by_the_script_that_went_it(host: Host) -> None:
    host.install(host.bundle("1.0.0"))
    host.install(host.bundle("1.1.0"))
    (host.base / "1.0.0" / "install.sh").write_text("exit 2\n")
    cut_install(
        host, host.base / "current", "systemctl", r"*\ enable\ edge-agent.service*", command="use 1.0.0"
    )
    assert (host.version(), host.on_trial()) == ("edge-agent, version 1.0.0", "1.1.0")
    assert (host.base / ".settle").read_bytes() == (ROOT / "systemd" / "install.sh").read_bytes()
    assert os.access(host.base / ".settle", os.X_OK)
    assert SETTLE in host.units() and host.enabled(SETTLE) == "enabled"


def test_only_an_operator_disables_the_service_for_good_and_no_cut_does(host: Host) -> None:
    bundle = host.bundle("1.0.0")
    cut_install(host, bundle, "systemctl", r"*\ enable\ *")
    assert host.enabled() == "disabled", "its unit is there, and no more"
    host.install(bundle)
    assert host.enabled() == "enabled"

    host.systemctl("disable")
    for arguments in (("install",), ("use", "1.0.0")):
        result = host.run(bundle, *arguments, "--root", str(host.root))
        said = [line for line in result.stdout.splitlines() if "disabled" in line]
        assert (result.returncode, len(said), host.enabled()) == (0, 1, "disabled"), result.stdout
    host.systemctl("enable")
    assert "disabled" not in host.run(bundle, "--root", str(host.root)).stdout
    assert host.enabled() == "enabled"

    cut_install(host, bundle, "rm", "*system/edge-agent.service", command="uninstall")
    assert (host.enabled(), "edge-agent.service" in host.units()) == ("disabled", True)
    host.install(bundle)
    assert host.enabled() == "enabled", "installed anew"
    assert not list(host.base.glob(".enable"))


def test_a_version_that_does_not_know_a_unit_yet_runs_without_it(host: Host) -> None:
    host.install(host.bundle("1.0.0"))
    host.install(host.bundle("1.1.0"))
    for name in UNITS - {"edge-agent.service"}:
        (host.base / "1.0.0" / "share" / "edge-agent" / name).unlink()
    for version, units in (("1.0.0", {"edge-agent.service"}), ("1.1.0", UNITS)):
        assert host.run(host.base / "current", "use", version, "--root", str(host.root)).returncode == 0
        assert host.units() == units | {SETTLE}


def test_a_version_that_is_removed_by_half_is_none_any_more(host: Host) -> None:
    host.install(host.bundle("1.0.0"))
    host.install(host.bundle("1.1.0"))
    third = host.bundle("1.2.0")
    cut_install(host, third, "rm", "*-rf*1.0.0*", f"/bin/rm -rf {host.base}/1.0.0/lib")
    assert listed(host) == ["1.1.0", "1.2.0"]
    assert host.install(third) == "edge-agent, version 1.2.0"
    assert host.versions() == ["1.1.0", "1.2.0"]


def test_installing_a_version_again_mends_it(host: Host) -> None:
    """Another Python may have come with the system since, or the disk lost a file."""
    first = host.bundle("1.0.0")
    host.install(first)
    assert "is already installed" in host.run(first, "--root", str(host.root)).stdout
    link = host.folder / "bin" / "python3"
    python = link.readlink()
    link.unlink()
    assert host.version() == "edge-agent, version 1.0.0", "it holds on to its Python, not to today's link"
    link.symlink_to(python)
    broken = (host.base / "current").resolve()
    next(broken.glob("lib/*/site-packages/edge_agent.py")).unlink()
    shutil.rmtree(next(broken.glob("lib/*/site-packages/__pycache__")))
    assert host.install(first) == "edge-agent, version 1.0.0"
    assert (host.base / "current").resolve() != broken, "what runs does not change under the daemon"


def add_up(folder: Path) -> None:
    """SHA256SUMS of a bundle that a test has changed."""
    sums = folder / "SHA256SUMS"
    names = [line.split("  ", 1)[1] for line in sums.read_text().splitlines()]
    sums.write_text(
        "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    )


def listed(host: Host) -> list[str]:
    shown = host.run(host.base / "current", "list", "--root", str(host.root))
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.split()
