"""An S3 on a free loopback port: moto, in a process of its own. It keeps everything in memory and refuses nobody."""

from __future__ import annotations

import contextlib
import http.client
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import accepts, free_port, serving

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[int]:
    """Gives its port; there is one bucket, `BUCKET`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, folder / "s3.log", ready=lambda: accepts(port), what="moto", env=CREDENTIALS):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
        yield port
