"""Logs: one line for each event on stderr, as key=value or JSON. Never prompt text, answers or secrets.

For an unexpected exception they have its class and its traceback, but not its message, which may quote a prompt.
This holds for every logger, and for exceptions that end the process or a thread. An event is one line without control
characters, whatever it quotes.

What was refused, or went wrong, has `code=` in front of whatever it quotes: the code of an error, or of `EVENT_CODES`.
Rules over the log match that; words and reasons may change. A test reads every call.

Under systemd a line begins with its priority and has no time, since the journal adds that.
Source: sd-daemon(3), "SD_ERR" and the others.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal

from edge_agent import printable

log = logging.getLogger(__name__)

EVENT_CODES = frozenset(
    (
        "answer_undelivered",
        "below_settings",
        "client_invalid",
        "disk_failed",
        "file_damaged",
        "message_unreadable",
        "mirror_failed",
        "notify_failed",
        "retained_request",
        "state_rebuilt",
        "store_unreachable",
    )
)
"""What happens to the agent and is no error of anybody's request. docs/operating.md says what to do about each."""
_CODE = re.compile(r"\bcode=([a-z][a-z0-9_]*)(?= |\Z)")
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_MAX_CAUSES = 5
_MAX_PLACES = 30
"""An endless recursion has a thousand; the last ones are enough."""


def configure(log_format: Literal["text", "json"], *, journal: bool) -> None:
    """Sets up the root logger once, at the start of a process.

    Args:
        journal: stderr is systemd's journal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter(journal=journal))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    sys.excepthook = _log_end_of_process
    threading.excepthook = _log_end_of_thread


def describe(error: BaseException) -> str:
    """Class and traceback of an exception and its causes, without their messages; a line for each place."""
    return "\n".join(_lines(error))


def _lines(error: BaseException | None) -> Iterator[str]:
    for number in range(_MAX_CAUSES):
        if error is None:
            return
        yield f"{'caused by ' if number else ''}{_kind(error)}"
        for code, line in _places(error.__traceback__)[-_MAX_PLACES:]:
            yield f"  at {code.co_filename}:{line}:{code.co_qualname}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _kind(error: BaseException) -> str:
    """The exception's class, and the name of its error number if the system or SQLite gave one."""
    number = error.errno if isinstance(error, OSError) else None
    name = errno.errorcode.get(number or 0, "") or getattr(error, "sqlite_errorname", "")
    return f"{type(error).__module__}.{type(error).__qualname__}{f' {name}' if name else ''}"


def _places(traceback: TracebackType | None) -> list[tuple[Any, int]]:
    places = []
    while traceback is not None:
        places.append((traceback.tb_frame.f_code, traceback.tb_lineno))
        traceback = traceback.tb_next
    return places


def _log_end_of_process(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    log.critical("process failed code=internal", exc_info=(kind, error, traceback))


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        name = ended.thread.name if ended.thread else ""
        log.critical("thread failed code=internal name=%s", name, exc_info=ended.exc_value)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable.line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return printable.text(describe(ei[1]))


class _TextFormatter(_Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__(
            "%(name)s: %(message)s" if journal else "%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable.line(record.getMessage()),
        }
        if code := _CODE.search(record.getMessage()):
            document["code"] = code[1]
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)
