"""What a prompt waits for, in words: a command that hears nothing asks the daemon's status, and says it on stderr.

`obstacle` is pure. A thread looks only while nothing comes; it ends with the first word of the answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from edge_agent import terminal
from edge_agent.errors import EdgeAgentError

SILENT_S = 1.0
"""An answer mostly begins sooner."""
AGAIN_S = 5.0
"""Between two lines."""

_STEPS = {"fetch": "fetching", "verify": "verifying", "gate": "trying", "activate": "activating"}


def obstacle(status: Mapping[str, Any], model: str | None) -> str:
    """What keeps a model from answering now; empty where nothing is known.

    Args:
        status: as `status --json` prints it.
        model: a configured name; None for the default one.
    """
    named = [each for each in status.get("models", ()) if model in (None, each["name"])]
    if not named:
        return ""
    entry = named[0]
    if entry["state"] == "ready":
        others = status.get("queue_depth", 0) - 1
        return f"{others} other prompts wait or run" if others > 0 else ""
    if progress := entry.get("progress"):
        return _fetching(progress)
    attempt = entry.get("attempt") or {}
    step = _STEPS.get(attempt.get("step", "")) if attempt.get("code") is None else None
    if step:
        return f"{step} version {attempt['version']}"
    why = terminal.reason_of(entry)
    return f"{entry['state']}: {why}" if why else str(entry["state"])


def is_coming(status: Mapping[str, Any], model: str | None) -> bool:
    """True while a version of a model that has none is on its way."""
    named = [each for each in status.get("models", ()) if model in (None, each["name"])]
    if not named or named[0]["state"] != "absent":
        return False
    attempt = named[0].get("attempt") or {}
    return bool(named[0].get("progress")) or (attempt.get("step") in _STEPS and attempt.get("code") is None)


def _fetching(progress: Mapping[str, Any]) -> str:
    total, left_s = progress.get("total_bytes") or 0, progress.get("eta_s")
    share = f", {100 * progress['bytes'] // total} % of {terminal.human_bytes(total)}" if total else ""
    return f"fetching{share}{'' if left_s is None else f', {terminal.span(left_s)} left'}"


@contextmanager
def told_while_silent(
    look: Callable[[], str],
    tell: Callable[[str], None],
    *,
    silent_s: float = SILENT_S,
    again_s: float = AGAIN_S,
) -> Iterator[Callable[[], None]]:
    """Tells what is waited for, as long as it changes, until what this gives is called or the block ends.

    Args:
        look: gives it; empty for nothing to tell.
        tell: called from another thread.
        silent_s, again_s: before the first time, and between two.
    """
    heard = threading.Event()

    def run() -> None:
        told, at_s = "", float("-inf")
        while not heard.wait(silent_s):
            try:
                text = look()
            except (EdgeAgentError, TimeoutError):
                continue  # the command itself hears of it
            now_s = time.monotonic()
            if text and text != told and now_s >= at_s + again_s and not heard.is_set():
                tell(text)
                told, at_s = text, now_s

    threading.Thread(target=run, name="waiting", daemon=True).start()
    try:
        yield heard.set
    finally:
        heard.set()
