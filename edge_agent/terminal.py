"""Output of the commands: lines, tables, progress, numbers for people.

Everything that a command prints goes through here, and loses its control characters here: it may quote a registry, a
package, a version file or a client.

rich is imported only when a table or a progress bar is drawn; `edge-agent run` never needs it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from edge_agent import printable

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

ProgressReport = Callable[[str, float, float], None]
"""Called with (step, bytes done, total bytes)."""

LINE_EVERY_BYTES = 64 << 20
"""Of a long step, where each line stays."""
_LABEL = len("update")
"""Columns of the longest label of a note."""
_IN_A_PIPE = 10_000
"""Columns: who searches for a text in what a command prints finds it in one line."""


class StdoutFailed(Exception):
    """Standard output takes nothing more, as a file on a full disk."""


def echo(text: str = "", *, err: bool = False, stream: TextIO | None = None) -> None:
    """Prints a text and a line feed, on stdout, stderr or `stream`, without control characters. JSON stays the same
    document."""
    if stream or err:
        try:
            print(printable.text(text), file=stream or sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # what goes to stderr is no result: it changes no exit code
            discard(stream or sys.stderr)
        return
    with _to_stdout():
        print(printable.text(text), flush=True)


def echo_answer(text: str) -> None:
    """Prints a piece of a model's answer as it comes: unchanged, but on a terminal, which would obey it."""
    with _to_stdout():
        print(printable.text(text) if sys.stdout.isatty() else text, end="", flush=True)


def check_stdout() -> None:
    """Writes out what stdout still holds.

    Raises:
        BrokenPipeError, StdoutFailed: it cannot be written.
    """
    with _to_stdout():
        sys.stdout.flush()


@contextmanager
def _to_stdout() -> Iterator[None]:
    """
    Raises:
        BrokenPipeError: nobody reads it any more.
        StdoutFailed: it cannot be written for another reason.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise StdoutFailed(f"standard output cannot be written: {error.strerror}") from error


def discard(stream: TextIO) -> None:
    """Gives up what a stream holds and cannot write, and all that comes.

    Python would try once more at its end, and exit with 120 over it. Source: Python, *sys.exit*.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), stream.fileno())


def replace_closed() -> None:
    """Gives a process that was started without stdin, stdout or stderr (`2>&-`) an empty one: Python has None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - to the end of the process


def let_go() -> None:
    """Writes out stdout and stderr before a process ends, or gives up what they cannot write."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit, such as 1.9 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def span(seconds: float) -> str:
    """How long something takes, in its two largest units, such as `12 min 5 s` and `2.4 s`. On every screen."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    left, parts = round(max(0.0, seconds)), []
    for unit, length in _UNITS:
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def age(seconds: float) -> str:
    """How long ago something was, in whole ones of its largest unit: `3 min`."""
    whole = max(0, int(seconds))
    return next((f"{whole // length} {unit}" for unit, length in _UNITS if whole >= length), "0 s")


def moment(seconds: float) -> str:
    """A time of this console's zone."""
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


@contextmanager
def progress_bar() -> Iterator[ProgressReport]:
    """Shows bytes, rate and time left on stderr; plain lines if that is not a terminal."""
    if not sys.stderr.isatty():
        yield _PlainProgress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: float, total: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total or None)
            progress.update(tasks[what], completed=done, total=total or None)

        yield report


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr how many of how many are done; nothing if that is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


class _PlainProgress:
    """A line at the start and the end of each step, and every 64 MiB in between."""

    def __init__(self) -> None:
        self._printed: dict[str, float] = {}

    def __call__(self, what: str, done: float, total: float) -> None:
        if not total:
            return  # the total is not known yet
        last = self._printed.get(what)
        if last is None or done - last >= LINE_EVERY_BYTES or (done >= total and last < done):
            self._printed[what] = done
            echo(f"{what}: {human_bytes(done)} of {human_bytes(total)}", err=True)


@dataclass(frozen=True)
class Coloured:
    """A cell whose text has a colour where there are colours, and goes on without one."""

    text: str
    colour: str
    rest: str = ""

    def __str__(self) -> str:
        return self.text + self.rest


@dataclass(frozen=True)
class Rows:
    """A table: its headings, and cells of any type; None is an empty one.

    Attributes:
        notes: for each row what stands below it, over the whole width: (label, text).
    """

    headings: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]
    notes: Sequence[Sequence[tuple[str, object]]] = ()


def print_page(page: Sequence[str | Rows]) -> None:
    """Prints lines and tables, one below the other, on stdout."""
    console = _console()
    drawn = _drawn(page, console.width)
    with _to_stdout():
        if sys.stdout.isatty():
            console.print(drawn)
            return
        with console.capture() as captured:
            console.print(drawn)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)


@contextmanager
def live_page() -> Iterator[Callable[[Sequence[str | Rows]], None]]:
    """Shows each page in place of the one before, on a terminal; the last one stays."""
    from rich.live import Live

    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        yield lambda page: live.update(_drawn(page, console.width), refresh=True)


@contextmanager
def whole_screen(rest: str) -> Iterator[Callable[[Sequence[str | Rows]], None]]:
    """Shows each page in place of the one before, on a terminal's second screen. Afterwards the first one is as it was.

    Args:
        rest: stands in the last line where a page is higher than the screen.
    """
    from rich.live import Live
    from rich.segment import SegmentLines

    console = _console()

    def show(page: Sequence[str | Rows]) -> None:
        lines = console.render_lines(_drawn(page, console.width), pad=False)
        if len(lines) > console.height:
            lines = [*lines[: console.height - 1], *console.render_lines(rest)]
        live.update(SegmentLines(lines, new_lines=True), refresh=True)

    with Live(console=console, auto_refresh=False, screen=True) as live:
        yield show


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _IN_A_PIPE, highlight=False, markup=False)


def _drawn(page: Sequence[str | Rows], columns: int) -> Group:
    from rich.console import Group

    parts: list[Text | Table] = []
    for block in page:
        parts.extend([_text(block)] if isinstance(block, str) else _tables(block, columns))
    return Group(*parts)


def _tables(block: Rows, columns: int) -> Iterator[Table]:
    """One table, or one for each row where notes stand in between; then they share their columns' widths."""
    if not block.notes:
        yield _table(block.headings, block.rows)
        return
    lines = [[_text(cell) for cell in row] for row in (block.headings, *block.rows)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*lines, strict=True)]
    while sum(widths) > columns - 2 * (len(widths) - 1) and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    for number, (row, notes) in enumerate(zip(block.rows, block.notes, strict=True)):
        yield _table(block.headings, [row], widths=widths, header=number == 0)
        if notes:
            yield _table(("", ""), [(f"  {label:<{_LABEL}}", text) for label, text in notes])


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    widths: Sequence[int] = (),
    header: bool = True,
) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False, show_header=header and any(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", width=widths[number] if widths else None)
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(cell: object) -> Text:
    from rich.text import Text

    if isinstance(cell, Coloured):
        return Text.assemble((printable.text(cell.text), cell.colour), printable.text(cell.rest))
    return Text("" if cell is None else printable.text(str(cell)))


def reason_of(model: Mapping[str, Any], *, but: str = "") -> str:
    """Why a model is in its state, and why no other version comes; once, where both are the same.

    Args:
        but: what is said elsewhere.
    """
    said = (model.get("reason"), model.get("update_problem"))
    return "; ".join(dict.fromkeys(text for text in said if text and text != but))


def troubles_of(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(code, text) of what the daemon says of itself. The first release said texts only, and runs on after an upgrade
    until it is restarted.

    Args:
        status: as `status --json` prints it.
    """
    return [
        (each["code"], each["text"]) if isinstance(each, Mapping) else ("", str(each))
        for each in status.get("troubles", ())
    ]


def standing_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What keeps a model at its version, or wants another one than its settings, as (what, in words): a pin, a desired
    state or a version file, a hold. What is rolled out to others first is held.

    Args:
        model: an entry of `status --json`, or of `models show --json`.
    """
    name, held, wanted = model["name"], model.get("held"), model.get("wanted") or {}
    version = f"version {wanted['version']}" if wanted.get("version") else "a version"
    notes = []
    if pinned := model.get("pinned"):
        unpin = f"`edge-agent models unpin {name}` lets it follow its reference again"
        notes.append(("pin", f"pinned to {pinned}; {unpin}"))
    if wanted.get("via") == "desired":
        notes.append(("wanted", f"model/desired asks for {version}, whatever the settings say"))
    elif wanted.get("via") == "import":
        notes.append(("wanted", f"a version file brought {version}; the registry's next word replaces it"))
    if held:
        notes.append(("held", str(held["reason"])))
    return notes


_STYLES = {"bold": 1, "red": 31, "green": 32, "yellow": 33}


class Paint:
    """Puts text into a style, or leaves it as it is. Only `echo_painted` prints that.

    Args:
        colours: whether stdout is read by somebody who can see them and wants them.
    """

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, text: str, *styles: str) -> str:
        if not self._colours:
            return text
        return f"\033[{';'.join(str(_STYLES[style]) for style in styles)}m{text}\033[0m"


def echo_painted(lines: Iterable[str]) -> None:
    """Prints lines on stdout that are without control characters already (`wrapped`), but for `Paint`."""
    with _to_stdout():
        for line in lines:
            print(line)
        sys.stdout.flush()


def columns() -> int | None:
    """How wide the terminal is; None where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, columns: int | None) -> list[str]:
    """A text without control characters as lines of at most so many columns; with None as one line."""
    text = printable.line(text)
    if columns is None:
        return [text]
    from rich.console import Console
    from rich.text import Text

    return [line.plain.rstrip() for line in Text(text).wrap(Console(), columns)] or [""]


def answer_line(result: Mapping[str, Any]) -> str:
    """The line of figures below an answer."""
    queue_ms = result.get("queue_ms", 0.0)
    queued = f" ({queue_ms:.0f} ms of it in the queue)" if queue_ms >= 1 else ""
    return (
        f"first token {result['first_token_ms']:.0f} ms{queued}, {result['tokens_per_s']:.1f} tokens/s, "
        f"model {result['model']} version {result['version']} ({result['flavor']})"
    )
