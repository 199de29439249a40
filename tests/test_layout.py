"""Where things stand: imports go down, names come from their home, functions are short."""

import ast
import graphlib
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOWER = {"support": set(), "tasks": {"support"}, "data": {"support", "tasks"}, "model": {"support"}}
LOWER["engine"] = {"support", "tasks", "data", "model"}
LOWER["mcts"] = {"support", "tasks", "data", "model", "engine"}
LOWER["svpo"] = {"support", "data", "model"}
LOWER["eval"] = LOWER["mcts"] | {"mcts", "svpo"}
LOWER["export"] = {"support", "data", "svpo"}
LOWER["train"] = LOWER["eval"] | {"eval"}
LOWER["minimal"] = {"data", "model", "tasks"}  # nothing that it specifies
MODULES = [name for name in LOWER if (ROOT / f"{name}.py").exists()]
FILES = [
    *ROOT.glob("*.py"),
    *(ROOT / "support").glob("*.py"),
    *(ROOT / "tasks").glob("*.py"),
    *(ROOT / "experiments").glob("*.py"),
]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def source_file(module: str, beside: Path = ROOT) -> Path | None:
    """The file of one of our modules; None for a module of somebody else."""
    for folder in (ROOT, beside):
        file = folder / (module.replace(".", "/") + ".py")
        if file.exists():
            return file
    return None


def imports(file: Path) -> list[tuple[str, str | None]]:
    """(module, name) of everything of ours that a file imports; name None for a whole module."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"  # from tasks import sandbox
                if source_file(whole, file.parent):
                    found.append((whole, None))
                else:
                    found.append((node.module, alias.name))
    return [(module, name) for module, name in found if source_file(module, file.parent)]


def defined(file: Path) -> set[str]:
    """The names that a file defines itself."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:
            names |= (
                {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
                if target
                else set()
            )
    return names


def test_imports_go_down():
    """Catches a module that imports something above itself in the table of CONTRIBUTING.md."""
    for file in FILES:
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "experiments":
            continue
        for module, _ in imports(file):
            other = module.split(".")[0]
            allowed = LOWER[room] | ({room} if room in ("support", "tasks") else set())
            assert other in allowed, f"{module_name(file)} imports {module}"


def test_no_circle_of_files():
    """Catches files that import each other in a circle, also within a function."""
    graph = {module_name(file): {module for module, _ in imports(file)} for file in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(FILES)


def test_names_come_from_where_they_are_defined():
    """Catches a name that is imported from a module that only passes it on."""
    for file in [*FILES, *(ROOT / "tests").glob("*.py")]:
        for module, name in imports(file):
            if name and name != "*":
                place = source_file(module, file.parent)
                assert name in defined(place), f"{module_name(file)}: {name} from {module}"


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_alone(module):
    """Catches an import that only works after another module has been imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_functions_fit_on_a_screen():
    """Catches functions of more than 50 lines outside the tests, decorators not counted."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 50, f"{module_name(file)}: {node.name} has {lines} lines"


def dimension_key(file: Path) -> set[str]:
    """The letters that a file's docstring explains."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return set(re.findall(r"\b([A-Z])\b", text.partition("Dimension key:")[2]))


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_dimension_keys_are_complete(file):
    """Catches a shape suffix whose letter the file's docstring does not explain."""
    names = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Name, ast.Attribute))
    }
    names |= {
        node.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.arg)
    }
    suffixes = [
        name.rpartition("_")[2] for name in names if re.fullmatch(r"[a-z]\w*_[A-Z0-9]+", name)
    ]
    used = {letter for suffix in suffixes for letter in suffix if letter.isalpha()}
    assert used <= dimension_key(file), sorted(used - dimension_key(file))


@pytest.mark.parametrize("page", ["docs/engine.md", "docs/objectives.md", "README.md"])
def test_pages_name_functions_that_exist(page):
    """Catches functions that were renamed or moved after a page had named them."""
    sys.path.insert(0, str(ROOT))
    names = re.findall(
        rf"`((?:{'|'.join(MODULES)})\.[A-Za-z_][\w.]*)(?:\(\))?`", (ROOT / page).read_text()
    )
    names = [name for name in names if not name.endswith(".py")]
    assert len(names) >= 12, f"{page} names {names}"
    for name in names:
        place = pydoc.locate(name)
        assert place is not None, f"{page}: {name} is not there"
        module = getattr(place, "__module__", None)  # a property has none
        assert module is None or name.startswith(module + "."), f"{name} is passed on from {module}"
