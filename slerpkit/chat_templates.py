"""Chat templates that a recipe may ask for by name, for a child that talks as neither parent does.

Each is written from the public description of its format, named beside it. They render as `apply_chat_template` of
transformers renders: messages with role and content, `bos_token`, `eos_token`, `add_generation_prompt`.
"""

from __future__ import annotations

import re

# Stanford Alpaca's prompt, https://github.com/tatsu-lab/stanford_alpaca#data-release. A turn ends as a text does.
ALPACA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content.strip() + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- '### Instruction:\n' + message.content.strip() + '\n\n' }}
    {%- else %}
        {{- '### Response:\n' + message.content.strip() + eos_token + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\n' }}
{%- endif %}
"""

# ChatML, https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# EXAONE 3, https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct: without a system turn there is an empty one.
EXAONE = """\
{%- if not messages or messages[0].role != 'system' %}
    {{- '[|system|][|endofturn|]\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message.role + '|]' + message.content.strip() }}
    {{- '\n' if message.role == 'user' else '[|endofturn|]\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""

# Llama 3, https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# Mistral 7B Instruct, https://docs.mistral.ai/guides/tokenization: a system turn stands before the first of the user's.
MISTRAL = """\
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set system.text = message.content.strip() + '\n\n' %}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + system.text + message.content.strip() + ' [/INST]' }}
        {%- set system.text = '' %}
    {%- else %}
        {{- ' ' + message.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}
"""

CHAT_TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "llama3": LLAMA_3, "mistral": MISTRAL}

# Marks that formats are known to put around a turn, and those that end one, where a model should stop.
TURN_MARK = re.compile(r"<\|\w+\|>|\[\|\w+\|\]|<(?:start|end)_of_turn>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "[|endofturn|]", "<end_of_turn>", "<|end|>", "<|end_of_turn|>")


def is_template_text(text: str) -> bool:
    """Whether a text is a chat template of its own, in Jinja, and not the name of one."""
    return re.search(r"\{\{|\{%", text) is not None
