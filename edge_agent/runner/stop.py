"""Stop strings for adapters whose library does not cut them out of a stream."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Cuts a text that comes in pieces before the first stop string; what may begin one waits.

    Attributes:
        found: a stop string came; nothing behind its beginning gets out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._waiting = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is safe to show now."""
        if self.found:
            return ""
        text = self._waiting + text
        cuts = [text.index(stop) for stop in self._stops if stop in text]
        self.found = bool(cuts)
        end = min(cuts) if cuts else len(text) - self._begun(text)
        self._waiting = "" if cuts else text[end:]
        return text[:end]

    def flush(self) -> str:
        """What waited, when the answer ended otherwise."""
        rest, self._waiting = self._waiting, ""
        return rest

    def _begun(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
