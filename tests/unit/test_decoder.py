"""Token ids to text: characters come whole or not at all. The tokens of the scripted tokenizer are bytes."""

from __future__ import annotations

import pytest

from edge_agent.runner.decoder import Decoder


class ByteTokens:
    """A byte-level vocabulary, written down as the test needs it; an empty token is a control token."""

    def __init__(self, *vocabulary: bytes) -> None:
        self.vocabulary = vocabulary

    def decode(self, ids: list[int], **_: object) -> str:
        return b"".join(self.vocabulary[token] for token in ids).decode("utf-8", "replace")


class WithoutFirstSpace(ByteTokens):
    """Strips a text's first space, as SentencePiece does."""

    def decode(self, ids: list[int], **options: object) -> str:
        return super().decode(ids, **options).removeprefix(" ")


class ByteRuns(ByteTokens):
    """Decodes bytes that stand together at once: one that does not fit spoils all of them, as with byte fallback."""

    def decode(self, ids: list[int], **_: object) -> str:
        run = b"".join(self.vocabulary[token] for token in ids)
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


def pushed(*vocabulary: bytes, kind: type[ByteTokens] = ByteTokens) -> list[str]:
    """What comes with each token."""
    controls = frozenset(token for token, text in enumerate(vocabulary) if not text)
    decoder = Decoder(kind(*vocabulary), controls)
    return [decoder.push(token) for token in range(len(vocabulary))]


def single(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


@pytest.mark.parametrize("kind", [ByteTokens, ByteRuns])
def test_a_character_made_of_several_tokens_comes_with_the_last_of_them(kind: type[ByteTokens]) -> None:
    assert pushed(*single("水😀"), kind=kind) == ["", "", "水", "", "", "", "😀"]


@pytest.mark.parametrize("kind", [ByteTokens, ByteRuns])
@pytest.mark.parametrize("text", ["水", "😀", "é"])
@pytest.mark.parametrize("before", ["", "水滩", "a "])
def test_a_character_that_is_never_completed_is_not_shown(
    kind: type[ByteTokens], text: str, before: str
) -> None:
    for cut in range(1, len(text.encode())):
        assert "".join(pushed(*single(before), *single(text)[:cut], kind=kind)) == before


def test_what_is_complete_in_a_token_does_not_wait_for_the_character_that_it_begins() -> None:
    assert pushed("水".encode() + b"\xe6", b"\xbb", b"\xa9") == ["水", "", "滩"]
    assert pushed(*single("😀")[:3], b"\x80\xe6", b"\xbb") == ["", "", "", "😀", ""]


def test_a_control_token_before_a_character_does_not_break_it() -> None:
    assert pushed(b"", *single("😀")) == ["", "", "", "", "😀"]


def test_a_byte_that_is_no_text_is_shown_once_something_complete_follows() -> None:
    assert pushed(b"a", b"\xff", b"b") == ["a", "", "\ufffdb"]


def test_endless_bytes_that_are_no_text_are_shown_at_last() -> None:
    texts = pushed(*[b"\xff"] * (3 * Decoder.MAX_WAITING), b"a")
    assert "".join(texts) == "\ufffd" * (3 * Decoder.MAX_WAITING) + "a"
    assert texts.count("") < len(texts) - 3


def test_a_space_before_a_word_stays() -> None:
    assert "".join(pushed(b" a", b" b", b" ", b"c", kind=WithoutFirstSpace)) == "a b c"
