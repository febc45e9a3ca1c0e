"""The house: its floors held by the real imports, its sizes, and what must not stand in the repository."""

from __future__ import annotations

import ast
import functools
import re
import statistics
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

from slerpkit.screen.flags import build_parser

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "slerpmerge.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCREEN_LIBRARIES = {"rich", "questionary", "prompt_toolkit", "colorama"}
HEAVY_LIBRARIES = {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
# Import names that are not the name to install.
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
# From the ground up. A module imports from its own floor, above itself in this list, or from a lower one.
FLOORS = (
    "slerpkit",
    "slerpkit.messages slerpkit.threads slerpkit.files slerpkit.lazy slerpkit.devices slerpkit.maths slerpkit.schedule"
    " slerpkit.chat_templates slerpkit.recipe",
    "slerpkit.parents.tensors slerpkit.parents.dtypes slerpkit.parents.adapted_tensor"
    " slerpkit.parents.safetensors_header slerpkit.parents.pickle_header"
    " slerpkit.parents.wrappers slerpkit.parents.modules slerpkit.parents.hub_cache"
    " slerpkit.parents.half_models slerpkit.parents.resolver"
    " slerpkit.parents.adapters slerpkit.parents.checkpoint slerpkit.parents.hub slerpkit.parents.hub_download",
    "slerpkit.recipe_yaml slerpkit.recipe_models slerpkit.recipe_tokenizer"
    " slerpkit.recipe_file slerpkit.recipe_identity slerpkit.recipe_writer",
    "slerpkit.parity.report slerpkit.parity.config_meaning slerpkit.parity.configs slerpkit.parity.quantisation"
    " slerpkit.parity.embeddings slerpkit.parity.soundness slerpkit.parity.sentencepiece_file"
    " slerpkit.parity.token_sources slerpkit.parity.tokenizer_source slerpkit.parity.vocabulary"
    " slerpkit.parity.segmentation slerpkit.parity.labels slerpkit.parity.prediction slerpkit.parity.pairing"
    " slerpkit.parity.names slerpkit.parity.modules slerpkit.parity.copied_files slerpkit.parity.chat"
    " slerpkit.parity.kinship slerpkit.parity.check",
    "slerpkit.merge.save_directory slerpkit.merge.tensor_plan slerpkit.merge.blocks"
    " slerpkit.merge.journal"
    " slerpkit.merge.events slerpkit.merge.supply slerpkit.merge.plan slerpkit.merge.arithmetic"
    " slerpkit.merge.recompute slerpkit.merge.worker slerpkit.merge.team slerpkit.merge.staging"
    " slerpkit.merge.difference_map slerpkit.merge.stream",
    "slerpkit.child.findings slerpkit.child.companions slerpkit.child.verify slerpkit.child.report"
    " slerpkit.child.upload",
    "slerpkit.story",
    "slerpkit.evaluation.loading slerpkit.evaluation.models slerpkit.evaluation.limits slerpkit.evaluation.taste"
    " slerpkit.evaluation.perplexity"
    " slerpkit.evaluation.harness slerpkit.evaluation.objectives slerpkit.evaluation.sweep slerpkit.demo",
    "slerpkit.screen.terminal slerpkit.screen.console slerpkit.screen.panels slerpkit.screen.figures"
    " slerpkit.screen.progress slerpkit.screen.answers slerpkit.screen.history slerpkit.screen.finder"
    " slerpkit.screen.prompts slerpkit.screen.blend_prompt slerpkit.screen.wizard slerpkit.screen.flag_values"
    " slerpkit.screen.flags slerpkit.screen.lookahead slerpkit.screen.session slerpkit.screen.fetching"
    " slerpkit.screen.afterwards"
    " slerpkit.screen.errands slerpkit.screen.searching",
    "slerpmerge",
)
# The package's door hands out merge_models, which it imports when it is asked for.
DOOR = "slerpkit imports slerpkit.story"
ORDER = {module: place for place, module in enumerate(" ".join(FLOORS).split())}
PURE = ("slerpkit.maths", "slerpkit.schedule", "slerpkit.recipe")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in [PROGRAM, *sorted((ROOT / "slerpkit").rglob("*.py"))]}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
BELOW_THE_SCREEN = [name for name in SOURCES if name != "slerpmerge" and not name.startswith("slerpkit.screen")]
# A sub-package's own __init__.py holds a docstring at most.
EMPTY = [name for name, path in SOURCES.items() if path.name == "__init__.py" and name != "slerpkit"]
FUNCTIONS = {
    f"{name}.{node.name} (line {node.lineno})": node
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
}


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_modules(node: ast.AST) -> set[str]:
    """Every module that imports anywhere inside a node ask for, inside functions and for type checkers too."""
    modules = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            modules |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            assert not part.level, "imports name their module in full"
            whole = {f"{part.module}.{alias.name}" for alias in part.names}
            modules |= whole & SOURCES.keys() or {part.module}
    return modules


def imported_roots(node: ast.AST) -> set[str]:
    return {module.partition(".")[0] for module in imported_modules(node)}


def names_bound_by(node: ast.stmt) -> set[str]:
    """The module-level names that a top-level statement makes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.If):
        return set().union(*(names_bound_by(inner) for inner in node.body + node.orelse))
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)}


@functools.cache
def global_names(module: str) -> frozenset[str]:
    """Names that a module takes from its own top level or the builtins, its functions' bodies included."""
    tables = [symtable.symtable(SOURCES[module].read_text(encoding="utf-8"), module, "exec")]
    top, used = tables[0], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (symbol.is_global() or table is top)
        }
    return frozenset(used)


def attributes_of(module: str) -> set[str]:
    """Every `name.attribute` in a module."""
    return {
        f"{part.value.id}.{part.attr}"
        for part in ast.walk(TREES[module])
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)
    }


def repository_files() -> list[Path]:
    """What git tracks or would; in a copy without git, the files of the project's own layout."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [*ROOT.glob("*.*"), *(ROOT / "tests").rglob("*.*"), *(ROOT / "slerpkit").rglob("*.*")]
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


# ── Floors ──


def test_every_module_has_its_floor():
    assert sorted(ORDER) == sorted(set(SOURCES) - set(EMPTY))


def test_imports_run_down_the_floors_only():
    """So there is no cycle either: the floors are an order of all modules."""
    upward = {
        f"{module} imports {imported}"
        for module in ORDER
        for imported in imported_modules(TREES[module])
        if imported.partition(".")[0] in ("slerpkit", "slerpmerge") and ORDER[imported] >= ORDER[module]
    }
    assert upward == {DOOR}


def test_the_check_of_imports_sees_them():
    """Guards the test above: it is worth nothing if the imports are not found."""
    assert {"slerpkit.merge.plan", "slerpkit.parity.check"} <= imported_modules(TREES["slerpkit.story"])
    assert "torch" in imported_modules(ast.parse("def f():\n    import torch"))


def test_the_packages_own_modules_are_empty():
    for module in EMPTY:
        assert all(isinstance(node, ast.Expr) for node in TREES[module].body), module


# ── The screen ──


@pytest.mark.parametrize("module", BELOW_THE_SCREEN)
def test_below_the_screen_nothing_knows_it(module):
    assert imported_roots(TREES[module]) & SCREEN_LIBRARIES == set()
    texts = {
        part.value if isinstance(part, ast.Constant) else part.id
        for part in ast.walk(TREES[module])
        if isinstance(part, ast.Name) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
    }
    assert {text for text in texts if text.partition(".")[0] in SCREEN_LIBRARIES} == set()  # for importlib either
    assert global_names(module) & {"print", "input", "exit", "quit", "breakpoint"} == set()
    allowed = {"os._exit"} if module == "slerpkit.merge.team" else set()  # how a forked worker ends
    forbidden = {"sys.exit", "sys.stdout", "sys.stderr", "sys.stdin", "os._exit", "os.system", "os.popen"}
    assert attributes_of(module) & forbidden - allowed == set()


@pytest.mark.parametrize("module", PURE)
def test_the_pure_modules_do_no_input_or_output(module):
    input_output = {"open", "os", "io", "sys", "shutil", "tempfile", "zipfile", "json", "importlib"}
    assert global_names(module) & input_output == set()
    called = {part.attr for part in ast.walk(TREES[module]) if isinstance(part, ast.Attribute)}
    assert called & {"open", "read", "write", "read_text", "write_text", "read_bytes", "write_bytes", "save"} == set()


def loaded_by(code: str) -> set[str]:
    """Which of the heavy and the screen's libraries a piece of code has loaded in the end."""
    code += f"\nimport sys\nprint(*sorted({SCREEN_LIBRARIES | HEAVY_LIBRARIES!r} & set(sys.modules)), file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(shown.stderr.split())


def test_importing_the_program_loads_no_heavy_or_screen_library():
    assert loaded_by("import slerpmerge") == set()


def test_importing_everything_below_the_screen_loads_no_heavy_library():
    assert loaded_by("\n".join(f"import {module}" for module in BELOW_THE_SCREEN)) == set()


# ── Taste ──


def test_modules_are_short():
    lengths = {module: len(SOURCES[module].read_text(encoding="utf-8").splitlines()) for module in ORDER}
    assert {module: length for module, length in lengths.items() if length > 450} == {}


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in FUNCTIONS.items()}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert statistics.median(lengths.values()) <= 15


def test_every_module_and_every_public_function_and_class_has_a_docstring():
    assert [module for module in ORDER if not ast.get_docstring(TREES[module])] == []
    bare = [
        f"{module}.{node.name}"
        for module in ORDER
        for node in TREES[module].body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_there_is_no_unused_module_level_name():
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    elsewhere: dict[str, set[str]] = {module: set() for module in ORDER}
    for user, tree in TREES.items():
        for part in ast.walk(tree):
            if isinstance(part, ast.ImportFrom) and part.module in elsewhere:
                elsewhere[part.module] |= {alias.name for alias in part.names}
        for module in imported_modules(tree) & ORDER.keys():
            head = module.rpartition(".")[2]
            elsewhere[module] |= {
                attribute.partition(".")[2] for attribute in attributes_of(user) if attribute.startswith(f"{head}.")
            }
    unused = {
        f"{module}.{name}"
        for module in ORDER
        for node in TREES[module].body
        for name in names_bound_by(node) - global_names(module) - elsewhere[module]
        if name != "__getattr__" and not re.search(rf"\b{name}\b", tests)
    }
    assert unused == set()


# ── Dependencies and repository ──


def test_the_script_block_states_the_requirements():
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", PROGRAM.read_text(encoding="utf-8"), re.MULTILINE)[1]
    stated = re.findall(r'^#   "([^"]+)",$', block, re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert stated == [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert re.search(r'^# requires-python = ">=3\.10"$', block, re.MULTILINE)


def test_every_library_that_is_imported_is_required():
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text("utf-8").split()}
    roots = set().union(*map(imported_roots, TREES.values())) - set(sys.stdlib_module_names) - {"slerpkit"}
    assert {DISTRIBUTIONS.get(root, root) for root in roots} <= required


def test_the_top_level_holds_the_six_and_dot_files():
    top = {file.relative_to(ROOT).parts[0] for file in repository_files()}
    expected = {"slerpmerge.py", "slerpkit", "requirements.txt", "tests", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= expected


def test_no_file_tells_of_the_machine_it_was_made_on():
    own = {ROOT, ROOT.parent, Path(sys.prefix), Path(sys.prefix).parent, Path.home()}
    own = {str(path) for path in own if len(path.parts) > 2 and path.parts[1] not in ("usr", "Library")}
    texts = {file: file.read_bytes().decode("utf-8", "replace") for file in repository_files()}
    assert {str(file.relative_to(ROOT)): path for file, text in texts.items() for path in own if path in text} == {}


# ── README ──


def test_the_readme_names_every_flag_and_no_other():
    stated = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    bench = {"--peer", "--layers", "--runs", "--sync"}  # of tests/bench_merge.py
    assert known - {"-h", "--help"} <= stated
    assert stated <= known | bench


def test_the_readme_names_every_question_that_is_not_always_asked():
    """What confirm, offers and choose ask, but for the names that are put into it."""
    asked = [
        node.args[0]
        for name in ("slerpmerge", *(module for module in TREES if module.startswith("slerpkit.screen")))
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("confirm", "offers", "choose")
    ]
    parts = [part for question in asked for part in getattr(question, "values", [question])]
    texts = [part.value for part in parts if isinstance(getattr(part, "value", None), str)]
    assert "Take it?" in texts
    assert [text for text in texts if text not in " ".join(README.split())] == []


def test_the_readmes_tree_says_of_every_module_what_it_says_itself():
    tree = {
        name: " ".join(ast.get_docstring(TREES[module]).split("\n\n")[0].split())
        for module in ORDER
        if (name := SOURCES[module].relative_to(ROOT).as_posix()) != "slerpkit/__init__.py"
    }
    lines = re.findall(r"^((?:slerpkit/[\w/]+|slerpmerge)\.py) +(.+)$", README, re.MULTILINE)
    assert lines == list(tree.items())


def test_every_command_of_the_readme_is_run_by_ci():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    typed = {"python slerpmerge.py"}  # the wizard: tests/test_wizard.py answers it on a real pseudo-terminal
    for command in commands:
        parts = [part.strip() for part in command.split("&&")]
        assert command in typed or all(part.split(" -r ")[0] in ci for part in parts), command
