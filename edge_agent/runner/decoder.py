"""Token ids to text, for adapters that stream the ids of a Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any


class Decoder:
    """Token ids of one answer to text; a character that is not complete waits for its other tokens, and one that is
    never completed is not shown.

    Some tokenizers strip a text's first space: each group is decoded behind the one before it.

    Args:
        tokenizer: its `decode` puts U+FFFD where bytes are no text (yet).
        control_ids: tokens that are no text.
    """

    BROKEN = "\ufffd"
    MAX_WAITING = 32
    """Tokens. A character has at most four bytes, so bytes that are no text are shown as they are at last."""

    def __init__(self, tokenizer: Any, control_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._control_ids = control_ids
        self._before: list[int] = []
        self._waiting: list[int] = []
        self._shown = 0  # characters of what waits: a token may end one character and begin another

    def push(self, token: int) -> str:
        """Text that is complete with this token, often empty."""
        if token in self._control_ids:
            return ""
        self._waiting.append(token)
        text = self._text()
        complete = text.rstrip(self.BROKEN) if len(self._waiting) < self.MAX_WAITING else text
        new, self._shown = complete[self._shown :], len(complete)
        if text and complete == text:  # a control token has none: it goes with what comes behind it
            self._before, self._waiting, self._shown = self._waiting, [], 0
        return new

    def _text(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._waiting).removeprefix(before)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
