"""What a command has started ends with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import alive, clean_environment, wait_until

PROGRAM = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
from edge_agent.cli.command import end_in_order
from edge_agent.private_broker import child_process
end_in_order()
with child_process(["sleep", "600"], Path(sys.argv[1])) as child:
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_takes_its_children_along(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
    assert process.stdout is not None
    with process.stdout:
        child = int(process.stdout.readline())
        assert alive(child)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    wait_until(lambda: not alive(child), 10, "the child's end")


def test_a_command_under_nohup_outlives_its_terminal() -> None:
    program = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from edge_agent.cli.command import end_in_order
end_in_order()
signal.raise_signal(signal.SIGHUP)
"""
    process = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment(), timeout=60, check=False
    )
    assert process.returncode == 0
