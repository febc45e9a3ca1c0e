"""The shape of the one file: its sections, what each may use, and what must not stand in the repository."""

from __future__ import annotations

import ast
import functools
import re
import statistics
import subprocess
import symtable
import sys
from pathlib import Path

import slerpmerge

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "slerpmerge.py"
SOURCE = PROGRAM.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BANNER = re.compile(r"# (?:── )?§(\d+)[a-z]?  ?\S")
SCREEN_LIBRARIES = {"rich", "questionary", "prompt_toolkit", "colorama"}
# Import names that are not the name to install.
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@functools.cache
def banners() -> list[tuple[int, int]]:
    """(line, section number) of every banner, in the order of the file."""
    return [(number, int(found[1])) for number, line in enumerate(LINES, 1) if (found := BANNER.match(line))]


@functools.cache
def section_of(node: ast.stmt) -> int:
    """The section that a top-level statement stands in; 0 before the first banner."""
    return max((section for line, section in banners() if line <= node.lineno), default=0)


def statements(first: int, last: int) -> list[ast.stmt]:
    """The top-level statements of sections `first` to `last`."""
    return [node for node in TREE.body if first <= section_of(node) <= last]


def names_bound_by(node: ast.stmt) -> set[str]:
    """The module-level names that a top-level statement makes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.If):
        return set().union(*(names_bound_by(inner) for inner in node.body + node.orelse))
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)}


@functools.cache
def names_used_by(node: ast.stmt) -> set[str]:
    """Names that a top-level statement takes from the module or the builtins, its functions' bodies included."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    tables = [symtable.symtable("\n".join(LINES[first - 1 : node.end_lineno]), PROGRAM.name, "exec")]
    module, used = tables[0], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (symbol.is_global() or table is module)
        }
    return used


@functools.cache
def sections_of_names() -> dict[str, int]:
    """Where each module-level name is made first."""
    found: dict[str, int] = {}
    for node in TREE.body:
        for name in names_bound_by(node):
            found.setdefault(name, section_of(node))
    return found


def uses_of_sections(node: ast.stmt, first: int, last: int) -> set[str]:
    """Names of sections `first` to `last` that a statement uses."""
    made_in = sections_of_names()
    return {name for name in names_used_by(node) if first <= made_in.get(name, -1) <= last}


def imported_roots(node: ast.AST) -> set[str]:
    """The top packages that imports anywhere inside a node ask for."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and part.module:
            found.add(part.module.partition(".")[0])
    return found


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def repository_files() -> list[Path]:
    """What git tracks or would; in a copy without git, the files of the project's own layout."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [*ROOT.glob("*.*"), *(ROOT / "tests").rglob("*.*")]
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


# ── Sections ──


def test_banners_stand_in_ascending_order():
    numbers = [section for _, section in banners()]
    assert numbers == sorted(numbers)
    assert sorted(set(numbers)) == list(range(1, max(numbers) + 1))
    assert max(numbers) >= 16


def test_the_opening_docstring_lists_every_section():
    lines = [line for line in ast.get_docstring(TREE).splitlines() if line.strip().startswith("§")]
    listed = sorted(int(number) for line in lines for number in re.findall(r"§(\d+)", line))
    assert listed == sorted({section for _, section in banners()})


def test_a_section_uses_only_names_of_sections_before_it():
    forward = {
        f"line {node.lineno}: §{section_of(node)} uses {name} of a later section"
        for node in TREE.body
        for name in uses_of_sections(node, section_of(node) + 1, 99)
    }
    assert forward == set()


def test_the_check_of_names_sees_into_methods_and_past_local_variables():
    """Guards the test above: it is worth nothing if the names are not found."""
    used = set().union(*(names_used_by(node) for node in statements(7, 7)))
    assert {"exact_sum", "slerp_coefficients", "TensorReader", "explain_os_error"} <= used
    assert "progress" not in used


def test_the_view_calls_nothing_of_the_work():
    """A name can be asked for its layer: that reads no file and changes nothing."""
    used = {name for node in statements(14, 14) for name in uses_of_sections(node, 4, 13)}
    assert used <= {"find_layer"}


def test_the_wizard_may_open_parents_but_never_merges():
    used = {name for node in statements(15, 15) for name in uses_of_sections(node, 6, 13)}
    assert used == set()


# ── The screen ──


def test_sections_0_to_13_import_no_screen_library():
    """Imports that only a type checker follows never run; whatever they name is used by later sections alone."""
    work = [node for node in statements(0, 13) if not is_for_type_checkers(node)]
    assert set().union(*map(imported_roots, work)) & SCREEN_LIBRARIES == set()
    for_types = [inner for node in TREE.body if is_for_type_checkers(node) for inner in node.body]
    screen_names = {
        name for inner in for_types if imported_roots(inner) & SCREEN_LIBRARIES for name in names_bound_by(inner)
    }
    assert screen_names & set().union(*map(names_used_by, work)) == set()


def test_sections_0_to_13_name_no_screen_library():
    """Not as a string for importlib either."""
    found = {
        part.value if isinstance(part, ast.Constant) else part.id
        for node in statements(0, 13)
        for part in ast.walk(node)
        if isinstance(part, ast.Name) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
    }
    assert {text for text in found if text.partition(".")[0] in SCREEN_LIBRARIES} == set()


def test_sections_0_to_13_neither_print_nor_ask_nor_leave():
    work = statements(0, 13)
    assert set().union(*map(names_used_by, work)) & {"print", "input", "exit", "quit", "breakpoint"} == set()
    attributes = {
        f"{part.value.id}.{part.attr}"
        for node in work
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)
    }
    forbidden = {"sys.exit", "sys.stdout", "sys.stderr", "sys.stdin", "os._exit", "os.system", "os.popen"}
    assert attributes & forbidden == set()


def test_the_maths_does_no_input_or_output():
    used = set().union(*map(names_used_by, statements(3, 3)))
    assert used & {"open", "os", "io", "sys", "shutil", "tempfile", "zipfile", "json", "Path", "importlib"} == set()
    called = {part.attr for node in statements(3, 3) for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    assert called & {"open", "read", "write", "read_text", "write_text", "read_bytes", "write_bytes", "save"} == set()


def test_importing_the_program_loads_no_heavy_or_screen_library():
    heavy = SCREEN_LIBRARIES | {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
    code = f"import sys, slerpmerge; print(sorted({heavy!r} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# ── Taste ──


def test_functions_are_short():
    lengths = {f"{node.name} (line {node.lineno})": node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert statistics.median(lengths.values()) <= 15


def test_every_public_function_and_class_has_a_docstring():
    bare = [
        f"{node.name} (line {node.lineno})"
        for node in TREE.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_there_is_no_unused_module_level_name():
    used = set().union(*map(names_used_by, TREE.body))
    made = {name for node in TREE.body for name in names_bound_by(node) if not isinstance(node, ast.ImportFrom)}
    elsewhere = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py"))
    unused = {name for name in made - used if not re.search(rf"\b{name}\b", elsewhere)}
    assert unused <= {"__version__", "annotations"}


# ── Dependencies and repository ──


def test_the_script_block_states_the_requirements():
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", SOURCE, re.MULTILINE)[1]
    stated = re.findall(r'^#   "([^"]+)",$', block, re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert stated == [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert re.search(r'^# requires-python = ">=3\.10"$', block, re.MULTILINE)


def test_every_library_that_is_imported_is_required():
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text("utf-8").split()}
    distributions = {DISTRIBUTIONS.get(root, root) for root in imported_roots(TREE) - set(sys.stdlib_module_names)}
    assert distributions <= required


def test_the_top_level_holds_the_five_and_dot_files():
    top = {file.relative_to(ROOT).parts[0] for file in repository_files()}
    expected = {"slerpmerge.py", "requirements.txt", "tests", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= expected


def test_no_file_tells_of_the_machine_it_was_made_on():
    own = {ROOT, ROOT.parent, Path(sys.prefix), Path(sys.prefix).parent, Path.home()}
    own = {str(path) for path in own if len(path.parts) > 2 and path.parts[1] not in ("usr", "Library")}
    texts = {file: file.read_bytes().decode("utf-8", "replace") for file in repository_files()}
    assert {str(file.relative_to(ROOT)): path for file, text in texts.items() for path in own if path in text} == {}


# ── README ──


def test_the_readme_names_every_flag_and_no_other():
    stated = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    known = {flag for action in slerpmerge.build_parser()._actions for flag in action.option_strings}
    bench = {"--peer", "--layers", "--runs", "--sync"}  # of tests/bench_merge.py
    assert known - {"-h", "--help"} <= stated
    assert stated <= known | bench


def test_every_command_of_the_readme_is_run_by_ci():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    typed = {"python slerpmerge.py"}  # the wizard: tests/test_wizard.py answers it on a real pseudo-terminal
    for command in commands:
        parts = [part.strip() for part in command.split("&&")]
        assert command in typed or all(part.split(" -r ")[0] in ci for part in parts), command
