"""A folder that stands for a device's root, and small bundles for it: real Pythons, real pip, real environments.

The bundles' one package is named as the agent, and answers `--version`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pip

from tests.support.processes import clean_environment
from tests.support.wheels import make_wheel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

import bundle  # noqa: E402
from wheels import Wheel  # noqa: E402

# And what .ci/programs.sh has fetched, systemctl for one, where the system has none.
_SYSTEM = f"/usr/bin:/bin:/usr/sbin:/sbin:{ROOT / '.tools' / 'bin'}"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Host:
    """A folder that stands for a device's root, and bundles for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.base = self.root / "opt" / "edge-agent"
        self.config = self.root / "etc" / "edge-agent" / "config.toml"
        self.root.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin" / f"python{PYTHON}")
        self.path = f"{programs}:{_SYSTEM}"

    def bundle(
        self, version: str, *, program: str = "print('edge-agent, version {version}')", **changes: str
    ) -> Path:
        """A bundle whose `edge-agent` runs `program`.

        Args:
            changes: `python`, `arch`; `stops`: what its check of the walls says.
        """
        stage = self.folder / f"bundle-{version}-{len(list(self.folder.iterdir()))}"
        (stage / "wheels").mkdir(parents=True)
        code = f"def main():\n    {program.format(version=version)}\n"
        files = {
            "edge_agent.py": code,
            "onnxruntime_genai.py": "",
            "mlflow/__init__.py": "",
            "mlflow/pyfunc.py": "",
            "mlflow/tests/test_pyfunc.py": "",
        }
        if stops := changes.get("stops"):
            files["edge_agent/__init__.py"] = files.pop("edge_agent.py")
            files["edge_agent/doctor/__init__.py"] = ""
            files["edge_agent/doctor/walls.py"] = (
                f"import os, sys\nprint({stops!r}, sys.argv[1], os.environ['STATE_DIRECTORY'], os.getcwd())\n"
            )
        wheel = Wheel(
            make_wheel(
                stage / "wheels", "edge_agent", version, files, scripts={"edge-agent": "edge_agent:main"}
            )
        )
        shutil.copy(pip_wheel(self.folder), stage / "wheels")
        python = changes.get("python", PYTHON)
        (stage / f"requirements-{python}.txt").write_text(
            f"edge-agent=={version} --hash=sha256:{wheel.sha256}\n"
        )
        bundle.write_files(stage, version, changes.get("arch", platform.machine()))
        return stage

    def run(
        self,
        folder: Path,
        *arguments: str,
        user: int | None = None,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """
        Args:
            cwd: start the script there, by a relative path.
            variables: of its environment.
        """
        script = folder / "install.sh"
        return subprocess.run(
            [os.path.relpath(script, cwd) if cwd else str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=clean_environment({"PATH": self.path, **(variables or {})}),
            user=user,
            cwd=cwd,
        )

    def cut_at(self, program: str, pattern: str, before: str = ":") -> Path:
        """From now on what runs ends as by a power cut where it starts `program` with arguments like `pattern`.

        Args:
            before: shell for what of the step is done all the same.

        Returns:
            the file that tells that it happened.
        """
        fired = self.folder / f"cut-{program}"
        script = self.folder / "bin" / program
        real = shutil.which(program, path=_SYSTEM)
        script.write_text(
            f'#!/bin/sh\ncase "$*" in {pattern}) {before}; : >"{fired}"; kill -KILL 0 ;; esac\nexec {real} "$@"\n'
        )
        script.chmod(0o755)
        return fired

    def install(self, folder: Path) -> str:
        """Installs, and gives the current version's own word."""
        result = self.run(folder, "--root", str(self.root))
        assert result.returncode == 0, result.stdout + result.stderr
        return self.version()

    def refuse(self, folder: Path) -> str:
        """Tries to install, and gives what it said when it did not."""
        result = self.run(folder, "--root", str(self.root))
        assert result.returncode == 1, result.stdout + result.stderr
        return result.stderr

    def version(self) -> str:
        command = [str(self.base / "current" / "bin" / "edge-agent"), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()

    def units(self) -> set[str]:
        return {path.name for path in (self.root / "etc/systemd/system").iterdir() if path.is_file()}

    def on_trial(self) -> str:
        """The version that a switch which was cut goes back to; empty if none was."""
        mark = self.base / ".trial"
        return mark.read_text().splitlines()[0] if mark.exists() else ""

    def enabled(self, unit: str = "edge-agent.service") -> str:
        return self.systemctl("is-enabled", unit)

    def systemctl(self, command: str, unit: str = "edge-agent.service") -> str:
        """What the real one says of a unit, or does with its links, below the root."""
        words = ["systemctl", f"--root={self.root}", command, unit]
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=clean_environment({"PATH": self.path}),
        ).stdout.strip()

    def versions(self) -> list[str]:
        return sorted(path.name for path in self.base.iterdir() if path.is_dir() and not path.is_symlink())


def pip_wheel(folder: Path) -> Path:
    """pip as a wheel, from the one that runs here."""
    wheel = folder / f"pip-{pip.__version__}-py3-none-any.whl"
    if not wheel.exists():
        source = Path(pip.__file__).parent
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in source.rglob("*.*"):
                if "__pycache__" not in path.parts:
                    archive.write(path, f"pip/{path.relative_to(source)}")
            metadata = f"Metadata-Version: 2.1\nName: pip\nVersion: {pip.__version__}\nLicense: MIT\n"
            archive.writestr(f"pip-{pip.__version__}.dist-info/METADATA", metadata)
    return wheel
