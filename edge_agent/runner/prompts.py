"""Text to token ids, for adapters that have a Hugging Face tokenizer. Owns what a message cannot do to a prompt, and
what of a refusal a client may read. The wrapper has the same rules for the library's own tokenizer.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edge_agent.errors import BadRequest

TEMPLATE_REFUSES = "the chat template refuses the messages"
NO_TEMPLATE = "this model has no chat template: send it a prompt"
TEMPLATE_TIMEOUT_S = 10.0
"""A chat template is a program in a sandbox, and may loop for ever."""
MAX_RENDERED_CHARACTERS = 8 << 20


class Prompts:
    """A literal special token in a message stays text. Before the template is rendered, a marker (a code point that the
    messages do not contain) is put behind the first character of each one; then the parts between markers are encoded
    separately, so that no part contains a whole special token. The model reads the characters as they were sent, and
    the template reads everything else as it was sent. A raw prompt is encoded unchanged.

    Args:
        tokenizer: of transformers.

    Attributes:
        control_ids: tokens that are no text: they frame prompts, and never reach a client.
        has_template: chats can be asked.
    """

    MARKERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
    """Noncharacters of Unicode: they mean nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in tokenizer.all_special_ids}
        added = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
        template = tokenizer.chat_template  # several, each with a name, are a dict
        self.has_template = bool(template.get("default") if isinstance(template, dict) else template)
        special |= {
            token: text for token, text in added.items() if tokenizer.added_tokens_decoder[token].special
        }
        marks = set(self._marks(added.values(), special.values()))
        special |= {token: text for token, text in added.items() if text in marks}
        self.control_ids = frozenset(special)
        texts = _any_of(special.values())
        self._special = re.compile(f"(?={texts})(.)", re.DOTALL)
        self._prefix = self._beginning()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """[tokens] ids of the messages in the model's own chat template, ready for the assistant's turn.

        Raises:
            BadRequest: the template refuses them, takes too long, or there is none.
        """
        marker = self._marker(messages)
        safe = [
            {"role": message["role"], "content": self._neutral(message["content"], marker)}
            for message in messages
        ]
        first, *others = self._render(safe).split(marker)
        tokens = self._encode(first)
        for part in others:
            tokens += self._continuation(part)
        return _not_empty(tokens, "messages")

    def raw(self, prompt: str) -> list[int]:
        """[tokens] ids of a prompt that brings its own control tokens.

        It begins with what the tokenizer puts there, once: a prompt that brings it gets no second one.
        """
        tokens = _not_empty(self._encode(prompt), "prompt")
        return tokens if tokens[: len(self._prefix)] == self._prefix else self._prefix + tokens

    def _beginning(self) -> list[int]:
        """[tokens] ids that the tokenizer puts before a text. What it puts behind one would end a prompt."""
        text, whole = self._encode("a"), list(self._tokenizer("a")["input_ids"])
        starts = (n for n in range(len(whole)) if whole[n : n + len(text)] == text)
        return whole[: next(starts, 0)]

    def _marks(self, added: Collection[str], special: Collection[str]) -> Iterator[str]:
        """Added tokens that begin a turn, though the tokenizer does not call them special: a message that brought one
        would begin a turn, too. What only opens or closes something within one, as `</think>`, has a partner."""
        others = set(added) - set(special)
        tokens = re.compile(_any_of(added))
        for part in " ".join(self._frames()[:-1]).split():
            run = re.match(f"(?:{tokens.pattern})+", part)
            first = next((token for token in tokens.findall(run[0]) if token in others), "") if run else ""
            if first and not others & {first.replace("<", "</", 1), first.replace("</", "<", 1)} - {first}:
                yield first

    def _frames(self) -> list[str]:
        """What the template writes before, between and behind the messages of a chat; nothing if it takes none."""
        content = self.MARKERS[0]
        for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
            try:
                rendered = self._render([{"role": role, "content": content} for role in roles])
            except BadRequest:
                continue
            return rendered.split(content)
        return []

    def _marker(self, messages: Sequence[Mapping[str, str]]) -> str:
        for marker in self.MARKERS:
            if not any(marker in message["content"] for message in messages):
                return marker
        raise BadRequest("the messages contain every noncharacter from U+FDD0 to U+FDEF")

    def _neutral(self, content: str, marker: str) -> str:
        return self._special.sub(rf"\1{marker}", content)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self.has_template:
            raise BadRequest(NO_TEMPLATE)
        try:
            with _time_limit(TEMPLATE_TIMEOUT_S):
                text = str(
                    self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                )
        except TimeoutError:
            raise BadRequest(f"the chat template takes more than {TEMPLATE_TIMEOUT_S:g} s") from None
        except Exception:  # noqa: BLE001 - a template raises what it likes, and Jinja has its own errors
            # Not passed on: its text may quote the template, or the messages.
            raise BadRequest(TEMPLATE_REFUSES) from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise BadRequest(f"the chat template makes {len(text)} characters of the messages")
        return text

    def _continuation(self, part: str) -> list[int]:
        """Ids of a text that continues another one: some tokenizers put a space before the first word of a text."""
        before, both = self._encode("\n"), self._encode(f"\n{part}")
        return both[len(before) :] if both[: len(before)] == before else self._encode(part)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for each of some texts, the longest first; it matches nothing if there are none."""
    return (
        "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if len(text) > 1) or "(?!)"
    )


def _not_empty(tokens: list[int], what: str) -> list[int]:
    if not tokens:
        raise BadRequest(f"{what} has no text")
    return tokens


@contextmanager
def _time_limit(timeout_s: float) -> Iterator[None]:
    """Ends Python code that runs longer, where this is the main thread: only that one gets signals.

    Raises:
        TimeoutError: it did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
