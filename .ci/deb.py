"""Wraps one offline bundle as a Debian package: `edge-agent_VERSION_ARCH.deb` beside the tarball that it is made of.

    bundle.tar.gz → /usr/lib/edge-agent/bundle, unchanged → control, maintainer scripts → dpkg-deb

The package owns the bundle; `/opt/edge-agent` belongs to the bundle's own install.sh, which the maintainer scripts call
(docs/adr/0022-a-debian-package-around-the-bundle.md). It refuses nothing by itself: what fits a host stands in the
fields. The same bundle gives the same bytes: times are SOURCE_DATE_EPOCH, the owner is root. Called by
`./build.sh package`.
"""

from __future__ import annotations

import argparse
import email.utils
import gzip
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version
from wheels import Wheel

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "systemd" / "deb"
BUNDLE = "usr/lib/edge-agent/bundle"
DOC = "usr/share/doc/edge-agent"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
LIBRARIES = ("libc6 (>= 2.28)", "libgcc-s1", "libstdc++6 (>= 8)", "zlib1g")
"""What the wheels link with and do not bring: PEP 600's lists for manylinux_2_28, as far as they use it."""
DESCRIPTION = """\
answers prompts with language models from an MLflow registry
 A daemon for edge devices: it pulls ONNX models that are registered with MLflow
 into a cache, runs them on the CPU, and answers prompts over MQTT, a control
 socket, and OpenAI's HTTP interface.
 .
 The package contains all Python packages that it needs, and is installed
 without a network. Versions are environments in /opt/edge-agent, for which
 700 MB must be free; the previous one stays, to go back to.
"""
_LAST_LINES = 'main "$@"\nexit\n'


def main() -> None:
    options = _options()
    made_at_s = int(os.environ["SOURCE_DATE_EPOCH"])
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        stage = Path(folder)
        made = make(options.bundle, stage, made_at_s, maintainer=maintainer())
        target = options.out / made
        build(stage, target)
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


def make(bundle: Path, stage: Path, made_at_s: int, *, maintainer: str) -> str:
    """Lays out the package's files and its control files below `stage`, and gives the package's file name."""
    inside = stage / BUNDLE
    unpack(bundle, inside)
    facts = dict(line.split("=", 1) for line in (inside / "bundle").read_text("utf-8").splitlines())
    version, arch = debian_version(facts["version"]), ARCHITECTURES[facts["arch"]]
    pythons = [path.name[len("requirements-") : -len(".txt")] for path in inside.glob("requirements-*.txt")]

    documents = stage / DOC
    documents.mkdir(parents=True)
    wheels = [Wheel(path) for path in sorted(inside.glob("wheels/*.whl"))]
    (documents / "copyright").write_text(copyright_of(wheels, made_at_s), "utf-8")
    compress(changelog(version, made_at_s, maintainer).encode(), documents / "changelog.Debian.gz")
    compress((ROOT / "CHANGELOG.md").read_bytes(), documents / "changelog.gz")
    command = stage / "usr/bin/edge-agent"
    command.parent.mkdir()
    command.symlink_to("/opt/edge-agent/current/bin/edge-agent")

    files = [path for path in sorted(stage.rglob("*")) if path.is_file() and not path.is_symlink()]
    control = stage / "DEBIAN"
    control.mkdir()
    (control / "md5sums").write_text(
        "".join(
            f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(stage)}\n" for path in files
        )
    )
    kilobytes = sum(-(-path.stat().st_size // 1024) for path in files)
    (control / "control").write_text(fields(version, arch, pythons, maintainer, kilobytes), "utf-8")
    (control / "triggers").write_bytes((SCRIPTS / "triggers").read_bytes())
    (control / "postinst").write_bytes((SCRIPTS / "postinst").read_bytes())
    (control / "postrm").write_text(postrm((inside / "install.sh").read_text("utf-8")), "utf-8")
    settle(stage, made_at_s)
    return f"edge-agent_{version}_{arch}.deb"


def unpack(bundle: Path, target: Path) -> None:
    target.mkdir(parents=True)
    run("tar", "--extract", "--strip-components=1", "--file", bundle, "--directory", target)


def debian_version(version: str) -> str:
    """The same order in dpkg's eyes: what comes before a release has a tilde. Source: PEP 440, deb-version(7)."""
    parsed = Version(version)
    text = parsed.base_version
    if parsed.pre:
        text += f"~{parsed.pre[0]}{parsed.pre[1]}"
    if parsed.post is not None:
        text += f"+post{parsed.post}"
    if parsed.dev is not None:
        text += f"~~dev{parsed.dev}"  # two: before ~a1, too
    return f"{text}+{parsed.local}" if parsed.local else text


def fields(version: str, arch: str, pythons: Iterable[str], maintainer: str, kilobytes: int) -> str:
    needs = ", ".join((*LIBRARIES, *python_range(pythons), "systemd"))
    return (
        f"Package: edge-agent\nVersion: {version}\nArchitecture: {arch}\nMaintainer: {maintainer}\n"
        f"Installed-Size: {kilobytes}\nDepends: {needs}\nSection: misc\nPriority: optional\n"
        f"Description: {DESCRIPTION}"
    )


def python_range(pythons: Iterable[str]) -> list[str]:
    """Dependencies on the Pythons that there are wheels for, and on no other: dpkg knows no "or" of two ranges, so each
    gap between two of them is one dependency.

    >>> python_range(["3.11", "3.13"])
    ['python3 (>= 3.11~)', 'python3 (<< 3.12) | python3 (>= 3.13~)', 'python3 (<< 3.14)']
    """
    minors = sorted(int(python.removeprefix("3.")) for python in pythons)
    gaps = [
        f"python3 (<< 3.{below + 1}) | python3 (>= 3.{above}~)"
        for below, above in itertools.pairwise(minors)
        if above > below + 1
    ]
    return [f"python3 (>= 3.{minors[0]}~)", *gaps, f"python3 (<< 3.{minors[-1] + 1})"]


def maintainer() -> str:
    """Who is named as the package's maintainer: whoever builds it, by Debian's own variables, else the project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    name = os.environ.get("DEBFULLNAME") or project["maintainers"][0]["name"]
    address = os.environ.get("DEBEMAIL") or "edge-agent@edge-agent.invalid"
    text = f"{name} <{address}>"
    if not re.fullmatch(r"[^<>\n,]+ <[^<>\s,]+@[^<>\s,]+>", text):
        raise SystemExit(f"DEBFULLNAME and DEBEMAIL make no maintainer: {text!r}")
    return text


def changelog(version: str, made_at_s: int, maintainer: str) -> str:
    date = email.utils.formatdate(made_at_s)
    return (
        f"edge-agent ({version}) stable; urgency=medium\n\n"
        f"  * What is new stands in /{DOC}/changelog.gz.\n\n -- {maintainer}  {date}\n"
    )


def copyright_of(wheels: Iterable[Wheel], made_at_s: int) -> str:
    """What each file is licensed under; the wheels bring their texts."""
    lines = [
        f" {wheel.name} {wheel.version}: {' '.join(wheel.license.split())[:200] or 'see the wheel'}\n"
        for wheel in wheels
        if wheel.name != "edge-agent"
    ]
    return (
        f"edge-agent\n\nCopyright (c) {time.gmtime(made_at_s).tm_year} the edge-agent maintainers\n"
        "License: Apache-2.0\n"
        "On Debian systems its text is in /usr/share/common-licenses/Apache-2.0.\n\n"
        f"/{BUNDLE}/wheels contains these packages of others, as they were published. Copyright and\n"
        "license of each stand in its wheel, below *.dist-info:\n\n" + "".join(lines)
    )


def postrm(install_sh: str) -> str:
    """install.sh, with dpkg's way of calling it at its end."""
    if not install_sh.endswith(_LAST_LINES):
        raise SystemExit("install.sh does not end as expected")
    return install_sh.removesuffix(_LAST_LINES) + (SCRIPTS / "postrm").read_text("utf-8").lstrip("\n")


def compress(content: bytes, target: Path) -> None:
    target.write_bytes(gzip.compress(content, 9, mtime=0))


def settle(stage: Path, made_at_s: int) -> None:
    """Modes and times, whatever the builder's umask and clock are."""
    programs = {"install.sh", "postinst", "postrm"}
    for path in [*stage.rglob("*"), stage]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.name in programs else 0o644)
        os.utime(path, (made_at_s, made_at_s), follow_symlinks=False)


def build(stage: Path, target: Path) -> None:
    """Writes the package whole or not at all."""
    temporary = target.with_suffix(".tmp")
    # Wheels are compressed already: more than the quickest level costs time and gains nothing.
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", stage, temporary)
    temporary.replace(target)


def run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if result.returncode:
        raise SystemExit(f"{command[0]} failed:\n{result.stderr[-4000:]}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True, type=Path, help="edge-agent-VERSION-linux-ARCH.tar.gz")
    parser.add_argument("--out", required=True, type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
