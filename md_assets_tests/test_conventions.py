"""The conventions of this code base that neither ruff nor import-linter can tell."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "md_assets"
TESTS = REPOSITORY / "md_assets_tests"

MODULES = sorted(PACKAGE.rglob("*.py"))
TEST_MODULES = sorted(TESTS.rglob("test_*.py"))

HEAVY = ("torch", "torchvision", "streaming", "diffusers", "transformers", "open_clip", "accelerate", "matplotlib")
"""Seconds of import each; the code location must load without them."""

LINES_LIMIT = 400
EMPTY_NAMES = {"utils", "util", "helpers", "common", "base", "misc"}
"""Module names that do not say what is inside."""

MIRRORED = ("bench", "core", "datasets", "stages", "storage", "encoders", "orchestration", "loader", "demo")
SAYS_WHAT_IS_NOT_HERE = ("bench", "core", "stages", "storage", "encoders", "orchestration", "loader", "demo")
"""Packages of many modules. In `datasets`, module docstrings are datasheets."""

DOCUMENTED = ("core", "stages", "storage")

WITHOUT_A_TEST_MODULE: dict[str, str] = {}
"""Module -> why it has none."""

STARTED_NOT_IMPORTED = {
    "accelerate": "`accelerate launch` starts the encoding processes",
    "dagster-webserver": "`dagster dev` starts it",
    "torchvision": "open_clip and mosaicml-streaming import it; named here so that it is pinned together with torch",
}
"""Declared dependencies that may go without an import in this code."""

IMPORT_NAMES = {
    "beautifulsoup4": "bs4",
    "mosaicml-streaming": "streaming",
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
}


def name(path: Path) -> str:
    """A file as messages and test IDs call it."""
    return path.relative_to(REPOSITORY).as_posix()


def in_packages(*packages: str) -> list[Path]:
    """The modules of some packages, without their `__init__` and `__main__`."""
    return [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in packages and not p.name.startswith("__")]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def docstring(path: Path) -> str:
    """A module's docstring on one line, empty where there is none."""
    return " ".join((ast.get_docstring(tree(path)) or "").split())


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a module imports anywhere, also inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_code_location_loads_without_anything_heavy() -> None:
    code = f"import sys, md_assets.definitions; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_module_has_a_docstring() -> None:
    assert [name(path) for path in MODULES if not docstring(path)] == []


def test_modules_say_what_is_in_them_and_what_is_not() -> None:
    """`Here: ...` and `Not here: ...`, the latter with the place where that is instead."""
    modules = {name(path): docstring(path) for path in in_packages(*SAYS_WHAT_IS_NOT_HERE)}
    assert [module for module, text in modules.items() if not re.search(r"(?<![Nn]ot )[Hh]ere: \S", text)] == []
    assert [module for module, text in modules.items() if not re.search(r"Not here: \S", text)] == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES + TEST_MODULES}
    assert {path: lines for path, lines in lengths.items() if lines > LINES_LIMIT} == {}


def test_names_say_what_is_inside() -> None:
    parts = {part for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert parts & EMPTY_NAMES == set()


def test_packages_are_two_levels_deep_at_most() -> None:
    assert [name(path) for path in MODULES if len(path.relative_to(PACKAGE).parts) > 2] == []


def test_every_folder_of_modules_is_a_package() -> None:
    """Without `__init__.py` setuptools leaves a folder out of what it installs."""
    folders = {path.parent for path in MODULES}
    assert [name(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_module_has_its_test_module() -> None:
    places = {name(p): TESTS / p.parent.relative_to(PACKAGE) / f"test_{p.name}" for p in in_packages(*MIRRORED)}
    missing = {module for module, place in places.items() if not place.exists()}
    assert missing == set(WITHOUT_A_TEST_MODULE)


def test_every_test_module_has_its_module() -> None:
    """`test_raw.py` and `test_raw_<aspect>.py` belong to `raw.py`; only tests of the whole lie elsewhere."""
    orphans = []
    for path in TEST_MODULES:
        if path.parent in (TESTS, TESTS / "end_to_end") or path == TESTS / "datasets" / "test_dataset_contract.py":
            continue
        modules = [p.stem for p in (PACKAGE / path.parent.relative_to(TESTS)).glob("*.py")]
        if not any(f"{path.stem}_".startswith(f"test_{module}_") for module in modules):
            orphans.append(name(path))
    assert orphans == []


def test_public_functions_and_classes_have_docstrings() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    without = [
        f"{name(path)}: {node.name}"
        for path in in_packages(*DOCUMENTED)
        for node in tree(path).body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert without == []


def _checks_something(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("pytest.raises", "pytest.warns", "pytest.fail"):
                return True
            if called.rpartition(".")[2].lstrip("_").startswith("assert_"):
                return True
    return False


def test_no_test_passes_without_checking() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    unchecked, empty = [], []
    for path in TEST_MODULES:
        tests = [n for n in ast.walk(tree(path)) if isinstance(n, kinds) and n.name.startswith("test_")]
        unchecked += [f"{name(path)}: {test.name}" for test in tests if not _checks_something(test)]
        empty += [] if tests else [name(path)]
    assert unchecked == []
    assert empty == []


def test_core_imports_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"md_assets"}
    assert {name(p): set(imported(p)) - allowed for p in PACKAGE.glob("core/*.py") if set(imported(p)) - allowed} == {}


def test_dependencies_are_what_is_imported() -> None:
    """A missing one breaks a bare `pip install .`, a superfluous one is gigabytes for nothing."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    declared_imports = {IMPORT_NAMES.get(d, d.replace("-", "_")): d for d in declared}
    third_party = {m for path in MODULES for m in imported(path)} - sys.stdlib_module_names - {"md_assets"}
    of_postgres = {Requirement(line).name.replace("-", "_") for line in project["optional-dependencies"]["postgres"]}
    assert of_postgres <= third_party, "declared for PostgreSQL, but never imported"
    assert third_party - set(declared_imports) - of_postgres == set(), "imported, but not declared"
    unused = {d for m, d in declared_imports.items() if m not in third_party}
    assert unused - set(STARTED_NOT_IMPORTED) == set(), "declared, but never imported"


# Spelled in pieces, so that this file does not find itself.
MACHINE_PATH = re.compile(r"file:/{2}/|(?<![\w.})/>~-])/" + r"(?:root|home|Users|work)/\w")
REGISTRY_HOST = re.compile(
    r"index" + r"-url|find" + r"-links|pypi\.(?:org/simple|python)|pythonhosted\." + r"org|download\.pytorch\.org"
)


def committed_text() -> Iterator[tuple[str, str]]:
    """Every text file that is in the repository or would be added to it."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout: nothing here will be committed")
    for path in sorted(set(filter(None, listed.stdout.split("\0")))):
        file = REPOSITORY / path
        if file.is_file():
            data = file.read_bytes()
            if b"\0" not in data:
                yield path, data.decode("utf-8")


def test_nothing_committed_knows_the_machine_it_was_made_on() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in committed_text()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["cd /" + "root/x", '"/' + 'home/me/x"', "see file:/" + "//x", "--index" + "-url x", "(/" + "Users/me/x)"],
)
def test_a_machine_path_would_be_found(line: str) -> None:
    assert MACHINE_PATH.search(line) or REGISTRY_HOST.search(line)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_constraints_pin_the_whole_stack_for_every_python(python: str) -> None:
    """Each dependency exactly once; torch and torchvision that do not fit fail at import only."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    names = [canonicalize_name(pin.name) for pin in pins if not pin.marker or pin.marker.evaluate(here)]
    assert len(set(names)) == len(names)
    assert all(pin.url is None and str(pin.specifier).startswith("==") for pin in pins)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {canonicalize_name(Requirement(line).name) for line in wanted} <= set(names)


def test_the_tables_of_the_readme_are_those_that_make_tables_writes() -> None:
    command = [sys.executable, str(REPOSITORY / "docs" / "tables.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment).returncode == 0, "run `make tables`"


def test_every_link_of_the_docs_leads_somewhere() -> None:
    broken = []
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{name(page)}: {target}")
    assert broken == []
