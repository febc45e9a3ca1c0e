"""Classification heads: rows follow labels, labels that differ block, and nothing else is put into another order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_checkpoint, open_parents
from slerpkit.parity.check import check_parity, incompatibility
from slerpkit.parity.labels import is_last_layer, stated_labels
from slerpkit.parity.report import Mismatch
from slerpkit.recipe import VECTORS, LayerSlice, MergeRecipe
from slerpkit.schedule import Schedule
from tests.builders import (
    HIDDEN,
    LLAMA_CONFIG,
    assert_same_bits,
    bits,
    copy_model,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    merge,
    replace_tensors,
    set_block_elements,
)

MOODS = ("anger", "joy", "fear", "love", "none")
OTHERWISE = ("none", "anger", "love", "joy", "fear")
WIDTH = 16
ENCODER = {
    "vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
VISION = {**ENCODER, "image_size": 16, "patch_size": 8}
# A model that answers with labels -> its configuration and the tensors that have a row for each.
HEADS = {
    "BertForTokenClassification": ("BertConfig", ENCODER, ["classifier.weight", "classifier.bias"]),
    "RobertaForSequenceClassification": (
        "RobertaConfig", ENCODER, ["classifier.out_proj.weight", "classifier.out_proj.bias"],
    ),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 40, "dim": WIDTH, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
        ["classifier.weight", "classifier.bias"],
    ),
    "MistralForSequenceClassification": (
        "MistralConfig", {**ENCODER, "num_key_value_heads": 2}, ["score.weight"],
    ),
    "T5ForSequenceClassification": (
        "T5Config", T5, ["classification_head.out_proj.weight", "classification_head.out_proj.bias"],
    ),
    "ViTForImageClassification": ("ViTConfig", VISION, ["classifier.weight", "classifier.bias"]),
}  # fmt: skip


def numbered(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a config states of labels in this order."""
    by_number = {str(number): label for number, label in enumerate(labels)}
    return {"id2label": by_number, "label2id": {label: number for number, label in enumerate(labels)}}


def save_classifier(folder: Path, architecture: str, seed: int, labels: Sequence[str]) -> Path:
    config_name, settings, _ = HEADS[architecture]
    ids = dict(enumerate(labels))
    config = getattr(transformers, config_name)(**settings, id2label=ids, label2id={v: k for k, v in ids.items()})
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_classifier(folder: Path, seed: int, labels: Sequence[str] = MOODS, **config: Any) -> Path:
    """A tiny Llama whose head has a row and a bias for each label; a config's value of ... removes a key."""
    tensors, generator = llama_tensors(seed), torch.Generator().manual_seed(seed)
    del tensors["lm_head.weight"]
    tensors["score.weight"] = torch.randn(len(labels), HIDDEN, generator=generator).to(torch.bfloat16)
    tensors["score.bias"] = torch.randn(len(labels), generator=generator).to(torch.bfloat16)
    stated = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"], **numbered(labels), **config}
    return make_checkpoint(folder, tensors, {key: value for key, value in stated.items() if value is not ...})


def reordered(
    source: Path, target: Path, labels: Sequence[str], names: Sequence[str] = ("score.weight", "score.bias")
) -> Path:
    """The same model with its labels, and the rows that stand for them, in another order."""
    before = list(json.loads((source / "config.json").read_text())["id2label"].values())
    rows = [before.index(label) for label in labels]
    copy_model(source, target)
    tensors = load_tensors(source)
    replace_tensors(target, {name: t[rows].clone() if name in names else t.clone() for name, t in tensors.items()})
    edit_json(target / "config.json", **numbered(labels))
    return target


def found_on_labels(primary: Path, secondary: Path, base: Path | None = None, **settings: Any) -> list[Mismatch]:
    """What parity says of labels and their heads."""
    recipe = MergeRecipe(primary, secondary, base=base, **settings)
    words = ("id2label", "score", "classifier", "problem_type")
    return [m for m in check_parity(open_parents(recipe), recipe).mismatches if m.subject.startswith(words)]


# ── Another order ──


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("count", [5, WIDTH], ids=["few", "as many as wide"])
def test_a_head_whose_labels_stand_in_another_order_is_blended_label_by_label(tmp_path, parents, architecture, count):
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    labels = [f"mood {number}" for number in range(count)]
    primary, there = (save_classifier(tmp_path / str(n), architecture, n, labels) for n in (1, 2))
    heads = HEADS[architecture][2]
    shuffled = reordered(there, tmp_path / "shuffled", [*labels[1::2], *reversed(labels[::2])], heads)
    parents.watch(primary, shuffled)
    expected = load_tensors(merge(primary, there, tmp_path / "expected", 0.3).child)
    child = merge(primary, shuffled, tmp_path / "child", 0.3).child
    assert_same_bits(load_tensors(child), expected)
    stated = [json.loads((folder / "config.json").read_text()) for folder in (child, primary)]
    assert [[config[key] for key in ("id2label", "label2id")] for config in stated] == [
        [stated[1]["id2label"], stated[1]["label2id"]]
    ] * 2
    _, report = getattr(transformers, architecture).from_pretrained(child, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (found,) = (m for m in found_on_labels(primary, shuffled) if m.severity != "notice")
    assert found.severity == "resolved"
    assert all(name in found.consequence for name in heads)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("granularity", VECTORS)
def test_rows_follow_labels_however_they_are_blended(tmp_path, monkeypatch, granularity, t):
    set_block_elements(monkeypatch, 2 * HIDDEN)
    primary, there = make_classifier(tmp_path / "primary", 1), make_classifier(tmp_path / "there", 2)
    settings = {"method": "nuslerp", "vectors": VECTORS[granularity]}
    shuffled = reordered(there, tmp_path / "shuffled", OTHERWISE)
    head = load_tensors(merge(primary, shuffled, tmp_path / "child", t, **settings).child)
    assert_same_bits(head, load_tensors(merge(primary, there, tmp_path / "expected", t, **settings).child))
    if t in (0.0, 1.0):
        assert_same_bits(head, load_tensors(there if t else primary))


def test_the_base_and_slices_follow_labels_too(tmp_path):
    primary, there, base = (make_classifier(tmp_path / role, n) for n, role in enumerate(("primary", "there", "base")))
    orders = reordered(there, tmp_path / "shuffled", OTHERWISE), reordered(base, tmp_path / "origin", MOODS[::-1])
    cut = LayerSlice(1, 0, 1, Schedule.constant(0.4))
    for settings in ({"method": "nuslerp"}, {"slices": (cut, cut), "method": "slerp"}):
        bases = (base, orders[1]) if settings["method"] == "nuslerp" else (None, None)
        expected = merge(primary, there, tmp_path / "expected", 0.3, base=bases[0], overwrite=True, **settings).child
        child = merge(primary, orders[0], tmp_path / "child", 0.3, base=bases[1], overwrite=True, **settings).child
        assert_same_bits(load_tensors(child), load_tensors(expected))
    subjects = [found.subject for found in found_on_labels(primary, orders[0], orders[1], method="nuslerp")]
    assert subjects == ["id2label", "id2label of the base"]


def test_one_spelling_of_labels_is_as_good_as_another(tmp_path):
    """MNLI's are written large in one model and small in the next."""
    primary = make_classifier(tmp_path / "primary", 1)
    same = make_classifier(tmp_path / "same", 2, [mood.upper() for mood in MOODS])
    assert found_on_labels(primary, same) == []
    edit_json(same / "config.json", **numbered([mood.title() for mood in OTHERWISE]))
    (found,) = found_on_labels(primary, same)
    assert found.severity == "resolved"


def test_names_that_label2id_alone_has_are_names():
    by_name = {"no": 1, "yes": 0}
    assert stated_labels({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": by_name}) == ("yes", "no")
    assert stated_labels({"id2label": {"1": "b", "0": "a"}}) == ("a", "b")
    for silent in ({}, {"id2label": {"0": "LABEL_0"}}, {"id2label": {"0": "0", "1": 1}}, {"id2label": {"3": "a"}}):
        assert stated_labels(silent) is None


@pytest.mark.parametrize(
    ("name", "is_last"),
    [
        ("score.weight", True),
        ("model.score.bias", True),
        ("score.2.weight", True),
        ("classifier.1.weight", True),
        ("decode_head.classifier.weight", True),
        ("distillation_classifier.bias", True),
        ("classifier.linear_out.weight", True),
        ("sequence_summary.summary.weight", True),
        ("logits_proj.weight", True),
        ("pre_classifier.weight", False),
        ("classifier.dense.weight", False),
        ("classifier.linear_hidden.weight", False),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", False),
        ("qa_outputs.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_the_last_layer_of_a_head_is_known_by_its_name(name, is_last):
    assert is_last_layer(name) == is_last


def test_of_a_head_of_several_layers_the_last_has_the_labels(tmp_path):
    """A hidden layer as wide as there are labels stays in its order."""
    labels = [str(number) + "th" for number in range(HIDDEN)]
    folders = []
    for seed, role in enumerate(("primary", "there")):
        folder = make_classifier(tmp_path / role, seed, labels)
        tensors = {name: t.clone() for name, t in load_tensors(folder).items()}
        generator = torch.Generator().manual_seed(seed)
        tensors["score.0.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator).to(torch.bfloat16)
        tensors["score.2.weight"], tensors["score.2.bias"] = tensors.pop("score.weight"), tensors.pop("score.bias")
        replace_tensors(folder, tensors)
        folders.append(folder)
    shuffled = reordered(folders[1], tmp_path / "other", labels[::-1], ("score.2.weight", "score.2.bias"))
    expected = load_tensors(merge(*folders, tmp_path / "expected", 0.3).child)
    assert_same_bits(load_tensors(merge(folders[0], shuffled, tmp_path / "child", 0.3).child), expected)


# ── Other labels ──


def test_labels_that_differ_block_by_name_and_can_be_accepted(tmp_path):
    primary = make_classifier(tmp_path / "primary", 1)
    secondary = make_classifier(tmp_path / "secondary", 2, ["anger", "joy", "envy", "love", "none"])
    (found,) = found_on_labels(primary, secondary)
    assert (found.severity, found.primary, found.secondary) == ("blocking", "fear of 5 labels", "envy of 5 labels")
    assert "id2label" in incompatibility(open_checkpoint(primary), open_checkpoint(secondary))
    (found,) = found_on_labels(primary, secondary, accept=("id2label",))
    assert found.severity == "notice"
    child = merge(primary, secondary, tmp_path / "child", 0.0, accept=("id2label",)).child
    assert bits(load_tensors(child)["score.weight"]) == bits(load_tensors(primary)["score.weight"])


def test_more_labels_on_one_side_block_with_a_true_reason(tmp_path):
    primary = make_classifier(tmp_path / "primary", 1)
    secondary = make_classifier(tmp_path / "secondary", 2, MOODS[:4])
    found = found_on_labels(primary, secondary, accept=("id2label",))
    assert {m.subject: m.severity for m in found} == {
        "id2label": "notice", "score.weight": "blocking", "score.bias": "blocking",
    }  # fmt: skip
    assert all("label" in m.consequence for m in found[:2])
    assert (found[-1].primary, found[-1].secondary) == ("none of 5 labels", "4 labels, none alone")


@pytest.mark.parametrize("nameless", [{"id2label": ..., "label2id": ...}, numbered([f"LABEL_{n}" for n in range(5)])])
def test_labels_without_names_say_nothing_of_an_order(tmp_path, nameless):
    named, silent, other = (
        make_classifier(tmp_path / "a", 1),
        make_classifier(tmp_path / "b", 2, **nameless),
        tmp_path / "c",
    )
    for primary, secondary in ((named, silent), (silent, named)):
        (found,) = found_on_labels(primary, secondary)
        assert (found.severity, found.accepted_as) == ("blocking", "id2label")
        assert found_on_labels(primary, secondary, accept=("id2label",))[0].severity == "notice"
    assert found_on_labels(silent, make_classifier(other, 3, id2label=..., label2id=...)) == []


def test_a_single_label_has_no_order(tmp_path):
    """As a reward model's, which one names and the next does not."""
    primary = make_classifier(tmp_path / "primary", 1, ["reward"])
    (found,) = found_on_labels(primary, make_classifier(tmp_path / "secondary", 2, ["LABEL_0"]))
    assert found.severity == "notice"
    (found,) = found_on_labels(primary, make_classifier(tmp_path / "other", 2, ["harm"]))
    assert found.severity == "blocking"


def test_another_order_of_rows_that_are_not_found_blocks(tmp_path):
    folders = [make_classifier(tmp_path / str(n), n, order) for n, order in enumerate((MOODS, OTHERWISE))]
    for folder in folders:
        tensors = {name.replace("score.", "answer."): t.clone() for name, t in load_tensors(folder).items()}
        replace_tensors(folder, tensors)
    (found,) = found_on_labels(*folders)
    assert (found.severity, found.accepted_as) == ("blocking", "id2label")
    assert "cannot be told" in found.consequence


def test_a_label_that_stands_twice_has_no_row_of_its_own(tmp_path):
    """Photographs of a crane may show a bird or a machine."""
    orders = ["crane", "dog", "crane"], ["crane", "crane", "dog"]
    same = make_classifier(tmp_path / "same", 3, orders[0])
    primary, secondary = (make_classifier(tmp_path / str(n), n, order) for n, order in enumerate(orders))
    (found,) = found_on_labels(primary, secondary)
    assert (found.severity, found.accepted_as) == ("blocking", "id2label")
    assert "cannot be told" in found.consequence
    assert found_on_labels(primary, same) == []


def test_labels_that_a_model_does_not_answer_with_are_told(tmp_path):
    folders = [
        make_checkpoint(tmp_path / str(n), llama_tensors(n), {**LLAMA_CONFIG, **numbered(order)})
        for n, order in enumerate((MOODS, OTHERWISE))
    ]
    (found,) = found_on_labels(*folders)
    assert found.severity == "notice"


def test_ways_to_answer_that_differ_are_told(tmp_path):
    kinds = ("single_label_classification", "multi_label_classification")
    folders = [make_classifier(tmp_path / str(n), n, problem_type=kind) for n, kind in enumerate(kinds)]
    (found,) = found_on_labels(*folders)
    assert (found.severity, found.primary, found.secondary) == ("notice", *kinds)
    edit_json(folders[1] / "config.json", problem_type=...)
    assert found_on_labels(*folders) == []


# ── Heads of other kinds ──


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_value_head_is_refused_and_the_policy_without_it_merges(tmp_path, prefix, shards):
    """As TRL saves it; the remedy that the refusal gives is done by hand."""
    policy = make_checkpoint(tmp_path / "policy", llama_tensors(1))
    plain, head = (
        llama_tensors(2),
        {"v_head.summary.weight": torch.ones(1, HIDDEN), "v_head.summary.bias": torch.ones(1)},
    )
    tensors = {prefix + name: tensor for name, tensor in plain.items()}
    valued = make_checkpoint(tmp_path / "valued", tensors | head, shards=shards)
    remedied = make_checkpoint(tmp_path / "remedied", tensors, shards=shards)
    for primary, secondary in ((policy, valued), (valued, policy)):
        recipe = MergeRecipe(primary, secondary)
        (found,) = check_parity(open_parents(recipe), recipe).of_severity("blocking")
        assert found.subject == "v_head.summary.bias, v_head.summary.weight"
        assert "out of that model's weights" in found.consequence
    expected = load_tensors(merge(make_checkpoint(tmp_path / "plain", plain), policy, tmp_path / "expected", 0.3).child)
    assert_same_bits(load_tensors(merge(remedied, policy, tmp_path / "child", 0.3).child), expected)


@pytest.mark.parametrize("other", ["LlamaForCausalLM", "LlamaModel"])
def test_a_head_beside_another_kind_of_head_is_one_line(tmp_path, other):
    primary = make_classifier(tmp_path / "primary", 1, ["reward"])
    secondary = make_checkpoint(tmp_path / "policy", llama_tensors(2), {**LLAMA_CONFIG, "architectures": [other]})
    recipe = MergeRecipe(primary, secondary)
    with pytest.raises(SlerpMergeError) as caught:
        check_parity(open_parents(recipe), recipe).raise_if_blocking()
    first, line = caught.value.message.split("\n")
    assert all(words in line for words in ("LlamaForSequenceClassification", other, "heads", "of one class"))


@pytest.mark.parametrize("left", [5, "LlamaModel", [], [3], {}])
def test_classes_that_are_no_list_of_names_are_no_obstacle_to_an_answer(tmp_path, left):
    config = {**LLAMA_CONFIG, "architectures": left, "id2label": {"0": [1], "x": None}, "label2id": 7}
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1), config)
    secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2), {**LLAMA_CONFIG, **numbered(MOODS)})
    recipe = MergeRecipe(primary, secondary)
    check_parity(open_parents(recipe), recipe)
