"""Makes one offline bundle: everything that a device of one architecture needs, in one tar.gz.

    lock → wheels for each Python (pip download, hashes checked) → all there? → requirements, SBOM, sums → tar.gz

The same sources and wheels give the same bytes: files are sorted, times are SOURCE_DATE_EPOCH. Signatures differ.
Called by `./build.sh package`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import sbom
from packaging.requirements import Requirement
from wheels import Target, Wheel, dependencies, locked, pins

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "locks" / "device.txt"
EXTRAS = "edge-agent[http,local-registry,s3,signing]"
FILES = {
    "install.sh": ROOT / "systemd" / "install.sh",
    "edge-agent.service": ROOT / "systemd" / "edge-agent.service",
    "edge-agent-http.service": ROOT / "systemd" / "edge-agent-http.service",
    "edge-agent-http.socket": ROOT / "systemd" / "edge-agent-http.socket",
    "edge-agent.sysusers.conf": ROOT / "systemd" / "edge-agent.sysusers.conf",
    "config.toml": ROOT / "systemd" / "config.toml",
    "LICENSE": ROOT / "LICENSE",
    **{f"docs/{page.name}": page for page in sorted((ROOT / "docs").glob("*.md"))},
}


def main() -> None:
    options = _options()
    made_at_s = int(os.environ["SOURCE_DATE_EPOCH"])
    own = Wheel(options.wheel)
    name = f"edge-agent-{own.version}-linux-{options.arch}"
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        stage = Path(folder) / name
        (stage / "wheels").mkdir(parents=True)
        needs: dict[str, set[str]] = {}
        for python in options.python:
            target = Target(arch=options.arch, python=python)
            house = options.cache / f"{options.arch}-{python}"
            fetch(target, house)
            for package, names in add_wheels(stage, own, house, target).items():
                needs.setdefault(package, set()).update(names)
        others = [
            Wheel(path) for path in sorted((stage / "wheels").glob("*.whl")) if path.name != own.path.name
        ]
        (stage / "sbom.cdx.json").write_text(
            sbom.make(own, others, needs, arch=options.arch, made_at_s=made_at_s), encoding="utf-8"
        )
        write_files(stage, own.version, options.arch)
        if options.sign_key:
            sign(stage / "SHA256SUMS", options.sign_key)
        target_file = options.out / f"{name}.tar.gz"
        pack(stage, target_file, made_at_s)
    print(f"{target_file}: {target_file.stat().st_size / 1e6:.0f} MB, {len(others) + 1} wheels")


def fetch(target: Target, house: Path) -> None:
    """Brings the target's wheels, no others, into a folder that is kept for the next time."""
    house.mkdir(parents=True, exist_ok=True)
    wanted = list(locked(LOCK, target))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pins(wanted))
        file.flush()
        pip(
            *("download", "--quiet", "--no-deps", "--require-hashes", "--find-links", str(house)),
            *("--dest", str(house), *target.pip_options, "--requirement", file.name),
        )
    versions = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement, _ in wanted}
    for path in house.glob("*.whl"):
        wheel = Wheel(path)
        if versions.get(wheel.name) != wheel.version:
            path.unlink()  # of an older lock


def add_wheels(stage: Path, own: Wheel, house: Path, target: Target) -> dict[str, set[str]]:
    """Puts the wheels in, and the list of them that pip installs from. Gives what needs what.

    Raises:
        LookupError: the wheels are not all that is needed.
    """
    wheels = [own, *(Wheel(path) for path in sorted(house.glob("*.whl")))]
    needs = dependencies(Requirement(EXTRAS), wheels, target)
    for wheel in wheels:
        shutil.copyfile(wheel.path, stage / "wheels" / wheel.path.name)
    requirements = stage / f"requirements-{target.python}.txt"
    # pip itself runs from its wheel; the device's environment has no use for it.
    installed = [wheel for wheel in wheels if wheel.name != "pip"]
    requirements.write_text(
        "".join(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in installed)
    )
    print(f"{target.arch} Python {target.python}: {len(installed)} wheels, every dependency among them")
    if target.python == f"{sys.version_info.major}.{sys.version_info.minor}":
        print(f"  {resolve(stage, requirements, target)}")
    return needs


def resolve(stage: Path, requirements: Path, target: Target) -> str:
    """pip's own word that it would install these for the target from the bundle alone."""
    with tempfile.TemporaryDirectory() as nowhere:
        said = pip(
            *(
                "install",
                "--dry-run",
                "--no-index",
                "--ignore-installed",
                "--require-hashes",
                "--no-cache-dir",
            ),
            *("--find-links", str(stage / "wheels"), "--target", nowhere),
            *(*target.pip_options, "--requirement", str(requirements)),
        )
    (line,) = re.findall(r"^Would install .*$", said, re.MULTILINE)
    return f"pip install --no-index --dry-run: {line[:100]}… ({len(line.split()) - 2} packages)"


def pip(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False, timeout=1800
    )
    if result.returncode:
        sys.exit(f"pip {arguments[0]} failed:\n{result.stderr[-4000:]}")
    return result.stdout


def write_files(stage: Path, version: str, arch: str) -> None:
    for name, source in FILES.items():
        target = stage / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if name == "install.sh" else 0o644)
    (stage / "bundle").write_text(f"version={version}\narch={arch}\n")
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(stage).as_posix()}\n"
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    ]
    (stage / "SHA256SUMS").write_text("".join(sums))


def sign(sums: Path, key: Path) -> None:
    """Writes `SHA256SUMS.sig`: ECDSA over SHA-256, which plain openssl on a device can check.

    Args:
        key: unencrypted private key (PEM) on a NIST curve, as one that signs packages.
    """
    command = ["openssl", "dgst", "-sha256", "-sign", str(key), "-out", f"{sums}.sig", str(sums)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        sys.exit(f"{key} cannot sign: {result.stderr.strip()}")


def pack(stage: Path, target: Path, made_at_s: int) -> None:
    """Writes the archive whole or not at all."""
    temporary = target.with_suffix(".tmp")
    # Wheels are compressed already: more than the quickest level costs time and gains nothing.
    with (
        temporary.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=made_at_s) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in [stage, *sorted(stage.rglob("*"))]:
            info = archive.gettarinfo(path, path.relative_to(stage.parent).as_posix())
            info.uid = info.gid = 0
            info.uname = info.gname = "root"
            info.mtime = made_at_s
            info.mode = 0o755 if path.is_dir() or path.name == "install.sh" else 0o644
            if path.is_dir():
                archive.addfile(info)
            else:
                with path.open("rb") as content:
                    archive.addfile(info, content)
    temporary.replace(target)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", required=True, choices=["x86_64", "aarch64"])
    parser.add_argument("--python", required=True, action="append", help="3.11, …; may be repeated")
    parser.add_argument("--wheel", required=True, type=Path, help="the agent's own wheel")
    parser.add_argument("--cache", required=True, type=Path, help="where fetched wheels are kept")
    parser.add_argument("--sign-key", type=Path, help="private key (PEM) that signs SHA256SUMS")
    parser.add_argument("--out", required=True, type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
