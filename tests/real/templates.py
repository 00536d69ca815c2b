"""Chat templates in the forms that models come with, and folders of the real model with one of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], object]

_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

CHATML = (
    "{% for message in messages %}{% set content = message['content'] %}" + _TURN + "{% endfor %}" + _OPEN
)
CUTS_THOUGHTS = CHATML.replace("['content'] %}", "['content'].split('</think>')[-1] %}")
REPLACES_IN_SYSTEM = CHATML.replace(
    "{% set content",
    "{% if message['role'] == 'system' %}{{ message['content'].replace('a', 'b') }}{% endif %}{% set content",
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
DROPS_SYSTEM = CHATML.replace(_TURN, "{% if message['role'] != 'system' %}" + _TURN + "{% endif %}")

TEMPLATES: Mapping[str, str] = {
    "chatml": CHATML,
    "cuts thoughts": CUTS_THOUGHTS,
    "cuts thoughts where there are any": """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "cuts thoughts before the last question": """\
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.seen and message.role == "user" and not message.content.startswith('<tool>') %}
        {%- set ns.seen = true %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if '</think>' not in content %}{% else %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' }}
""",
    "blocks on lines of their own": """\
{% for message in messages %}
    {% if message['role'] == 'user' %}
### Question
{{ message['content'] }}
    {% else %}
### {{ message['role'] }}
{{ message['content'] | trim }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Answer
{% endif %}
""",
    "bos, alternating, no system": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<turn>' + role + '\\n' + message['content'] | trim + '<end>\\n' }}{% endfor %}<turn>model\n",
    "system in the first question": """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "roles in brackets": "{% for message in messages %}{% if message['role'] in ['system', 'user'] %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% else %}"
    "<|assistant|>\n{{ message['content'] }}<|end|>\n{% endif %}{% endfor %}<|assistant|>\n",
    "drops the system message": DROPS_SYSTEM,
    "asks for text in many ways": """\
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and '</think>' in content.strip() %}
        {%- set content = (content | trim).split('</think>')[-1] %}
    {%- elif '<b>' not in content | trim and not ('zzz' in (m['content'])) %}
        {{- "'</think>' in content: no\\n" }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
'x' in text is text
""",
}


def folder_like(
    real_model: Path,
    folder: Path,
    *,
    template: str | None = None,
    genai: Change | None = None,
    tokenizer: Change | None = None,
    configuration: Change | None = None,
) -> Path:
    """A folder with the real model's weights and changed files beside them."""
    folder.mkdir()
    for file in real_model.iterdir():
        with contextlib.suppress(OSError):  # another file system
            if file.suffix in (".onnx", ".data"):
                os.link(file, folder / file.name)
                continue
        shutil.copyfile(file, folder / file.name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    changes = {"genai_config": genai, "tokenizer": tokenizer, "tokenizer_config": configuration}
    for name, change in changes.items():
        if change is not None:
            file = folder / f"{name}.json"
            document = json.loads(file.read_text())
            change(document)
            file.write_text(json.dumps(document))
    return folder
