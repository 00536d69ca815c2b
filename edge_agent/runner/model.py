"""A loaded model, whatever runs it: one shape for the runner's main.

Owns the seam between the runner and its adapters (`loader.py` picks one): `stream` yields text deltas and one
`End`. An adapter answers one prompt at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from edge_agent.errors import RunnerError


@dataclass(frozen=True, kw_only=True)
class End:
    """The last item of a stream."""

    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float] = field(default_factory=dict)


class Model(ABC):
    """One loaded package.

    Attributes:
        flavor: what runs it, with its library's version, for status.
        signature: `chat` or `prompt`: the form that the package is made for.
        golden: the package's golden prompts as they stand in its metadata; None when it has none.
    """

    flavor: str
    signature: str
    golden: Any = None

    @abstractmethod
    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """Text deltas (empty ones are chances to stop), then one `End`.

        Closing the iterator stops the generation.
        """

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
