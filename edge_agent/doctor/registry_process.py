"""The process that asks the registry: `python -m edge_agent.doctor.registry_process`.

It reads a question from stdin, `{"uri", "timeout_s", "refs"}`, and writes a JSON list to stdout with one answer for
each reference: `{"version"}` or `{"code", "message", "remedy"}`. It downloads nothing, and has walls around it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from edge_agent.doctor.registry import as_answer
from edge_agent.errors import EdgeAgentError, TransportError
from edge_agent.host.confinement import confine
from edge_agent.package.reference import ModelRef
from edge_agent.sync.registry import Registry
from edge_agent.sync.walls import around_question


def main() -> None:
    question = json.load(sys.stdin)
    confine(around_question(question["uri"]))
    refs = question["refs"]
    answers: list[dict[str, Any]] = []
    for ref in refs:
        try:
            registry = Registry(question["uri"], timeout_s=question["timeout_s"])
            answers.append({"version": registry.resolve(ModelRef.parse(ref)).version})
        except TransportError as error:  # do not wait for a dead registry once more for each model
            answers += [as_answer(error)] * (len(refs) - len(answers))
            break
        except EdgeAgentError as error:
            answers.append(as_answer(error))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
