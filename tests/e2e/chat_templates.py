"""Chat templates of unlike kinds, for the tests of tools/preprocess --chat."""

# Qwen3's ways: thinking is shown behind the last question alone, and there even when there was none.
QWEN3 = r"""
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- set thought = m.reasoning_content if m.reasoning_content is defined else '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ m.role ~ '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > last.user and (loop.last or thought) %}
        {{- '<think>\n' ~ thought ~ '\n</think>\n\n' }}
    {%- endif %}
    {{- text ~ '<|im_end|>\n' }}
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
