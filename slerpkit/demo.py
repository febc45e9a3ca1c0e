"""Two tiny parents, trained on the spot: something to merge where there is no model.

Knows nothing of merging; the script merges them as it merges any two.
"""

from __future__ import annotations

import copy
import random
import tempfile
from pathlib import Path
from typing import Any

from slerpkit.lazy import torch
from slerpkit.merge.save_directory import check_save_directory

DEMO_TOPICS = {
    "demo-sailor": "the sea is wide and the {} sails over the {} waves until the {} wind sleeps . ",
    "demo-gardener": "the garden is warm and the {} grows under the {} leaves until the {} rain falls . ",
}
DEMO_WORDS = ("small", "old", "quiet", "green", "bright", "slow", "happy", "silver")
DEMO_PROMPT = "the"
DEMO_CHILD = "demo-child"
DEMO_MODELS = (*DEMO_TOPICS, DEMO_CHILD)


def demo_text(topic: str, lines: int, seed: int) -> str:
    """Sentences on one topic, the same for the same seed."""
    chooser = random.Random(seed)
    return "".join(DEMO_TOPICS[topic].format(*chooser.choices(DEMO_WORDS, k=3)) for _ in range(lines))


def make_demo_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 entries, trained on the demo's own sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text(topic, 50, 0) for topic in DEMO_TOPICS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def teach_demo_model(model: Any, tokens: torch.Tensor, steps: int, seed: int) -> None:
    """A few steps of AdamW on windows of 32 tokens."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 33, (16,), generator=generator)
        batch = torch.stack([tokens[start : start + 32] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_demo_parents(folder: Path | None) -> tuple[Path, Path]:
    """Trains a tiny Llama on two topics, then one copy of it on each. Returns their folders. Some seconds.

    folder: where they are put; None: a new one among the system's temporary files. Raises SlerpMergeError, before
    anything is made, where DEMO_CHILD could not stand beside them.
    """
    if folder is not None:
        check_save_directory(folder / DEMO_CHILD, (), overwrite=True)
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    tokenizer = make_demo_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = LlamaForCausalLM(config)
    texts = {topic: torch.tensor(tokenizer(demo_text(topic, 120, 1))["input_ids"]) for topic in DEMO_TOPICS}
    teach_demo_model(base, torch.cat(list(texts.values())), steps=50, seed=2)
    models = {topic: copy.deepcopy(base) for topic in texts}
    for topic, tokens in texts.items():
        teach_demo_model(models[topic], tokens, steps=25, seed=3)
    folder = folder or Path(tempfile.mkdtemp(prefix="slerpmerge-demo-"))
    for topic, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder / topic)
        tokenizer.save_pretrained(folder / topic)
    primary, secondary = (folder / topic for topic in texts)
    return primary, secondary
