"""What the pages say is so: commands, flags, files, pasted outputs, and the README's length."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import readme  # noqa: E402, I001

PAGES = [*readme.PAGES, "CONTRIBUTING.md", "RESULTS.md", "experiments/tables.md"]
COMMANDS = {  # what knows flags
    "train.py": [],
    "mcts.py": [],
    "export.py": [],
    "eval.py": [],
    "experiments/bench.py": ["search"],
    "experiments/search_speed.py": ["growth"],
    "experiments/same_tokens.py": [],
    "experiments/run.py": [],
    "experiments/why.py": [],
    "experiments/gpu.py": [],
    "experiments/real.py": [],
    "experiments/ladder.py": [],
    "experiments/first_run.py": [],
    "experiments/first_errors.py": [],
    "experiments/step_speed.py": [],
}
ALL_HELP = """
import json, runpy, sys
commands = json.loads(sys.argv[1])
sys.path[:0] = ["", sys.argv[2]]
for name, words in commands.items():
    sys.argv = [name, *words, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
"""
OTHERS = {"--index-url", "--nproc-per-node", "--dist"}  # flags of pip, torchrun and pytest


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def test_the_readme_is_short():
    """Catches a README that has grown past what a visitor reads: 1,500 words."""
    assert len(text_of("README.md").split()) <= 1500


def test_two_commands_stand_on_top():
    """Catches a first screen without its two commands, or with a third."""
    top = text_of("README.md").split("\n## ")[0]
    found = re.findall(r"^    (\S.*)$", top, re.MULTILINE)
    assert len(found) == 2 and all(line.startswith("bash setup.sh") for line in found)
    assert found[0].endswith("train.py") and "pytest" in found[1]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    """Catches pictures, pages and scripts that were moved, and links to headings that are gone."""
    text = text_of(page)
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.split()
    links = re.findall(r"\]\(([^)]+)\)", text)
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        target, _, heading = link.partition("#")
        if link.startswith("http"):
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), link
        if heading:
            names = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names]
            assert heading in anchors, link
    for name in re.findall(r"(?:experiments|prompts|tests|tasks|support|docs)/\w+\.\w+", text):
        assert not listed or name in listed, name


def test_commands_name_flags_that_exist():
    """Catches flags in the pages' commands and texts that no command has."""
    command = [sys.executable, "-c", ALL_HELP, json.dumps(COMMANDS), "experiments"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    known = done.stdout
    for page in PAGES:
        for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text_of(page))) - OTHERS:
            assert re.search(re.escape(flag) + r"(?![\w-])", known), f"{page}: {flag}"


def test_outputs_are_pasted():
    """Catches tables that a hand has written: each stands between marks, names its commit, and ends
    as the script pastes it."""
    count = 0
    for page in readme.PASTED:
        text = text_of(page)
        blocks = [(match[2], match[0]) for match in readme.MARK.finditer(text)]
        assert len(blocks) == text.count("    stage "), page
        for command, block in blocks:
            rows = [line[4:] for line in block.splitlines() if line.startswith("    ")]
            assert rows[0].startswith("stage "), command
            assert re.fullmatch(r"\(commit [0-9a-f]{7,}(, \d+ s)?\)", rows[-1]), command
            assert readme.last_table("\n".join(["x", *rows[:-1]])) == rows[:-1], command
            count += 1
    assert count >= 4


def test_the_script_finds_the_commands():
    """Catches a script that passes because it runs nothing."""
    found = readme.commands("\n".join(text_of(page) for page in readme.PAGES))
    assert sum("train.py" in command for command in found) >= 4
    assert any("mcts.py" in command for command in found)
    assert sum("eval.py" in command for command in found) >= 4
    assert {name for page in readme.PAGES for name, _ in readme.EXAMPLE.findall(text_of(page))} == {
        "sorting",
        "dfs",
        "olmo",
        "puzzles",
        "ipo",
        "short",
    }


def test_named_tests_exist():
    """Catches invariants of CONTRIBUTING.md whose test was renamed."""
    text = text_of("CONTRIBUTING.md")
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).exists(), name
