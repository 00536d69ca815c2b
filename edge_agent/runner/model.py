"""A loaded model, whatever runs it: one shape for the runner's main.

Owns the seam between the runner and its adapters (`loader.py` picks one): `stream` yields text deltas and one
`End` for one prompt; `start` gives lanes, which the scheduler steps in turn. An adapter answers one prompt at a
time unless it says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_agent.errors import RunnerError


@dataclass(frozen=True, kw_only=True)
class End:
    """The last item of a stream."""

    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float] = field(default_factory=dict)


class Lane:
    """One prompt that is answered, a step at a time.

    Args:
        steps: the items of `stream` that come with each step; often none.
        close: ends it; may be called at any time, and again.
    """

    def __init__(self, steps: Iterator[Sequence[str | End]], close: Callable[[], None]) -> None:
        self.close = close
        self._steps = steps

    def __next__(self) -> Sequence[str | End]:
        return next(self._steps)


class Model(ABC):
    """One loaded package.

    Attributes:
        flavor: what runs it, with its library's version, for status.
        signature: `chat` or `prompt`: the form that the package is made for.
        golden: the package's golden prompts as they stand in its metadata; None when it has none.
        answers_several: prompts can run at the same time; otherwise one ends before the next starts.
    """

    flavor: str
    signature: str
    golden: Any = None
    answers_several = False

    @abstractmethod
    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """Text deltas (empty ones are chances to stop), then one `End`.

        Closing the iterator stops the generation.
        """

    def start(self, documents: Sequence[dict[str, Any]]) -> list[Lane]:
        """Begins to answer documents, from the first on, as many as there is memory for now.

        Returns:
            A lane for each, to be stepped by one thread and closed; where none is open, at least one.
        """
        items = self.stream(documents[0])
        return [Lane(([item] for item in items), items.close)]

    def stopped(self, timeout_s: float) -> bool:
        """True when nothing is computed any longer for prompts whose lanes are closed. Waits for it, up to
        `timeout_s`."""
        return True

    def ask(self, document: dict[str, Any]) -> tuple[str, int]:
        """Answers one document whole: (text, completion tokens)."""
        texts: list[str] = []
        for item in self.stream(document):
            if isinstance(item, End):
                return "".join(texts), item.usage.get("completion_tokens", 0)
            texts.append(item)
        raise RunnerError("the model's stream ended without usage and finish_reason")

    def warm_up(self) -> None:
        """Generates one token, so that the first prompt does not pay for what the library does only once."""
        document = (
            {"messages": [{"role": "user", "content": "Hi"}]}
            if self.signature == "chat"
            else {"prompt": "Hi"}
        )
        for _ in self.stream({**document, "max_tokens": 1}):
            pass
