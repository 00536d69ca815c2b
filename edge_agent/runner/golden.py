"""The gate: what a candidate must answer before it becomes active. Runs in the candidate's own process.

A package may bring golden prompts (MLmodel metadata `edge_agent.golden`): a list of
`{prompt or messages, expect: regex, max_tokens}`, answered greedily. The patterns come from the package: a
catastrophic one costs the candidate `PATTERN_LIMIT_S` and the daemon nothing.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from edge_agent.package.mlmodel import GOLDEN_TOKENS, MAX_GOLDEN_TOKENS
from edge_agent.runner.protocol import MAX_GOLDEN, OnPrompt

PATTERN_LIMIT_S = 5.0
_SPEED_TOKENS = 32
_MAX_SHOWN = 80

Ask = Callable[[dict[str, Any]], tuple[str, int]]
"""Answers one document: (text, completion tokens)."""


def try_out(
    golden: object,
    *,
    signature: str,
    ask: Ask,
    on_prompt: OnPrompt = lambda prompt, of: None,
) -> tuple[list[str], int, float]:
    """Answers every golden prompt, and measures the speed.

    Args:
        golden: the package's list, or None if it has none. It is untrusted.
        signature: `chat` or `prompt`: the form of the prompt that measures the speed.
        on_prompt: told before each golden prompt which one it is, from 1, and of how many.

    Returns:
        (the failures, one line each; how many prompts there were; tokens a second).
    """
    started_s, tokens = time.monotonic(), 0
    failures: list[str] = []
    number = 0
    entries = list(_entries(golden))
    for number, entry in enumerate(entries, start=1):
        on_prompt(number, len(entries))
        failure, used = _try_one(entry, ask)
        tokens += used
        if failure:
            failures.append(f"golden prompt {number}: {failure}")
    if tokens < _SPEED_TOKENS:
        started_s = time.monotonic()
        document: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me something."}]}
        _, tokens = ask(
            {**(document if signature == "chat" else {"prompt": "Once"}), "max_tokens": _SPEED_TOKENS}
        )
    elapsed_s = time.monotonic() - started_s
    return failures, number, tokens / elapsed_s if elapsed_s > 0 else 0.0


def _entries(golden: object) -> Iterator[object]:
    if golden is None:
        return
    if not isinstance(golden, list):
        yield golden  # reported as not understood
        return
    yield from golden[:MAX_GOLDEN]
    if len(golden) > MAX_GOLDEN:
        yield f"more than {MAX_GOLDEN} golden prompts"


def _try_one(entry: object, ask: Ask) -> tuple[str, int]:
    """(why it failed, or an empty string; tokens)."""
    if not isinstance(entry, dict) or not isinstance(entry.get("expect"), str):
        return "not understood", 0
    content = {key: entry[key] for key in ("messages", "prompt") if key in entry}
    max_tokens = entry.get("max_tokens", GOLDEN_TOKENS)
    if len(content) != 1 or not isinstance(max_tokens, int) or not 0 < max_tokens <= MAX_GOLDEN_TOKENS:
        return "not understood", 0
    text, tokens = ask({**content, "max_tokens": max_tokens, "temperature": 0.0})
    try:
        found = _found(entry["expect"], text)
    except re.error as error:
        return f"its pattern is not one: {error}", tokens
    except TimeoutError:
        return f"its pattern {_shown(entry['expect'])} found no end in {PATTERN_LIMIT_S:g} s", tokens
    return ("" if found else f"{_shown(text)} does not match {_shown(entry['expect'])}"), tokens


def _found(pattern: str, text: str) -> bool:
    """Whether the pattern is found in the text. Main thread only: `re` checks for signals while it searches.

    Raises:
        TimeoutError: it took too long.
    """

    def end(*_: object) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATTERN_LIMIT_S)
    try:
        return re.search(pattern, text) is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")
