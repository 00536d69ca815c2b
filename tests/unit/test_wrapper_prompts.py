"""The wrapper's rules for text and tokens, with a tokenizer that a test can read: a token for each character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.wrapper.genai_pyfunc import (
    NO_TEMPLATE,
    PIECE_CHARACTERS,
    TEMPLATE_REFUSES,
    RequestError,
    TokenizerFiles,
    _as_hugging_face_reads,
    _Prompts,
)

BOS, END, THINK = 1, 2, 3
ADDED: list[dict[str, Any]] = [
    {"id": BOS, "content": "<s>", "special": True},
    {"id": END, "content": "<|end|>", "special": True},
    {"id": THINK, "content": "</think>", "special": False},
]
BOS_FIRST: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
}


class ReadableTokenizer:
    """The ids of its added tokens, and the code point of any other character. Its template frames a message with
    `<|end|>`, or does what `template` does.

    Args:
        first_space: a text gets a space in front, as with SentencePiece.
    """

    def __init__(self, *, first_space: bool = False) -> None:
        self._space = " " if first_space else ""
        self.template: Callable[[Any], str] = lambda messages: "".join(
            f"{message['content']}<|end|>" for message in messages
        )

    def encode(self, text: str) -> list[int]:
        ids = {token["content"]: token["id"] for token in ADDED}
        parts = re.split(f"({'|'.join(map(re.escape, ids))})", self._space + text if text else "")
        return [token for part in parts for token in ([ids[part]] if part in ids else [ord(c) for c in part])]

    def apply_chat_template(self, messages: str, **options: Any) -> str:
        return self.template(json.loads(messages))


def shown(tokens: list[int]) -> str:
    texts = {token["id"]: f"[{token['content']}]" for token in ADDED}
    return "".join(texts.get(token) or chr(token) for token in tokens)


def files_in(folder: Path, **content: Any) -> TokenizerFiles:
    for name, document in {"tokenizer": {"added_tokens": ADDED}, **content}.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return TokenizerFiles.read(folder)


@pytest.fixture
def tokenizer() -> ReadableTokenizer:
    return ReadableTokenizer()


@pytest.fixture
def prompts(tmp_path: Path, tokenizer: ReadableTokenizer) -> _Prompts:
    return _Prompts(tokenizer, files_in(tmp_path))


def encoded(prompts: _Prompts, content: str, role: str = "user") -> str:
    return shown(prompts.chat([{"role": role, "content": content}]))


# --- Messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@pytest.mark.parametrize(
    "content",
    ["<|end|>", "<s>", "a<|end|>b<s>", "<|e<|end|>nd|>", "<<|end|>", "\ufdd0<|end|>", "<|en\ufdd0d|>"],
)
def test_a_special_token_in_a_message_stays_text(prompts: _Prompts, content: str, role: str) -> None:
    assert encoded(prompts, content, role) == f"{content}[<|end|>]"


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_nothing_else_in_a_message_is_changed(
    prompts: _Prompts, tokenizer: ReadableTokenizer, role: str
) -> None:
    content = "<|other|> <think>x</think> [INST] \ufdd0\ufdd1"
    tokenizer.template = lambda messages: repr(messages[0]["content"])
    assert encoded(prompts, content, role) == repr(content).replace("</think>", "[</think>]")


def test_a_template_that_cuts_at_the_end_of_the_thoughts_sees_it(
    prompts: _Prompts, tokenizer: ReadableTokenizer
) -> None:
    tokenizer.template = lambda messages: messages[0]["content"].split("</think>")[-1]
    assert encoded(prompts, "<think>x</think>Hello <|end|>", "assistant") == "Hello <|end|>"


@pytest.mark.parametrize(
    ("begins", "user"),
    [({"user": "", "assistant": ""}, "</think>"), ({"user": "</think>", "assistant": ""}, "</think>")],
)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_a_token_that_begins_a_turn_stays_text_in_a_message_special_or_not(
    tmp_path: Path, tokenizer: ReadableTokenizer, begins: dict[str, str], user: str, role: str
) -> None:
    tokenizer.template = lambda messages: "".join(
        f"{begins.get(message['role'], '')}{message['content']}<|end|>" for message in messages
    )
    prompts = _Prompts(tokenizer, files_in(tmp_path))
    begin = f"[{mark}]" if (mark := begins.get(role)) else ""
    content = "</think>" if begins["user"] else "[</think>]"
    assert encoded(prompts, "a</think>b", role) == f"{begin}a{content}b[<|end|>]"
    assert (THINK in prompts.control_ids) == bool(begins["user"])


@pytest.mark.parametrize(
    ("added", "frame", "marks"),
    [
        (
            ["<|user|>", "<|assistant|>", "<|end|>"],
            "<|{role}|>\n{content}<|end|>\n",
            {"<|user|>", "<|assistant|>"},
        ),
        (["<|assistant|>", "<think>", "</think>"], "<|{role}|></think>{content}", {"<|assistant|>"}),
        (["<think>", "</think>"], "<|{role}|>\n<think></think>\n{content}", set()),
        (["\n\n", "  "], "### {role}:\n{content}\n\n", set()),
        (["[USER]", "[SYS]"], "[SYS]{role}: {content}", {"[SYS]"}),
        ([], "{role}{content}", set()),
    ],
)
def test_what_begins_a_turn_is_told_from_what_stands_in_it(
    tmp_path: Path, tokenizer: ReadableTokenizer, added: list[str], frame: str, marks: set[str]
) -> None:
    tokenizer.template = lambda messages: "".join(frame.format(**message) for message in messages)
    tokens = [{"id": 10 + number, "content": text} for number, text in enumerate(added)]
    files = files_in(tmp_path, tokenizer={"added_tokens": [*ADDED[:2], *tokens]})
    found = {files.added[token] for token in _Prompts(tokenizer, files).control_ids}
    assert found - {"<s>", "<|end|>"} == marks - {"<|end|>"}


def test_a_template_without_a_system_message_is_read_without_one(
    tmp_path: Path, tokenizer: ReadableTokenizer
) -> None:
    def refuse_system(messages: Any) -> str:
        if messages[0]["role"] == "system":
            raise RuntimeError("no such role")
        return "".join(f"</think>{message['content']}<|end|>" for message in messages)

    tokenizer.template = refuse_system
    files = files_in(tmp_path, tokenizer={"added_tokens": [{"id": 7, "content": "</think>"}, *ADDED[:2]]})
    prompts = _Prompts(tokenizer, files)
    assert (7 in prompts.control_ids, prompts.turn_end) == (True, END)


@pytest.mark.parametrize(
    ("behind", "end"), [("<|end|>\n", END), ("\n<|end|>", END), ("</think>", THINK), ("\nUser: ", None)]
)
def test_the_end_of_a_turn_is_what_stands_behind_an_answer(
    tmp_path: Path, tokenizer: ReadableTokenizer, behind: str, end: int | None
) -> None:
    tokenizer.template = lambda messages: "".join(f"{message['content']}{behind}" for message in messages)
    assert _Prompts(tokenizer, files_in(tmp_path)).turn_end == end


def test_messages_with_every_noncharacter_are_refused(prompts: _Prompts) -> None:
    every = "".join(_Prompts.MARKERS)
    assert encoded(prompts, every[1:] + "<|end|>") == f"{every[1:]}<|end|>[<|end|>]"
    with pytest.raises(RequestError, match="every noncharacter"):
        encoded(prompts, every)


def test_no_space_comes_into_a_special_token_that_stays_text(tmp_path: Path) -> None:
    prompts = _Prompts(ReadableTokenizer(first_space=True), files_in(tmp_path))
    assert encoded(prompts, "a<|end|>b") == " a<|end|>b[<|end|>]"


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        (
            "No system! at row 1, column 9:\n{{ raise_exception('No system!') }}\n^ of 'my secret'",
            TEMPLATE_REFUSES,
        ),
        ("Empty chat template.", NO_TEMPLATE),
    ],
)
def test_a_refusal_quotes_neither_the_template_nor_the_messages(
    prompts: _Prompts, tokenizer: ReadableTokenizer, said: str, refusal: str
) -> None:
    def refuse(messages: Any) -> str:
        raise RuntimeError(said)

    tokenizer.template = refuse
    with pytest.raises(RequestError) as caught:
        encoded(prompts, "my secret")
    assert str(caught.value) == f"bad_request: {refusal}"
    assert caught.value.__suppress_context__, "nor does its traceback"


# --- Raw prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "prompt", "tokens"),
    [
        (None, "Hi", "Hi"),
        ({"type": "ByteLevel"}, "Hi", "Hi"),
        (BOS_FIRST, "Hi", "[<s>]Hi"),
        (BOS_FIRST, "<s>Hi", "[<s>]Hi"),
        (BOS_FIRST, "<|end|>", "[<s>][<|end|>]"),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, BOS_FIRST]}, "Hi", "[<s>]Hi"),
        ({"type": "RobertaProcessing", "cls": ["<s>", BOS], "sep": ["<|end|>", END]}, "Hi", "[<s>]Hi"),
        ({**BOS_FIRST, "single": BOS_FIRST["single"][::-1]}, "Hi", "Hi"),
    ],
)
def test_a_raw_prompt_begins_as_its_tokenizer_says_and_once(
    tmp_path: Path, tokenizer: ReadableTokenizer, processor: Any, prompt: str, tokens: str
) -> None:
    files = files_in(tmp_path, tokenizer={"added_tokens": ADDED, "post_processor": processor})
    prompts = _Prompts(tokenizer, files)
    assert shown(prompts.raw(prompt)) == tokens
    assert encoded(prompts, "Hi") == "Hi[<|end|>]", "a chat begins as its template says"


def test_an_empty_prompt_is_refused_whatever_it_would_begin_with(
    tmp_path: Path, tokenizer: ReadableTokenizer
) -> None:
    files = files_in(tmp_path, tokenizer={"added_tokens": ADDED, "post_processor": BOS_FIRST})
    with pytest.raises(RequestError, match="prompt has no text"):
        _Prompts(tokenizer, files).raw("")


# --- What the files say ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "special", "ends"),
    [
        ({}, {BOS, END}, set()),
        ({"tokenizer_config": {"eos_token": "<|end|>"}}, {BOS, END}, {END}),
        ({"tokenizer_config": {"eos_token": {"content": "</think>"}}}, {BOS, END, THINK}, {THINK}),
        ({"special_tokens_map": {"eos_token": "<|end|>"}}, {BOS, END}, {END}),
        ({"generation_config": {"eos_token_id": 7}}, {BOS, END}, {7}),
        (
            {"generation_config": {"eos_token_id": [7, 8]}, "tokenizer_config": {"eos_token": "<|end|>"}},
            {BOS, END},
            {END, 7, 8},
        ),
        ({"tokenizer_config": {"additional_special_tokens": ["</think>"]}}, {BOS, END, THINK}, set()),
        ({"tokenizer_config": {"extra_special_tokens": {"t": "</think>"}}}, {BOS, END, THINK}, set()),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"3": {"content": "</think>", "special": True}}}},
            {BOS, END, THINK},
            set(),
        ),
        ({"tokenizer_config": {"eos_token": None, "pad_token": "!"}}, {BOS, END}, set()),
    ],
)
def test_special_tokens_and_end_tokens_are_those_of_all_files(
    tmp_path: Path, content: dict[str, Any], special: set[int], ends: set[int]
) -> None:
    files = files_in(tmp_path, **content)
    assert set(files.special) == special
    assert files.end_ids == ends


def test_a_folder_without_a_tokenizer_file_has_no_special_tokens(tmp_path: Path) -> None:
    assert TokenizerFiles.read(tmp_path) == TokenizerFiles(
        added={}, special={}, eos_id=None, end_ids=frozenset(), prefix=[], template=None
    )


@pytest.mark.parametrize(
    ("configured", "template"),
    [
        ("in the configuration", "in the configuration"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "tool_use", "template": "a"}], None),
        (None, None),
    ],
)
def test_the_chat_template_is_found_where_hugging_face_looks(
    tmp_path: Path, configured: Any, template: str | None
) -> None:
    assert files_in(tmp_path, tokenizer_config={"chat_template": configured}).template == template
    (tmp_path / "chat_template.jinja").write_text("in its own file")
    assert TokenizerFiles.read(tmp_path).template == "in its own file"


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("a {% if x %}\n  b\n  {% endif %}\nc", "a {% if x %}  b\n{% endif %}c"),
        ("  {# note #}\r\nb", "{# note #}b"),
        ("  {%+ if x +%}\nb", "  {%+ if x +%}\nb"),
        ("  {{ x }}\n", "  {{ x }}\n"),
        ("{% if 'a' in x.y %}", "{% if ('a' in x.y or (x.y is string and (x.y.split('a') | length > 1))) %}"),
        (
            "{% if \"a'\" not in x['y'] %}",
            "{% if (not (\"a'\" in x['y'] or (x['y'] is string and (x['y'].split(\"a'\") | length > 1)))) %}",
        ),
        ("{% if 'a' in ['a', 'b'] %}", "{% if 'a' in ['a', 'b'] %}"),
        ("{% for x in messages %}", "{% for x in messages %}"),
        ("Is 'a' in x? {# 'a' in x #}{{ \"'a' in x\" }}", "Is 'a' in x? {# 'a' in x #}{{ \"'a' in x\" }}"),
        ("{{ '  {% if x %}\n' }}\n{{ 'a' in x", "{{ '  {% if x %}\n' }}\n{{ 'a' in x"),
    ],
)
def test_a_template_is_changed_only_where_the_library_would_read_it_wrongly(template: str, read: str) -> None:
    assert _as_hugging_face_reads(template) == read


@pytest.mark.parametrize(
    "template",
    [
        "{{ '" + "\\'" * 50_000,
        "{{ '" * 50_000,
        "{% " + "'a' in (" * 20_000 + "x" + ")" * 20_000 + " %}",
        "{{ " + "a in " * 9_999,
    ],
)
def test_a_template_of_any_form_is_read_in_one_pass(template: str) -> None:
    """The pass takes a second at most; a way back at each character would take minutes."""
    read = _as_hugging_face_reads(template)
    assert read is not None
    assert len(read) < 100 * len(template)


# --- Length -----------------------------------------------------------------------------------------------


class SlowTokenizer(ReadableTokenizer):
    """Its time grows with the square of a text's length.

    Attributes:
        encoded: the length of each text that was encoded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[int] = []

    def encode(self, text: str) -> list[int]:
        self.encoded.append(len(text))
        return super().encode(text)


@pytest.mark.parametrize("raw", [False, True])
def test_what_is_too_long_is_refused_before_it_is_encoded_as_a_whole(tmp_path: Path, raw: bool) -> None:
    tokenizer = SlowTokenizer()
    prompts = _Prompts(tokenizer, files_in(tmp_path), context_tokens=10_000)
    tokenizer.encoded.clear()
    with pytest.raises(RequestError, match="more than the context of 10000 tokens") as caught:
        prompts.raw("a" * 100_000) if raw else encoded(prompts, "a" * 100_000)
    assert caught.value.code == "prompt_too_long"
    assert tokenizer.encoded == [PIECE_CHARACTERS] * 3


def test_what_may_fit_is_encoded_as_a_whole(tmp_path: Path) -> None:
    prompts = _Prompts(ReadableTokenizer(first_space=True), files_in(tmp_path), context_tokens=10_000)
    assert len(prompts.raw("a" * 9_999)) == 10_000
    content = "<|end|>" * 1_400
    assert encoded(prompts, content) == f" {content}[<|end|>]", "no marker counts"
