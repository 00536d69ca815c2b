"""Wheels for a device: which ones a lock means there, what they say of themselves, and whether they are all.

pip judges environment markers by the Python that runs it, not by the one it fetches for; here they are judged
for the device. Source: PEP 508 (markers), PEP 600 (manylinux), the core metadata specification.
"""

from __future__ import annotations

import email.parser
import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

GLIBC = (2, 28)
"""The oldest that onnxruntime-genai is built for: Debian 10, RHEL 8, Ubuntu 20.04."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One processor architecture and one Python."""

    arch: str
    python: str

    @property
    def environment(self) -> dict[str, str]:
        """For markers."""
        return {
            **{key: str(value) for key, value in default_environment().items()},
            "python_version": self.python,
            "python_full_version": f"{self.python}.99",
            "platform_machine": self.arch,
            "platform_system": "Linux",
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
            "os_name": "posix",
            "sys_platform": "linux",
        }

    @property
    def pip_options(self) -> list[str]:
        """What pip needs to choose this target's wheels."""
        newest = [f"manylinux_2_{minor}_{self.arch}" for minor in range(GLIBC[1], 4, -1)]
        old = [f"manylinux{name}_{self.arch}" for name in ("2014", "2010", "1")]
        platforms = [option for name in (*newest, *old) for option in ("--platform", name)]
        return ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}", *platforms]


@dataclass(frozen=True)
class Wheel:
    """One wheel file and its metadata."""

    path: Path

    @cached_property
    def name(self) -> str:
        return str(parse_wheel_filename(self.path.name)[0])

    @cached_property
    def version(self) -> str:
        return str(parse_wheel_filename(self.path.name)[1])

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _metadata(self) -> email.message.Message:
        with zipfile.ZipFile(self.path) as archive:
            (name,) = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            return email.parser.Parser().parsestr(archive.read(name).decode("utf-8", "replace"))

    @property
    def license(self) -> str:
        """An SPDX expression where there is one, else what the package has in its place."""
        return str(self._metadata.get("License-Expression") or self._metadata.get("License") or "").strip()

    @property
    def requires(self) -> list[Requirement]:
        return [Requirement(text) for text in self._metadata.get_all("Requires-Dist", [])]


def locked(lock: Path, target: Target) -> Iterator[tuple[Requirement, list[str]]]:
    """The pins of a lock that hold for a target, with their hashes."""
    for line in lock.read_text("utf-8").replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        text, *hashes = line.split("--hash=")
        requirement = Requirement(text.strip())
        if requirement.marker is None or requirement.marker.evaluate(target.environment):
            yield requirement, [digest.strip() for digest in hashes]


def pins(requirements: Iterable[tuple[Requirement, list[str]]]) -> str:
    """A requirements file that pip takes with --require-hashes."""
    return "".join(
        f"{requirement.name}{requirement.specifier} {' '.join(f'--hash={digest}' for digest in hashes)}\n"
        for requirement, hashes in requirements
    )


def dependencies(root: Requirement, wheels: Sequence[Wheel], target: Target) -> dict[str, set[str]]:
    """What each package needs on the target, from the root on.

    Raises:
        LookupError: something that is needed is not among the wheels, or only in another version.
    """
    found: Mapping[str, Wheel] = {canonicalize_name(wheel.name): wheel for wheel in wheels}
    needs: dict[str, set[str]] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(root, "")]
    while waiting:
        requirement, needed_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        wheel = found.get(name)
        if wheel is None or not requirement.specifier.contains(wheel.version, prereleases=True):
            have = wheel.version if wheel else "nothing"
            raise LookupError(f"{needed_by or 'the bundle'} needs {requirement}, there is {have}")
        needs.setdefault(name, set())
        if needed_by:
            needs[needed_by].add(name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            environment = {**target.environment, "extra": extra}
            waiting += [
                (each, name)
                for each in wheel.requires
                if each.marker is None or each.marker.evaluate(environment)
            ]
    return needs
