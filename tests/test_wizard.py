"""The wizard: how answers are read, and the real program played on a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch

import slerpmerge
from slerpmerge import SlerpMergeError, clean_path, parse_blend, parse_t, proposed_save_directory
from tests.builders import (
    LLAMA_CONFIG,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    make_real_model,
    reference_slerp,
    units_of_last_place,
)
from tests.terminal import Terminal, needs_terminal

posix_paths = pytest.mark.skipif(os.name == "nt", reason="a backslash separates folders on Windows")

# ── How answers are read ──


class TestCleanPath:
    @pytest.mark.parametrize(
        "text",
        [
            "/models/tiny",
            "/models/tiny/",
            "  /models/tiny \t",
            "'/models/tiny'",
            '"/models/tiny/"',
            "${SLERPMERGE_TEST}/tiny",
            "$SLERPMERGE_TEST/tiny/",
            '"$SLERPMERGE_TEST/tiny"',
        ],
    )
    def test_what_means_the_same_path(self, text, monkeypatch):
        monkeypatch.setenv("SLERPMERGE_TEST", "/models")
        assert clean_path(text) == Path("/models/tiny")

    @pytest.mark.parametrize("text", ["~", "~/", "'~'", "$HOME"])
    def test_home(self, text, monkeypatch):
        monkeypatch.setenv("HOME", "/home/ada")
        monkeypatch.setenv("USERPROFILE", "/home/ada")
        assert clean_path(text) == Path("/home/ada")

    def test_below_home(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/ada")
        monkeypatch.setenv("USERPROFILE", "/home/ada")
        assert clean_path("~/models/tiny") == clean_path("$HOME/models/tiny") == Path("/home/ada/models/tiny")

    @pytest.mark.parametrize("text", ["/my models/tiny", "'/my models/tiny'"])
    def test_spaces(self, text):
        assert clean_path(text) == Path("/my models/tiny")

    @posix_paths
    @pytest.mark.parametrize(
        ("text", "path"),
        [
            (r"/my\ models/tiny\ one/", "/my models/tiny one"),
            (r"/models/tiny\ \(copy\)", "/models/tiny (copy)"),
            (r"/models/ada\'s\ tiny", "/models/ada's tiny"),
        ],
    )
    def test_a_folder_dropped_onto_the_terminal(self, text, path):
        assert clean_path(text) == Path(path)

    @pytest.mark.parametrize("text", ["/models/ada's", "/models/$unknown/tiny", "/models/tiny[1]", "'/models/tiny"])
    def test_what_only_looks_special_is_left_alone(self, text):
        assert clean_path(text) == Path(text)


class TestParseBlend:
    @pytest.mark.parametrize(
        ("text", "t"),
        [
            ("even", 0.5),
            ("e", 0.5),
            ("EVE", 0.5),
            ("lean to primary", 0.3),
            ("  Lean  to  Primary ", 0.3),
            ("lean to p", 0.3),
            ("lean to secondary", 0.7),
            ("lean to s", 0.7),
            ("0", 0.0),
            ("1", 1.0),
            ("0.25", 0.25),
            (".75", 0.75),
            (" 0.6 ", 0.6),
        ],
    )
    def test_names_their_beginnings_and_numbers(self, text, t):
        assert parse_blend(text) == slerpmerge.Schedule.constant(t)

    def test_a_comma_list_is_a_gradient(self):
        assert parse_blend("0, 0.5, 1").rules == (slerpmerge.ScheduleRule((0.0, 0.5, 1.0)),)

    @pytest.mark.parametrize("text", ["l", "le", "lean", "lean t", "lean to", "lean to "])
    def test_a_beginning_of_two_names_is_refused(self, text):
        with pytest.raises(SlerpMergeError):
            parse_blend(text)

    @pytest.mark.parametrize("text", ["odd", "evenly", "primary", "1.1", "-0.5", "nan", "50%", "0.5 0.6", " "])
    def test_anything_else_is_refused(self, text):
        with pytest.raises(SlerpMergeError, match="is not a number from 0 to 1"):
            parse_blend(text)

    def test_a_refusal_names_the_choices(self):
        with pytest.raises(SlerpMergeError) as refusal:
            parse_blend("odd")
        assert "even" in f"{refusal.value.message} {refusal.value.hint}"


class TestParseT:
    def test_one_number(self):
        assert parse_t("0.3") == slerpmerge.Schedule.constant(0.3)

    def test_a_list_runs_over_the_layers(self):
        schedule = parse_t("0,0.5 , 1")
        assert [schedule.t_for("any", position) for position in (0, 0.25, 0.5, 1)] == [0, 0.25, 0.5, 1]

    @pytest.mark.parametrize("text", ["", "even", "1.01", "-0.01", "nan", "inf", "0.5,", "0.5,,0.6", "0.5,2"])
    def test_wrong_ones_are_refused(self, text):
        with pytest.raises(SlerpMergeError, match="is not a number from 0 to 1"):
            parse_t(text)


class TestProposedSaveDirectory:
    def test_it_names_both_parents_below_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        proposed = proposed_save_directory(Path("/models/Tiny-1.1B_chat"), Path("/models/tiny-code/"))
        assert proposed == Path("Tiny-1.1B_chat-tiny-code-slerp")

    def test_it_is_free(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for expected in ("a-b-slerp", "a-b-slerp-2", "a-b-slerp-3"):
            proposed = proposed_save_directory(Path("/x/a"), Path("/x/b"))
            assert proposed == Path(expected)
            proposed.mkdir()

    def test_odd_characters_are_left_out(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = str(proposed_save_directory(Path("/x/my model (1)"), Path("/x/b\x1b[31m")))
        assert re.fullmatch(r"[\w.-]+-slerp", name)

    def test_the_current_folder_has_a_name_too(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert proposed_save_directory(Path(), Path("..")) == Path(f"here-{tmp_path.name}-slerp")

    def test_a_model_in_a_hub_cache_goes_by_its_own_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        cached = [Path(f"/cache/models--meadow--{name}/snapshots/{'0a' * 20}") for name in ("finch", "wren")]
        assert proposed_save_directory(*cached) == Path("finch-wren-slerp")


# ── The real program on a real pseudo-terminal ──


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


FOLDERS = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "child")


@needs_terminal
class TestSession:
    def test_three_questions_a_blend_and_a_start_make_a_child(self, tmp_path, parents):
        """On the way: a wrong answer is corrected in place, Tab completes, quotes and spaces are understood."""
        folders = make_pair(tmp_path)[0], tmp_path / "second model"
        (tmp_path / "secondary").rename(folders[1])
        parents.watch(*folders)
        with Terminal.start(folder=tmp_path) as terminal:
            terminal.answer("Primary model", "nowhere")
            terminal.wait_for("The folder nowhere does not exist. Give the folder")
            assert terminal.text.count("Primary model") == 1, "asked once, corrected in place"
            terminal.send("\x15pri\t")
            terminal.wait_for("Primary model primary")
            terminal.send("\r")
            terminal.answer("Secondary model", " 'second model/' ")
            terminal.answer("Save directory", "primary")
            terminal.wait_for("is a parent's folder")
            terminal.send("\x15below/child\r")
            terminal.answer("? Blend", "a lot")
            terminal.wait_for("'a lot' is not a number from 0 to 1.")
            terminal.send("\x150.25\r")
            terminal.answer("Start the merge?", "y")
            terminal.answer("Load the child with transformers", "n")
            assert terminal.exit_status() == 0
            text = terminal.text
        order = [
            "? Primary model primary", "? Secondary model  'second model/'", "? Save directory", "below/child",
            "? Blend", "0.25", "Parity", "Plan", "t = 0.25", "? Start the merge? Yes", "Done", "21 slerped", "Try it:",
        ]  # fmt: skip
        positions = [text.find(part) for part in order]
        assert positions == sorted(positions), text
        assert positions[0] >= 0, text
        child, primary, secondary = map(load_tensors, (tmp_path / "below" / "child", *folders))
        for name, tensor in child.items():
            exact = reference_slerp(primary[name], secondary[name], 0.25)
            assert units_of_last_place(tensor.flatten(), exact.flatten()) <= 0.51, name
        assert names_below(tmp_path) == {"primary", "second model", "below"}

    def test_plain_enter_takes_every_default_that_is_shown(self, tmp_path):
        for seed, name in enumerate(("primary", "secondary")):
            make_real_model(tmp_path / name, seed)
        with Terminal.start(folder=tmp_path) as terminal:
            terminal.answer("Primary model", "primary")
            terminal.answer("Secondary model", "secondary")
            terminal.answer("(primary-secondary-slerp)")
            terminal.answer("(even)")
            terminal.answer("Start the merge? (Y/n)")
            terminal.answer("Load the child with transformers, to be sure? (Y/n)")
            assert terminal.exit_status() == 0
            assert "t = 0.5" in terminal.text
            assert "no missing, unexpected or mismatched key" in terminal.text
        assert (tmp_path / "primary-secondary-slerp" / "model.safetensors").is_file()
        assert names_below(tmp_path) == {"primary", "secondary", "primary-secondary-slerp"}

    def test_what_a_flag_gives_is_not_asked_and_no_writes_nothing(self, tmp_path, parents):
        parents.watch(*make_pair(tmp_path))
        with Terminal.start([*FOLDERS, "--method", "lerp"], env={"NO_COLOR": "1"}, folder=tmp_path) as terminal:
            terminal.answer("? Blend", "lean to s")
            terminal.answer("Start the merge?", "n")
            assert terminal.exit_status() == 0
            assert "Nothing was written" in terminal.text
            assert "lerp, t = 0.7" in terminal.text
            for question in ("? Primary", "? Secondary", "? Save"):
                assert question not in terminal.text
            assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|9\d)[;m]", terminal.output), "NO_COLOR leaves no colour"
        assert names_below(tmp_path) == {"primary", "secondary"}

    def test_a_second_parent_that_cannot_match_is_refused_in_place(self, tmp_path):
        edit_json(make_pair(tmp_path)[1] / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
        with Terminal.start(["--primary", "primary"], folder=tmp_path) as terminal:
            terminal.answer("Secondary model", "secondary")
            terminal.wait_for("does not fit the primary", timeout=3)
            assert "? Save directory" not in terminal.text, "nothing more is asked before it is mended"

    def test_yes_asks_nothing(self, tmp_path, parents):
        parents.watch(*make_pair(tmp_path))
        with Terminal.start([*FOLDERS, "--yes"], folder=tmp_path) as terminal:
            assert terminal.exit_status() == 0
            assert "?" not in terminal.text
        assert (tmp_path / "child" / "model.safetensors").is_file()

    def test_the_first_prompt_does_not_wait_for_torch(self, tmp_path):
        fastest = 60.0
        for _ in range(3):  # a busy machine may be slow once
            with Terminal.start(folder=tmp_path) as terminal:
                started = time.monotonic()
                terminal.wait_for("Primary model")
                fastest = min(fastest, time.monotonic() - started)
            if fastest < 0.9:
                break
        assert fastest < 0.9, "0.3 s is the aim; loading torch alone takes longer than this bound"


@needs_terminal
class TestLeaving:
    @pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["ctrl-c", "ctrl-d"])
    def test_at_the_first_prompt(self, tmp_path, parents, key):
        parents.watch(*make_pair(tmp_path))
        with Terminal.start(folder=tmp_path) as terminal:
            terminal.wait_for("Primary model")
            terminal.send(key)
            assert terminal.exit_status() == 130
            assert "Nothing was written." in terminal.text
            assert "Traceback" not in terminal.text
        assert names_below(tmp_path) == {"primary", "secondary"}

    def test_at_the_last_prompt(self, tmp_path, parents):
        parents.watch(*make_pair(tmp_path))
        with Terminal.start([*FOLDERS, "--t", "0.5"], folder=tmp_path) as terminal:
            terminal.wait_for("Start the merge?")
            terminal.interrupt()
            assert terminal.exit_status() == 130
            assert "Nothing was written." in terminal.text
        assert names_below(tmp_path) == {"primary", "secondary"}

    def test_during_the_merge(self, tmp_path, parents):
        """Many small tensors take long enough to be interrupted, and little room."""
        count = 12_000
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(count)]
        for seed, name in enumerate(("primary", "secondary")):
            weights = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
            tensors = dict(zip(names, weights))
            parents.watch(make_checkpoint(tmp_path / name, tensors, {**LLAMA_CONFIG, "num_hidden_layers": count}))
        save_directory = tmp_path / "new" / "child"
        arguments = (*FOLDERS[:-1], "new/child", "--yes")
        with Terminal.start(arguments, folder=tmp_path) as terminal:
            terminal.wait_for(".weight  slerp, ")  # the line of the tensor at hand
            assert not save_directory.exists(), "the child appears whole or not at all"
            assert names_below(tmp_path / "new"), "it grows beside its place"
            terminal.interrupt()
            assert terminal.exit_status() == 130
            assert "The unfinished child was removed; both parents are as they were." in terminal.text
            assert "Traceback" not in terminal.text
            assert "━" not in terminal.text, "the bar is gone"
            assert terminal.output.rfind("\x1b[?25h") > terminal.output.rfind("\x1b[?25l"), "the cursor is back"
        assert names_below(tmp_path) == {"primary", "secondary"}


@needs_terminal
class TestSixtyColumns:
    def test_no_line_is_broken_but_the_command_to_paste(self, tmp_path):
        primary = make_checkpoint(tmp_path / "primary", llama_tensors(1))
        secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2, torch.float16))
        edit_json(secondary / "config.json", max_position_embeddings=128, vocab_note="a value of some length " * 3)
        with Terminal.start(["--primary", primary], columns=60, folder=tmp_path) as terminal:
            terminal.answer("Secondary model", "secondary")
            terminal.answer("Save directory")
            terminal.answer("? Blend")
            terminal.answer("Start the merge?")
            terminal.answer("Load the child with transformers", "n")
            assert terminal.exit_status() == 0
            text, _, command = terminal.text.partition("Try it:")
            broken = [line for line in terminal.screen.overrun_lines if line not in command]
            assert broken == []
            assert max(map(len, terminal.text.splitlines())) <= 60
        marks = "primary bfloat16", "secondary float16", "max_position_embeddings", "primary 64", "secondary 128"
        for part in (*marks, "LlamaForCausalLM", "21 slerped"):
            assert part in text

    def test_a_refusal_is_readable_to_its_end(self, tmp_path):
        with Terminal.start(columns=60, folder=tmp_path) as terminal:
            terminal.answer("Primary model", "nowhere")
            terminal.wait_for("The folder nowhere does not exist.")
            terminal.wait_for("Give the folder that holds a model's config.json and weights.", timeout=2)
