"""How well each model predicts a text, with standard errors.

The window, the losses of its steps, and what chance makes of their sums: all statistics of texts stand here, and the
sweep uses them too. How figures are shown is not known here. Read models.py before this.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.child.findings import make_finding, with_stderr
from slerpkit.evaluation.models import NO_NUMBERS, check_generates_text, loaded_model, with_fallback_to_cpu
from slerpkit.files import file_size, read_bytes
from slerpkit.lazy import torch
from slerpkit.merge.events import WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.parity.configs import context_limit

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.evaluation.models import ComparedModels
    from slerpkit.merge.events import Observer

MAX_TEXT_BYTES = 100_000_000  # of a text that models are measured on
WINDOW_TOKENS = 1024  # of context at most; half of them are new in each step
LOGIT_ROWS = 256  # turned into float32 at once
MAX_NATS = 700  # a token, beyond which a perplexity is no number any more


def read_judged_text(path: Path) -> str:
    """A text to be predicted. Raises SlerpMergeError where there is none, or none in it."""
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "is not there"
        raise SlerpMergeError(f"The text {path} {why}.", "Give a text file, in UTF-8.")
    if file_size(path) > MAX_TEXT_BYTES:
        what = f"The text {path} is larger than {format_bytes(MAX_TEXT_BYTES)}."
        raise SlerpMergeError(what, "A megabyte or less tells as much, sooner.")
    data = read_bytes(path, MAX_TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SlerpMergeError(f"The text {path} is not UTF-8: {error}.", "Save it as UTF-8.") from error
    if not text.strip():
        raise SlerpMergeError(f"The text {path} is empty.", "Give a file with some pages of text.")
    return text


@dataclass(frozen=True)
class TextLoss:
    """How well one model predicts one text, by a window that slides over it."""

    steps: tuple[int, ...]  # tokens that each step of the window predicts
    byte_count: int  # of the text that those stand for, in UTF-8
    nats: tuple[float, ...]  # of each step: -log p, summed over its tokens

    @property
    def tokens(self) -> int:
        """That were predicted: all but the first."""
        return sum(self.steps)

    @property
    def perplexity(self) -> float:
        """e to the mean loss of a token in nats."""
        return math.exp(math.fsum(self.nats) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the text in UTF-8, so that models of different tokenizers can be compared."""
        return math.fsum(self.nats) / math.log(2) / self.byte_count

    @property
    def items(self) -> tuple[tuple[float, float], ...]:
        """(bits, bytes) of each step, whose sums make bits_per_byte."""
        width = self.byte_count / self.tokens
        return tuple((nats / math.log(2), count * width) for nats, count in zip(self.nats, self.steps))


def ratio_of(items: Iterable[Sequence[float]]) -> float:
    """The sum of the first over the sum of the second part of each item: bits per byte, or a mean where those are 1."""
    amounts, weights = zip(*items)
    return math.fsum(amounts) / math.fsum(weights)


def standard_error(items: Sequence[Sequence[float]]) -> float | None:
    """Of ratio_of independent items; None where there are too few to tell.

    Formula: W. G. Cochran, Sampling Techniques (1977), chapter 6, the variance of a ratio estimate.
    """
    count = len(items)
    if count < 2:
        return None
    ratio, total = ratio_of(items), math.fsum(weight for _, weight in items)
    residuals = math.fsum((amount - ratio * weight) ** 2 for amount, weight in items)
    return math.sqrt(count / (count - 1) * residuals) / total


def error_of_difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the difference of two ratios: paired where the items are the same ones, else of both."""
    if [weight for _, weight in left] == [weight for _, weight in right]:
        return standard_error([(a - b, weight) for (a, weight), (b, _) in zip(left, right)])
    errors = standard_error(left), standard_error(right)
    return None if None in errors else math.hypot(*errors)


def window_of(models: ComparedModels) -> int:
    """Tokens of context for all models alike: what each of them can look back on."""
    limits = [limit for checkpoint in models.checkpoints.values() if (limit := context_limit(checkpoint))]
    return min(WINDOW_TOKENS, *limits) if limits else WINDOW_TOKENS


def sliding_windows(count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, tokens that are predicted for the first time) of a window moved over `count` tokens by its half."""
    covered = 1  # nothing stands before the first token to predict it from
    for begin in range(0, count, max(1, window // 2)):
        end = min(begin + window, count)
        if end > covered:
            yield begin, end, end - covered
        covered = end
        if end == count:
            return


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens. Raises SlerpMergeError where there are no two of them."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise SlerpMergeError("The text has fewer than two tokens, so there is none to predict.", "Give a longer one.")
    return ids


def text_loss(
    model: Any, tokenizer: Any, text: str, ids: Sequence[int], window: int, advance: Callable[[int, int], object]
) -> TextLoss:
    """-log p of every token of a text but the first, each seen with half a window or more before it, where there is.

    As the transformers documentation computes "perplexity of fixed-length models", with a stride of half a window.
    ids: the text's, as token_ids has them. advance: told the tokens and the bytes of the text that each step did.
    Raises SlerpMergeError where a probability is no number.
    """
    tokens = torch.tensor(ids, device=model.device)
    size, done = len(text.encode()), 0
    nats, steps = [], []
    for begin, end, fresh in sliding_windows(len(ids), window):
        logits = model(input_ids=tokens[begin:end].unsqueeze(0), use_cache=False).logits[0, -fresh - 1 : -1]
        targets = tokens[end - fresh : end]
        nats.append(
            math.fsum(
                float(torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum"))
                for part in (slice(start, start + LOGIT_ROWS) for start in range(0, fresh, LOGIT_ROWS))
            )
        )
        steps.append(fresh)
        before, done = done, size * sum(steps) // (len(ids) - 1)
        advance(fresh, done - before)
    if not math.fsum(nats) < MAX_NATS * sum(steps):
        what = "A model gives a probability that is no number, or next to none."
        raise SlerpMergeError(what, NO_NUMBERS)
    first = "" if ids[0] in tokenizer.all_special_ids else tokenizer.decode(ids[:1])
    return TextLoss(tuple(steps), max(1, size - len(first.encode())), tuple(nats))


def lose_on_texts(
    models: ComparedModels,
    role: str,
    texts: Sequence[str],
    device_and_dtype: tuple[str, str],
    window: int,
    advance: Callable[[int, int], object],
    begin: Callable[[int], object] = lambda tokens: None,
) -> list[TextLoss]:
    """One model's losses on several texts; window in tokens, `advance` as in text_loss.

    begin: told the tokens that there are to predict, once the model is loaded.
    """
    with loaded_model(models, role, *device_and_dtype) as (model, tokenizer):
        ids = [token_ids(tokenizer, text) for text in texts]
        begin(sum(map(len, ids)) - len(ids))
        return [text_loss(model, tokenizer, text, own, window, advance) for text, own in zip(texts, ids)]


def compare_perplexity(models: ComparedModels, paths: Sequence[Path], observe: Observer) -> list[Finding]:
    """How well each model predicts each text: a finding for each text. One model is in memory at a time.

    Raises SlerpMergeError where a text is empty, or a model cannot be loaded or does not predict texts.
    """
    texts = [read_judged_text(path) for path in paths]
    for checkpoint in models.checkpoints.values():
        check_generates_text(checkpoint, reads_on=True)
    window = window_of(models)

    def losses_of(role: str, device_and_dtype: tuple[str, str]) -> list[TextLoss]:
        observe(WorkBegan(f"Loading the {role}", 0))
        return lose_on_texts(
            models,
            role,
            texts,
            device_and_dtype,
            window,
            lambda tokens, _: observe(WorkAdvanced(tokens)),
            lambda tokens: observe(WorkBegan(f"Measuring the {role}", tokens, unit="tokens")),
        )

    def work(device: str, dtype: str) -> list[Finding]:
        losses = {role: losses_of(role, (device, dtype)) for role, _ in models.folders}
        observe(WorkEnded())
        measured = describe_window(window, dtype, device)
        return [
            perplexity_finding(path.name, text, measured, {role: losses[role][number] for role in losses})
            for number, (path, text) in enumerate(zip(paths, texts))
        ]

    return with_fallback_to_cpu(models, observe, work)


def describe_window(window: int, dtype: str, device: str) -> str:
    """How a text was read, in words."""
    return f"Sliding window of {window} tokens, {max(1, window // 2)} of them new in each step; {dtype} on {device}."


def perplexity_finding(name: str, text: str, measured: str, losses: Mapping[str, TextLoss]) -> Finding:
    """What one text told of each model, and of the child against each of the others. losses: by role."""
    if any(len(loss.nats) < 2 for loss in losses.values()):
        measured += " The text is shorter than a window and a half, so how far chance goes in it is not known."
    models = [
        {
            "role": role,
            "tokens": loss.tokens,
            "perplexity": loss.perplexity,
            "bits_per_byte": loss.bits_per_byte,
            "stderr": standard_error(loss.items),
        }
        for role, loss in losses.items()
    ]
    child = losses["child"]
    differences = {
        role: {
            "bits_per_byte": child.bits_per_byte - loss.bits_per_byte,
            "stderr": error_of_difference(child.items, loss.items),
        }
        for role, loss in losses.items()
        if role != "child"
    }
    return make_finding(
        "perplexity",
        "Perplexity",
        f"Perplexity on {name}",
        ("model", "tokens", "perplexity", "bits per byte"),
        [
            (
                model["role"],
                f"{model['tokens']:,}",
                f"{model['perplexity']:.4f}",
                with_stderr(model["bits_per_byte"], model["stderr"]),
            )
            for model in models
        ],
        measured,
        {
            "text": name,
            "bytes": len(text.encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "models": models,
            "child_against": differences,
        },
        [describe_difference(role, **difference) for role, difference in differences.items()],
    )


def describe_difference(role: str, bits_per_byte: float, stderr: float | None) -> str:
    """The child's bits per byte less another model's, and what that is worth: within two standard errors, nothing."""
    verdict = "better" if bits_per_byte < 0 else "worse"
    if stderr is None:
        verdict += ", as far as so short a text tells"
    elif abs(bits_per_byte) <= 2 * stderr:
        verdict = "not to be told apart"
    return f"child against {role}: {with_stderr(bits_per_byte, stderr, '+.4f')} bits per byte: {verdict}"
