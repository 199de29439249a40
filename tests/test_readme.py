"""What the README says of the code is so: line counts, functions, commands, files. `python tests/test_readme.py` brings the line counts up to date."""
import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (\S+) \| (\d+) \|", re.MULTILINE)


def lines_of(name: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("*.py"))))


def table() -> dict[str, int]:
    section = (ROOT / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
    return {name: int(count) for name, count in ROW.findall(section)}


def test_line_counts():
    """Catches a table that has grown old, and modules that have grown long."""
    assert table() == {name: lines_of(name) for name in table()} and len(table()) == 9
    assert {name for name in table() if name.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}
    modules = [name for name in table() if name.endswith(".py")]
    assert max(map(lines_of, modules)) <= 400 and sum(map(lines_of, modules)) < 2000


def test_functions_are_short():
    """Catches functions of the modules that no longer fit on a screen."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < (60 if node.name == "optimize" else 40), f"{path.name}: {node.name}"


def test_every_equation_names_a_function():
    """Catches functions that were renamed or moved."""
    sys.path.insert(0, str(ROOT))
    section = (ROOT / "README.md").read_text().split("## The method on one page")[1].split("\n## ")[0]
    names = re.findall(r"\| `([\w.]+)` \|", section)
    assert len(names) >= 15
    for name in names:
        place = pydoc.locate(name)
        assert place is not None and place.__doc__, f"{name} is not there, or has no docstring"
        module = getattr(place, "__module__", None)  # a property has none
        assert module is None or name.startswith(module + "."), f"{name} is passed on from {module}"


def test_files_and_links_exist():
    """Catches pictures, prompts and scripts that were moved."""
    text = (ROOT / "README.md").read_text() + (ROOT / "RESULTS.md").read_text()
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split())
    for name in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text) + re.findall(r"(?:experiments|prompts|tests|tasks|support)/\w+\.\w+", text):
        assert name.startswith("http") or not tracked or name in tracked or (ROOT / name).is_dir(), name


def test_commands_name_flags_that_exist():
    """Catches flags in the README's commands that no command has."""
    text = (ROOT / "README.md").read_text()
    known = "".join(subprocess.run([sys.executable, ROOT / name, *more], capture_output=True, text=True).stdout for name, more in (
        ("train.py", ["--help"]), ("mcts.py", ["--help"]), ("eval.py", ["--help"]), ("bench.py", ["search", "--help"]), ("bench.py", ["train", "--help"]),
        ("experiments/same_tokens.py", ["--help"]), ("experiments/search_speed.py", ["growth", "--help"]), ("experiments/run.py", ["--help"]), ("experiments/why.py", ["--help"])))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - {"--index-url", "--nproc-per-node", "--dist"}:
        assert re.search(re.escape(flag) + r"(?![\w-])", known), flag


def test_outputs_are_pasted():
    """Catches tables in the README that a hand has written: each stands between marks, names its commit, and ends as the script pastes it."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import readme
    text = (ROOT / "README.md").read_text()
    blocks = [(match[2], match[0]) for match in readme.MARK.finditer(text)]
    assert len(blocks) == text.count("    stage ") >= 2 and {command for command, _ in blocks} <= set(readme.commands(text))
    for command, block in blocks:
        rows = [line for line in block.splitlines() if line.startswith("    ")]
        assert rows[0].startswith("    stage ") and re.fullmatch(r"    \(commit [0-9a-f]{7,}(, \d+ s)?\)", rows[-1]), command
        assert readme.last_table("\n".join(line[4:] for line in ["    x", *rows[:-1]])) == [line[4:] for line in rows[:-1]]


if __name__ == "__main__":
    text = (ROOT / "README.md").read_text()
    before, after = text.split("## Files", 1)
    (ROOT / "README.md").write_text(before + "## Files" + ROW.sub(lambda match: f"| {match[1]} | {lines_of(match[1])} |", after, count=9))
