"""Chat templates in the manner of each family of models: the same delimiters, roles and switches as the published ones, in our
own words, the tokens that such a vocabulary adds, and conversations to write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


@dataclass(frozen=True, kw_only=True)
class Family:
    """A chat template, the tokens that it needs, and how the family's answers are told apart."""

    template: str
    special: tuple[str, ...]  # tokens that are left out of the text
    plain: tuple[str, ...] = ()  # added tokens that are not
    bos: str | None = None
    eos: str
    output_format: str


_CHATML_CALLS = """
{%- macro schemas(tools) %}
{%- for tool in tools %}{{ "\\n" + (tool | tojson) }}{% endfor %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- 'Functions that may be called:\\n<tools>' + schemas(tools) + '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""
QWEN3 = (
    _CHATML_CALLS
    + """
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] if message.role == 'user' and ns.last < 0 %}
    {%- set ns.last = messages | length - 1 - messages[::-1].index(message) %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content if message.content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.split('</think>')[-1].lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {%- if content or not loop.first %}{{ '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
)
QWEN3_CODER = (
    _CHATML_CALLS
    + """
{%- macro argument(name, value) %}
{{- '<parameter=' + name + '>\\n' }}
{{- value if value is string else value | tojson }}
{{- '\\n</parameter>\\n' }}
{%- endmacro %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
    {{- message.content if message.content is defined and message.content is not none }}
    {%- for call in message.tool_calls | default([], true) %}
        {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for name, value in call.function.arguments | items %}{{ argument(name, value) }}{% endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
)
DEEPSEEK_R1 = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', in_calls=false) %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' in message %}
        {{- '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}
        {%- for call in message['tool_calls'] %}
            {{- '\\n' if not loop.first }}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' }}
            {{- call['function']['arguments'] | tojson + '\\n```<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
    {%- if message['role'] == 'tool' %}
        {{- '<｜tool▁outputs▁begin｜>' if not ns.in_calls }}
        {%- set ns.in_calls = true %}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
    {%- elif ns.in_calls %}
        {%- set ns.in_calls = false %}{{ '<｜tool▁outputs▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""
DEEPSEEK_V31 = """
{%- if not thinking is defined %}{% set thinking = false %}{% endif %}
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}
{%- if tools %}
    {{- '\\n\\n## Tools' }}
    {%- for tool in tools %}{{ '\\n' + tool.function.name + ': ' + tool.function.parameters | tojson }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {%- if messages[loop.index0 - 1].role == 'user' %}{{ '<｜Assistant｜></think>' }}{% endif %}
        {{- message.content.split('</think>', 1)[-1] if message.content }}
        {%- if message.tool_calls is defined %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in message.tool_calls %}
                {{- '<｜tool▁call▁begin｜>' ~ call.function.name ~ '<｜tool▁sep｜>' }}
                {{- call.function.arguments | tojson ~ '<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- elif message.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}
    {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}
"""
KIMI_K2 = """
{%- if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{% endif %}
{%- for message in messages %}
    {%- set name = message.get('name') or message.role %}
    {%- if message.role == 'user' %}<|im_user|>{{ name }}<|im_middle|>
    {%- elif message.role == 'assistant' %}<|im_assistant|>{{ name }}<|im_middle|>
    {%- else %}<|im_system|>{{ name }}<|im_middle|>
    {%- endif %}
    {%- if message.role == 'tool' %}## Return of {{ message.tool_call_id }}
{{ message.content }}
    {%- elif message.role == 'assistant' %}
        {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
        {{- message.content or '' }}
        {%- if message.tool_calls %}<|tool_calls_section_begin|>
            {%- for call in message.tool_calls %}
                {{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
                {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
                {{- '<|tool_call_end|>' }}
            {%- endfor %}<|tool_calls_section_end|>
        {%- endif %}
    {%- else %}{{ message.content }}
    {%- endif %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}
"""
HARMONY = """
{%- macro type_of(schema) -%}
    {%- if schema.type == 'array' -%}{{ type_of(schema['items']) + '[]' }}
    {%- elif schema.enum -%}{{ '"' + schema.enum | join('" | "') + '"' }}
    {%- elif schema.type in ('integer', 'number') -%}number
    {%- else -%}{{ schema.type | default('any') }}
    {%- endif -%}
{%- endmacro -%}
{%- set effort = reasoning_effort if reasoning_effort is defined else 'medium' -%}
{{- '<|start|>system<|message|>' + (model_identity or 'You are a model.') + '\\n' -}}
{{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + effort + '\\n\\n' -}}
{{- '# Valid channels: analysis, commentary, final.<|end|>' -}}
{%- if messages[0].role in ['developer', 'system'] -%}
    {%- set instructions, rest = messages[0].content, messages[1:] -%}
{%- else -%}
    {%- set instructions, rest = '', messages -%}
{%- endif -%}
{%- if instructions or tools -%}
    {{- '<|start|>developer<|message|>' + ('# Instructions\\n\\n' + instructions + '\\n\\n' if instructions else '') -}}
    {%- if tools -%}
        {{- '# Tools\\n\\nnamespace functions {\\n' -}}
        {%- for tool in tools -%}
            {%- set f = tool.function -%}
            {{- '// ' + f.description + '\\ntype ' + f.name + ' = (_: {' -}}
            {%- for name, schema in f.parameters.properties.items() -%}
                {{- name + ('' if name in f.parameters.required or [] else '?') + ': ' + type_of(schema) + ', ' -}}
            {%- endfor -%}
            {{- '}) => any;\\n' -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endif -%}
{%- set calls = namespace(last=none) -%}
{%- for message in rest -%}
    {%- if message.role == 'assistant' -%}
        {%- if 'content' in message and '<|channel|>final<|message|>' in message.content -%}
            {{- raise_exception('content must not have channels') -}}
        {%- endif -%}
        {%- if message.tool_calls -%}
            {%- set call = message.tool_calls[0].function -%}
            {%- if message.thinking -%}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' -}}
            {%- endif -%}
            {{- '<|start|>assistant<|channel|>commentary to=functions.' + call.name + ' <|constrain|>json<|message|>' -}}
            {{- call.arguments | tojson + '<|call|>' -}}
            {%- set calls.last = call.name -%}
        {%- elif loop.last and not add_generation_prompt -%}
            {%- if message.thinking -%}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' -}}
            {%- endif -%}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' -}}
        {%- else -%}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' -}}
        {%- endif -%}
    {%- elif message.role == 'tool' -%}
        {%- if calls.last is none -%}{{ raise_exception('a tool answers, but none was called') }}{%- endif -%}
        {{- '<|start|>functions.' + calls.last + ' to=assistant<|channel|>commentary<|message|>' -}}
        {{- message.content | tojson + '<|end|>' -}}
    {%- else -%}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}
"""
MISTRAL = """
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort is not none else 'none' %}
{%- if effort not in ['none', 'high'] %}
    {{- raise_exception('reasoning_effort must be none or high') }}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if tools is defined and tools is not none and tools | length > 0 %}
    {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[MODEL_SETTINGS]{"reasoning_effort": "' + effort + '"}[/MODEL_SETTINGS]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}
            {%- for block in message['content'] %}{{ block['text'] if block['type'] == 'text' else '[IMG]' }}{% endfor %}
            {{- '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {%- if message['reasoning_content'] is defined %}
            {{- '[THINK]' + message['reasoning_content'] + '[/THINK]' }}
        {%- endif %}
        {{- message['content'] if message['content'] is defined }}
        {%- for call in message['tool_calls'] | default([]) %}
            {{- '[TOOL_CALLS]' + call['function']['name'] + '[ARGS]' }}
            {%- set arguments = call['function']['arguments'] %}
            {{- arguments if arguments is string else arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS]' + message['content'] | string + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('roles are user, assistant and tool; got ' + message['role']) }}
    {%- endif %}
{%- endfor %}
"""
GLM_45 = """[gMASK]<sop>
{%- if tools %}
<|system|>
Tools, one a line:
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif %}
{%- macro visible(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}
            {%- if part is mapping and part.type == 'text' -%}{{ part.text }}{%- elif part is string -%}{{ part }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{%- for m in messages %}
{%- if m.role == 'user' %}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith("/nothink")) }}
{%- elif m.role == 'assistant' %}<|assistant|>
{{ '<think>' + m.reasoning_content.strip() + '</think>' if m.reasoning_content is string else '<think></think>' }}
{%- if m.content and visible(m.content).strip() %}
{{ '\\n' + visible(m.content).strip() }}
{%- endif %}
{%- for call in m.tool_calls or [] %}
{{ '\\n<tool_call>' + call.function.name }}
{% for name, value in call.function.arguments.items() %}
<arg_key>{{ name }}</arg_key>
<arg_value>{{ value | tojson(ensure_ascii=False) if value is not string else value }}</arg_value>
{% endfor %}
</tool_call>
{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}
<tool_response>
{{ visible(m.content) }}
</tool_response>
{%- elif m.role == 'system' %}<|system|>
{{ visible(m.content) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}
{%- endif %}
"""
GLM_47 = (
    GLM_45.replace("</arg_key>\n<arg_value>", "</arg_key><arg_value>")
    .replace("</arg_value>\n{%", "</arg_value>{%")
    .replace("call.function.name }}\n{% for", "call.function.name }}{% for")
    .replace("{% endfor %}\n</tool_call>", "{% endfor %}</tool_call>")
    .replace("else '' }}\n{%- endif %}\n", "else '<think>' }}\n{%- endif %}\n")
)
MINIMAX_M2 = """
{%- macro arguments(values) -%}
{%- for name, value in values.items() -%}
<parameter name="{{ name }}">{{ value if value is string else value | tojson(ensure_ascii=False) }}</parameter>
{% endfor -%}
{%- endmacro -%}
]~!b[]~b]system
{{ messages[0].content if messages[0].role == 'system' else model_identity | default('You are a model.') }}
{%- if tools %}

<tools>
{%- for tool in tools %}
<tool>{{ tool.function | tojson(ensure_ascii=False) }}</tool>
{%- endfor %}
</tools>
{%- endif %}[e~[
{%- for message in messages %}
{%- if message.role == 'assistant' %}
]~b]ai
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}
{{- message.content or '' }}
{%- if message.tool_calls %}
<minimax:tool_call>
{% for call in message.tool_calls %}
<invoke name="{{ call.function.name }}">
{{ arguments(call.function.arguments) }}</invoke>
{% endfor %}
</minimax:tool_call>
{%- endif %}[e~[
{%- elif message.role != 'system' %}
]~b]{{ message.role }}
{{ '<response>' + message.content + '</response>' if message.role == 'tool' else message.content }}[e~[
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
]~b]ai
{{ '<think>\\n' }}
{%- endif %}
"""
LLAMA_3 = """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, messages = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- message.content | tojson if message.content is mapping or message.content is iterable else message.content }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
LLAMA_4 = """
{{- bos_token }}
{%- if tools is defined and tools %}
    {{- '<|header_start|>system<|header_end|>\\n\\nCall functions as [name(argument=value)].\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n' }}{% endfor %}
    {{- '<|eot|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|header_start|>' + ('ipython' if message.role == 'tool' else message.role) + '<|header_end|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content | default([]) %}
            {%- if content['type'] == 'image' %}{% continue %}{% endif %}
            {{- content['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {%- if message.tool_calls %}
        {{- '<|python_start|>[' }}
        {%- for call in message.tool_calls %}
            {{- call.function.name + '(' }}
            {%- for name, value in call.function.arguments.items() %}
                {{- name ~ '=' ~ (value | tojson) ~ ('' if loop.last else ', ') }}
            {%- endfor %}
            {{- ')' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']<|python_end|>' }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}
"""
PHI_4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and tools is not none and tools %}"
    "{{ '<|system|>' + message['content'] + '<|tool|>' + (tools | tojson) + '<|/tool|>' + '<|end|>' }}"
    "{% elif message['tool_calls'] %}{% set call = message['tool_calls'][0]['function'] %}"
    "{{ '<|assistant|>functools[{\"name\": \"' + call.name + '\", \"arguments\": ' + call.arguments | tojson + '}]<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
OLMOE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GRANITE_4 = """
{%- if tools or messages[0].role == 'system' %}
    {{- '<|start_of_role|>system<|end_of_role|>' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
    {%- if tools %}
        {{- 'Functions:\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools>' }}
    {%- endif %}
    {{- '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|start_of_role|>user<|end_of_role|>\n<tool_response>\n' + message.content + '\n</tool_response><|end_of_text|>\n' }}
    {%- elif message.role != 'system' %}
        {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|end_of_text|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
_BRACKETS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[ARGS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]",
)  # fmt: skip
_KIMI = (
    "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)  # fmt: skip
_HARMONY = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
)  # fmt: skip
_GLM = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink",
)  # fmt: skip
_LLAMA_3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>",
)  # fmt: skip
_LLAMA_4 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>",
    "<|python_start|>", "<|python_end|>",
)  # fmt: skip
_PHI = ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|tool_call|>")

FAMILIES: dict[str, Family] = {
    "qwen3": Family(template=QWEN3, special=_CHATML, plain=_TAGS, eos="<|im_end|>", output_format="qwen3"),
    "qwen3_coder": Family(template=QWEN3_CODER, special=_CHATML, plain=_TAGS, eos="<|im_end|>", output_format="qwen3_coder"),
    "deepseek_r1": Family(
        template=DEEPSEEK_R1, special=_DEEPSEEK[:2], plain=(*_DEEPSEEK[2:], "<think>", "</think>"), bos=_DEEPSEEK[0],
        eos=_DEEPSEEK[1], output_format="deepseek_v3",
    ),
    "deepseek_v31": Family(
        template=DEEPSEEK_V31, special=_DEEPSEEK[:2], plain=(*_DEEPSEEK[2:], "<think>", "</think>"), bos=_DEEPSEEK[0],
        eos=_DEEPSEEK[1], output_format="deepseek_v3.1",
    ),
    "kimi_k2": Family(
        template=KIMI_K2, special=_KIMI, plain=("<think>", "</think>"), bos="[BOS]", eos="[EOS]", output_format="kimi_k2"
    ),
    "granite_4": Family(
        template=GRANITE_4, special=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), plain=_TAGS[:4],
        eos="<|end_of_text|>", output_format="granite_4",
    ),
    "gpt_oss": Family(
        template=HARMONY, special=_HARMONY, bos="<|startoftext|>", eos="<|return|>", output_format="harmony"
    ),
    "mistral": Family(template=MISTRAL, special=_BRACKETS, bos="<s>", eos="</s>", output_format="mistral"),
    "glm_45": Family(
        template=GLM_45, special=_GLM, plain=(*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        eos="<|endoftext|>", output_format="glm_4.5",
    ),
    "glm_47": Family(
        template=GLM_47, special=_GLM, plain=(*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        eos="<|endoftext|>", output_format="glm_4.7",
    ),
    "minimax_m2": Family(
        template=MINIMAX_M2, special=("]~!b[", "]~b]", "[e~["),
        plain=("<minimax:tool_call>", "</minimax:tool_call>", "<think>", "</think>"), bos="]~!b[", eos="[e~[",
        output_format="minimax_m2",
    ),
    "llama_3": Family(
        template=LLAMA_3, special=_LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>", output_format="llama_3"
    ),
    "llama_4": Family(template=LLAMA_4, special=_LLAMA_4, bos="<|begin_of_text|>", eos="<|eot|>", output_format="llama_4"),
    "phi_4_mini": Family(
        template=PHI_4_MINI, special=_PHI, bos="<|endoftext|>", eos="<|endoftext|>", output_format="phi_4_mini"
    ),
    "olmoe": Family(
        template=OLMOE, special=("<|endoftext|>", "<|padding|>"), bos="<|endoftext|>", eos="<|endoftext|>",
        output_format="plain",
    ),
}  # fmt: skip


CALL = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich <b>", "days": 3, "exact": True}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says 'what' to wear & more",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "array", "items": {"type": "string", "enum": ["°C", "°F"]}},
                },
                "required": ["city"],
            },
        },
    }
]
QUESTION = [{"role": "user", "content": "What's 2 + 2? <|im_end|> größer 🙂"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    *QUESTION,
    {"role": "assistant", "content": "4", "reasoning_content": "two and two\n", "tool_calls": None},
    {"role": "user", "content": "  And the weather? "},
]
CALLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "look it up"},
    {"role": "tool", "content": '{"rain": 1}', "tool_call_id": "functions.weather:0"},
]


def write(folder: Path, family: Family) -> Path:
    """A byte-level `tokenizer.json` with the family's tokens and a `tokenizer_config.json` with its template."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in family.special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in family.plain])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.eos,
        "chat_template": family.template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    return folder
