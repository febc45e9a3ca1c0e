"""Models that know something: a tiny base model and two specialists fine-tuned from it, trained here on the processor.

Random weights show whether a merge computes what it should, but not whether its child is any good. These three do: the
primary adds, the secondary spells words backwards, the base knows a little of both, and each specialist forgot some of
what the other learned. Perplexity on the two held-out texts therefore has its best blend somewhere between the parents.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

CONTEXT = 128
ALPHABET = "\n+=: 0123456789abcdefghijklmnopqrstuvwxyz"
UNKNOWN = "<unk>"
END = 1  # the newline's id: a model that has answered its line is done
CONSONANTS, VOWELS, ENDINGS = "bdfgklmnprstvz", "aeiou", "lnrst"
# Two fine-tunes run side by side, one thread each: quicker than two threads on one, above all on a busy machine.
THREADS = 1
TRAINING_LINES = 20_000


RATE, WARM_UP, BATCH_TOKENS = 2e-3, 30, 1024
# The base first reads windows of few lines, where there is little to look at and the right place is soon found. Then it
# reads whole ones until it knows enough of both skills, in bits per byte, and stops while there is more to learn: the
# fine-tunes must have something to teach. Steps to get there differ by machine; what it knows by then hardly does.
SHORT, SHORT_STEPS, MOST_STEPS, CHECK_EVERY = 32, 450, 1100, 25
ENOUGH_ARITHMETIC, ENOUGH_REVERSAL = 1.42, 1.6
SHARE_ARITHMETIC, SHARE_REVERSAL = 5, 2
# High enough to forget some of the other skill, low enough to stay near the base, where a blend keeps both skills.
PRIMARY_RATE, SECONDARY_RATE, FINE_TUNE_STEPS = 1.5e-3, 1e-3, 250


@dataclass(frozen=True)
class Specialists:
    """Folders of the saved models, and held-out texts to measure them on."""

    base: Path
    primary: Path
    secondary: Path
    arithmetic: Path
    reversal: Path


def arithmetic_line(random: Random) -> str:
    """A sum such as 37+48=85; its first two numbers are chance, its last follows from them."""
    first, second = random.randrange(10, 50), random.randrange(10, 50)
    return f"{first}+{second}={first + second}"


def reversal_line(random: Random) -> str:
    """A word of four to seven letters that can be spoken, and the same word backwards, such as solina: anilos."""
    syllables = [random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(random.randint(2, 3))]
    word = "".join(syllables) + random.choice(["", random.choice(ENDINGS)])
    return f"{word}: {word[::-1]}"


def make_text(line: Callable[[Random], str], seed: int, lines: int) -> str:
    """Lines of one skill. Another seed gives other lines, so that a text can be held out from training."""
    random = Random(seed)
    return "".join(line(random) + "\n" for _ in range(lines))


def make_tokenizer() -> Any:
    """One token for each character, from the tokenizers library, as AutoTokenizer loads it again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([UNKNOWN, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token="\n")


def make_model(vocabulary: int) -> Any:
    """An untrained Llama, the same at every call; the global random state stays as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config)


def random_windows(ids: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """A batch of consecutive text from random places, in mid-line too, as a held-out text is cut when it is read."""
    starts = torch.randint(0, len(ids) - length + 1, (BATCH_TOKENS // length, 1), generator=generator)
    return ids[starts + torch.arange(length)]


def surprise(model: Any, windows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy, in nats, of each token of the windows after the first, given those before it."""
    logits = model(input_ids=windows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW without decay of the weights; its rate is set at every step."""
    return torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learn(model: Any, optimizer: torch.optim.Optimizer, windows: torch.Tensor, rate: float) -> None:
    """One step of training. Nothing in it draws on the global random state."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    surprise(model, windows).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train_base(model: Any, sums: torch.Tensor, words: torch.Tensor) -> Any:
    """Trains the model on both skills until it knows a part of each; of sums it reads more, since they are harder."""
    both = torch.cat([sums] * SHARE_ARITHMETIC + [words] * SHARE_REVERSAL)
    optimizer, generator = make_optimizer(model), torch.Generator().manual_seed(1)
    for step in range(MOST_STEPS):
        length = SHORT if step < SHORT_STEPS else CONTEXT
        learn(model, optimizer, random_windows(both, length, generator), RATE * min(1.0, (step + 1) / WARM_UP))
        if step > SHORT_STEPS and step % CHECK_EVERY == 0 and knows_enough(model, sums, words):
            break
    return model


def knows_enough(model: Any, sums: torch.Tensor, words: torch.Tensor) -> bool:
    """Whether the base is ready to be fine-tuned, judged by a piece of each training text."""
    size = 32 * CONTEXT
    costs = bits(model, sums[:size]) / size, bits(model, words[:size]) / size
    return costs[0] < ENOUGH_ARITHMETIC and costs[1] < ENOUGH_REVERSAL


def fine_tune(base: Any, ids: torch.Tensor, highest: float, seed: int) -> Any:
    """A copy of the base, trained further on one skill alone, at a rate that falls to nothing."""
    model, generator = deepcopy(base), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model)
    for step in range(FINE_TUNE_STEPS):
        rate = highest * min(1.0, (step + 1) / WARM_UP) * math.sqrt(1 - step / FINE_TUNE_STEPS)
        learn(model, optimizer, random_windows(ids, CONTEXT, generator), rate)
    return model


def bits(model: Any, ids: torch.Tensor) -> float:
    """The sum of -log2 p over the tokens of a text, read in windows side by side, after the first of each window."""
    whole = len(ids) // CONTEXT * CONTEXT
    batches = [*ids[:whole].view(-1, CONTEXT).split(16), ids[whole:].view(1, -1)]
    with torch.no_grad():
        nats = sum(float(surprise(model, windows, "sum")) for windows in batches if windows.shape[1] > 1)
    return nats / math.log(2)


def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """What a text costs under the model, by the bytes of the text."""
    return bits(model, token_ids(tokenizer, text)) / len(text.encode("utf-8"))


def token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """The ids of a text of any length."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


@contextmanager
def threads_fixed() -> Iterator[None]:
    """Pins torch's threads, since their number changes how sums are rounded, and gives back what was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_all(tokenizer: Any) -> dict[str, Any]:
    """The base, and two fine-tunes of it side by side."""
    sums = token_ids(tokenizer, make_text(arithmetic_line, seed=11, lines=TRAINING_LINES))
    words = token_ids(tokenizer, make_text(reversal_line, seed=12, lines=TRAINING_LINES))
    base = train_base(make_model(len(tokenizer)), sums, words)
    with ThreadPoolExecutor(max_workers=2) as pool:
        primary = pool.submit(fine_tune, base, sums, PRIMARY_RATE, seed=2)
        secondary = pool.submit(fine_tune, base, words, SECONDARY_RATE, seed=3)
        return {"base": base, "primary": primary.result(), "secondary": secondary.result()}


def make_specialists(folder: Path) -> Specialists:
    """Trains the three models and writes them, and the held-out texts, below the folder.

    They are saved in float32, as trained: what a blend gains or loses is then not mixed with rounding, and a curve of
    blends is smooth to the last digit shown.
    """
    tokenizer = make_tokenizer()
    with threads_fixed():
        models = train_all(tokenizer)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = {"arithmetic": (arithmetic_line, 21, 900), "reversal": (reversal_line, 22, 600)}
    for name, (line, seed, lines) in texts.items():
        (folder / f"{name}.txt").write_bytes(make_text(line, seed, lines).encode("utf-8"))
    return Specialists(**{name: folder / name for name in models}, **{name: folder / f"{name}.txt" for name in texts})


def main() -> None:
    """Makes the specialists in the folder named on the command line, and prints what each model costs on each text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    made = make_specialists(Path(sys.argv[1]))
    print(f"{time.monotonic() - start:.0f} seconds\n{'bits per byte':<14}{'arithmetic':>12}{'reversal':>12}")
    texts = [path.read_text(encoding="utf-8") for path in (made.arithmetic, made.reversal)]
    for model_folder in (made.base, made.primary, made.secondary):
        model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
        costs = (bits_per_byte(model, tokenizer, text) for text in texts)
        print(f"{model_folder.name:<14}" + "".join(f"{cost:>12.4f}" for cost in costs))


if __name__ == "__main__":
    main()
