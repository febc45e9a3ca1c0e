"""The finished child is read back: what was tampered with is caught, and what only may be wrong is told."""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from slerpkit.child.report import MergeReport
from slerpkit.child.verify import Verification, verify_child
from slerpkit.evaluation.models import verify_with_transformers
from slerpkit.merge.plan import MergePlan
from slerpkit.merge.staging import StagedChild
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.safetensors_header import read_header
from tests.builders import (
    HIDDEN,
    VOCABULARY,
    add_tokenizer,
    copy_model,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    make_real_model,
    merge,
)

QUERY = "model.layers.{}.self_attn.q_proj.weight"


def merge_tampered(folder: Path, tamper: Callable[[Path], None], t: float = 0.3) -> MergeReport:
    """Merges `primary` and `secondary` of a folder; `tamper` gets the staged child just before it is verified."""

    def verify_tampered(plan: MergePlan, child: StagedChild, *rest: Any) -> Verification:
        tamper(child.folder)
        return verify_child(plan, child, *rest)

    with mock.patch("slerpkit.story.verify_child", verify_tampered):
        return merge(folder / "primary", folder / "secondary", folder / "child", t)


def overwrite(file: Path, name: str, change: Callable[[bytes], bytes], place: float = 0.5) -> None:
    """Changes the two bytes at a place, 0 to 1, of a tensor in a safetensors file."""
    info = read_header(file)[name]
    with file.open("r+b") as stream:
        stream.seek(info.offset + int(place * (info.byte_count - 2)) // 2 * 2)
        before = stream.read(2)
        stream.seek(-2, 1)
        stream.write(change(before))


def flip(two_bytes: bytes) -> bytes:
    return bytes(byte ^ 0x55 for byte in two_bytes)


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """Saves a safetensors file again with other tensors; None removes one."""
    tensors = {**load_tensors(file.parent), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


# ── Tampered between the last write and the check ───────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in llama_tensors(1) if "layers.0" not in name])
def test_flipped_bytes_in_the_middle_of_any_tensor_are_caught(tmp_path, parents, name):
    parents.watch(*make_pair(tmp_path))
    with pytest.raises(SlerpMergeError, match=rf"did not pass its own check: {name} differs"):
        merge_tampered(tmp_path, lambda staged: overwrite(staged / "model.safetensors", name, flip))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["primary", "secondary"]


@pytest.mark.parametrize(
    "bytes_there", [b"\xc0\x7f", b"\x80\x7f", b"\xff\xff", b"\x00\x00"], ids=["nan", "infinity", "ones", "zeros"]
)
def test_any_foreign_value_is_caught(tmp_path, bytes_there):
    make_pair(tmp_path)
    name = QUERY.format(1)
    with pytest.raises(SlerpMergeError, match=rf"{name} differs"):
        merge_tampered(tmp_path, lambda staged: overwrite(staged / "model.safetensors", name, lambda _: bytes_there))


def test_a_value_two_units_of_the_last_place_off_is_caught(tmp_path):
    make_pair(tmp_path)
    name = QUERY.format(1)

    def nudge(two_bytes: bytes) -> bytes:
        return bytes([two_bytes[0] ^ 2, two_bytes[1]])

    with pytest.raises(SlerpMergeError, match=rf"{name} differs"):
        merge_tampered(tmp_path, lambda staged: overwrite(staged / "model.safetensors", name, nudge))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["numbers", "same", QUERY.format(0)])
def test_flipped_bytes_of_copied_tensors_are_caught(tmp_path, name, t):
    shared = {"numbers": torch.arange(100, dtype=torch.int16), "same": torch.ones(100, dtype=torch.bfloat16)}
    for seed, role in ((1, "primary"), (2, "secondary")):
        make_checkpoint(tmp_path / role, {**llama_tensors(seed), **shared})
    with pytest.raises(SlerpMergeError, match=rf"{name} differs"):
        merge_tampered(tmp_path, lambda staged: overwrite(staged / "model.safetensors", name, flip), t)


def test_two_tensors_whose_bytes_changed_places_are_caught(tmp_path):
    make_pair(tmp_path)

    def swap(staged: Path) -> None:
        file = staged / "model.safetensors"
        infos = [read_header(file)[QUERY.format(layer)] for layer in (0, 1)]
        first, second = (slice(info.offset, info.offset + info.byte_count) for info in infos)
        data = bytearray(file.read_bytes())
        data[first], data[second] = data[second], data[first]
        file.write_bytes(data)

    with pytest.raises(SlerpMergeError, match=rf"{QUERY.format(0)} differs"):
        merge_tampered(tmp_path, swap)


def test_two_names_swapped_in_the_header_are_caught(tmp_path):
    make_pair(tmp_path)
    first, second = (QUERY.format(layer).encode() for layer in (0, 1))

    def swap(staged: Path) -> None:
        file = staged / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data.replace(first, b"?").replace(second, first).replace(b"?" + b'"', second + b'"'))

    with pytest.raises(SlerpMergeError, match=r"model\.safetensors does not hold .*q_proj\.weight as planned"):
        merge_tampered(tmp_path, swap)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, "does not hold .* as planned"),
        ({"lm_head.weight": torch.ones(1, dtype=torch.bfloat16)}, "does not hold lm_head.weight as planned"),
        ({"model.norm.weight": torch.ones(16, dtype=torch.float16)}, "does not hold .* as planned"),
    ],
    ids=["missing", "another shape", "another dtype"],
)
def test_a_file_saved_again_with_other_tensors_is_caught(tmp_path, changes, words):
    make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match=words):
        merge_tampered(tmp_path, lambda staged: rewrite(staged / "model.safetensors", **changes))


@pytest.mark.parametrize("count", [1, 1000])
def test_a_file_cut_short_or_lengthened_is_caught(tmp_path, count):
    make_pair(tmp_path)

    def cut(staged: Path) -> None:
        data = (staged / "model.safetensors").read_bytes()
        (staged / "model.safetensors").write_bytes(data[:-count])

    def lengthen(staged: Path) -> None:
        data = (staged / "model.safetensors").read_bytes()
        (staged / "model.safetensors").write_bytes(data + bytes(count))

    for tamper in (cut, lengthen):
        with pytest.raises(SlerpMergeError, match=r"model\.safetensors is damaged or incomplete: its tensors end at"):
            merge_tampered(tmp_path, tamper)
        assert not (tmp_path / "child").exists()


def test_a_parent_that_changed_is_told_before_the_disk_is_blamed(tmp_path):
    make_pair(tmp_path)

    def change(_: Path) -> None:
        data = (tmp_path / "secondary" / "model.safetensors").read_bytes()
        (tmp_path / "secondary" / "model.safetensors").write_bytes(data[:-200] + bytes(200))

    with pytest.raises(SlerpMergeError, match=r"secondary changed during the merge: model\.safetensors") as caught:
        merge_tampered(tmp_path, change)
    assert "the disk or memory" not in caught.value.hint
    assert not (tmp_path / "child").exists()


def test_a_file_that_is_gone_is_named(tmp_path):
    make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match=r"model\.safetensors: No such file"):
        merge_tampered(tmp_path, lambda staged: (staged / "model.safetensors").unlink())


# ── What is right, and what only may be wrong ───────────────────────────────────────────────────


def test_a_good_child_passes_and_says_what_was_looked_at(tmp_path):
    for folder in make_pair(tmp_path):
        add_tokenizer(folder)
    report = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child")
    assert report.content["checks"] == list(report.verified.checks)
    assert report.verified.warnings == ()
    text = "\n".join(report.verified.checks)
    assert "21 tensors stand under the primary's names and shapes" in text
    assert "21 in part from the parents, all equal" in text
    assert "no infinite value and none that is not a number" in text
    assert f"every token id (up to {VOCABULARY - 1}) has its row among {VOCABULARY}" in text


def test_tensors_that_neither_parent_changed_pass_beside_a_base(tmp_path):
    """As an embedding that was frozen while both were trained."""
    frozen = {name: llama_tensors(1)[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    folders = [make_checkpoint(tmp_path / f"model{seed}", {**llama_tensors(seed), **frozen}) for seed in (1, 2, 3)]
    report = merge(folders[0], folders[1], tmp_path / "child", base=folders[2])
    assert report.merged.count("copy") == 2


def test_a_tokenizer_longer_than_the_embedding_is_told(tmp_path):
    for folder in make_pair(tmp_path):
        add_tokenizer(folder, VOCABULARY + 5)
    report = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child")
    (warning,) = report.verified.warnings
    assert f"id {VOCABULARY + 4}" in warning
    assert f"only {VOCABULARY} rows" in warning


def test_a_tokenizer_longer_than_the_embedding_of_a_nested_model_is_told(tmp_path):
    for folder in make_pair(tmp_path):
        edit_json(folder / "config.json", vocab_size=..., text_config={"vocab_size": VOCABULARY})
        add_tokenizer(folder, VOCABULARY + 1)
    (warning,) = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child").verified.warnings
    assert f"only {VOCABULARY} rows" in warning


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": {"type": "Unheard"}}'])
def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path, text):
    for folder in make_pair(tmp_path):
        add_tokenizer(folder)
        (folder / "tokenizer.json").write_text(text)
    (warning,) = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child").verified.warnings
    assert warning.startswith("tokenizer.json cannot be read")


@pytest.mark.parametrize("ids", [VOCABULARY, [2, VOCABULARY]])
def test_an_end_of_text_in_the_config_that_has_no_row_is_told(tmp_path, ids):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        edit_json(folder / "config.json", eos_token_id=ids, pad_token_id=-1, sep_token_id=None)
    (warning,) = merge(primary, secondary, tmp_path / "child").verified.warnings
    assert "config.json: eos_token_id" in warning
    assert f"only {VOCABULARY} rows" in warning


# ── As transformers loads it ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    return make_real_model(tmp_path_factory.mktemp("real") / "model", 1)


def changed_copy(model: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a model with other tensors; None removes one."""
    copy_model(model, folder)
    rewrite(folder / "model.safetensors", **changes)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [4000, 10**9])
def test_a_merged_child_loads(tmp_path, parents, tied, shard_bytes):
    folders = [make_real_model(tmp_path / str(seed), seed, tie_word_embeddings=tied) for seed in (1, 2)]
    parents.watch(*folders)
    child = merge(*folders, tmp_path / "child", max_shard_bytes=shard_bytes).child
    assert ("lm_head.weight" in load_tensors(child)) is not tied
    loaded, tokenizer = verify_with_transformers(child).checks
    assert loaded == "LlamaForCausalLM loads it with no missing, unexpected or mismatched key"
    assert f"{VOCABULARY} tokens" in tokenizer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, r"missing keys: model\.norm\.weight"),
        ({"lm_head.weight": None}, r"missing keys: lm_head\.weight"),
        ({QUERY.format(1): None, QUERY.format(0): None}, r"missing keys: .*0.self_attn.q_proj.*1.self_attn.q_proj"),
        ({"model.extra.weight": torch.ones(3)}, r"unexpected keys: model\.extra\.weight"),
        ({"model.layers.7.mlp.up_proj.weight": torch.ones(3)}, r"unexpected keys: model\.layers\.7\."),
        ({"model.norm.weight": torch.ones(8)}, r"mismatched keys: .*model\.norm\.weight"),
        ({QUERY.format(0): torch.ones(16, 8)}, r"mismatched keys: .*q_proj\.weight"),
    ],
)
def test_a_child_that_transformers_would_load_wrong_is_refused(tmp_path, real_model, changes, words):
    with pytest.raises(SlerpMergeError, match=words) as caught:
        verify_with_transformers(changed_copy(real_model, tmp_path / "model", **changes))
    assert "LlamaForCausalLM" in caught.value.message
    assert caught.value.hint


def test_a_tied_child_without_its_embedding_is_refused(tmp_path):
    tied = make_real_model(tmp_path / "tied", 1, tie_word_embeddings=True)
    with pytest.raises(SlerpMergeError, match=r"missing keys: .*embed_tokens"):
        verify_with_transformers(changed_copy(tied, tmp_path / "model", **{"model.embed_tokens.weight": None}))


def verify_with_config(model: Path, folder: Path, without: str | None = None, **changes: Any) -> Verification:
    """What is found of a copy of a model with another config, and perhaps without a tensor."""
    changed_copy(model, folder, **({} if without is None else {without: None}))
    edit_json(folder / "config.json", **changes)
    return verify_with_transformers(folder)


@pytest.mark.parametrize("architecture", ["UnheardOfForCausalLM", "logging", "AutoTokenizer"])
def test_an_architecture_that_transformers_does_not_have_is_said_as_not_checked(tmp_path, real_model, architecture):
    """Also a name that is there but is no model: config.json must not choose what is called."""
    found = verify_with_config(real_model, tmp_path / "model", architectures=[architecture])
    (warning,) = found.warnings
    assert re.match(rf"not checked with transformers: transformers \S+ has no {architecture}", warning)
    assert "loads it" not in " ".join(found.checks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"_attn_implementation": "somebody/kernels"}, "names the code somebody/kernels"),
    ],
)
def test_a_config_that_transformers_cannot_take_is_said_as_not_checked(tmp_path, real_model, changes, words):
    (warning,) = verify_with_config(real_model, tmp_path / "model", **changes).warnings
    assert warning.startswith("not checked with transformers: ")
    assert words in warning


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}, "it brings code of its own"),
        ({"transformers_version": "99.1.0"}, "transformers 99.1.0 saved it"),
    ],
)
def test_keys_that_another_class_may_take_are_no_fault(tmp_path, real_model, changes, words):
    found = verify_with_config(real_model, tmp_path / "model", "model.norm.weight", **changes)
    assert words in found.warnings[0]
    assert verify_with_config(real_model, tmp_path / "whole", **changes).warnings == ()


def test_layers_that_predict_further_tokens_are_no_fault(tmp_path, real_model):
    """transformers leaves them out when it loads; a stranger's name beside them stays one."""
    copies = {"mtp.fc.weight": torch.ones(3), "mtp.layers.0.mlp.up_proj.weight": torch.ones(3)}
    assert verify_with_transformers(changed_copy(real_model, tmp_path / "original", **copies)).warnings == ()
    with pytest.raises(SlerpMergeError, match=r"unexpected keys: extra\.weight"):
        verify_with_transformers(
            changed_copy(real_model, tmp_path / "other", **copies, **{"extra.weight": torch.ones(3)})
        )


def test_what_a_pre_training_leaves_is_no_fault(tmp_path):
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForMaskedLM(RobertaConfig(vocab_size=48, **sizes)).save_pretrained(tmp_path / "tuned")
    pooler = {"roberta.pooler.dense.weight": torch.ones(8, 8), "roberta.pooler.dense.bias": torch.ones(8)}
    original = changed_copy(tmp_path / "tuned", tmp_path / "original", **pooler)
    found = verify_with_transformers(original)
    assert any("no missing, unexpected or mismatched key" in line for line in found.checks)


def test_logits_that_are_no_numbers_are_refused_and_others_are_told(tmp_path, real_model):
    assert "its logits for a short text are finite" in verify_with_transformers(real_model, with_logits=True).checks
    spoiled = changed_copy(
        real_model, tmp_path / "model", **{"model.norm.weight": torch.full((HIDDEN,), math.nan, dtype=torch.bfloat16)}
    )
    assert verify_with_transformers(spoiled).warnings == ()
    with pytest.raises(SlerpMergeError, match="logits for a short text are infinite or not a number"):
        verify_with_transformers(spoiled, with_logits=True)


def test_logits_that_there_is_no_memory_for_are_said_as_not_computed(real_model, monkeypatch):
    monkeypatch.setattr("slerpkit.evaluation.models.free_memory", lambda: 1e6)
    (warning,) = verify_with_transformers(real_model, with_logits=True).warnings
    assert re.match("its logits were not computed: .* of memory", warning)


@pytest.mark.parametrize("text", ["no json", "{}"])
def test_a_tokenizer_that_transformers_cannot_load_is_refused(tmp_path, real_model, text):
    (copy_model(real_model, tmp_path / "model") / "tokenizer.json").write_text(text)
    with pytest.raises(SlerpMergeError, match="cannot load the child's tokenizer"):
        verify_with_transformers(tmp_path / "model")


def test_code_that_a_child_carries_is_not_run(tmp_path, real_model):
    model = copy_model(real_model, tmp_path / "model")
    (model / "modeling_custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    classes = {"AutoConfig": "modeling_custom.Config", "AutoModelForCausalLM": "modeling_custom.Model"}
    edit_json(model / "config.json", auto_map=classes)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_custom.Tokenizer"]})
    verify_with_transformers(model)
    assert not (tmp_path / "ran").exists()


def write_hole(file: Path, shapes: Mapping[str, list[int]]) -> int:
    """Writes a file whose tensors, in bfloat16, take no room on the disk; how many bytes they state."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end)
    return end


def test_a_child_larger_than_memory_should_hold_is_loaded_without_its_weights(tmp_path, real_model):
    """Two matrices of 400 MB each, all hole on the disk: stand-ins take no memory either."""
    resource = pytest.importorskip("resource")
    model = copy_model(real_model, tmp_path / "model")
    longer = {HIDDEN: 1024, HIDDEN // 2: 512, VOCABULARY: 200_000}  # 64 times as wide
    edit_json(model / "config.json", vocab_size=200_000, hidden_size=1024, head_dim=256)
    stored = read_header(model / "model.safetensors")
    shapes = {name: [longer.get(length, length) for length in info.shape] for name, info in stored.items()}
    end = write_hole(model / "model.safetensors", shapes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verify_with_transformers(model)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 100e6 < end


def test_experts_that_are_put_into_one_tensor_take_no_memory(tmp_path):
    """Eight of 25 MB in each of two layers, all hole on the disk."""
    resource = pytest.importorskip("resource")
    transformers = pytest.importorskip("transformers")
    width, inner, tokens, experts = 1024, 4096, 64, 8
    config = transformers.MixtralConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=experts, architectures=["MixtralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shapes = {"model.embed_tokens.weight": [tokens, width], "lm_head.weight": [tokens, width]}
    shapes["model.norm.weight"] = [width]
    for layer in (f"model.layers.{number}." for number in range(2)):
        shapes |= {f"{layer}self_attn.{part}_proj.weight": [width, width] for part in "qkvo"}
        shapes |= {f"{layer}{norm}_layernorm.weight": [width] for norm in ("input", "post_attention")}
        shapes[f"{layer}block_sparse_moe.gate.weight"] = [experts, width]
        for expert in (f"{layer}block_sparse_moe.experts.{number}." for number in range(experts)):
            shapes |= {f"{expert}w1.weight": [inner, width], f"{expert}w3.weight": [inner, width]}
            shapes[f"{expert}w2.weight"] = [width, inner]
    end = write_hole(tmp_path / "model.safetensors", shapes)
    transformers.MixtralForCausalLM  # noqa: B018 - loaded before memory is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (loaded,) = verify_with_transformers(tmp_path).checks
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert loaded.startswith("MixtralForCausalLM loads it")
    assert grown * (1 if sys.platform == "darwin" else 1024) < 100e6 < end


def test_a_tokenizer_that_asks_for_code_of_its_own_gets_none_run(tmp_path, real_model):
    model = copy_model(real_model, tmp_path / "model")
    (model / "tokenization_custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto_map = {"AutoTokenizer": ["tokenization_custom.CustomTokenizer", None]}
    edit_json(model / "tokenizer_config.json", tokenizer_class="CustomTokenizer", auto_map=auto_map)
    with contextlib.suppress(SlerpMergeError):  # some versions fall back to a tokenizer of their own
        verify_with_transformers(model)
    assert not (tmp_path / "ran").exists()
