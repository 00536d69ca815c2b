"""Chat templates that show tools and write calls, in the forms that models come with."""

from __future__ import annotations

from collections.abc import Mapping

_CHATML = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_OPEN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

TAGS = f"""\
{{%- if tools %}}
    {{{{- '<|im_start|>system\\n' }}}}
    {{%- if messages[0].role == 'system' %}}{{{{- messages[0].content + '\\n\\n' }}}}{{%- endif %}}
    {{{{- '<tools>' }}}}
    {{%- for tool in tools %}}
        {{{{- '\\n' }}}}
        {{{{- tool | tojson }}}}
    {{%- endfor %}}
    {{{{- '\\n</tools><|im_end|>\\n' }}}}
{{%- endif %}}
{{%- for m in messages %}}
    {{%- if m.role == 'tool' %}}
        {{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}}{{{{- '<|im_start|>user' }}}}{{%- endif %}}
        {{{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}}}
        {{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}}{{{{- '<|im_end|>\\n' }}}}{{%- endif %}}
    {{%- elif m.role == 'assistant' and m.tool_calls %}}
        {{{{- '<|im_start|>assistant' }}}}
        {{%- if m.content %}}{{{{- '\\n' + m.content }}}}{{%- endif %}}
        {{%- for call in m.tool_calls %}}
            {{{{- '\\n<tool_call>\\n{{"name": "' + call.function.name + '", "arguments": ' }}}}
            {{{{- call.function.arguments | tojson }}}}
            {{{{- '}}\\n</tool_call>' }}}}
        {{%- endfor %}}
        {{{{- '<|im_end|>\\n' }}}}
    {{%- elif not (tools and loop.first and m.role == 'system') %}}
        {_CHATML}
    {{%- endif %}}
{{%- endfor %}}
{_OPEN}
"""

BARE = f"""\
{{%- for m in messages %}}
    {{%- if m.role == 'tool' %}}
        {{{{- '<|im_start|>ipython\\n' + (m.content | tojson) + '<|im_end|>\\n' }}}}
    {{%- elif m.role == 'assistant' and m.tool_calls %}}
        {{%- if m.tool_calls | length != 1 %}}{{{{- raise_exception('one call at once') }}}}{{%- endif %}}
        {{%- set call = m.tool_calls[0].function %}}
        {{{{- '<|im_start|>assistant\\n{{"name": "' + call.name + '", "parameters": ' }}}}
        {{{{- call.arguments | tojson }}}}
        {{{{- '}}<|im_end|>\\n' }}}}
    {{%- elif m.role == 'user' and loop.first and tools %}}
        {{{{- '<|im_start|>user\\n' }}}}
        {{%- for tool in tools %}}{{{{- (tool | tojson(indent=4)) + '\\n' }}}}{{%- endfor %}}
        {{{{- m.content + '<|im_end|>\\n' }}}}
    {{%- else %}}
        {_CHATML}
    {{%- endif %}}
{{%- endfor %}}
{_OPEN}
"""

TOKENS = f"""\
{{%- for m in messages %}}
    {{%- if m.role == 'user' and loop.last and tools %}}
        {{{{- '<repo_name>' + (tools | tojson) + '<file_sep>' }}}}
    {{%- endif %}}
    {{%- if m.role == 'tool' %}}
        {{%- if m.tool_call_id | length != 9 %}}{{{{- raise_exception('an id has 9 characters') }}}}{{%- endif %}}
        {{{{- '<jupyter_output>{{"content": ' + (m.content | tojson) }}}}
        {{{{- ', "id": "' + m.tool_call_id + '"}}<file_sep>' }}}}
    {{%- elif m.role == 'assistant' and m.tool_calls %}}
        {{{{- '<|im_start|>assistant\\n<jupyter_code>[' }}}}
        {{%- for call in m.tool_calls %}}
            {{{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}}' }}}}
            {{%- if not loop.last %}}{{{{- ', ' }}}}{{%- endif %}}
        {{%- endfor %}}
        {{{{- ']<|im_end|>\\n' }}}}
    {{%- else %}}
        {_CHATML}
    {{%- endif %}}
{{%- endfor %}}
{_OPEN}
"""

XML = TAGS.replace(
    """{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}""",
    """{{- '\\n<tool_call>\\n<function=' + call.function.name + '>' }}""",
).replace("""{{- '}\\n</tool_call>' }}""", """{{- '</function>\\n</tool_call>' }}""")

NONE = f"{{%- for m in messages %}}{_CHATML}{{%- endfor %}}{_OPEN}"

TEMPLATES: Mapping[str, str] = {"tags": TAGS, "bare": BARE, "tokens": TOKENS, "xml": XML, "none": NONE}
"""`tags` is what Qwen and Hermes have, `bare` Llama, `tokens` Mistral; `xml` writes calls as no JSON."""
