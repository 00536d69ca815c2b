"""The process that asks the registry: `python -m edge_agent.doctor.registry_process`.

It reads a question from stdin, `{"uri", "timeout_s", "tls", "refs"}`, and writes a JSON list to stdout with one answer
for each reference: `{"version", "file"}`, where a byte of that file came; or `{"code", "message", "remedy"}`, with the
version where it is known. It keeps nothing of what it reads, and has walls around it; its argument is a folder that it
may write.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edge_agent.doctor.registry import as_answer
from edge_agent.errors import EdgeAgentError, TransportError, VerificationError
from edge_agent.host.confinement import confine
from edge_agent.package.reference import ModelRef, ModelVersion
from edge_agent.sync.registry import Registry
from edge_agent.sync.tls import TlsFiles
from edge_agent.sync.walls import around_question


def main() -> None:
    question = json.load(sys.stdin)
    refs, tls, scratch = question["refs"], TlsFiles(**question["tls"]), Path(sys.argv[1])
    confine(around_question(question["uri"], tls=tls, scratch=scratch))
    answers: list[dict[str, Any]] = []
    for ref in refs:
        try:
            registry = Registry(question["uri"], timeout_s=question["timeout_s"], tls=tls)
            version = registry.resolve(ModelRef.parse(ref))
        except TransportError as error:  # do not wait for a dead registry once more for each model
            answers += [as_answer(error)] * (len(refs) - len(answers))
            break
        except EdgeAgentError as error:
            answers.append(as_answer(error))
            continue
        try:
            answers.append({"version": version.version, "file": read_a_byte(registry, version, scratch)})
        except EdgeAgentError as error:
            answers.append({"version": version.version, **as_answer(error)})
    json.dump(answers, sys.stdout)


def read_a_byte(registry: Registry, version: ModelVersion, scratch: Path) -> str:
    """Reads the beginning of one file as a sync would: of the largest, which may come another way than small ones.

    Returns:
        The file's path.

    Raises:
        EdgeAgentError: it does not come.
    """
    package = registry.package(version, scratch=Path(tempfile.mkdtemp(dir=scratch)) / "whole")
    files = sorted(package.listing(), key=lambda file: file.size_bytes)
    if not files:
        raise VerificationError(f"version {version.version} of {version.name!r} has no files")
    file = files[0 if package.whole_files else -1]
    with package.open(file.path) as stream:
        next(iter(stream.chunks), b"")
    return file.path


if __name__ == "__main__":
    main()
