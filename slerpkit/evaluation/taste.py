"""The same prompts, answered side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.evaluation.models import check_generates_text, loaded_model, with_fallback_to_cpu
from slerpkit.merge.events import WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.parity.configs import context_limit, is_encoder_decoder

if TYPE_CHECKING:
    from slerpkit.evaluation.models import ComparedModels
    from slerpkit.merge.events import Observer
    from slerpkit.parents.checkpoint import Checkpoint

TASTE_TOKENS = 120  # of an answer, at most


def taste(lineup: ComparedModels, prompts: Sequence[str], observe: Observer) -> list[dict[str, Any]]:
    """What each model answers to each prompt, greedily, so that it can be repeated: an entry for each prompt.

    Raises SlerpMergeError where a model cannot be loaded or cannot generate, or where a prompt is empty or too long.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise SlerpMergeError("A prompt is empty.", "Give a question, or the beginning of a sentence.")
    for checkpoint in lineup.checkpoints.values():
        check_generates_text(checkpoint, reads_on=False)

    def work(device: str, dtype: str) -> list[dict[str, Any]]:
        answers: dict[str, list[tuple[str, bool]]] = {}
        observe(WorkBegan("Tasting", len(lineup.folders) * len(prompts)))
        for role, _ in lineup.folders:
            answers[role] = answers_of(lineup, role, prompts, (device, dtype), observe)
        observe(WorkEnded())
        entries = []
        for number, prompt in enumerate(prompts):
            talked = [role for role in answers if answers[role][number][1]]
            through = f"through the chat templates of {', '.join(talked)}" if talked else "without a chat template"
            measured = f"Greedy, at most {TASTE_TOKENS} tokens, {through}, {dtype} on {device}."
            found = {role: answers[role][number][0] for role in answers}
            entries.append({"prompt": prompt, "measured": measured, "answers": found})
        return entries

    return with_fallback_to_cpu(lineup, observe, work)


def answers_of(
    lineup: ComparedModels, role: str, prompts: Sequence[str], place: tuple[str, str], observe: Observer
) -> list[tuple[str, bool]]:
    """One model's answers. A function of its own, so that no name holds on to the model when the next one loads."""
    with loaded_model(lineup, role, *place) as (model, tokenizer):
        found = []
        for prompt in prompts:
            found.append(answer_to(prompt, model, tokenizer, lineup.checkpoints[role]))
            observe(WorkAdvanced(1))
        return found


def answer_to(prompt: str, model: Any, tokenizer: Any, checkpoint: Checkpoint) -> tuple[str, bool]:
    """(a model's greedy answer, whether its chat template was applied)."""
    talks = bool(getattr(tokenizer, "chat_template", None))
    text = prompt
    if talks:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a program of a stranger's, run in a sandbox, fails in its own ways
            what = f"The chat template of {checkpoint.name} cannot take the prompt: {shorten(str(error), 200)}"
            raise SlerpMergeError(what, "Give another prompt, or correct the template in its folder.") from error
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not talks, return_token_type_ids=False)
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
        **inputs.to(model.device), max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=padding
    )
    start = 0 if is_encoder_decoder(checkpoint) else count
    return tokenizer.decode(output[0][start:], skip_special_tokens=True).strip(), talks
