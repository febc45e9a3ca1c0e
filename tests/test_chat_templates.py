"""Chat templates by name, as transformers renders them, held against prompts that the formats' descriptions show."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from slerpkit.chat_templates import CHAT_TEMPLATES, is_template_text

TALK = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And now?"},
]
PROMPTS = {
    "alpaca": (
        "<s>Answer in one word.\n\n### Instruction:\nHello\n\n### Response:\nHi</s>\n\n"
        "### Instruction:\nAnd now?\n\n### Response:\n"
    ),
    "chatml": (
        "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "exaone": (
        "[|system|]Answer in one word.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi[|endofturn|]\n"
        "[|user|]And now?\n[|assistant|]"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nAnswer in one word.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Answer in one word.\n\nHello [/INST] Hi</s>[INST] And now? [/INST]",
}


def render(name: str, talk: list[dict[str, str]], *, prompt: bool = True) -> str:
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATES[name]
    return wrapped.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_writes_a_prompt_as_its_format_describes(name):
    assert render(name, TALK) == PROMPTS[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_prompt_goes_on_from_the_talk_without_it(name):
    """The next turn is asked for behind what training saw, and not in place of some of it."""
    assert render(name, TALK).startswith(render(name, TALK, prompt=False))
    answered = [*TALK, {"role": "assistant", "content": "Now"}]
    assert render(name, answered, prompt=False).startswith(render(name, TALK))


def test_an_exaone_talk_without_a_system_turn_has_an_empty_one():
    assert render("exaone", TALK[1:]).startswith("[|system|][|endofturn|]\n[|user|]Hello\n")


def test_a_name_is_told_from_a_text():
    assert not any(map(is_template_text, (*CHAT_TEMPLATES, "auto", "primary", "{not so}")))
    assert all(map(is_template_text, (*CHAT_TEMPLATES.values(), "{{ messages[0].content }}", "{% if x %}y{% endif %}")))
