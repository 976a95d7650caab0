"""Chat templates of unlike kinds, for the tests of tools/preprocess --chat."""

# Qwen3's ways: thinking is shown behind the last question alone, and there even when there was none; tools are named in the system's turn, calls
# of them are a part of the answer, and their replies a turn of the user's, one for all that follow one another.
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if messages[0].role == 'system' else '') ~ '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- set thought = m.reasoning_content if m.reasoning_content is defined else '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' ~ text ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif not (tools and loop.first and m.role == 'system') %}
        {{- '<|im_start|>' ~ m.role ~ '\n' }}
        {%- if m.role == 'assistant' and loop.index0 > last.user and (loop.last or thought) %}
            {{- '<think>\n' ~ thought ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if text or not loop.first }}
            {%- set arguments = call.function.arguments if call.function.arguments is string else call.function.arguments | tojson %}
            {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ arguments ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
LLAMA3 = r"""
{%- for m in messages %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
MISTRAL = r"""{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}
    {%- if m.role == 'user' %}{{- '[INST] ' ~ m.content ~ ' [/INST]' }}{%- else %}{{- ' ' ~ m.content ~ eos_token }}{%- endif %}
{%- endfor %}"""
CHATML = r"""
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MARKED = {  # the same texts as CHATML and LLAMA3
    "chatml": r"""
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{- m.content ~ '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{- m.content ~ '<|im_end|>' }}{%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "llama": r"""
{%- for m in messages %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{- (m.content | trim) ~ '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{- (m.content | trim) ~ '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
}
