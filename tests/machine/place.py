"""Where a machine's disks are: the image that was made, what is kept with everything installed, and this run's copy.

The installed disk is kept beside the image, named by the bundles that it has: other bundles, another disk. Copies are
sparse, so that a disk of gigabytes costs what is on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from pathlib import Path

from tests.machine.console import MachineError
from tests.machine.device import payload
from tests.machine.machine import Hardware, Image, Machine
from tests.machine.models import SAMPLE

_CONFIGURE_TIMEOUT_S = 3600.0
_KEY = "release.pub"


class Place:
    """The files of one architecture and release. One thread.

    Args:
        image: a folder made by prepare.sh.
        bundles: a folder of two bundles of different versions, the key that signed them, and models in files.
        work: for this run's disk and logs.
    """

    def __init__(self, image: Path, bundles: Path, work: Path) -> None:
        self.image = Image(folder=image)
        self._bundles = bundles
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.bundle, self.newer = sorted(path.name for path in bundles.glob("edge-agent-*.tar.gz"))

    @property
    def disk(self) -> Path:
        """This run's."""
        return self.work / "disk.raw"

    @property
    def installed(self) -> Path:
        """A disk with the first bundle and a model, switched off in order."""
        digest = hashlib.sha256((self._bundles / "key").read_bytes()).hexdigest()[:12]
        return self.image.folder / f"installed-{digest}.raw"

    def version(self, bundle: str) -> str:
        return bundle.split("-")[2]

    def payload(self) -> Path:
        """What the machine finds on its second disk."""
        names = [self.bundle, self.newer, _KEY, *(path.name for path in self._bundles.glob("*.model"))]
        files = {name: self._bundles / name for name in names}
        return payload({**files, "sample_model": SAMPLE}, self.work / "payload.tar")

    def copy(self, source: Path) -> None:
        """Begins this run's disk with what another one has."""
        self._copy(source, self.disk)

    def keep_installed(self) -> None:
        for old in self.image.folder.glob("installed-*"):
            old.unlink()
        self._copy(self.disk, self.installed)

    def configure(self, hardware: Hardware) -> None:
        """Lets a disk that debootstrap has only unpacked configure its packages, in a machine of its own.

        Raises:
            MachineError: it did not come to its end.
        """
        mark = self.image.folder / ".configured"
        if mark.exists():
            return
        new = self.image.disk.with_suffix(".configured")  # what is left half-way is of no use
        self._copy(self.image.disk, new)
        drive = f"file={new},cache=unsafe"
        with contextlib.closing(Machine(hardware, self.image, drive, self.work)) as machine:
            machine.start(wait=False)
            machine.wait_off(_CONFIGURE_TIMEOUT_S)
            if "machine: packages configured" not in machine.kernel_log:
                raise MachineError(f"the packages were not configured:\n{machine.kernel_log[-4000:]}")
        new.rename(self.image.disk)
        mark.touch()

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        new = target.with_suffix(".new")
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, new], check=True)
        new.rename(target)
