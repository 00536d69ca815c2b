"""The process that asks the mirrors: `python -m edge_agent.doctor.mirror_process`.

It reads a question from stdin, `{"mirrors", "ca_file", "sha256", "bytes"}`, and writes a JSON list to stdout: for each
mirror `has`, `lacks`, or what is wrong with it. It has walls around it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edge_agent.errors import EdgeAgentError
from edge_agent.host.clock import CLOCK
from edge_agent.host.confinement import Confinement, confine
from edge_agent.host.seccomp import Calls, Network
from edge_agent.sync.files import is_of
from edge_agent.sync.mirrors import NotThere
from edge_agent.sync.mirrors.places import folder_of, mirror_at


def main() -> None:
    question = json.load(sys.stdin)
    files = (*map(folder_of, question["mirrors"]), Path(question["ca_file"]) if question["ca_file"] else None)
    confine(
        Confinement(
            read=tuple(file for file in files if file), calls=Calls(network=Network.INTERNET_AND_UNIX)
        )
    )
    json.dump([_answer(url, question) for url in question["mirrors"]], sys.stdout)


def _answer(url: str, question: dict[str, Any]) -> str:
    sha256, size_bytes = question["sha256"], question["bytes"]
    try:
        mirror = mirror_at(url, ca_file=question["ca_file"], clock=CLOCK)
        with mirror.open(sha256, size_bytes=size_bytes, offset=0) as stream:
            has_it = is_of(stream, size_bytes=size_bytes, sha256=sha256)
    except NotThere as absent:
        folder = folder_of(url)
        return "lacks" if absent.yet or (folder and (folder / "sha256").is_dir()) else absent.message
    except EdgeAgentError as error:
        return error.message
    return "has" if has_it else "it gives other bytes than those of the digest"


if __name__ == "__main__":
    main()
