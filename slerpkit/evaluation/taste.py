"""The same prompts, answered by parents and child side by side.

Answers are greedy, so that they can be had again. How they are shown or kept is not known here: a finding carries its
own table. Read models.py before this, and child/findings.py for what a finding is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.child.findings import make_finding
from slerpkit.evaluation.limits import text_within_limits
from slerpkit.evaluation.models import check_generates_text, loaded_model, with_fallback_to_cpu
from slerpkit.merge.events import WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.messages import SlerpMergeError
from slerpkit.parity.configs import context_limit, is_encoder_decoder

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.evaluation.models import ComparedModels
    from slerpkit.merge.events import Observer
    from slerpkit.parents.checkpoint import Checkpoint

TASTE_TOKENS = 120  # of an answer, at most


def taste(models: ComparedModels, prompts: Sequence[str], observe: Observer) -> list[Finding]:
    """What each model answers to each prompt, greedily: a finding for each prompt.

    Raises SlerpMergeError where a model cannot be loaded or cannot generate, or where a prompt is empty or too long.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise SlerpMergeError("A prompt is empty.", "Give a question, or the beginning of a sentence.")
    for checkpoint in models.checkpoints.values():
        check_generates_text(checkpoint, reads_on=False)

    def work(device: str, dtype: str) -> list[Finding]:
        answers: dict[str, list[tuple[str, bool]]] = {}
        for role, _ in models.folders:
            answers[role] = answers_of(models, role, prompts, (device, dtype), observe)
        observe(WorkEnded())
        return [
            taste_finding(prompt, {role: answers[role][number] for role in answers}, device, dtype)
            for number, prompt in enumerate(prompts)
        ]

    return with_fallback_to_cpu(models, observe, work)


def taste_finding(prompt: str, answers: Mapping[str, tuple[str, bool]], device: str, dtype: str) -> Finding:
    """What was answered to one prompt. answers: by role, each as answer_to has it."""
    templated = [role for role, (_, by_template) in answers.items() if by_template]
    through = f"through the chat templates of {', '.join(templated)}" if templated else "without a chat template"
    return make_finding(
        "taste",
        "Tastes",
        prompt,
        ("model", "answer"),
        [(role, answer or "(nothing)") for role, (answer, _) in answers.items()],
        measured=f"Greedy, at most {TASTE_TOKENS} tokens, {through}, {dtype} on {device}.",
        figures={"prompt": prompt, "answers": {role: answer for role, (answer, _) in answers.items()}},
    )


def answers_of(
    models: ComparedModels, role: str, prompts: Sequence[str], device_and_dtype: tuple[str, str], observe: Observer
) -> list[tuple[str, bool]]:
    """One model's answers. A function of its own, so that no name holds on to the model when the next one loads."""
    answers = []
    observe(WorkBegan(f"Loading the {role}", 0))
    with loaded_model(models, role, *device_and_dtype) as (model, tokenizer):
        observe(WorkBegan(f"Tasting the {role}", TASTE_TOKENS * len(prompts), unit="tokens"))
        for prompt in prompts:
            watched = WatchedAnswer(observe)
            answers.append(answer_to(prompt, model, tokenizer, models.checkpoints[role], watched))
            watched.finish()
    return answers


class WatchedAnswer:
    """Tells of each token of one answer; generate() calls it a streamer."""

    def __init__(self, observe: Observer) -> None:
        self.observe = observe
        self.tokens = -1  # the first call brings the prompt

    def put(self, tokens: Any) -> None:
        """Told of the prompt, then of each token."""
        self.tokens += 1
        if self.tokens:
            self.observe(WorkAdvanced(1))

    def end(self) -> None:
        """Told of the answer's end."""

    def finish(self) -> None:
        """Counts what a short answer left as done."""
        self.observe(WorkAdvanced(TASTE_TOKENS - max(self.tokens, 0)))


def answer_to(
    prompt: str, model: Any, tokenizer: Any, checkpoint: Checkpoint, streamer: WatchedAnswer | None = None
) -> tuple[str, bool]:
    """(a model's greedy answer, whether its chat template was applied). streamer: told of it while it grows.

    Raises SlerpMergeError where the template or the model's context cannot take the prompt.
    """
    by_template = bool(getattr(tokenizer, "chat_template", None))
    text = prompt
    if by_template:
        talk = [{"role": "user", "content": prompt}]
        text = text_within_limits(
            lambda: tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False),
            f"The chat template of {checkpoint.name} cannot take the prompt",
            "Give another prompt, or correct the template in its folder.",
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not by_template, return_token_type_ids=False)
    count = inputs["input_ids"].shape[1]
    limit = context_limit(checkpoint)
    room = TASTE_TOKENS if limit is None else min(TASTE_TOKENS, limit - count)
    if room < 1 or not count:
        what = f"The prompt has {count} tokens; {checkpoint.name} takes from 1 to {(limit or 2) - 1}."
        raise SlerpMergeError(what, "Give another prompt.")
    ends = model.generation_config.eos_token_id
    padding = model.generation_config.pad_token_id
    padding = padding if padding is not None else ends[0] if isinstance(ends, list) else ends
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        pad_token_id=padding,
        streamer=streamer,
    )
    start = 0 if is_encoder_decoder(checkpoint) else count
    return tokenizer.decode(output[0][start:], skip_special_tokens=True).strip(), by_template
