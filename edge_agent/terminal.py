"""Output of the commands: lines, tables, progress, numbers for people.

Everything that a command prints goes through here, and loses its control characters here: it may quote a registry, a
package, a version file or a client.

rich is imported only when a table or a progress bar is drawn; `edge-agent run` never needs it.
"""

from __future__ import annotations

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

ProgressReport = Callable[[str, float, float], None]
"""Called with (step, bytes done, total bytes)."""

_LINE_EVERY_BYTES = 64 << 20


def echo(text: str = "", *, err: bool = False, stream: TextIO | None = None) -> None:
    """Prints a text and a line feed, on stdout, stderr or `stream`, without control characters. JSON stays the same
    document."""
    print(printable.text(text), file=stream or (sys.stderr if err else sys.stdout), flush=True)


def echo_answer(text: str) -> None:
    """Prints a piece of a model's answer as it comes: unchanged, but on a terminal, which would obey it."""
    print(printable.text(text) if sys.stdout.isatty() else text, end="", flush=True)


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit, such as 1.9 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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
        if last is None or done - last >= _LINE_EVERY_BYTES or (done >= total and last < done):
            self._printed[what] = done
            echo(f"{what}: {human_bytes(done)} of {human_bytes(total)}", err=True)


@dataclass(frozen=True)
class Rows:
    """A table: its headings, and cells of any type; None is an empty one."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]


def print_table(headings: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    """Prints a table on stdout."""
    print_page([Rows(headings, rows)])


def print_page(page: Sequence[str | Rows]) -> None:
    """Prints lines and tables, one below the other, on stdout."""
    _console().print(_drawn(page))


@contextmanager
def live_page() -> Iterator[Callable[[Sequence[str | Rows]], None]]:
    """Shows each page in place of the one before, on a terminal; the last one stays."""
    from rich.live import Live

    with Live(console=_console(), auto_refresh=False) as live:
        yield lambda page: live.update(_drawn(page), refresh=True)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def _drawn(page: Sequence[str | Rows]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Text | Table] = []
    for block in page:
        if isinstance(block, str):
            parts.append(Text(printable.text(block)))
            continue
        table = Table(box=None, pad_edge=False, show_edge=False, show_header=any(block.headings))
        for heading in block.headings:
            table.add_column(heading, overflow="fold")
        for row in block.rows:
            table.add_row(*(Text("" if cell is None else printable.text(str(cell))) for cell in row))
        parts.append(table)
    return Group(*parts)


def print_status(status: Mapping[str, Any]) -> None:
    """Prints the status document for people."""
    cache, registry, broker = status["cache"], status["registry"], status["broker"]
    echo(
        f"state     {status['state']}   (edge-agent {status['agent_version']}, queue {status['queue_depth']})"
    )
    for trouble in status.get("troubles", []):
        echo(f"look at   {printable.line(trouble['text'])}")
    problem = f": {printable.line(broker['problem'])}" if broker.get("problem") else ""
    place = f"{broker['host']}:{broker['port']}"
    echo(f"broker    {place} {'connected' if broker['connected'] else f'not connected{problem}'}")
    unheard = broker.get("answers_unheard", 0)
    if count := broker.get("answers_undelivered", 0) - unheard:
        echo(f"          did not take {count} answers")
    if unheard:
        echo(f"          had nobody who listened to {unheard} answers")
    echo(f"registry  {registry['uri'] or 'none'}   {_reach(registry)}")
    echo(f"cache     {human_bytes(cache['bytes'])} of {human_bytes(cache['quota_bytes'])}, "
         f"{human_bytes(cache['free_bytes'])} free on the disk")  # fmt: skip
    line = status.get("link") or {}
    if line.get("bytes_per_day"):
        used = "?" if line["used_bytes"] is None else human_bytes(line["used_bytes"])
        echo(f"line      {used} of {human_bytes(line['bytes_per_day'])} today")
    for model in status["models"]:
        if walls := model.get("walls"):
            lacks = "".join(f"; no {wall} ({printable.line(why)})" for wall, why in walls["missing"].items())
            echo(f"walls     {model['name']}: {', '.join(walls['stand'])}{lacks}")
    rows = [
        (
            model["name"],
            model["state"],
            model["version"],
            model["uri"],
            model["flavor"],
            _fetching(model.get("progress")) or reason_of(model),
        )
        for model in status["models"]
    ]
    if rows:
        echo()
        print_table(("MODEL", "STATE", "VERSION", "URI", "FLAVOR", "REASON"), rows)


def reason_of(model: Mapping[str, Any]) -> str:
    """Why a model is in its state, and why no other version comes; once, where both are the same."""
    said = (model.get("reason"), model.get("update_problem"))
    return "; ".join(dict.fromkeys(text for text in said if text))


def _fetching(progress: Mapping[str, Any] | None) -> str:
    if not progress:
        return ""
    left = "" if progress["eta_s"] is None else f", {progress['eta_s']:.0f} s left"
    return (
        f"fetching {human_bytes(progress['bytes'])} of {human_bytes(progress['total_bytes'])}, "
        f"{human_bytes(progress['bytes_per_s'])}/s{left}"
    )


def _reach(registry: Mapping[str, Any]) -> str:
    if registry["last_check"] is None:
        return "not asked yet"
    when = datetime.fromtimestamp(registry["last_check"], UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    answer = "out of reach"
    if registry["reachable"]:
        answer = "refuses this device" if registry["problem"] else "reachable"
    return f"{answer}, last asked {when}"


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
