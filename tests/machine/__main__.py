"""A Debian that boots in an emulated machine: `python -m tests.machine --help`. Called by `./build.sh machine-test`.

Without more, a device's life: the bundle installed without a network, a model imported, prompts from outside, what
onnxruntime takes of the CPU, upgrade, rollback, reboot, uninstall. With `--cuts`, its power is cut off again and again
at moments drawn from the seed; with `--container`, that of a container on a real ext4, at the speed of this host; with
`--worn`, its disk, its memory and its clock are bad. Each step prints what it saw, and fails when what should happen
did not. What was installed is kept for the next run, as long as the bundles are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.machine.console import MachineError
from tests.machine.container import ContainerRig
from tests.machine.device import QUESTIONS
from tests.machine.emulated import EmulatedRig
from tests.machine.life import Life
from tests.machine.machine import Hardware
from tests.machine.models import reference
from tests.machine.place import Place
from tests.machine.power import Options, PowerCuts
from tests.machine.rig import Rig
from tests.machine.worn import Worn

Step = tuple[str, Callable[[], str]]
_ARCH, _DEBIAN = "x86_64", "12"


def main() -> int:
    options = _options()
    # A machine is in a session of its own, and would go on without this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    hardware = Hardware(arch=options.arch, mount=options.mount)
    started_s = time.monotonic()
    where = "in a container" if options.container else f"on {options.arch}, emulated"
    print(f"Debian {options.debian} {where}", flush=True)
    place = Place(options.image, options.bundles, options.work)
    failed = 0 if options.container or place.installed.exists() else _install(place, hardware)
    if not failed and options.cuts:
        failed = _cut(options, hardware)
    elif not failed and options.worn:
        with contextlib.closing(Worn(place, hardware)) as worn:
            failed = take(worn.steps(), worn.trouble)
    elif not failed:
        with contextlib.closing(Life(place, hardware)) as life:
            failed = take(life.steps(), life.trouble)
    if not failed:
        print(f"passed in {time.monotonic() - started_s:.0f} s")
    return failed


def _install(place: Place, hardware: Hardware) -> int:
    with contextlib.closing(Life(place, hardware)) as life:
        return take(life.installation(), life.trouble)


def _cut(options: argparse.Namespace, hardware: Hardware) -> int:
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    kind = "-".join(filter(None, (str(seed), options.mount.replace("=", "-"), "lying" * options.lying_disk)))
    place = Place(options.image, options.bundles, options.work / f"cuts-{kind}")
    print(f"{options.cuts} cuts with --seed {seed}: the same seed goes on where this run ends", flush=True)
    wanted = Options(seed=seed, count=options.cuts, lying=options.lying_disk)
    right = [str(reference(QUESTIONS[:1], version)[0]["text"]) for version in (1, 2)]
    report = functools.partial(print, flush=True)
    try:
        with contextlib.closing(_rig(options, place, hardware)) as rig:
            rig.install()
            with contextlib.closing(PowerCuts(place, rig, wanted, right=right, report=report)) as power:
                return power.run()
    except (MachineError, AssertionError, subprocess.SubprocessError, OSError, ValueError) as error:
        print(f"FAIL  {error or repr(error)}", flush=True)
        return 1


def _rig(options: argparse.Namespace, place: Place, hardware: Hardware) -> Rig:
    if options.container:
        return ContainerRig(place, options.bundles, options.mount)
    return EmulatedRig(place, hardware)


def take(steps: Iterable[Step], trouble: Callable[[], str]) -> int:
    """Takes the steps until one fails; the exit code."""
    step = "start"
    try:
        for step, do in steps:
            began_s = time.monotonic()
            line = do()
            print(f"ok    {step} ({time.monotonic() - began_s:.0f} s): {line}", flush=True)
    except (MachineError, AssertionError, subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
        print(f"FAIL  {step}: {error or repr(error)}\n{trouble()}", flush=True)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default=_ARCH, choices=["x86_64", "aarch64"])
    parser.add_argument("--debian", default=_DEBIAN, choices=["12", "13"])
    parser.add_argument("--cuts", type=int, default=0, metavar="N", help="cut its power off so often")
    parser.add_argument("--seed", type=int, help="of the cuts; one is drawn and printed without it")
    parser.add_argument(
        "--mount", default="", help="more options for its file system, such as data=writeback"
    )
    parser.add_argument(
        "--lying-disk", action="store_true", help="a disk that answers flushes and does nothing"
    )
    parser.add_argument(
        "--container", action="store_true", help="cut the power of a container, not of a machine"
    )
    parser.add_argument("--worn", action="store_true", help="the steps on a worn device")
    parser.add_argument("--image", required=True, type=Path, help="a folder made by prepare.sh")
    parser.add_argument("--bundles", required=True, type=Path, help="bundles, their key, a model; the same")
    parser.add_argument("--work", required=True, type=Path, help="a folder for disks and logs")
    options = parser.parse_args()
    if options.container and not options.cuts:
        parser.error("--container is for --cuts")
    if options.container and (options.arch, options.debian) != (_ARCH, _DEBIAN):
        parser.error(
            f"--container is Debian {_DEBIAN} on this host's own processor: leave --arch and --debian out"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
