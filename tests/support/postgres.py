"""A PostgreSQL of one test on a free loopback port, in a folder of its own; it refuses to be root, and is somebody else
then."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import accepts, clean_environment, free_port, serving

USER = "nobody"


@contextlib.contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """Gives the URI of an empty database, as `mlflow server --backend-store-uri` takes it."""
    data, port = folder / "data", free_port()
    data.mkdir()
    somebody = []
    if os.geteuid() == 0:
        shutil.chown(data, USER, "nogroup")
        folder.chmod(0o711)
        somebody = ["setpriv", "--reuid", USER, "--regid", "nogroup", "--clear-groups"]
    made = subprocess.run(
        [*somebody, "initdb", "-D", str(data), "-U", "mlflow", "-A", "trust", "--no-sync"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    command = [
        *somebody,
        "postgres",
        "-D",
        str(data),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    with serving(command, folder / "postgres.log", ready=lambda: accepts(port), what="PostgreSQL"):
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
