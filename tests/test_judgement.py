"""What parents and child say and know: against transformers itself, and what can be wrong with a text or a model."""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from slerpkit.child.report import CARD_MARKS, FINDINGS_MARK, amend_report
from slerpkit.evaluation.models import (
    ComparedModels,
    DeviceOutOfMemory,
    choose_device_and_dtype,
    generates_text,
    with_fallback_to_cpu,
)
from slerpkit.evaluation.perplexity import (
    TextLoss,
    compare_perplexity,
    error_of_difference,
    ratio_of,
    sliding_windows,
    standard_error,
)
from slerpkit.evaluation.taste import TASTE_TOKENS, taste, taste_finding
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded, ignore
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_checkpoint
from slerpkit.screen.figures import render_finding
from tests.builders import VOCABULARY, add_tokenizer, edit_json, make_pair, make_real_model, merge
from tests.conftest import fingerprint
from tests.pictures import RecordingConsole
from tests.test_command_line import run  # noqa: F401  (a fixture)

ALPHABET = [chr(0x4E00 + number) for number in range(1, VOCABULARY)]


def write_text(path: Path, characters: int, seed: int = 1) -> Path:
    """A text of the tiny models' own alphabet; each character is one token and three bytes."""
    path.write_text("".join(random.Random(seed).choices(ALPHABET, k=characters)), encoding="utf-8")
    return path


@pytest.fixture
def family(tmp_path, parents) -> ComparedModels:
    """Two real tiny models and their child, which are asked on the processor."""
    primary, secondary = (make_real_model(tmp_path / name, seed) for seed, name in ((1, "primary"), (2, "secondary")))
    parents.watch(primary, secondary)
    child = merge(primary, secondary, tmp_path / "child", device="cpu").child
    return ComparedModels((("primary", primary), ("secondary", secondary), ("child", child)), "cpu")


def direct_nats(folder: Path, text: str, window: int, stride: int) -> tuple[float, int]:
    """(nats, tokens) as the documentation of transformers computes the perplexity of a model of fixed length."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(part, labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())
        total, count, previous = total + float(loss) * predicted, count + predicted, end
        if end == ids.shape[1]:
            break
    return total, count


# ── Perplexity ──


@pytest.mark.parametrize("characters", [2, 63, 64, 65, 200, 333])
def test_perplexity_is_that_of_transformers(family, tmp_path, characters):
    path = write_text(tmp_path / "text.txt", characters)
    (finding,) = compare_perplexity(family, [path], ignore)
    models = finding["figures"]["models"]
    assert [model["role"] for model in models] == ["primary", "secondary", "child"]
    for model, (_, folder) in zip(models, family.folders):
        nats, tokens = direct_nats(folder, path.read_text("utf-8"), window=64, stride=32)
        assert model["tokens"] == tokens == characters - 1
        assert model["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert model["bits_per_byte"] == pytest.approx(nats / math.log(2) / (3 * tokens), rel=1e-4)


@pytest.mark.parametrize("window", [2, 7, 64])
@pytest.mark.parametrize("count", [2, 3, 63, 64, 65, 96, 97, 1000])
def test_every_token_but_the_first_is_predicted_once_with_half_a_window_before_it(count, window):
    seen: list[int] = []
    for begin, end, fresh in sliding_windows(count, window):
        assert end - begin <= window
        for position in range(end - fresh, end):
            assert position - begin >= min(position, window - window // 2)
            seen.append(position)
    assert seen == list(range(1, count))


def test_the_noise_of_a_text_is_what_chance_makes_of_it():
    """Steps of unequal length; of many texts drawn alike, the figures scatter as the noise of one says they do."""
    generator = torch.Generator().manual_seed(3)
    steps = (127, *[64] * 40, 17)

    def drawn() -> TextLoss:
        tokens = torch.rand(sum(steps), generator=generator, dtype=torch.float64) * 4
        return TextLoss(steps, 2 * sum(steps), tuple(float(part.sum()) for part in tokens.split(list(steps))))

    losses = [drawn() for _ in range(300)]
    scatter = float(torch.tensor([loss.bits_per_byte for loss in losses], dtype=torch.float64).std())
    told = sum(standard_error(loss.items) for loss in losses) / len(losses)
    assert told == pytest.approx(scatter, rel=0.15)
    assert ratio_of(losses[0].items) == pytest.approx(losses[0].bits_per_byte)


def test_a_difference_that_every_token_agrees_on_has_no_noise():
    steps = (1023, 76)
    left, right = (TextLoss(steps, 3000, tuple(count * each for count in steps)) for each in (2.0, 2.1))
    assert error_of_difference(left.items, right.items) == pytest.approx(0.0, abs=1e-12)


def test_texts_cut_into_other_steps_are_not_paired():
    left = [(1.0, 1.0), (5.0, 1.0), (9.0, 1.0), (3.0, 1.0)]
    assert error_of_difference(left, [(value + 0.1, 1.0) for value, _ in left]) == pytest.approx(0, abs=1e-9)
    assert error_of_difference(left, left[:3]) > 1
    assert error_of_difference(left, [(value, 2.0) for value, _ in left]) > 1


def test_a_text_shorter_than_a_window_is_measured_and_said_to_be(family, tmp_path):
    (finding,) = compare_perplexity(family, [write_text(tmp_path / "text.txt", 20)], ignore)
    assert "shorter than a window" in finding["measured"]
    assert finding["figures"]["child_against"]["primary"]["stderr"] is None
    assert finding["figures"]["models"][0]["stderr"] is None
    assert all(note.endswith("as far as so short a text tells") for note in finding["notes"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not there"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\xff\xfe\x00 not text", "is not UTF-8"),
        (chr(0x4E01).encode(), "fewer than two tokens"),
    ],
)
def test_a_text_that_is_none_is_refused_in_one_message(run, family, tmp_path, content, words):  # noqa: F811
    before = fingerprint(tmp_path)
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    outcome = run("--child", "child", "--perplexity", "text.txt")
    assert outcome.status == 1
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    (tmp_path / "text.txt").unlink(missing_ok=True)
    assert fingerprint(tmp_path) == before, "the child is as it was"


def test_before_a_merge_a_wrong_text_is_refused_and_nothing_is_written(run, family, tmp_path):  # noqa: F811
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes")
    outcome = run(*arguments, "--perplexity", "nowhere.txt")
    assert (outcome.status, (tmp_path / "other").exists()) == (1, False)
    assert "nowhere.txt is not there" in outcome.err


# ── Taste ──


def test_answers_are_greedy_and_the_models_own(family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "".join(ALPHABET[:5])
    findings = taste(family, [prompt, ALPHABET[7]], ignore)
    assert findings == taste(family, [prompt, ALPHABET[7]], ignore), "the same again"
    answers = findings[0]["figures"]["answers"]
    assert list(answers) == ["primary", "secondary", "child"]
    for role, folder in family.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        while ids.shape[1] < 64:  # the model's own limit
            with torch.no_grad():
                following = int(model(ids).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[following]])], dim=1)
            if following == 2:
                break
        assert answers[role] == tokenizer.decode(ids[0, 5:], skip_special_tokens=True).strip()


def test_a_chat_template_is_applied_where_there_is_one(family):
    child = family.folders[2][1]
    mark = ALPHABET[20]
    (child / "chat_template.jinja").write_text(f"{mark}{{{{ messages[0]['content'] }}}}{mark}", encoding="utf-8")
    edit_json(child / "tokenizer_config.json", chat_template=f"{mark}{{{{ messages[0]['content'] }}}}{mark}")
    (finding,) = taste(family, [ALPHABET[3]], ignore)
    assert "the chat templates of child" in finding["measured"]
    plain = ComparedModels((("child", child),), "cpu")
    (child / "chat_template.jinja").unlink()
    edit_json(child / "tokenizer_config.json", chat_template=...)
    (same,) = taste(plain, [mark + ALPHABET[3] + mark], ignore)
    assert same["figures"]["answers"]["child"] == finding["figures"]["answers"]["child"]


@pytest.mark.parametrize(("prompt", "words"), [("  ", "empty"), ("".join(ALPHABET * 2), "94 tokens")])
def test_a_prompt_that_cannot_be_answered_is_refused(family, prompt, words):
    with pytest.raises(SlerpMergeError, match=words):
        taste(family, [prompt], ignore)


def test_one_model_is_in_memory_at_a_time(family, tmp_path, monkeypatch):
    import transformers

    most = []
    load = transformers.LlamaForCausalLM.from_pretrained.__func__

    def counted(cls, *arguments, **settings):
        gc.collect()
        model = load(cls, *arguments, **settings)
        most.append(sum(type(thing) is transformers.LlamaForCausalLM for thing in gc.get_objects()))
        return model

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(counted))
    compare_perplexity(family, [write_text(tmp_path / "text.txt", 100)], ignore)
    taste(family, [ALPHABET[1]], ignore)
    assert most == [1] * 6


def test_progress_is_told_to_its_end(family, tmp_path):
    texts = [write_text(tmp_path / f"{seed}.txt", 150, seed) for seed in (1, 2)]
    events: list[object] = []
    compare_perplexity(family, texts, events.append)
    taste(family, [ALPHABET[1]], events.append)
    began = [(event.what, event.total, event.unit) for event in events if isinstance(event, WorkBegan)]
    deeds = [("Measuring", 2 * 149), ("Tasting", TASTE_TOKENS)]
    assert began == [
        stretch
        for deed, tokens in deeds
        for role, _ in family.folders
        for stretch in ((f"Loading the {role}", 0, ""), (f"{deed} the {role}", tokens, "tokens"))
    ]
    amounts = [event.amount for event in events if isinstance(event, WorkAdvanced)]
    assert sum(amounts) == sum(total for _, total, _ in began)
    assert max(amounts) < TASTE_TOKENS, "while an answer grows, not only at its end"
    assert sum(isinstance(event, WorkEnded) for event in events) == 2


def test_a_parent_without_a_tokenizer_reads_with_anothers(family, tmp_path):
    shutil.copytree(family.folders[1][1], tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    bare = ComparedModels((family.folders[0], ("secondary", tmp_path / "bare"), family.folders[2]), "cpu")
    text = write_text(tmp_path / "text.txt", 100)
    assert compare_perplexity(bare, [text], ignore) == compare_perplexity(family, [text], ignore)


# ── Models and devices that cannot ──


def make_encoders(folder: Path) -> tuple[Path, Path]:
    from transformers import BertConfig, BertForMaskedLM

    folders = folder / "bert-1", folder / "bert-2"
    for seed, path in enumerate(folders):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).save_pretrained(path)
        add_tokenizer(path)
    return folders


@pytest.mark.parametrize("flags", [("--taste", "x"), ("--perplexity", "text.txt")])
def test_an_encoder_cannot_be_asked_and_can_be_merged(run, tmp_path, flags):  # noqa: F811
    primary, secondary = make_encoders(tmp_path)
    write_text(tmp_path / "text.txt", 100)
    arguments = ("--primary", primary, "--secondary", secondary, "--save-dir", "child", "--yes")
    outcome = run(*arguments, *flags)
    assert outcome.status == 1
    assert "BertForMaskedLM, which reads texts and cannot write any" in outcome.err
    assert not (tmp_path / "child").exists()
    assert run(*arguments).status == 0


@pytest.mark.parametrize(
    ("architectures", "writes"),
    [
        (["LlamaForCausalLM"], True),
        (["GPT2LMHeadModel"], True),
        (["ReformerModelWithLMHead"], True),
        (["MarianMTModel"], True),
        (["VisionEncoderDecoderModel"], True),
        (["T5ForConditionalGeneration"], True),
        (["T5EncoderModel"], False),
        (["LlamaModel"], False),
        (["BertForMaskedLM"], False),
        (["BertForPreTraining"], False),
        (["LlamaForSequenceClassification"], False),
        ([], False),
        (..., False),
    ],
)
def test_a_models_name_tells_whether_it_writes_texts(tmp_path, architectures, writes):
    folder = make_pair(tmp_path)[0]
    edit_json(folder / "config.json", architectures=architectures)
    assert generates_text(open_checkpoint(folder)) == writes


def test_too_little_memory_is_one_message_and_the_child_stands(run, family, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("slerpkit.evaluation.models.free_memory", lambda: 1e6)
    monkeypatch.setattr("slerpkit.evaluation.sweep.free_memory", lambda: 1e6)
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes")
    outcome = run(*arguments, "--taste", ALPHABET[1])
    assert outcome.status == 1
    assert "of memory to be asked anything; 1.0 MB are free" in outcome.err
    assert f"The child stands in {tmp_path / 'other'}" in " ".join(outcome.err.split())
    assert (tmp_path / "other" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        MemoryError(),
    ],
)
def test_a_device_that_runs_out_of_memory_is_named(family, tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("slerpkit.evaluation.perplexity.text_loss", fail)
    with pytest.raises(DeviceOutOfMemory, match="The device cpu ran out of memory with primary"):
        compare_perplexity(family, [write_text(tmp_path / "text.txt", 100)], ignore)


def crowded(device: str, tried: list[str]) -> Sequence[str]:
    """Work that an accelerator has no memory for."""
    tried.append(device)
    if device != "cpu":
        raise DeviceOutOfMemory("primary", device)
    return tried


def test_an_accelerator_that_was_chosen_and_runs_full_gives_way_to_the_processor(family, monkeypatch):
    monkeypatch.setattr("slerpkit.evaluation.models.accelerators", lambda: {"cuda": True, "mps": False})
    monkeypatch.setattr("slerpkit.evaluation.models.accelerator_memory", lambda device: 1e12)
    events: list[object] = []
    chosen = ComparedModels(family.folders, "auto")
    tried = with_fallback_to_cpu(chosen, events.append, lambda device, dtype: crowded(device, []) and [device])
    assert tried == ["cpu"]
    (noted,) = (event.text for event in events if isinstance(event, Noted))
    assert "ran out of memory" in noted
    with pytest.raises(DeviceOutOfMemory):  # what the person asked for is not changed unasked
        with_fallback_to_cpu(ComparedModels(family.folders, "cuda"), ignore, lambda device, _: crowded(device, []))


@pytest.mark.parametrize(
    ("memory", "device_and_dtype"),
    [(1e12, ("cuda", "bfloat16")), (1e5, ("cpu", "float32"))],
)
def test_the_device_is_the_one_that_fits(family, monkeypatch, memory, device_and_dtype):
    monkeypatch.setattr("slerpkit.evaluation.models.accelerators", lambda: {"cuda": True, "mps": False})
    monkeypatch.setattr("slerpkit.evaluation.models.accelerator_memory", lambda device: memory)
    assert choose_device_and_dtype(ComparedModels(family.folders, "auto")) == device_and_dtype
    assert choose_device_and_dtype(ComparedModels(family.folders, "cpu")) == ("cpu", "float32")


def test_a_model_of_nothing_but_nan_is_refused(family, tmp_path):
    from safetensors.torch import load_file, save_file

    child = family.folders[2][1]
    tensors = load_file(child / "model.safetensors")
    nothing = {name: torch.full_like(v, torch.nan) for name, v in tensors.items()}
    save_file(nothing, child / "model.safetensors", {"format": "pt"})
    with pytest.raises(SlerpMergeError, match="a probability that is no number"):
        compare_perplexity(family, [write_text(tmp_path / "text.txt", 100)], ignore)


# ── What stays of it ──


def test_findings_join_the_report_and_the_card(run, family, tmp_path):  # noqa: F811
    write_text(tmp_path / "text.txt", 100)
    outcome = run("--child", "child", "--taste", ALPHABET[1], "--perplexity", "text.txt", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads((tmp_path / "child" / "merge_report.json").read_text("utf-8"))
    assert report["findings"] == outcome.report["findings"]
    assert [finding["kind"] for finding in report["findings"]] == ["taste", "perplexity"]
    card = (tmp_path / "child" / "README.md").read_text("utf-8")
    child = report["findings"][1]["figures"]["models"][2]
    assert f"| child | 99 | {child['perplexity']:.4f} | {child['bits_per_byte']:.4f}" in card
    assert "Sliding window of 64 tokens, 32 of them new in each step; float32 on cpu." in card
    assert f"> {ALPHABET[1]}" in card
    assert run("--child", "child", "--taste", ALPHABET[2]).status == 0
    report = json.loads((tmp_path / "child" / "merge_report.json").read_text("utf-8"))
    assert sum(finding["kind"] == "taste" for finding in report["findings"]) == 2


def test_what_a_person_wrote_into_the_card_stays(family):
    child = family.folders[2][1]
    card = child / "README.md"
    own = (
        card.read_text("utf-8").replace("# child", "# My best model\n\nMade on a rainy Sunday.")
        + "\nMy own last words.\n"
    )
    card.write_text(own, encoding="utf-8")
    amend_report(child, taste(family, [ALPHABET[1]], ignore))
    told = card.read_text("utf-8")
    assert "Made on a rainy Sunday." in told
    assert told.endswith("My own last words.\n")
    assert "## Tastes" in told


def test_a_card_without_marks_keeps_all_it_has(family):
    child = family.folders[2][1]
    (child / "README.md").write_text("Mine alone.\n", encoding="utf-8")
    amend_report(child, taste(family, [ALPHABET[1]], ignore))
    assert (child / "README.md").read_text("utf-8").startswith("Mine alone.\n\n<!--")


def test_an_answer_cannot_break_out_of_the_card(family):
    child = family.folders[2][1]
    wild = f"| a | b\n# Heading\r\n{CARD_MARKS[1]}"
    for _ in range(2):
        amend_report(child, [taste_finding(wild, {"child": (wild, False)}, "cpu", "float32")])
    card = (child / "README.md").read_text("utf-8")
    assert card.count(CARD_MARKS[1]) == 1
    assert card.count(FINDINGS_MARK) == 1
    assert "\n# Heading" not in card


def test_a_child_is_asked_with_a_merge_too(run, family, tmp_path):  # noqa: F811
    write_text(tmp_path / "text.txt", 100)
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes", "--json")
    outcome = run(*arguments, "--taste", ALPHABET[1], "--perplexity", "text.txt")
    assert outcome.status == 0, outcome.err
    assert {"child", "slerped"} <= outcome.report.keys()
    assert [finding["kind"] for finding in outcome.report["findings"]] == ["taste", "perplexity"]


def test_a_model_that_lacks_weights_is_not_asked(family, tmp_path):
    from safetensors.torch import load_file, save_file

    child = family.folders[2][1]
    tensors = {name: v for name, v in load_file(child / "model.safetensors").items() if "mlp" not in name}
    save_file(tensors, child / "other.safetensors", {"format": "pt"})
    (child / "other.safetensors").replace(child / "model.safetensors")
    with pytest.raises(SlerpMergeError, match="lacks weights: model.layers.0.mlp"):
        taste(family, [ALPHABET[1]], ignore)


@pytest.mark.parametrize(
    "harm",
    [
        lambda child: edit_json(child / "config.json", num_attention_heads="x"),
        lambda child: edit_json(child / "config.json", hidden_size=32),
        lambda child: (child / "tokenizer.json").write_text("{}"),
        lambda child: (child / "merge_report.json").write_text('{"findings": null}'),
        lambda child: (child / "merge_report.json").write_text('{"recipe": {"a": 1}}'),
        lambda child: (child / "merge_report.json").write_text("no JSON"),
        lambda child: edit_json(child / "config.json", attn_implementation="owner/kernel"),
        lambda child: (child / "adapter_config.json").write_text("{}"),
    ],
)
def test_a_damaged_child_is_one_message(run, family, tmp_path, harm):  # noqa: F811
    harm(family.folders[2][1])
    write_text(tmp_path / "text.txt", 100)
    for flags in (("--taste", ALPHABET[1]), ("--perplexity", "text.txt")):
        outcome = run("--child", "child", *flags)
        assert outcome.status == 1
        assert outcome.err.count("✗") == 1
        assert "Traceback" not in outcome.err


def test_what_was_found_is_told_even_where_the_report_cannot_take_it(run, family, tmp_path):  # noqa: F811
    (tmp_path / "child" / "merge_report.json").write_text("no JSON")
    outcome = run("--child", "child", "--taste", ALPHABET[1], "--json")
    assert outcome.status == 1
    assert [finding["kind"] for finding in outcome.report["findings"]] == ["taste"]


def test_a_link_in_the_way_of_a_new_card_is_not_followed(family, tmp_path):
    child = family.folders[2][1]
    (tmp_path / "precious.txt").write_text("precious")
    (child / ".README.md.new").symlink_to(tmp_path / "precious.txt")
    amend_report(child, [])
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert not (child / "README.md").is_symlink()


def test_a_card_that_is_not_utf_8_keeps_its_bytes(family):
    card = family.folders[2][1] / "README.md"
    card.write_bytes(b"caf\xe9 <!-- until here -->\n" + card.read_bytes())
    for _ in range(2):
        amend_report(card.parent, [])
    assert card.read_bytes().startswith(b"caf\xe9 <!-- until here -->\n")
    assert card.read_bytes().count(CARD_MARKS[0].encode()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--inspect", "--taste", "x"), "--inspect does not go with --taste"),
        (("--child", "child", "--sweep", "--perplexity", "text.txt"), "--child does not go with --sweep"),
        (("--demo", "--score", "x"), "--demo does not go with --score"),
        (("--dry-run", "--map", "m.svg"), "--dry-run does not go with --map"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(run, family, flags, words):  # noqa: F811
    outcome = run(*flags)
    assert outcome.status == 2
    assert words in outcome.err


def test_a_folder_that_is_no_child_is_refused(run, family):  # noqa: F811
    outcome = run("--child", "primary", "--taste", "x")
    assert outcome.status == 1
    assert "merge_recipe.yaml" in outcome.err
    assert run("--child", "child").status == 2


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_screen_has_all_figures_within_its_width(family, tmp_path, width, encoding, monkeypatch):
    monkeypatch.setattr(RecordingConsole, "encoding", encoding)
    console = RecordingConsole(width)
    (measured,) = compare_perplexity(family, [write_text(tmp_path / "text.txt", 200)], ignore)
    for finding in (measured, *taste(family, [ALPHABET[1]], ignore)):
        console.print(render_finding(console, finding))
    text = console.export_text()
    assert max(map(cell_len, text.splitlines())) <= width
    for model in measured["figures"]["models"]:
        assert f"{model['perplexity']:.4f}" in text
    assert encoding != "ascii" or text.isascii()


def test_plain_merges_ask_nobody(tmp_path, monkeypatch):
    """Neither harness nor models are loaded where nothing was asked."""
    monkeypatch.setattr("slerpkit.evaluation.harness.load_harness", lambda: pytest.fail("loaded"))
    monkeypatch.setattr("slerpkit.evaluation.taste.loaded_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("slerpkit.evaluation.perplexity.loaded_model", lambda *_: pytest.fail("loaded"))
    merge(*make_pair(tmp_path), tmp_path / "child")
