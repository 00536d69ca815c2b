"""What a package may use of this host while it loads and while it reads a prompt: memory and computing time.

Both bounds are the kernel's, so they hold in native code that never looks at a signal. A refused allocation is an error
like another; a block that computes too long ends the process with SIGPROF. That signal counts processor time, so a slow
disk or a busy host does not set it off, and the daemon knows the death for the package's own doing.

A library written in Rust raises `pyo3_runtime.PanicException` where its code gives up, as the tokenizers do for a
regular expression that backtracks too long; model code may call `sys.exit`. Neither is an `Exception`, and neither may
end a process that can go on: `panics_caught`.
"""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from edge_agent.host.confinement import lower_limit

READ_LIMIT_S = 60.0
"""Processor time of all threads for a chat template and a tokenizer, which take milliseconds."""
LOAD_LIMIT_S = 600.0
"""The same for a load by our wrapper, which looks at what the chat template does."""
_NO_MEMORY = re.compile(r"bad_alloc|[Ff]ailed to allocate memory|not enough memory|[Cc]annot allocate memory")


def limit_memory(limit_bytes: int) -> None:
    """Limits what this process maps for itself, from now on and for good. Mapped files do not count.

    Args:
        limit_bytes: 0 for no limit. One that is stricter already stays.
    """
    if limit_bytes:
        lower_limit(resource.RLIMIT_DATA, limit_bytes)


def is_memory_error(error: BaseException) -> bool:
    """True for an allocation that was refused, in Python or as a native library says it."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


class Panic(RuntimeError):
    """A package gave up in a way that ends processes. Its text may quote what it worked on, and is left out."""


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raises a panic of the block, or its call of `sys.exit`, as an error.

    Raises:
        Panic: there was one.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Panic(f"the model gave up ({type(error).__name__})") from error


@contextmanager
def computing(limit_s: float = 0.0) -> Iterator[None]:
    """Ends this process with SIGPROF if the block computes longer, in seconds of processor time.

    Args:
        limit_s: 0 for `READ_LIMIT_S`.
    """
    signal.setitimer(signal.ITIMER_PROF, limit_s or READ_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
