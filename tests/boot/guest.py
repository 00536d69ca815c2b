"""A version file of the package that attacks the device it runs on: `python -m tests.boot.guest FILE`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.support.attacking_model import MODEL, make_package
from tests.support.version_files import export_package


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        exported = export_package(Path(folder), make_package(Path(folder, "package")), MODEL, version=1)
        shutil.copyfile(exported.file, sys.argv[1])


if __name__ == "__main__":
    main()
