"""Commands that only look, as root runs them and as another user of this host, a member of a group and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.host import OTHER_USER
from tests.support.processes import Daemon, clean_environment

GROUP = 54_321
"""No group of this host: whoever is put into it is in it."""
_PROGRAM = """
import contextlib, io, json, os, sys
from edge_agent.cli import main

def seen(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, prog_name="edge-agent")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    return code, out.getvalue(), err.getvalue()

commands, user, group = json.load(sys.stdin)
by_root = [seen(command) for command in commands]
if os.geteuid() == 0:
    os.setgroups([group])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
json.dump([by_root, [seen(command) for command in commands]], sys.stdout)
"""


class Seen(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def look(*commands: Sequence[str]) -> tuple[list[Seen], list[Seen]]:
    """Runs `edge-agent ARGUMENTS` for each, all in one process: first as root, and then as another user who is in
    `GROUP`. Where this is not root, all of it as this user.

    The other user may not be able to read where this Python is installed: what a command imports was imported by root
    then, and the kernel asks again only for the files and sockets that it opens.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps([commands, OTHER_USER, GROUP]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean_environment({"HOME": "/", "PYTHONPATH": os.pathsep.join(sys.path)}),
    )
    assert done.returncode == 0, done.stderr
    by_root, by_member = json.loads(done.stdout)
    return [Seen(*each) for each in by_root], [Seen(*each) for each in by_member]


def without_socket(device: Daemon) -> Path:
    """Settings of the same device that name a control socket where nobody listens: as if its daemon were down."""
    path = device.folder / "down.toml"
    here = device.config_file.read_text()
    path.write_text(here.replace(str(device.control_socket), str(device.folder / "none.sock")))
    return path
