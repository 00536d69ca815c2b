"""A sync's main: `python -m edge_agent.sync.child`, a job on stdin, events on stdout, exit code 0 or 1.

Brings one version of one model into the cache and ends. The job says where it comes from: the registry, or an
inherited open file. Refuses jobs over a bound. Stdout carries events and nothing else; what libraries print goes
to stderr.

    job → brought from the registry or from the file → resolved, progress … done | error
"""

from __future__ import annotations

import logging
import os
import sys

from edge_agent import logs
from edge_agent.errors import EdgeAgentError
from edge_agent.sync import protocol
from edge_agent.sync.bring import synchronise
from edge_agent.sync.protocol import MAX_JOB_BYTES, Emit, Event, SyncJob, SyncResult
from edge_agent.sync.version_file import import_version

log = logging.getLogger(__name__)


def main() -> int:
    """One sync, from its job to the process's exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    emit = _own_stdout()
    try:
        job = SyncJob.parse(sys.stdin.buffer.read(MAX_JOB_BYTES + 1))
        emit(protocol.done(_run(job, emit)))
    except EdgeAgentError as error:
        emit(protocol.failed(error))
        return 1
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as error:  # the process's top: the daemon must hear of it
        log.exception("sync failed")
        reason = " ".join(logs.describe(error).split())
        emit(protocol.failed(EdgeAgentError(f"unforeseen: {reason}")))
        return 1
    return 0


def _run(job: SyncJob, emit: Emit) -> SyncResult:
    if job.version_file is None:
        return synchronise(job, emit)
    return import_version(job, job.version_file, emit)


def _own_stdout() -> Emit:
    """Keeps stdout for events: what any library prints from now on goes to stderr."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        events.write(protocol.encode(event))
        events.flush()

    return emit


if __name__ == "__main__":
    sys.exit(main())
