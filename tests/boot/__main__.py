"""The device's life, step by step: `python -m tests.boot --help`.

Each step prints what it saw, and fails when what should happen did not. Called by `./build.sh boot-test`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tests.boot.container import BootTestError, Container
from tests.boot.device import Device, Files

STATE_BYTES = 64 << 20


def main() -> int:
    options = _options()
    files = Files(
        bundle=options.bundle,
        newer=options.newer,
        broken=options.broken,
        release_key=options.release_key,
        model=options.model,
        guest=options.guest,
        real_model=options.real_model,
    )
    started_s = time.monotonic()
    container = Container(options.root, options.work / "container", state_bytes=STATE_BYTES)
    step = "start"
    try:
        for step, do in Device(container, files).steps():
            began_s = time.monotonic()
            line = do()
            print(f"ok    {step} ({time.monotonic() - began_s:.0f} s): {line}", flush=True)
    except (BootTestError, subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
        print(f"FAIL  {step}: {error or repr(error)}\n--- journal\n{container.journal(60)}", flush=True)
        print(f"--- console\n{container.console_tail()}", flush=True)
        return 1
    finally:
        container.close()
    print(f"all steps passed in {time.monotonic() - started_s:.0f} s")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, meaning in (
        ("root", "a Debian root with systemd, Python and mosquitto"),
        ("work", "a folder for the container"),
        ("bundle", "the bundle to install"),
        ("newer", "a bundle of a higher version"),
        ("broken", "a bundle whose daemon does not start"),
        ("release-key", "the public key that signed the bundles (PEM)"),
        ("model", "a model version, made by `models export`"),
        ("guest", "a version of a package that attacks, made by tests.boot.guest"),
        ("real-model", "a folder that the model builder made of a real language model"),
    ):
        parser.add_argument(f"--{name}", required=True, type=Path, help=meaning)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
