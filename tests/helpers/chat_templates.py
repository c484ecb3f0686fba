"""Chat templates that write what those of the supported model families write, for tests of rendering and masks.

Written anew from the families' formats, with their habits: Qwen3 drops the thinking of earlier turns and gives the
last one an empty think block, Qwen2.5 adds a system message of its own, Llama 3 writes BOS, today's date, strips
contents and replaces the content by a tool call, Llama 2 has no token before an answer.
"""

QWEN3 = r"""
{%- set last = namespace(question=messages|length - 1, found=false) -%}
{%- for m in messages|reverse -%}
  {%- if not last.found and m.role == 'user'
      and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
    {%- set last.found = true -%}
    {%- set last.question = messages|length - loop.index -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' -}}{% endif -%}
  {{- '<tools>' -}}
  {%- for tool in tools %}{{- '\n' + tool|tojson -}}{% endfor -%}
  {{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set said, thought = m.content, '' -%}
    {%- if m.reasoning_content is defined and m.reasoning_content is not none -%}
      {%- set thought = m.reasoning_content -%}
    {%- elif '</think>' in m.content -%}
      {%- set parts = m.content.split('</think>') -%}
      {%- set said = parts[-1].lstrip('\n') -%}
      {%- set thought = parts[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > last.question and (loop.last or thought) -%}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') -}}
    {%- else -%}
      {{- said -}}
    {%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {%- if said or not loop.first %}{{- '\n' -}}{% endif -%}
      {%- set call = call.function or call -%}
      {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' -}}
      {{- call.arguments if call.arguments is string else call.arguments|tojson -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' -}}{% endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' -}}{% endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{% endif -%}
"""

# The variants that open the think block in the generation prompt, though earlier turns are rendered without one.
QWEN3_THINKING = QWEN3.replace(
    "{{- '<|im_start|>assistant\\n' -}}{% endif -%}", "{{- '<|im_start|>assistant\\n<think>\\n' -}}{% endif -%}"
)

QWEN25 = r"""
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{% endif -%}
"""

LLAMA3 = r"""
{{- bos_token -}}
{%- set system = '' -%}
{%- set rest = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set system, rest = messages[0].content|trim, messages[1:] -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' -}}
{{- system + '<|eot_id|>' -}}
{%- for m in rest -%}
  {%- if 'tool_calls' in m -%}
    {%- if m.tool_calls|length != 1 -%}
      {{- raise_exception('This model only supports single tool-calls at once!') -}}
    {%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments|tojson + '}<|eot_id|>' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content|tojson + '<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{% endif -%}
"""

LLAMA2 = r"""
{%- for m in messages -%}
  {%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content.strip() + ' [/INST]' -}}
  {%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token -}}{% endif -%}
{%- endfor -%}
"""

GENERATION_TAGS = r"""
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' -}}
  {%- if m.role == 'assistant' -%}
    {% generation %}{{- m.content + '<|im_end|>' -}}{% endgeneration %}
  {%- else -%}
    {{- m.content + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{% endif -%}
"""

# Ends the conversation with a token of its own, after the one that ends the turn.
CLOSED = r"""
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{% endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '<|endoftext|>' -}}
"""

# No special token anywhere: nothing but the next speaker shows that a turn has ended.
SCRIPT = r"""
{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' -}}{% endfor -%}
{%- if add_generation_prompt %}{{- 'assistant: ' -}}{% endif -%}
"""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>",
)  # fmt: skip
