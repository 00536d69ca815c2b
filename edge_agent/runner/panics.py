"""Panics of native libraries as errors of the model.

A library written in Rust raises `pyo3_runtime.PanicException` where its code gives up, as the tokenizers do for a
regular expression that backtracks too long. It is no `Exception`, so it would end a process that could go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OWN = (Exception, KeyboardInterrupt, SystemExit, GeneratorExit)


class Panic(RuntimeError):
    """A native library gave up in the middle. Its text may quote what it worked on, and is left out."""


@contextmanager
def caught() -> Iterator[None]:
    """Raises a panic of the block as an error.

    Raises:
        Panic: there was one.
    """
    try:
        yield
    except _OWN:
        raise
    except BaseException as error:
        raise Panic(f"a library of the model panicked ({type(error).__name__})") from error
