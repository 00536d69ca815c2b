"""The runner's rules for prompts, with a real tokenizer of transformers: a token for each byte, and three more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import BadRequest
from edge_agent.runner import prompts as rules
from edge_agent.runner.prompts import NO_TEMPLATE, TEMPLATE_REFUSES, Prompts

transformers = pytest.importorskip("transformers")

BOS, END, THINK = 256, 257, 258
ADDED = {"<s>": BOS, "<|end|>": END, "</think>": THINK}
FRAMED = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FIRST = {"SpecialToken": {"id": "<s>", "type_id": 0}}
LAST = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}

Make = Callable[..., Prompts]


def processor(*single: dict[str, Any]) -> dict[str, Any]:
    tokens = {text: {"id": text, "ids": [ADDED[text]], "tokens": [text]} for text in ("<s>", "<|end|>")}
    return {"type": "TemplateProcessing", "single": single, "pair": [TEXT, TEXT], "special_tokens": tokens}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    from tokenizers.pre_tokenizers import ByteLevel

    def make(
        template: Any = FRAMED, *, post_processor: Any = None, normalizer: Any = None, **config: Any
    ) -> Prompts:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [
            {"id": token, "content": text, "special": token != THINK, **flags}
            for text, token in ADDED.items()
        ]
        letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
        document = {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": BYTES,
            "post_processor": post_processor,
            "decoder": BYTES,
            "model": {"type": "BPE", "vocab": letters, "merges": []},
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), **config
        )
        tokenizer.chat_template = template
        return Prompts(tokenizer)

    return make


def shown(prompts: Prompts, tokens: list[int]) -> str:
    """Added tokens in brackets."""
    text, run = "", []
    for token in [*tokens, None]:
        if token is not None and token < BOS:
            run.append(token)
            continue
        text += prompts._tokenizer.decode(run, clean_up_tokenization_spaces=False)
        run = []
        if token is not None:
            text += f"[{prompts._tokenizer.convert_ids_to_tokens(token)}]"
    return text


def encoded(prompts: Prompts, content: str, role: str = "user") -> str:
    return shown(prompts, prompts.chat([{"role": role, "content": content}]))


# --- Messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@pytest.mark.parametrize(
    "content",
    ["<|end|>", "<s>", "a<|end|>b<s>", "<|e<|end|>nd|>", "<<|end|>", "\ufdd0<|end|>", "<|en\ufdd0d|>"],
)
def test_a_special_token_in_a_message_stays_text(make: Make, content: str, role: str) -> None:
    assert encoded(make(), content, role) == f"{content}[<|end|>]"


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_nothing_else_in_a_message_is_changed(make: Make, role: str) -> None:
    content = "<|other|> <think>x</think> [INST] \ufdd0\ufdd1"
    prompts = make("{{ messages[0]['content'] | length }} {{ messages[0]['content'] }}")
    assert encoded(prompts, content, role) == f"{len(content)} {content.replace('</think>', '[</think>]')}"


def test_a_template_that_cuts_at_the_end_of_the_thoughts_sees_it(make: Make) -> None:
    prompts = make("{{ messages[0]['content'].split('</think>')[-1] }}")
    assert encoded(prompts, "<think>x</think>Hello <|end|>", "assistant") == "Hello <|end|>"


def test_messages_with_every_noncharacter_are_refused(make: Make) -> None:
    every = "".join(Prompts.MARKERS)
    assert encoded(make(), every[1:] + "<|end|>") == f"{every[1:]}<|end|>[<|end|>]"
    with pytest.raises(BadRequest, match="every noncharacter"):
        encoded(make(), every)


def test_no_space_comes_into_a_special_token_that_stays_text(make: Make) -> None:
    prompts = make(normalizer={"type": "Prepend", "prepend": " "})
    assert encoded(prompts, "a<|end|>b").removeprefix(" ") == "a<|end|>b[<|end|>]"


def test_a_token_that_the_configuration_names_is_special(make: Make) -> None:
    prompts = make(additional_special_tokens=["</think>"])
    assert prompts.control_ids == {BOS, END, THINK}
    assert encoded(prompts, "a</think>") == "a</think>[<|end|>]"


# --- Templates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('No ' + messages[0]['content']) }}",
        "{{ messages[0]['content'].secret.more }}",
        "{{ messages.__class__.__mro__ }}{{ 1 // 0 }}",
        "{% if %}secret",
    ],
)
def test_a_refusal_quotes_neither_the_template_nor_the_messages(make: Make, template: str) -> None:
    with pytest.raises(BadRequest) as caught:
        encoded(make(template), "my secret")
    assert caught.value.message == TEMPLATE_REFUSES
    assert caught.value.__suppress_context__, "nor does its traceback"


def test_a_template_that_does_not_end_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "TEMPLATE_TIMEOUT_S", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(BadRequest, match=r"^the chat template takes more than 0\.2 s$"):
        encoded(make(endless), "Hi")


@pytest.mark.parametrize("template", [None, {"tool_use": FRAMED}])
def test_without_a_template_of_its_own_a_model_takes_prompts_only(make: Make, template: Any) -> None:
    prompts = make(template)
    assert not prompts.has_template
    with pytest.raises(BadRequest) as caught:
        encoded(prompts, "Hi")
    assert caught.value.message == NO_TEMPLATE


def test_of_several_templates_the_default_one_is_taken(make: Make) -> None:
    prompts = make({"tool_use": "no", "default": FRAMED})
    assert prompts.has_template
    assert encoded(prompts, "Hi") == "Hi[<|end|>]"


# --- Raw prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("post_processor", "prompt", "tokens"),
    [
        (None, "Hi", "Hi"),
        (BYTES, "Hi", "Hi"),
        (processor(FIRST, TEXT), "Hi", "[<s>]Hi"),
        (processor(FIRST, TEXT), "<s>Hi", "[<s>]Hi"),
        (processor(FIRST, TEXT), "<|end|>", "[<s>][<|end|>]"),
        (processor(FIRST, TEXT, LAST), "Hi", "[<s>]Hi"),
        (processor(TEXT, LAST), "Hi", "Hi"),
        ({"type": "Sequence", "processors": [BYTES, processor(FIRST, TEXT)]}, "Hi", "[<s>]Hi"),
    ],
)
def test_a_raw_prompt_begins_as_its_tokenizer_says_and_once(
    make: Make, post_processor: Any, prompt: str, tokens: str
) -> None:
    prompts = make(post_processor=post_processor)
    assert shown(prompts, prompts.raw(prompt)) == tokens
    assert encoded(prompts, "Hi") == "Hi[<|end|>]", "a chat begins as its template says"


def test_an_empty_prompt_is_refused_whatever_it_would_begin_with(make: Make) -> None:
    with pytest.raises(BadRequest, match="prompt has no text"):
        make(post_processor=processor(FIRST, TEXT)).raw("")
