"""The Debian package as dpkg handles it: unpacked, configured, cut off, replaced and removed, below a test's folder.

dpkg is real, and so are its database and its triggers; the packages are made of small bundles. The maintainer scripts
run outside of the folder (`--force-script-chrootless`), as where the image of a device is made. The agent itself is
installed from its package, with apt, by `./build.sh boot-test`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.installing import PYTHON, ROOT, Host
from tests.support.processes import clean_environment, short_folder

sys.path.insert(0, str(ROOT / ".ci"))

import deb

MADE_AT_S = 1_767_225_600
HERE = {"libc6": "2.36", "libgcc-s1": "12", "libstdc++6": "12", "zlib1g": "1.2", "systemd": "252"}
ARCH = subprocess.run(
    ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
).stdout.strip()


class Debian(Host):
    """A device whose dpkg knows the packages of `HERE` and a Python."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.database = self.root / "var/lib/dpkg"
        for name in ("info", "updates", "triggers"):
            (self.database / name).mkdir(parents=True)
        self.python(f"{PYTHON}.2-1+b1")

    def python(self, version: str) -> None:
        packages = {**HERE, "python3": version}
        (self.database / "status").write_text(
            "".join(
                f"Package: {name}\nStatus: install ok installed\nMaintainer: a <b@c>\nArchitecture: {ARCH}\n"
                f"Version: {number}\nDescription: here\n\n"
                for name, number in packages.items()
            )
        )

    def package(self, version: str, **changes: str) -> Path:
        """The package of a bundle whose `edge-agent` runs `program`."""
        made = self.bundle(version, **changes)
        name = f"edge-agent-{version}-linux-{made.name}"
        archive = self.folder / f"{name}.tar.gz"
        made.rename(self.folder / name)
        subprocess.run(["tar", "czf", archive, "-C", self.folder, name], check=True)
        (self.folder / name).rename(made)
        out = self.folder / f"out-{name}"
        out.mkdir()
        return build(archive, out)

    def dpkg(self, *arguments: str | Path, cut: bool = False) -> subprocess.CompletedProcess[str]:
        """
        Args:
            cut: it is killed with everything that it has started.
        """
        command = ["dpkg", f"--root={self.root}", "--force-script-chrootless", "--force-not-root"]
        result = subprocess.run(
            [*command, "--force-unsafe-io", "--log=/dev/null", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=clean_environment({"PATH": self.path}),
            start_new_session=True,
        )
        assert (result.returncode == -9) == cut, result.stdout + result.stderr
        return result

    def cut(self, program: str, pattern: str, *arguments: str | Path, before: str = ":") -> None:
        """Runs dpkg, and cuts the power where `program` is started with arguments like `pattern`."""
        fired = self.cut_at(program, pattern, before)
        self.dpkg(*arguments, cut=True)
        fired.unlink()
        (self.folder / "bin" / program).unlink()

    def state(self) -> str:
        query = ["dpkg-query", f"--admindir={self.database}", "-W", "-f", "${Version} ${db:Status-Status}"]
        return subprocess.run(
            [*query, "edge-agent"], capture_output=True, text=True, check=False, timeout=60
        ).stdout

    def python_was_replaced(self) -> None:
        trigger = ["dpkg-trigger", f"--admindir={self.database}", "--by-package=python3", "/usr/bin/python3"]
        subprocess.run(trigger, check=True, timeout=60)

    def left(self) -> list[str]:
        """Files of the agent, wherever."""
        files = (path.relative_to(self.root) for path in self.root.rglob("*") if not path.is_dir())
        return sorted(path.as_posix() for path in files if not path.is_relative_to("var/lib/dpkg"))


def build(archive: Path, out: Path, **variables: str) -> Path:
    subprocess.run(
        [sys.executable, deb.__file__, "--bundle", archive, "--out", out],
        env=clean_environment({"SOURCE_DATE_EPOCH": str(MADE_AT_S), "PATH": os.environ["PATH"], **variables}),
        check=True,
        timeout=120,
    )
    (package,) = out.glob("*.deb")
    return package


def shown(package: Path, *fields: str) -> str:
    what = "--field" if fields else "--contents"
    command: list[str | Path] = ["dpkg-deb", what, package, *fields]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return said.strip()


@pytest.fixture
def device() -> Iterator[Debian]:
    with short_folder() as folder:
        folder.chmod(0o755)
        yield Debian(folder)


# --- What is in it -------------------------------------------------------------------------------------


def test_a_package_says_what_it_needs_and_keeps_to_its_places(device: Debian) -> None:
    package = device.package("1.0.0")
    assert package.name == f"edge-agent_1.0.0_{ARCH}.deb"
    assert shown(package, "Package", "Version", "Architecture", "Section", "Priority").splitlines() == [
        "Package: edge-agent",
        "Version: 1.0.0",
        f"Architecture: {ARCH}",
        "Section: misc",
        "Priority: optional",
    ]
    needs = shown(package, "Depends").split(", ")
    assert needs[-1] == "systemd"
    assert needs[-3:-1] == deb.python_range([PYTHON])
    assert int(shown(package, "Installed-Size")) > 1000
    entries = [line.split(maxsplit=5) for line in shown(package).splitlines()]
    assert {entry[1] for entry in entries} == {"root/root"}
    assert {(entry[3], entry[4]) for entry in entries} == {("2026-01-01", "00:00")}
    files = {entry[5].split(" ")[0] for entry in entries if not entry[5].endswith("/")}
    places = ("./usr/lib/edge-agent/bundle/", "./usr/share/doc/edge-agent/", "./usr/bin/edge-agent")
    assert not {name for name in files if not name.startswith(places)}
    assert {Path(name).name for name in files if "/doc/" in name} == {
        "changelog.Debian.gz",
        "changelog.gz",
        "copyright",
    }
    assert {entry[0] for entry in entries} == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"}
    control = device.folder / "control"
    subprocess.run(["dpkg-deb", "--control", package, control], check=True, timeout=60)
    assert {path.name for path in control.iterdir()} == {
        "control",
        "md5sums",
        "postinst",
        "postrm",
        "triggers",
    }, "no conffiles: dpkg asks nobody about the settings"
    summed = {f"./{line[34:]}" for line in (control / "md5sums").read_text().splitlines()}
    assert summed == files - {"./usr/bin/edge-agent"}


def test_the_same_bundle_gives_the_same_package_and_whoever_builds_it_is_its_maintainer(
    device: Debian,
) -> None:
    package = device.package("1.0.0")
    (archive,) = device.folder.glob("*.tar.gz")
    for number, variables in enumerate(({}, {"DEBFULLNAME": "A Fleet", "DEBEMAIL": "root@fleet.example"})):
        again = device.folder / f"again-{number}"
        again.mkdir(mode=0o700)
        same = build(archive, again, **variables)
        assert (same.read_bytes() == package.read_bytes()) == (not variables)
    assert shown(same, "Maintainer") == "A Fleet <root@fleet.example>"
    assert shown(package, "Maintainer") == "edge-agent maintainers <edge-agent@edge-agent.invalid>"
    assert package.stat().st_mode & 0o777 == 0o644


@pytest.mark.long
def test_lintian_finds_no_error(device: Debian) -> None:
    package = device.package("1.0.0")
    command = ["lintian", "--no-cfg", "--allow-root", "--fail-on", "error", str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, "W: edge-agent: " in result.stdout) == (0, True), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("pythons", "needs"),
    [
        (["3.11"], ["python3 (>= 3.11~)", "python3 (<< 3.12)"]),
        (["3.13", "3.12"], ["python3 (>= 3.12~)", "python3 (<< 3.14)"]),
        (
            ["3.9", "3.13", "3.11"],
            [
                "python3 (>= 3.9~)",
                "python3 (<< 3.10) | python3 (>= 3.11~)",
                "python3 (<< 3.12) | python3 (>= 3.13~)",
                "python3 (<< 3.14)",
            ],
        ),
    ],
)
def test_a_package_depends_on_the_pythons_that_it_has_wheels_for(
    pythons: list[str], needs: list[str]
) -> None:
    assert deb.python_range(pythons) == needs


@pytest.mark.parametrize(
    "ordered",
    [
        ["1.0.dev1", "1.0a1", "1.0rc1.dev2", "1.0rc1", "1.0", "1.0.post1", "1.0.1.dev1", "1.0.1"],
        ["1.0rc1", "1.0", "1.0+fleet.1", "1.0+fleet.2", "1.0.1"],
    ],
)
def test_dpkg_orders_versions_as_python_does(ordered: list[str]) -> None:
    for earlier, later in itertools.pairwise(map(deb.debian_version, ordered)):
        compared = subprocess.run(
            ["dpkg", "--compare-versions", earlier, "lt", later], check=False, timeout=60
        )
        assert compared.returncode == 0, f"{earlier} < {later}"


# --- What dpkg does with it ----------------------------------------------------------------------------


def test_from_the_first_package_to_the_next_and_away(device: Debian) -> None:
    assert device.dpkg("-i", device.package("1.0.0")).returncode == 0
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.0.0 installed")
    assert device.enabled() == "enabled"
    command = device.root / "usr/bin/edge-agent"
    assert command.readlink() == Path("/opt/edge-agent/current/bin/edge-agent")
    device.config.write_text('device_id = "mine"\n')
    state = device.root / "var/lib/edge-agent/journal.db"
    state.parent.mkdir()
    state.touch()

    assert device.dpkg("-i", device.package("1.1.0")).returncode == 0
    assert (device.version(), device.versions()) == ("edge-agent, version 1.1.0", ["1.0.0", "1.1.0"])
    assert (device.config.read_text(), state.exists()) == ('device_id = "mine"\n', True)

    assert device.run(device.base / "current", "use", "1.0.0", "--root", str(device.root)).returncode == 0
    device.python_was_replaced()
    assert device.state() == "1.1.0 triggers-pending"
    assert device.dpkg("--configure", "--pending").returncode == 0
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.1.0 installed"), (
        "the same Python: an operator's choice stays"
    )
    old = device.base / "1.0.0" / "lib"
    (old / f"python{PYTHON}").rename(old / "python3.10")
    device.python_was_replaced()
    assert device.dpkg("--configure", "--pending").returncode == 0
    assert device.version() == "edge-agent, version 1.1.0", (
        "another one: what runs is the package's, and works"
    )
    assert (old / "python3.10").is_dir(), "what runs does not change under the daemon"

    assert device.dpkg("-r", "edge-agent").returncode == 0
    assert (device.state(), device.left()) == (
        "1.1.0 config-files",
        ["etc/edge-agent/config.toml", "var/lib/edge-agent/journal.db"],
    )
    assert device.dpkg("-P", "edge-agent").returncode == 0
    assert (device.state(), device.left()) == ("", [])
    assert not list(device.root.rglob("edge-agent"))


def test_an_upgrade_that_is_cut_leaves_a_whole_version_and_is_finished_by_dpkg(device: Debian) -> None:
    device.dpkg("-i", device.package("1.0.0"))
    device.systemctl("disable")
    second = device.package("1.1.0")
    half = '/usr/bin/dpkg-deb "$@" | head -c 300000'
    device.cut("dpkg-deb", "*--fsys-tarfile*", "-i", second, before=half)
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.0.0 half-installed")
    assert not device.dpkg("--configure", "--pending").returncode, "nothing that it could finish"

    device.cut("install", "*share/edge-agent/*", "-i", second)
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.1.0 half-configured")
    device.cut("mv", "*.current*", "--configure", "--pending")
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.1.0 half-configured")
    device.cut("cmp", "*edge-agent-http.service*", "--configure", "--pending")
    assert (device.version(), device.state()) == ("edge-agent, version 1.1.0", "1.1.0 half-configured")
    assert device.enabled() == "disabled", "it does not start at the boot"
    assert device.dpkg("--configure", "--pending").returncode == 0
    assert (device.version(), device.state()) == ("edge-agent, version 1.1.0", "1.1.0 installed")
    assert device.enabled() == "disabled"
    assert device.versions() == ["1.0.0", "1.1.0"]


def test_a_version_that_does_not_work_is_not_configured_and_the_old_one_goes_on(device: Debian) -> None:
    first = device.package("1.0.0")
    device.dpkg("-i", first)
    refused = device.dpkg("-i", device.package("1.1.0", program="raise SystemExit('no such luck')"))
    assert (refused.returncode, "no such luck" in refused.stderr) == (1, True), refused.stderr
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.1.0 half-configured")
    assert device.dpkg("-i", first).returncode == 0, "the way back"
    assert (device.version(), device.state()) == ("edge-agent, version 1.0.0", "1.0.0 installed")
    assert device.versions() == ["1.0.0"]


def test_a_purge_takes_what_a_removal_left_that_failed_and_was_cut(device: Debian) -> None:
    device.dpkg("-i", device.package("1.0.0"))
    removal = "*-rf*opt/edge-agent"
    device.cut_at("rm", removal, "exit 1")
    assert device.dpkg("-r", "edge-agent").returncode == 1
    device.cut("rm", removal, "-r", "edge-agent")
    assert (device.state(), (device.base / "current").is_symlink()) == ("1.0.0 half-installed", True)
    assert device.dpkg("-P", "edge-agent").returncode == 0
    assert (device.state(), device.left()) == ("", [])


def test_a_purge_spares_what_was_installed_without_the_package_since_it_was_removed(device: Debian) -> None:
    device.dpkg("--unpack", device.package("1.0.0"))
    device.dpkg("-r", "edge-agent")
    assert device.state() == "1.0.0 config-files"
    bundle = device.bundle("1.1.0")
    device.install(bundle)
    before = device.left()
    purged = device.dpkg("-P", "edge-agent")
    said = f"attention: {device.base} was not installed by this package"
    assert (purged.returncode, said in purged.stdout) == (0, True), purged.stdout + purged.stderr
    assert (device.state(), device.version()) == ("", "edge-agent, version 1.1.0")
    assert (device.left(), "etc/edge-agent/config.toml" in before) == (before, True)
    assert device.run(bundle, "uninstall", "--purge", "--root", str(device.root)).returncode == 0
    assert device.left() == []


def test_a_python_that_it_has_no_wheels_for_is_dpkgs_to_refuse(device: Debian) -> None:
    device.python("3.10.1-1")
    refused = device.dpkg("-i", device.package("1.0.0"))
    assert (refused.returncode, "python3 (>= " in refused.stderr) == (1, True), refused.stderr
    assert (device.state(), device.base.exists()) == ("1.0.0 unpacked", False)
    assert device.dpkg("-P", "edge-agent").returncode == 0, "what was never configured can be removed"
    assert (device.state(), device.left()) == ("", [])
