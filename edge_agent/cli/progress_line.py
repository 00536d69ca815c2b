"""One line that says which step a long command is at, and goes when the command has ended.

On a terminal it stands in one place, with bytes and the time that the step has taken. Elsewhere each step is a line of
its own, and so is every 64 MiB of it: a log shows what went on. It goes to what stderr is when the command begins, and
is seen while what libraries print is hidden (`library_output.py`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from edge_agent import printable, terminal

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_line(*, plain: bool = True) -> Iterator[terminal.ProgressReport]:
    """Yields what is called with (step, bytes done, total bytes); a total of 0 is none.

    Args:
        plain: whether there are lines where stdout or stderr is no terminal.
    """
    on_screen = sys.stderr.isatty() and sys.stdout.isatty()
    with _own_stderr() as stream:
        if on_screen:
            with _on_screen(stream) as report:
                yield report
        elif plain:
            yield PlainLines(stream)
        else:
            yield lambda step, done, total: None


@contextmanager
def _own_stderr() -> Iterator[TextIO]:
    with contextlib.ExitStack() as stack:
        stream = sys.stderr
        with contextlib.suppress(OSError):  # it is no file: a test's
            copy = os.dup(sys.stderr.fileno())
            stream = stack.enter_context(os.fdopen(copy, "w", encoding=sys.stderr.encoding, errors="replace"))
        yield stream


@contextmanager
def _on_screen(stream: TextIO) -> Iterator[terminal.ProgressReport]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(
        *columns,
        console=Console(file=stream),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        yield _Line(progress)


class _Line:
    """A step takes the place of the one before, and its time begins anew."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._step = ""
        self._task: Any = None

    def __call__(self, step: str, done: float, total: float) -> None:
        text = printable.line(said(step, done, total))
        if step == self._step:
            self._progress.update(self._task, description=text)
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._step, self._task = step, self._progress.add_task(text, total=None)


class PlainLines:
    """A line for each step, for every 64 MiB of it, and for the end of one that has bytes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._step = ""
        self._said_bytes = 0.0

    def __call__(self, step: str, done: float, total: float) -> None:
        begins = step != self._step
        goes_on = done - self._said_bytes >= terminal.LINE_EVERY_BYTES
        ends = 0 < total <= done and self._said_bytes < done
        if begins or goes_on or ends:
            self._step, self._said_bytes = step, done
            terminal.echo(printable.line(said(step, done, total)), stream=self._stream)


def said(step: str, done: float, total: float) -> str:
    """A step, and how far it is: `uploading 12.4 of 90.2 MB`. The unit is that of the total."""
    if not total:
        return step
    whole, unit = terminal.human_bytes(total).split()
    part = done / total * float(whole)
    return f"{step} {part:.{0 if unit == 'B' else 1}f} of {whole} {unit}"
