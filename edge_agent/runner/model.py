"""A loaded model, whatever runs it: one shape for the runner's main.

Owns the seam between the runner and its adapters (`loader.py` picks one): `stream` yields text deltas and one
`End` for one prompt; `start` gives lanes, which the scheduler steps in turn. An adapter answers one prompt at a
time unless it says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_agent.errors import BadRequest, PromptError, PromptTooLong, RunnerError
from edge_agent.runner import bounds
from edge_agent.runner.protocol import with_system

OPTIONS = (
    "temperature",
    "max_tokens",
    "stop",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "response_format",
)
"""Request options that reach a package as MLflow params when its signature declares them."""
TOOL_OPTIONS = ("tools", "tool_choice", "parallel_tool_calls")
TOO_LONG = "it is too long for the context that there is memory for"
"""Why a system prompt is refused that the model may take elsewhere."""
DEFAULT_MAX_TOKENS = 256
"""Of an answer where neither request, settings nor package say otherwise; the wrapper has the same."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a tool; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class End:
    """The last item of a stream."""

    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float] = field(default_factory=dict)
    tool_calls: tuple[ToolCall, ...] = ()


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
        room_tokens: that a warm-up asks for; more than 1 where what it has run is kept, and the first prompt needs
            room after it.
    """

    flavor: str
    signature: str
    golden: Any = None
    answers_several = False
    room_tokens = 1

    @abstractmethod
    def stream(self, document: dict[str, Any]) -> Generator[str | End, None, None]:
        """Text deltas (empty ones are chances to stop), then one `End`.

        Closing the iterator stops the generation.
        """

    def start(self, document: dict[str, Any], owner: str) -> Lane | None:
        """Begins to answer a document.

        Args:
            owner: whose it is. A model that keeps what it has run shows none of it to another owner, but for what
                `warm_up` was given.

        Returns:
            Its lane, to be stepped by one thread and closed; None where memory is short now, and another lane is open.
        """
        items = self.stream(document)
        return Lane(([item] for item in items), items.close)

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

    def warm_up(self, system: str = "") -> str:
        """Runs what the first prompt would otherwise pay for: what the library does only once, and the beginning of
        each chat, which is the system prompt of the settings or the template's own. A model that keeps what it has
        run goes on from there.

        Args:
            system: of the settings; empty for none.

        Returns:
            Why the model takes no chat with this system prompt, although it takes one without; empty if it does.
            `TOO_LONG` is the context's fault, which memory may have made short, rather than the model's.

        Raises:
            Exception: it takes neither.
        """
        chat, shorter = _chat("Hello there"), _chat("Hi")
        if self.signature != "chat":
            self._begin({"prompt": "Hi"})
            if not system or self._refusal(chat):
                return ""  # it takes no chats at all
            return self._refusal(with_system(chat, system))
        refusal = self._refusal(with_system(chat, system)) if system else ""
        if refusal or not system:
            self._begin(chat)
        if self.room_tokens > 1:  # as the first prompt will: it goes on from what is kept
            self._refusal(with_system(shorter, "" if refusal else system))
        return refusal

    def _refusal(self, chat: dict[str, Any]) -> str:
        """Why a chat gets no answer; empty if it does."""
        try:
            with bounds.panics_caught():
                self._begin(chat)
        except PromptTooLong:
            return TOO_LONG
        except PromptError as error:
            return error.message
        except Exception as error:  # noqa: BLE001 - model code may raise anything
            return f"it raised {type(error).__name__}"
        return ""

    def _begin(self, document: dict[str, Any]) -> None:
        """Answers a document up to its first text, with as much of the room as the context has."""
        tokens = self.room_tokens
        while True:
            items = self.stream({**document, "max_tokens": tokens})
            try:
                next((item for item in items if item), None)
                return
            except PromptTooLong:
                if tokens == 1:
                    raise
                tokens //= 2
            finally:
                items.close()


def refuse_tools(document: Mapping[str, Any], why: str) -> None:
    """For a model that knows no tools: nothing of them is left out in silence.

    Raises:
        BadRequest: the document has tools, or calls of an earlier answer, or results.
    """
    if "tools" in document:
        raise BadRequest(f"tools: {why}")
    for index, message in enumerate(document.get("messages", ())):
        if message["role"] == "tool" or "tool_calls" in message:
            raise BadRequest(f"tools, in messages[{index}]: {why}")


def _chat(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}]}
