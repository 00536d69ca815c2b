"""The tokenizer of a GGUF file as Hugging Face's files: tokenizer.json, its configuration and the chat template.

Two kinds are known: `gpt2`, merges over bytes, whose way to split a text first has a name in the file; and `llama`,
SentencePiece with a score for each token, from which its merges follow. Another kind, or a way that is not known here,
would give other tokens than the model learned, so it is refused.
Source: src/llama-vocab.cpp of llama.cpp; the tokenizer.json of each family.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.errors import PublishError
from edge_agent.publishing.gguf.architecture import OTHERWISE
from edge_agent.publishing.gguf.reader import GgufFile, Value

_PREFIX = "tokenizer.ggml."
_NAMED = frozenset(
    (
        *("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask", "cls"),
        *("prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
    )
)
"""Tokens with a key of their own, as files spell it. Those of other tasks change no token of a conversation."""
_MAY_HAVE = frozenset(
    (
        *("model", "pre", "tokens", "token_type", "scores", "merges"),
        *("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"),
        *(f"{name}_token_id" for name in _NAMED),
    )
)
_TYPES = frozenset(range(1, 7))
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WHOLE = frozenset((_CONTROL, _USER_DEFINED))
"""Types of tokens that are found in a text before it is split."""
_FRAME = re.compile(r"<[|｜][^<>|｜]*[|｜]>")
"""What a chat template puts around messages, where it is one token."""
_ENDS = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>"),
    )
)
"""Tokens that end an answer and are control tokens, whatever the file says: llama.cpp knows them by their texts."""
_SPACE = "▁"
_MAX_PIECE = 128
"""Characters of a SentencePiece token that is looked at for merges."""
MAX_MERGES = 1 << 20
"""Gemma's 256,000 pieces have 580,000. In memory a merge takes some hundred bytes, and in the file it may take none."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(*, regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(regex=False)]}


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a text is split before it is merged.

    Attributes:
        begins: it begins with the BOS token where the file does not say.
        whole: a part that is a token is not merged from its bytes.
    """

    splits: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    begins: bool = False
    whole: bool = False


# The library reads no `Digits`: it splits several spaces before a digit in another way (onnxruntime-genai 0.18).
_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(regex=True)],
}
_WAYS: Mapping[str, _Way] = {
    "gpt-2": _Way(splits=_byte_level(regex=True)),
    "smollm": _Way(splits=_DIGITS),
    "llama-bpe": _Way(splits=_split(_LLAMA3), begins=True, whole=True),
    "qwen2": _Way(splits=_split(_QWEN2), normalizer={"type": "NFC"}),
}
_SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What a model's folder says of its tokens.

    Attributes:
        document: tokenizer.json.
        bos, pad: ids; None if there is none.
        ends: ids that end an answer; the first one is the file's.
        template: the chat template, or empty.
    """

    document: Mapping[str, Any]
    tokens: Sequence[str]
    bos: int | None
    pad: int | None
    ends: tuple[int, ...]
    template: str

    def write(self, folder: Path, context_tokens: int) -> None:
        """Writes the files that onnxruntime-genai reads."""
        names = {"bos_token": self.bos, "eos_token": self.ends[0], "pad_token": self.pad}
        configuration = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_tokens,
            "clean_up_tokenization_spaces": False,
            **{name: self.tokens[number] for name, number in names.items() if number is not None},
        }
        _write_json(folder / "tokenizer.json", self.document)
        _write_json(folder / "tokenizer_config.json", configuration)
        if self.template:
            (folder / "chat_template.jinja").write_text(self.template, "utf-8", newline="")


def read(file: GgufFile, vocabulary: int) -> Tokenizer:
    """Reads and checks it.

    Args:
        vocabulary: rows of the table of embeddings.

    Raises:
        PublishError: it is of a kind that is not known here, or its parts do not fit each other.
    """
    keys = file.keys_under(_PREFIX)
    try:
        return _read(keys, file.metadata.get("tokenizer.chat_template", ""), vocabulary)
    except _Unknown as error:
        raise PublishError(
            f"{file.path} has a tokenizer that cannot be converted: {error}",
            remedy=OTHERWISE,
        ) from error


class _Unknown(Exception):
    """Says what is not understood."""


_TOO_MANY = f"it has more than {MAX_MERGES} merges"


def _read(keys: Mapping[str, Value], template: Value, vocabulary: int) -> Tokenizer:
    _check_keys(keys)
    tokens = _texts(keys, "tokens")
    if len(tokens) != vocabulary or len(set(tokens)) != len(tokens):
        raise _Unknown(f"it has {len(set(tokens))} different tokens, and the model {vocabulary}")
    types = _types(keys, tokens)
    eos = _token(keys, "eos_token_id", tokens)
    if eos is None:
        raise _Unknown("no token ends an answer (tokenizer.ggml.eos_token_id)")
    bos = _token(keys, "bos_token_id", tokens)
    kind = keys.get("model")
    if kind == "gpt2":
        document, begins = _byte_pairs(keys, tokens)
    elif kind == "llama":
        document, begins = _sentence_pieces(keys, tokens, types), True
    else:
        raise _Unknown(f"its kind is {str(kind)[:32]!r}; gpt2 and llama are known")
    added = _WHOLE | {_UNKNOWN} if kind == "llama" else _WHOLE
    document["added_tokens"] = [
        _added(number, token, special=kind_of != _USER_DEFINED)
        for number, (token, kind_of) in enumerate(zip(tokens, types, strict=True))
        if kind_of in added
    ]
    if keys.get("add_bos_token", begins) and bos is not None:
        document["post_processor"] = _beginning(bos, tokens[bos])
    named = (eos, _token(keys, "eot_token_id", tokens), _token(keys, "eom_token_id", tokens))
    others = (number for number, token in enumerate(tokens) if token in _ENDS)
    ends = tuple(dict.fromkeys(each for each in (*named, *others) if each is not None))
    pad = _token(keys, "padding_token_id", tokens)
    if not isinstance(template, str):
        raise _Unknown("its chat template is no text")
    frame = set(_FRAME.findall(template))
    for number, token in enumerate(tokens):
        if types[number] not in _WHOLE and (number in ends or token in frame):
            raise _Unknown(f"{token[:32]!r} frames a turn, and is no control token ({_PREFIX}token_type)")
    return Tokenizer(
        document=document,
        tokens=tokens,
        bos=bos,
        pad=eos if pad is None else pad,
        ends=ends,
        template=template,
    )


def _check_keys(keys: Mapping[str, Value]) -> None:
    """Refuses what would give other tokens than this conversion does."""
    if unknown := sorted(keys.keys() - _MAY_HAVE):
        raise _Unknown(f"it has {_PREFIX}{unknown[0]}, which is not known here")
    for key in ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"):
        if not isinstance(keys.get(key, False), bool):
            raise _Unknown(f"{_PREFIX}{key} is {str(keys[key])[:32]}")
    for key in ("add_eos_token", "add_sep_token"):
        if keys.get(key):
            raise _Unknown(f"it puts a token behind each text ({_PREFIX}{key})")


def _types(keys: Mapping[str, Value], tokens: Sequence[str]) -> list[int]:
    """What each token is: without it the frame of a turn would be plain text."""
    types = keys.get("token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise _Unknown(f"its tokens have no types ({_PREFIX}token_type)")
    found = [kind for kind in types if isinstance(kind, int) and not isinstance(kind, bool)]
    if len(found) != len(tokens) or not set(found) <= _TYPES:
        raise _Unknown(f"a token has a type that is not known here ({_PREFIX}token_type)")
    return [_CONTROL if token in _ENDS else kind for token, kind in zip(tokens, found, strict=True)]


def _byte_pairs(keys: Mapping[str, Value], tokens: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """tokenizer.json, and whether a text begins with the BOS token where the file does not say."""
    name = str(keys.get("pre", "not named"))
    way = _WAYS.get(_SAME.get(name, name))
    if way is None:
        known = ", ".join(sorted((*_WAYS, *_SAME)))
        raise _Unknown(f"its way to split a text is {name[:32]!r} (tokenizer.ggml.pre); known are {known}")
    merged = _texts(keys, "merges")
    if len(merged) > MAX_MERGES:
        raise _Unknown(_TOO_MANY)
    merges = [merge.split(" ") for merge in merged]
    if not all(len(merge) == 2 for merge in merges):
        raise _Unknown("a merge is not of two parts")
    document = {
        **_document(tokens, merges, ignore_merges=way.whole),
        "normalizer": way.normalizer,
        "pre_tokenizer": way.splits,
        "decoder": _byte_level(regex=True),
    }
    return document, way.begins


def _sentence_pieces(
    keys: Mapping[str, Value], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    scores = keys.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise _Unknown("its tokens have no scores")
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise _Unknown("a score is no number")
    unknown = _token(keys, "unknown_token_id", tokens)
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if keys.get("add_space_prefix", True) else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    normal = [kind == _NORMAL for kind in types]
    return {
        **_document(
            tokens,
            [list(pair) for pair in _merges(tokens, scores, normal)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        ),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
    }


def _merges(
    tokens: Sequence[str], scores: Sequence[Any], normal: Sequence[bool]
) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that together are one; the pair of the higher score is merged first."""
    numbers = {token: number for number, token in enumerate(tokens)}
    found = []
    for number, token in enumerate(tokens):
        if not normal[number] or len(token) > _MAX_PIECE:
            continue
        for cut in range(1, len(token)):
            left, right = numbers.get(token[:cut]), numbers.get(token[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[number]), number, left, right))
        if len(found) > MAX_MERGES:
            raise _Unknown(_TOO_MANY)
    return ((tokens[left], tokens[right]) for _, _, left, right in sorted(found))


def _document(tokens: Sequence[str], merges: Sequence[Sequence[str]], **model: object) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _added(number: int, token: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": special}


def _beginning(bos: int, token: str) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }


def _texts(keys: Mapping[str, Value], key: str) -> list[str]:
    value = keys.get(key)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _Unknown(f"{_PREFIX}{key} is no list of texts")
    return [str(each) for each in value]


def _token(keys: Mapping[str, Value], key: str, tokens: Sequence[str]) -> int | None:
    value = keys.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
        raise _Unknown(f"{_PREFIX}{key} is {str(value)[:32]}")
    return value


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        json.dump(document, stream, ensure_ascii=False, indent=1)  # never as one text: it has a million parts
