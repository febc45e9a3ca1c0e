"""Every prompt in a table: its help, its way back, its flag; and what stays on the screen of one."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

import slerpmerge
from slerpkit.merge.journal import JOURNAL_NAME
from slerpkit.merge.save_directory import staging_area
from slerpkit.merge.supply import DiskTooSmall
from slerpkit.schedule import Schedule
from slerpkit.screen import afterwards, fetching
from slerpkit.screen.answers import Answers, Blend
from slerpkit.screen.finder import ModelFinder
from slerpkit.screen.flags import answers_given, build_parser
from slerpkit.screen.prompts import GUIDES, Prompter
from slerpkit.screen.session import Session
from slerpkit.screen.terminal import Terminated
from slerpkit.screen.wizard import Wizard
from tests.builders import add_tokenizer, edit_json, llama_tensors, make_checkpoint, make_pair
from tests.pictures import RecordingConsole
from tests.terminal import PATIENCE

ESC, CTRL_C = "\x1b", "\x03"
HELP = "?\r"


class TypingPrompter(Prompter):
    """Prompts at which somebody types: the next keys at each that is put. `asked` has their subjects, in order."""

    def __init__(self, keyboard: PipeInput, keys: Iterable[str]) -> None:
        super().__init__(RecordingConsole(400), lambda: None)
        self.keyboard = keyboard
        self.keys = iter(keys)
        self.asked: list[str] = []

    def text(self, message: str, subject: str, *how: object, **more: object) -> object:
        self.asked.append(subject)
        return super().text(message, subject, *how, **more)

    def ask(self, question: object) -> str:
        self.keyboard.send_text(next(self.keys))
        return super().ask(question)

    @property
    def shown(self) -> str:
        """What stays on the screen."""
        return self.console.export_text(clear=False)


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def start_session(keyboard: PipeInput, *keys: str, flags: tuple[str, ...] = ()) -> Session:
    """A session at whose prompts these keys are typed, one after the other."""
    session = Session(build_parser().parse_args(flags), slerpmerge.NOTHING_WRITTEN)
    prompter = TypingPrompter(keyboard, keys)
    session.console, session.interactive = prompter.console, True
    session.wizard = Wizard(prompter, ModelFinder([]), lambda *_: None)
    session.prepare_for = lambda *_: None
    return session


def typed(text: str) -> list[str]:
    """Answers with an Enter behind each."""
    return [f"{answer}\r" for answer in text.split("|")] if text else []


# Of every prompt: what is asked before it, what is typed to get there, and the prompt that Esc leads to from there.
ANSWERED = "primary|secondary|child"
OTHER_FLAGS = ("--method", "nuslerp", "--granularity", "row", "--dot-threshold", "0.9", "--epsilon", "1e-6",
               "--extrapolate", "--accept", "hidden_act")  # fmt: skip
ASKED_FIRST = [
    ("primary", "", "primary"),
    ("secondary", "primary", "primary"),
    ("save_directory", "primary|secondary", "secondary"),
    ("overwrite", "primary|secondary|base", "save_directory"),
    ("carry_on", "primary|secondary|unfinished", "save_directory"),
    ("blend", ANSWERED, "save_directory"),
    ("curves", f"{ANSWERED}|0,1", "blend"),
    ("base", f"{ANSWERED}|task vectors", "blend"),
    ("text", f"{ANSWERED}|find", "blend"),
    ("second_text", f"{ANSWERED}|find|text.txt", "text"),
    ("recipe_t", f"{ANSWERED}|other.yaml", "blend"),
]
ASKED_OF_A_PLAN = [
    ("start", "", "change"),
    ("change", "c", "start"),
    ("recipe", "s", "start"),
    *((name, f"c|{words}", "start") for name, words in (
        ("base", "base"), ("method", "method"), ("tokenizer", "tokenizer"), ("chat_template", "chat"),
        ("dtype", "dtype"), ("vectors", "granularity"), ("dot_threshold", "dot"), ("epsilon", "epsilon"),
        ("extrapolate", "extra"), ("accept", "accept"),
    )),
]  # fmt: skip
ASKED_OF_PARENTS = [("differences", "", "change"), ("template_offer", "", "change")]
ASKED_OF_THE_HUB = [("fetch", "y", "start"), ("stream", "", "change")]
ASKED_AFTERWARDS = [("next", "", None), ("prompt", "t", "next"), ("measured_text", "p", "next"),
                    ("upload", "u", "next"), ("private", "u|", "upload")]  # fmt: skip


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A folder with all that the prompts above ask for, which is the current one."""
    monkeypatch.chdir(tmp_path)
    make_pair(tmp_path)
    make_checkpoint(tmp_path / "base", llama_tensors(3))
    (tmp_path / "text.txt").write_text("Some words to be predicted.")
    models = "models:\n- model: base\n- model: secondary\n"
    (tmp_path / "other.yaml").write_text(f"merge_method: slerp\nbase_model: base\n{models}parameters:\n  t: 0.25\n")
    staging_area(tmp_path / "unfinished").mkdir()
    (staging_area(tmp_path / "unfinished") / JOURNAL_NAME).write_text("{}")
    return tmp_path


FOLDERS = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "child", "--t", "0.25")


class TestEveryPrompt:
    def test_the_table_has_every_prompt(self):
        table = (*ASKED_FIRST, *ASKED_OF_A_PLAN, *ASKED_OF_PARENTS, *ASKED_OF_THE_HUB, *ASKED_AFTERWARDS)
        assert {subject for subject, *_ in table} == GUIDES.keys()

    def test_its_flag_is_one(self):
        known = {flag for action in build_parser()._actions for flag in action.option_strings}
        for subject, guide in GUIDES.items():
            flags = set(re.findall(r"--[a-z-]+", guide.flag))
            assert flags <= known, subject
            assert flags or subject == "change", "the answers that can be changed have their own"

    def hold(self, session: Session, subject: str, back: str | None) -> None:
        """Holds a session to what the table says of its last prompt but one."""
        prompter = session.wizard.prompt
        assert prompter.asked[-2 if back else -1 :] == [subject, back][: 2 if back else 1]
        assert str(GUIDES[subject]) in " ".join(prompter.shown.split())

    @pytest.mark.parametrize(("subject", "answers", "back"), ASKED_FIRST, ids=[row[0] for row in ASKED_FIRST])
    def test_before_the_plan(self, models, keyboard, subject, answers, back):
        session = start_session(keyboard, *typed(answers), HELP, ESC, CTRL_C)
        with pytest.raises(KeyboardInterrupt):
            session.ask(Answers())
        self.hold(session, subject, back)

    @pytest.mark.parametrize(("subject", "answers", "back"), ASKED_OF_A_PLAN, ids=[row[0] for row in ASKED_OF_A_PLAN])
    def test_of_a_plan(self, models, keyboard, subject, answers, back):
        session = start_session(keyboard, *typed(answers), HELP, ESC, CTRL_C, flags=(*FOLDERS, *OTHER_FLAGS))
        with pytest.raises(KeyboardInterrupt):
            slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        self.hold(session, subject, back)

    @pytest.mark.parametrize(("subject", "answers", "back"), ASKED_OF_PARENTS)
    def test_of_parents(self, models, keyboard, subject, answers, back):
        if subject == "differences":
            edit_json(models / "secondary" / "config.json", rms_norm_eps=1e-5)
        else:
            add_tokenizer(models / "primary")
            add_tokenizer(models / "secondary")
            (models / "secondary" / "chat_template.jinja").write_text("{{ messages }}")
        session = start_session(keyboard, *typed(answers), HELP, ESC, CTRL_C, flags=FOLDERS)
        with pytest.raises(KeyboardInterrupt):
            slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        self.hold(session, subject, back)

    @pytest.mark.parametrize(("subject", "answers", "back"), ASKED_OF_THE_HUB)
    def test_of_what_is_on_the_hub(self, models, keyboard, monkeypatch, subject, answers, back):
        if subject == "fetch":
            monkeypatch.setattr(
                slerpmerge.fetching, "may_fetch", lambda session, plan: fetching.consent(session, 10**9)
            )
        else:
            error = DiskTooSmall("Too small.", "", True)
            monkeypatch.setattr(fetching.story, "plan_merge", mock.Mock(side_effect=error))
        session = start_session(keyboard, *typed(answers), HELP, ESC, CTRL_C, flags=FOLDERS)
        with pytest.raises(KeyboardInterrupt):
            slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        self.hold(session, subject, back)

    @pytest.mark.parametrize(("subject", "answers", "back"), ASKED_AFTERWARDS)
    def test_afterwards(self, models, keyboard, monkeypatch, subject, answers, back):
        monkeypatch.setattr(afterwards, "may_generate_text", lambda plan: True)
        monkeypatch.setattr(afterwards, "logged_in_user", lambda: "ada")
        monkeypatch.setattr(afterwards, "check_card", lambda folder: None)
        closing = [ESC] * (subject == "private")
        session = start_session(keyboard, *typed(answers), HELP, ESC, *closing, *typed("leave"))
        plan, compared = mock.Mock(), mock.Mock(folders=(("child", models / "base"),))
        plan.options.stream_parents = False
        afterwards.ask_what_now(session, plan, compared)
        if subject == "private":
            assert session.wizard.prompt.asked.pop() == "next"
        self.hold(session, subject, back)

    @pytest.mark.parametrize(("subject", "answers", "back"), [*ASKED_AFTERWARDS[1:3], ("change", "c", "start")])
    def test_enter_goes_back_where_it_could_take_nothing(self, models, keyboard, monkeypatch, subject, answers, back):
        monkeypatch.setattr(afterwards, "may_generate_text", lambda plan: True)
        session = start_session(keyboard, *typed(answers), "\r", CTRL_C, flags=FOLDERS)
        with pytest.raises(KeyboardInterrupt):
            if subject == "change":
                slerpmerge.agree_on_plan(session, answers_given(session.arguments))
            else:
                plan = mock.Mock()
                plan.options.stream_parents = False
                afterwards.ask_what_now(session, plan, mock.Mock())
        assert session.wizard.prompt.asked[-2:] == [subject, back]


class TestRecord:
    """What stays on the screen of a prompt."""

    def test_it_is_the_answer_that_was_taken_and_no_hint(self, models, keyboard):
        keys = [*typed("primary|secondary||att"), CTRL_C]
        session = start_session(keyboard, *keys, flags=())
        with pytest.raises(KeyboardInterrupt):
            slerpmerge.agree_on_plan(session, Answers())
        lines = [line.rstrip() for line in session.wizard.prompt.shown.splitlines() if line.startswith("? ")]
        assert lines == [
            "? Primary model  primary",
            "? Secondary model  secondary",
            "? Save directory  primary-secondary-slerp",
            "? Blend  attention and mlp",
            "? Start the merge?",  # where Ctrl-C left it
        ]

    def test_a_refused_letter_does_not_stay_in_the_line(self, models, keyboard):
        session = start_session(keyboard, "x\rstart\r", flags=FOLDERS)
        assert slerpmerge.agree_on_plan(session, answers_given(session.arguments))[2] == "start"

    def test_a_refused_path_stays_to_be_corrected(self, models, keyboard):
        session = start_session(keyboard, "primar\ry\r", CTRL_C)
        with pytest.raises(KeyboardInterrupt):
            session.ask(Answers())
        assert session.wizard.prompt.asked == ["primary", "secondary"]


class TestStopping:
    @pytest.mark.parametrize("stop", [KeyboardInterrupt(), Terminated(15)])
    @pytest.mark.parametrize("flags", [(), ("--yes",)])
    def test_ctrl_c_alone_ends_work_alone_and_only_where_somebody_is_asked_again(self, keyboard, flags, stop):
        session = start_session(keyboard, flags=flags)
        ends_alone = not flags and not isinstance(stop, Terminated)
        with contextlib.nullcontext() if ends_alone else pytest.raises(type(stop)), session.stoppable():
            raise stop
        assert ("Stopped." in session.wizard.prompt.shown) is ends_alone

    def test_an_inspection_that_is_ended_leads_back_to_the_start(self, models, keyboard, monkeypatch):
        monkeypatch.setattr(slerpmerge.story, "measure_differences", mock.Mock(side_effect=KeyboardInterrupt))
        session = start_session(keyboard, *typed("i|y"), flags=FOLDERS)
        assert slerpmerge.agree_on_plan(session, answers_given(session.arguments))[2] == "start"


class TestFinding:
    def test_a_menu_that_is_open_grows_while_models_are_looked_for(self, models, keyboard, monkeypatch):
        goes_on = threading.Event()

        def folders(finder: ModelFinder) -> Iterator[Path]:
            yield from (models / "base", models / "primary")
            goes_on.wait(PATIENCE)
            yield models / "secondary"

        monkeypatch.setattr(ModelFinder, "_folders", folders)
        (models / ".empty").mkdir()
        monkeypatch.chdir(models / ".empty")
        finder = ModelFinder([])
        prompter = TypingPrompter(keyboard, [""])
        prompter.waiting, finder.on_change = [finder.start], prompter.refresh
        wizard = Wizard(prompter, finder, lambda *_: None)
        menus: list[list[str]] = []

        def look() -> None:
            """Presses Tab while two models are found, lets the finder find the third, and leaves."""
            for keys, count in (("\t", 2), ("", 3)):
                wait_until(lambda count=count: len(finder.models) == count)
                keyboard.send_text(keys)
                wait_until(lambda count=count: len(menu(prompter)) == count)
                menus.append([Path(name).name for name in menu(prompter)])
                goes_on.set()
            keyboard.send_text(CTRL_C)

        threading.Thread(target=look, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            wizard.ask_primary(Answers(), Answers())
        assert menus == [["base", "primary"], ["base", "primary", "secondary"]]

    def test_the_prompt_says_whether_it_is_still_looking(self, models):
        finder, prompter = ModelFinder([]), mock.Mock()
        prompter.path.return_value = models / "primary"
        Wizard(prompter, finder, lambda *_: None).ask_model("primary", "Primary model", mock.Mock(), None)
        hint = prompter.path.call_args.args[3]
        assert hint() == "still looking for models, ? helps"
        finder._look()
        assert hint() == "Tab lists what is here, ? helps"


def menu(prompter: Prompter) -> list[str]:
    """What the menu of the prompt that stands offers."""
    application = prompter.application
    state = application.current_buffer.complete_state if application is not None else None
    return [] if state is None else [completion.text for completion in state.completions]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + PATIENCE
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)


class TestChange:
    def agreed(self, keyboard: PipeInput, answers: str, flags: tuple[str, ...] = FOLDERS) -> Answers:
        """The answers once the plan is taken."""
        session = start_session(keyboard, *typed(answers), flags=flags)
        answers, plan, decision = slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        assert decision == "start"
        assert plan.recipe == answers.recipe
        return answers

    @pytest.mark.parametrize(
        ("typed_there", "name", "value"),
        [
            ("method|slerp-norm", "method", "slerp-norm"),
            ("method|slerp", "method", "slerp"),
            ("dtype|float32", "dtype", "float32"),
            ("base|base", "base", Path("base")),
        ],
    )
    def test_settings_can_be_changed(self, models, keyboard, typed_there, name, value):
        assert getattr(self.agreed(keyboard, f"c|{typed_there}|y").recipe, name) == value

    def test_what_a_flag_gave_can_be_changed_and_taken_back(self, models, keyboard):
        flags = (*FOLDERS, "--base", "base", "--accept", "hidden_act", "--dot-threshold", "0.9")
        answers = self.agreed(keyboard, "c|base|none|c|accept|none|c|dot|0.99|c|primary|base|y", flags)
        recipe = answers.recipe
        assert (recipe.base, recipe.accept, recipe.dot_threshold) == (None, (), 0.99)
        assert recipe.primary == Path("base")

    def test_what_cannot_be_is_refused_in_place(self, models, keyboard):
        flags = (*FOLDERS, "--method", "nuslerp", "--granularity", "row")
        session = start_session(keyboard, *typed("c|method"), "lerp\rnuslerp\r", *typed("y"), flags=flags)
        answers, _, _ = slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        assert answers.recipe.method == "nuslerp"

    def test_another_blend_keeps_the_base_and_task_vectors_take_any_blend(self, models, keyboard):
        answers = self.agreed(keyboard, "task vectors|base|ramp|y", FOLDERS[:-2])
        assert answers.recipe.base == Path("base")
        assert len(answers.recipe.schedule.rules[0].gradient) == 5
        answers = self.agreed(keyboard, "task vectors|base||c|blend|0.75|y", FOLDERS[:-2])
        assert answers.recipe.base == Path("base")
        assert answers.recipe.schedule == Schedule.constant(0.75)

    def test_only_the_t_of_a_recipe_for_other_models_is_taken(self, models, keyboard):
        answers = self.agreed(keyboard, "other.yaml|y|y", FOLDERS[:-2])
        assert answers.recipe.schedule == Schedule.constant(0.25)
        assert (answers.recipe.primary, answers.blend.recipe) == (Path("primary"), None)

    def test_a_recipe_goes_with_the_parents_that_it_is_for(self):
        recipe = mock.Mock()
        answers = Answers(Path("a"), Path("b"), Path("c"), Blend(recipe=recipe))
        assert answers.without("primary").unanswered() == ["primary", "blend"]
        assert "base" not in answers.changeable()

    @pytest.mark.parametrize(("answer", "taken"), [("y", "secondary"), ("n", "auto")])
    def test_a_chat_template_is_offered_once_for_a_pair_of_parents(self, models, keyboard, answer, taken):
        for folder in ("primary", "secondary", "base"):
            add_tokenizer(models / folder)
        for folder in ("secondary", "base"):
            (models / folder / "chat_template.jinja").write_text("{{ messages }}")
        session = start_session(
            keyboard, *typed(f"{answer}|c|method|lerp|c|blend|0.75|c|secondary|base|{answer}|y"), flags=FOLDERS
        )
        _, plan, _ = slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        assert session.wizard.prompt.asked.count("template_offer") == 2, "once for each pair"
        assert plan.recipe.chat_template == taken

    def test_a_plan_that_cannot_be_leads_back_to_the_last_question(self, models, keyboard):
        make_checkpoint(models / "odd", {"model.norm.weight": torch.ones(3)})
        session = start_session(keyboard, *typed("odd|child|0.25"), ESC, CTRL_C, flags=FOLDERS[2:4])
        with pytest.raises(KeyboardInterrupt):
            slerpmerge.agree_on_plan(session, answers_given(session.arguments))
        assert session.wizard.prompt.asked == ["primary", "save_directory", "blend", "change", "blend"]
