"""Template forms that Hugging Face's engine and the library's read differently, through both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2.sandbox
import onnxruntime_genai as og
import pytest

from edge_agent import demo
from edge_agent.wrapper.genai_pyfunc import _as_hugging_face_reads

TEXTS = ("a</think>b", "</think>", "<think>", "", " x </think> ")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    folder = Path(demo.__file__).parent / "sample_model"
    return og.Tokenizer(og.Config(str(folder)))


def hugging_face(template: str, messages: list[dict[str, str]]) -> str:
    engine = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "condition",
    [
        "'</think>' in m.content",
        "'</think>' not in m.content",
        "not '</think>' in m['content']",
        "'</think>' in m.content.strip()",
        "'</think>' in m.content | trim",
        "'</think>' in (m.content)",
        "'</think>' in m.get('content')",
        "m.role == 'user' and '</think>' in m.content or false",
        "'</' ~ 'think>' in m.content",
        "'</' + 'think>' in m.content + 'x'",
        "end in m.content",
        "end not in m.content and m.content in texts",
        "('</think>' in m.content) and (end in m.content)",
        "'' in m.content",
        "m.content in texts",
        "'content' in m",
        "'</think>' in ['</think>', 'b']",
        "m.content in 'a</think>b'",
        "m.role in ('user', 'assistant')",
        "('a' in m.content if '</think>' in m.content else 'x' not in m.content)",
    ],
)
def test_in_means_for_text_what_it_means_elsewhere(tokenizer: Any, condition: str, text: str) -> None:
    template = (
        "{% set end = '</think>' %}{% set texts = ['<think>', '</think>'] %}"
        "{% for m in messages if 'user' in m.role %}\n"
        f"  {{% set found = {condition} %}}\n"
        f"{{{{ 'yes' if {condition} else 'no' }}}}, {{% if {condition} %}}yes{{% else %}}no{{% endif %}} \"'a' in b\"\n"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
    ours = tokenizer.apply_chat_template(json.dumps(messages), template_str=_as_hugging_face_reads(template))
    assert ours == hugging_face(template, messages)
