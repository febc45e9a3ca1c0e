"""What lies beside the weights: tokenizer, configs, code files and the model card."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import COMPANION_FILES, GENERATION_NAME, TEMPLATE_FILES, TOKENIZER_FILES
from tests.builders import (
    LLAMA_CONFIG,
    add_tokenizer,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    merge,
    plan_of,
)

# One file of every kind that a tokenizer consists of; the folder stands for a whole one.
TOKENIZER_EXAMPLES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken",
    "spm.model", "spm_char.model", "sentencepiece.model", "source.spm", "tiktoken.model", "bpe.codes",
    "dict.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "normalizer.json",
    "prophetnet.tokenizer", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
PRIMARY_EXAMPLES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modeling_custom.py", "configuration_custom.py",
)  # fmt: skip
# Nothing of these may follow a child: they describe, index or train the parent.
NEVER_COPIED = ("model.gguf", "training_args.bin", "optimizer.pt", "pytorch_model.bin", "notes.txt", ".gitattributes")


def write_examples(folder: Path, names: tuple[str, ...]) -> None:
    """Files whose content names the folder they come from, valid as JSON and as text."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"from": folder.name, "name": name}))


def merged_files(child: Path) -> dict[str, str]:
    """Which parent each file of a child is from, for the files that tell."""
    texts = {path.relative_to(child).as_posix(): path.read_bytes() for path in child.rglob("*") if path.is_file()}
    made = (
        "config.json",
        "README.md",
        "difference_map.svg",
        "merge_recipe.yaml",
        "merge_report.json",
        "model.safetensors",
    )
    return {name: json.loads(text)["from"] for name, text in texts.items() if name not in made}


# ── The tokenizer's donor ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("has_map", "has_tokenizer", "asked", "donor"),
    [
        ("neither", "both", "auto", "primary"),
        ("both", "both", "auto", "primary"),
        ("primary", "both", "auto", "primary"),
        ("secondary", "both", "auto", "secondary"),
        ("neither", "primary", "auto", "primary"),
        ("neither", "secondary", "auto", "secondary"),
        ("secondary", "secondary", "auto", "secondary"),
        ("secondary", "both", "primary", "primary"),
        ("primary", "both", "secondary", "secondary"),
    ],
)
def test_the_donor_of_the_tokenizer(tmp_path, has_map, has_tokenizer, asked, donor):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        if has_tokenizer in ("both", folder.name):
            add_tokenizer(folder, special_tokens_map=has_map in ("both", folder.name))
            edit_json(folder / "tokenizer_config.json", added_by=folder.name)
    report = merge(primary, secondary, tmp_path / "child", tokenizer=asked)
    assert report.as_dict()["tokenizer_from"] == donor
    assert report.plan.parity.vocabulary.reason
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (report.child / name).read_bytes() == (tmp_path / donor / name).read_bytes()
    assert (report.child / "special_tokens_map.json").exists() == (has_map in ("both", donor))


def test_the_reason_for_a_donor_names_the_file_it_is_about(tmp_path):
    for has_map, who in ((True, "both have"), (False, "neither has")):
        primary, secondary = make_pair(tmp_path / who)
        for parent in (primary, secondary):
            add_tokenizer(parent, special_tokens_map=has_map)
        plan = plan_of(primary, secondary, tmp_path / "child")
        assert plan.parity.vocabulary.reason == f"{who} special_tokens_map.json"


def test_parents_without_a_tokenizer_have_a_child_without_one(tmp_path):
    report = merge(*make_pair(tmp_path), tmp_path / "child")
    assert report.as_dict()["tokenizer_from"] is None
    assert merged_files(report.child) == {}


@pytest.mark.parametrize("asked", ["primary", "secondary"])
def test_a_donor_that_has_no_tokenizer_is_refused(tmp_path, asked):
    primary, secondary = make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match=f"The {asked} model has no tokenizer"):
        merge(primary, secondary, tmp_path / "child", tokenizer=asked)


@pytest.mark.parametrize("donor", ["primary", "secondary"])
def test_all_of_a_tokenizer_comes_from_one_parent(tmp_path, parents, donor):
    """Also where the other parent has files that the donor lacks: two halves of a tokenizer never meet."""
    primary, secondary = make_pair(tmp_path)
    other = secondary if donor == "primary" else primary
    write_examples(tmp_path / donor, TOKENIZER_EXAMPLES[:4])
    write_examples(other, TOKENIZER_EXAMPLES)
    parents.watch(primary, secondary)
    child = merge(primary, secondary, tmp_path / "child", tokenizer=donor).child
    assert merged_files(child) == dict.fromkeys(TOKENIZER_EXAMPLES[:4], donor)


def test_every_kind_of_companion_goes_where_it_belongs(tmp_path, parents):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        write_examples(folder, (*TOKENIZER_EXAMPLES, *PRIMARY_EXAMPLES, *NEVER_COPIED))
    parents.watch(primary, secondary)
    child = merge(primary, secondary, tmp_path / "child", tokenizer="secondary").child
    expected = {**dict.fromkeys(TOKENIZER_EXAMPLES, "secondary"), **dict.fromkeys(PRIMARY_EXAMPLES, "primary")}
    assert merged_files(child) == expected
    assert len(TOKENIZER_EXAMPLES) == len(TOKENIZER_FILES + TEMPLATE_FILES)
    assert {"*.py", *PRIMARY_EXAMPLES} >= {*COMPANION_FILES, GENERATION_NAME}


def test_generation_settings_are_the_primarys_though_the_tokenizer_is_not(tmp_path):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(secondary)
    write_examples(primary, ("generation_config.json",))
    write_examples(secondary, ("generation_config.json",))
    child = merge(primary, secondary, tmp_path / "child").child
    assert json.loads((child / "generation_config.json").read_text())["from"] == "primary"
    assert (child / "tokenizer.json").read_bytes() == (secondary / "tokenizer.json").read_bytes()


def test_generation_settings_of_the_secondary_alone_are_not_lost(tmp_path):
    primary, secondary = make_pair(tmp_path)
    write_examples(secondary, ("generation_config.json",))
    child = merge(primary, secondary, tmp_path / "child").child
    assert merged_files(child) == {"generation_config.json": "secondary"}


def test_code_of_the_primary_is_copied_and_never_run(tmp_path, monkeypatch):
    primary, secondary = make_pair(tmp_path)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("modeling_custom.py", "conftest.py", "torch.py"):
        (primary / name).write_text(code)
    edit_json(primary / "config.json", auto_map={"AutoModelForCausalLM": "modeling_custom.CustomModel"})
    edit_json(secondary / "config.json", auto_map={"AutoModelForCausalLM": "modeling_custom.CustomModel"})
    monkeypatch.chdir(primary)
    child = merge(primary, secondary, tmp_path / "child").child
    assert (child / "modeling_custom.py").read_text() == code
    assert not (tmp_path / "ran").exists()
    assert not any(name.endswith("modeling_custom") for name in sys.modules)


TOKENIZER_CODE = {
    "tokenization_own.py": "from .pieces import cut\nfrom .configuration_own import OwnConfig\n",
    "pieces.py": "import os\n",
    "configuration_own.py": "class OwnConfig: ...\n",
    "modeling_own.py": "from .configuration_own import OwnConfig\n",
}


def pair_with_code(folder: Path) -> tuple[Path, Path]:
    """Parents whose model and tokenizer bring code, each file of it with a last line that names its parent."""
    primary, secondary = make_pair(folder)
    for parent in (primary, secondary):
        add_tokenizer(parent)
        auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
        edit_json(parent / "config.json", auto_map=auto_map)
        edit_json(parent / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Fast"]})
        for name, text in TOKENIZER_CODE.items():
            (parent / name).write_text(f"{text}# {parent.name}\n")
    return primary, secondary


@pytest.mark.parametrize("donor", ["primary", "secondary"])
def test_code_of_a_tokenizer_comes_with_it_and_the_models_stays(tmp_path, parents, donor):
    primary, secondary = pair_with_code(tmp_path)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", tokenizer=donor)
    found = {name: (report.child / name).read_text().rpartition("# ")[2].strip() for name in TOKENIZER_CODE}
    assert found == {"tokenization_own.py": donor, "pieces.py": donor} | dict.fromkeys(
        ("configuration_own.py", "modeling_own.py"), "primary"
    )
    told = {m.subject: m.consequence for m in report.plan.parity.of_severity("notice") if m.subject.endswith(".py")}
    if donor == "primary":
        assert told == {}
    else:
        assert told.keys() == {"tokenization_own.py", "pieces.py", "configuration_own.py"}
        assert "may not load" in told["configuration_own.py"] and "may not load" not in told["pieces.py"]


def test_code_that_is_the_same_or_the_donors_alone_is_not_told(tmp_path):
    primary, secondary = pair_with_code(tmp_path)
    for name in ("tokenization_own.py", "configuration_own.py"):
        (primary / name).write_bytes((secondary / name).read_bytes())
    (primary / "pieces.py").unlink()
    report = merge(primary, secondary, tmp_path / "child", tokenizer="secondary")
    assert (report.child / "pieces.py").read_bytes() == (secondary / "pieces.py").read_bytes()
    assert not any(m.subject.endswith(".py") for m in report.plan.parity.mismatches)


@pytest.mark.parametrize("stated", ["other/place--code.Fast", "../secret.Fast", "/etc/x.Fast", 5, {"a": "b"}], ids=str)
def test_code_is_looked_for_beside_the_model_alone(tmp_path, stated):
    primary, secondary = make_pair(tmp_path)
    for parent in (primary, secondary):
        add_tokenizer(parent)
    (tmp_path / "secret.py").write_text("x")
    edit_json(secondary / "tokenizer_config.json", auto_map={"AutoTokenizer": stated})
    child = merge(primary, secondary, tmp_path / "child", tokenizer="secondary").child
    assert not any(child.rglob("*.py"))


def test_files_of_a_hubs_cache_are_copied_and_not_linked(tmp_path, parents):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(primary)
    cache = tmp_path / "hub" / "models--org--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(primary.iterdir())):
        file.rename(blobs / str(number))
        try:
            (snapshot / file.name).symlink_to(blobs / str(number))
        except OSError:
            pytest.skip("links cannot be made here")
    parents.watch(blobs, secondary)
    child = merge(snapshot, secondary, tmp_path / "child").child
    assert not any(path.is_symlink() for path in child.iterdir())
    assert (child / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "modeling.py", "chat_template.jinja", "additional_chat_templates/x.jinja"]
)
def test_a_link_that_leads_out_of_its_folder_is_refused(tmp_path, parents, name):
    """A published child would carry what it leads to."""
    primary, secondary = make_pair(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (primary / "tokenizer.json").write_text("{}")
    file = primary / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    try:
        file.symlink_to(tmp_path / "secret")
    except OSError:
        pytest.skip("links cannot be made here")
    parents.watch(secondary)
    with pytest.raises(SlerpMergeError, match="is a link that leads outside its folder, to .*secret"):
        merge(primary, secondary, tmp_path / "child")
    assert not (tmp_path / "child").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_that_would_be_copied_without_end_are_refused(tmp_path):
    primary, secondary = make_pair(tmp_path)
    templates = primary / "additional_chat_templates"
    templates.mkdir()
    (templates / "x.jinja").write_text("x")
    (templates / "again").symlink_to(templates)
    with pytest.raises(SlerpMergeError, match="again is neither a file nor a folder"):
        merge(primary, secondary, tmp_path / "child")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes there")
@pytest.mark.parametrize("name", ["modeling.py", "tokenizer.json", "config.json"])
def test_a_pipe_in_a_model_is_refused_at_once(tmp_path, name):
    primary, secondary = make_pair(tmp_path)
    (primary / name).unlink(missing_ok=True)
    os.mkfifo(primary / name)
    with pytest.raises(SlerpMergeError, match=r"is neither a file nor a folder|has no config\.json"):
        merge(primary, secondary, tmp_path / "child")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_weights_are_read_through_links_to_wherever_they_lie(tmp_path):
    primary, secondary = make_pair(tmp_path)
    merge(primary, secondary, tmp_path / "plain")
    (tmp_path / "disk").mkdir()
    for folder in (primary, secondary):
        elsewhere = tmp_path / "disk" / f"{folder.name}.weights"
        (folder / "model.safetensors").rename(elsewhere)
        (folder / "model.safetensors").symlink_to(elsewhere)
    merge(primary, secondary, tmp_path / "child")
    plain, child = (tmp_path / name / "model.safetensors" for name in ("plain", "child"))
    assert child.read_bytes() == plain.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_that_the_person_vouches_for_are_followed(tmp_path):
    primary, secondary = make_pair(tmp_path)
    (primary / "modeling_custom.py").symlink_to(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("mine")
    with pytest.raises(SlerpMergeError) as refused:
        merge(primary, secondary, tmp_path / "child")
    assert "--follow-links" in refused.value.hint
    merge(primary, secondary, tmp_path / "child", follow_links=True)
    assert (tmp_path / "child" / "modeling_custom.py").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_that_nothing_uses_is_not_refused(tmp_path):
    primary, secondary = make_pair(tmp_path)
    (tmp_path / "mine.py").write_text("mine")
    (secondary / "modeling_custom.py").symlink_to(tmp_path / "mine.py")
    merge(primary, secondary, tmp_path / "child")
    assert not (tmp_path / "child" / "modeling_custom.py").exists()


def test_a_companion_that_cannot_be_read_is_named(tmp_path):
    primary, secondary = make_pair(tmp_path)
    try:
        (primary / "modeling_custom.py").symlink_to(primary / "gone")
    except OSError:
        pytest.skip("links cannot be made here")
    with pytest.raises(SlerpMergeError, match=r"Could not copy .*modeling_custom\.py"):
        merge(primary, secondary, tmp_path / "child")
    assert not (tmp_path / "child").exists()


# ── config.json ─────────────────────────────────────────────────────────────────────────────────


def test_a_config_keeps_its_unknown_keys_and_its_order(tmp_path):
    config = {
        "zebra": {"b": 1, "a": [1, {"c": None}]},
        **LLAMA_CONFIG,
        "torch_dtype": "bfloat16",
        "名前": "値",
        "auto_map": {"AutoModel": "modeling_custom.Model"},
        "apple": 1e-12,
    }
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1), config)
    secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2), {**LLAMA_CONFIG, "only_here": 1})
    for dtype in ("auto", "bfloat16"):
        text = (merge(primary, secondary, tmp_path / dtype, dtype=dtype).child / "config.json").read_text("utf-8")
        assert list(json.loads(text).items()) == list(config.items())
        assert "値" in text


@pytest.mark.parametrize("stated", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()], ids=str)
def test_an_asked_dtype_is_stated_as_the_primary_spells_it(tmp_path, stated):
    primary, secondary = make_pair(tmp_path)
    edit_json(primary / "config.json", **dict.fromkeys(stated, "bfloat16"))
    before = json.loads((primary / "config.json").read_text())
    child = merge(primary, secondary, tmp_path / "child", dtype="float16").child
    config = json.loads((child / "config.json").read_text())
    assert config == {**before, **dict.fromkeys(stated or ("torch_dtype",), "float16")}
    assert {tensor.dtype for tensor in load_tensors(child).values()} == {torch.float16}


def test_an_asked_dtype_reaches_the_models_inside_a_model(tmp_path):
    inner = {"text_config": {"dtype": "bfloat16", "deep": 1}, "vision_config": {"torch_dtype": "bfloat16"}, "plain": {}}
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        edit_json(folder / "config.json", **inner)
    child = merge(primary, secondary, tmp_path / "child", dtype="float32").child
    config = json.loads((child / "config.json").read_text())
    assert config["text_config"] == {"dtype": "float32", "deep": 1}
    assert config["vision_config"] == {"torch_dtype": "float32"}
    assert config["plain"] == {}


def test_the_childs_config_is_the_primarys_where_parents_differ(tmp_path):
    primary, secondary = make_pair(tmp_path)
    edit_json(secondary / "config.json", eos_token_id=[2, 5], max_position_embeddings=4096, extra="key")
    child = merge(primary, secondary, tmp_path / "child", t=0.9).child
    assert json.loads((child / "config.json").read_text()) == LLAMA_CONFIG


# ── The model card ──────────────────────────────────────────────────────────────────────────────

ODD_NAME = ('a name: with "marks" | and #', None, 'a name: with "marks" | and #')


def read_card(child: Path) -> tuple[dict[str, object], str]:
    """(front matter, body) of a card. Knows as much YAML as a card needs: `key: value` and lists of strings."""
    text = (child / "README.md").read_text("utf-8")
    front, body = re.fullmatch(r"---\n(.*?\n)---\n(.*)", text, re.DOTALL).groups()
    fields: dict[str, object] = {}
    for line in front.splitlines():
        item = re.fullmatch(r"- (.+)", line)
        key, value = re.fullmatch(r"([a-z_]+):(?: (.+))?", line).groups() if item is None else (list(fields)[-1], None)
        if item is not None:
            fields[key].append(json.loads(item[1]) if item[1].startswith('"') else item[1])
        else:
            assert key not in fields
            fields[key] = [] if value is None else value
    return fields, body


def table_rows(body: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = body.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_a_cards_front_matter_is_what_hubs_read(tmp_path):
    child = merge(*make_pair(tmp_path), tmp_path / "my-child").child
    fields, body = read_card(child)
    assert fields["base_model"] == ["primary", "secondary"]
    assert fields["library_name"] == "transformers"
    assert {"merge", "slerp"} <= set(fields["tags"])
    assert "# my-child\n" in body


def test_a_cards_recipe_is_the_one_that_was_followed(tmp_path):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(secondary)
    child = merge(
        primary, secondary, tmp_path / "child", 0.35, method="slerp-norm", dot_threshold=0.99, dtype="float16"
    ).child
    settings = dict(table_rows(read_card(child)[1], "Recipe"))
    assert settings["primary (t = 0)"] == "primary"
    assert settings["secondary (t = 1)"] == "secondary"
    assert settings["method"] == "slerp-norm"
    assert settings["blend"] == "t = 0.35"
    assert settings["dtype"] == "float16"
    assert settings["dot threshold"] == "0.99"
    assert settings["tokenizer from"] == "secondary"


def test_a_cards_table_counts_every_tensor_once(tmp_path):
    left, right = llama_tensors(1), llama_tensors(2)
    left["zero"], right["zero"] = torch.zeros(1000), torch.ones(1000)
    left["same"], right["same"] = torch.ones(2000), torch.ones(2000)
    left["longer"], right["longer"] = torch.arange(1.0, 4.0), 2 * torch.arange(1.0, 4.0)
    primary, secondary = make_checkpoint(tmp_path / "p", left), make_checkpoint(tmp_path / "s", right)
    _, body = read_card(merge(primary, secondary, tmp_path / "child").child)
    rows = {rule: counts for rule, *counts in table_rows(body, "What was done")}
    assert rows["lerp (zero)"] == ["1", "1.0K", ""]
    assert rows["copy (identical)"] == ["1", "2.0K", "0.00° to 0.00°"]
    assert rows["lerp (parallel)"][:2] == ["1", "3"]
    slerped = sum(tensor.numel() for tensor in llama_tensors(1).values())
    assert rows["slerp"][:2] == [str(len(llama_tensors(1))), f"{slerped / 1000:.1f}K"]
    low, high = map(float, re.fullmatch(r"([\d.]+)° to ([\d.]+)°", rows["slerp"][2]).groups())
    assert 5 < low < 20 < high < 45  # the shorter a tensor, the further its angle from the 20 degrees of all
    assert len(rows) == 4


def test_a_card_says_what_was_mended(tmp_path):
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1))
    secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2, torch.float16))
    assert "`dtype of 21 tensors`" in read_card(merge(primary, secondary, tmp_path / "child").child)[1]


def test_no_file_of_the_child_tells_where_its_parents_lie(tmp_path):
    primary, secondary = make_pair(tmp_path, shards=2)
    add_tokenizer(primary)
    child = merge(primary, secondary, tmp_path / "child", max_shard_bytes=9000).child
    places = {str(place).encode() for path in (tmp_path, primary, Path.home()) for place in (path, path.resolve())}
    for path in child.rglob("*"):
        assert not any(place in path.read_bytes() for place in places if len(place) > 1), path.name


@pytest.mark.parametrize(
    ("place", "claimed", "name"),
    [
        ("models--org--name/snapshots/abc", None, "org/name"),
        ("models--name/snapshots/abc", None, "name"),
        ("plain", None, "plain"),
        ("plain", "org/plain", "org/plain"),
        ("plain", "org/another", "plain"),
        ("plain", "/home/somebody/models/plain", "plain"),
        ("plain", "../secret/plain", "plain"),
        pytest.param(*ODD_NAME, marks=pytest.mark.skipif(os.name == "nt", reason="no name for a folder there")),
    ],
)
def test_a_card_calls_parents_what_people_call_them(tmp_path, place, claimed, name):
    primary = make_checkpoint(tmp_path / place, llama_tensors(1), {**LLAMA_CONFIG, "_name_or_path": claimed})
    secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2))
    fields, body = read_card(merge(primary, secondary, tmp_path / "child").child)
    assert fields["base_model"] == [name, "secondary"]
    assert dict(table_rows(body, "Recipe"))["primary (t = 0)"] == name.replace("|", "\\|")
    assert str(tmp_path) not in body
