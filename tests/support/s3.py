"""An S3 on a free loopback port: moto, in a process of its own. It keeps everything in memory and refuses nobody."""

from __future__ import annotations

import contextlib
import http.client
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import Child, accepts, free_port, wait_until

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_START_TIMEOUT_S = 60


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[int]:
    """Gives its port; there is one bucket, `BUCKET`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    child = Child(command, folder / "s3.log", CREDENTIALS)
    try:
        wait_until(lambda: not child.running or accepts(port), _START_TIMEOUT_S, "moto")
        assert child.running, (folder / "s3.log").read_text()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
        yield port
    finally:
        child.stop()
