"""A child process that answers JSON lines. It keeps heavy libraries out of the benchmark's own process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from edge_agent.errors import EdgeAgentError
from edge_agent.runner.lines import LineReader

MAX_LINE_BYTES = 1 << 20


class BenchError(EdgeAgentError):
    """A part of the benchmark does not run."""

    code = "bench_failed"


class LineChild:
    """`python -m MODULE ARGUMENT…` behind a runner's walls, killed at the end of the block.

    Args:
        arguments: of the module; it may read the model's folder, if that is the first.
        environment: the child's complete environment.
        walls: whether there are any.
    """

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str], walls: bool = True
    ) -> None:
        self._module = module
        self._lines = LineReader(
            limit_bytes=MAX_LINE_BYTES, broken=lambda reason: BenchError(f"{module} wrote {reason}")
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", *(["edge_agent.bench.confined"] if walls else []), module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Sends a line and returns the answer.

        Raises:
            BenchError: the child died or did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise BenchError(f"{self._module} has ended") from error
        return self.read(timeout_s=timeout_s)

    def read(self, *, timeout_s: float) -> dict[str, Any]:
        """Returns the next line that the child writes.

        Raises:
            BenchError: the child died, wrote an error or something malformed, or wrote nothing in time.
        """
        assert self._process.stdout is not None
        descriptor, limit_s = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while (answer := self._lines.document()) is None:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, limit_s - time.monotonic()))
            if not ready:
                raise BenchError(f"{self._module} did not answer within {timeout_s:.0f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise BenchError(f"{self._module} ended with {self._process.poll()} before it answered")
            self._lines.add(data)
        if "error" in answer:
            raise BenchError(f"{self._module}: {answer['error']}")
        return answer
