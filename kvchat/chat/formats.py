"""The built-in chat formats, as templates of the same language as the models' own.

They do not say the first BOS: it is put before them where the tokenizer has one.
"""

from __future__ import annotations

PLAIN = "plain"  # no roles: the model goes on with the text

BUILTIN_FORMATS = {
    "llama2": """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}
{%- elif m.role == 'user' %}
{{- (bos_token if not loop.first and not (loop.index == 2 and ns.system) else '') }}
{{- '[INST] ' + ns.system + m.content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- else %}
{{- ' ' + m.content + ' ' + eos_token }}
{%- endif %}
{%- endfor %}""",
    "llama3": """\
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "chatml": """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "mistral": """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- set ns.system = m.content + '\\n\\n' %}
{%- elif m.role == 'user' %}
{{- '[INST] ' + ns.system + m.content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- else %}
{{- ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}""",
    "zephyr": """\
{%- for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}""",
    PLAIN: """\
{%- for m in messages %}
{{- ('\\n' if m.role == 'user' and not loop.first else '') + m.content }}
{%- endfor %}""",
}
