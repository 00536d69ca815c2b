"""A sync's main: `python -m edge_agent.sync.child [SCRATCH]`, a job on stdin, events on stdout, exit code 0 or 1.

Brings one version of one model into the cache and ends. The job says where it comes from: the registry, or an
inherited open file. Refuses jobs over a bound. Stdout carries events and nothing else; what libraries print goes
to stderr. Before it talks to anybody or imports MLflow, it builds walls around itself (`walls.py`).

    job → confined → brought from the registry or from the file → resolved, progress … done | error
                     or only looked at                           → outlined | error
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import IO

from edge_agent import logs
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError
from edge_agent.host.confinement import confine
from edge_agent.sync import protocol, walls
from edge_agent.sync.bring import outline, synchronise
from edge_agent.sync.protocol import MAX_JOB_BYTES, Emit, Event, SyncJob, SyncResult
from edge_agent.sync.version_file import import_version

log = logging.getLogger(__name__)


def main() -> int:
    """One sync, from its job to the process's exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    events = _own_stdout()
    emit = _emitter(events)
    try:
        job = SyncJob.parse(sys.stdin.buffer.read(MAX_JOB_BYTES + 1))
        scratch = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        Store(Path(job.state_dir)).create()  # a wall has room for what is there
        confine(walls.around_sync(job, scratch=scratch, keep=events.fileno()))
        emit(protocol.outlined(outline(job)) if job.outline else protocol.done(_run(job, emit)))
    except EdgeAgentError as error:
        emit(protocol.failed(error))
        return 1
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as error:  # the process's top: the daemon must hear of it
        log.exception("sync failed code=internal")
        reason = " ".join(logs.describe(error).split())
        emit(protocol.failed(EdgeAgentError(f"unforeseen: {reason}")))
        return 1
    return 0


def _run(job: SyncJob, emit: Emit) -> SyncResult:
    if job.version_file is None:
        return synchronise(job, emit)
    return import_version(job, job.version_file, emit)


def _own_stdout() -> IO[bytes]:
    """Keeps stdout for events: what any library prints from now on goes to stderr."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return events


def _emitter(events: IO[bytes]) -> Emit:
    def emit(event: Event) -> None:
        events.write(protocol.encode(event))
        events.flush()

    return emit


if __name__ == "__main__":
    sys.exit(main())
