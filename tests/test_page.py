"""The tree page: what is on it, and that text of models stays text, in a browser too."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_mcts import CONFIG, QUESTIONS

from data import Tree, TreeNode, read_trees, write_trees
from eval import page_row
from mcts import search_trees
from support.page import LARGEST, write_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update
""".split()
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--",
    "]]>",
    "${document.title='owned'}",
    "\u2028'\"\\",
]


class Words:
    """A tokenizer whose tokens are whole texts."""

    def __init__(self, texts: list[str]):
        self.tokenizer = self
        self.texts = texts

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[index] for index in ids)


def forest() -> tuple[list[Tree], Words]:
    texts = ["1+1\n", *HOSTILE]
    nodes = [TreeNode(-1, [0], [False], visit_count=9)]
    for index in range(1, len(texts)):
        q_value = 0.8 if index % 2 else -0.8
        nodes.append(TreeNode(0, [index], [True], -1.0, 0.5, 4, q_value, 0.1 * index, None, None))
    nodes += [
        TreeNode(1, [1], [True], -1.0, 0.5, 1, 1.0, 0.9, 1.0, "answer"),
        TreeNode(2, [2], [True], -1.0, 0.5, 1, -1.0, -0.9, -1.0, "answer"),
        TreeNode(0, [3], [True], -1.0, 0.5, 1, -1.0, 0.95, -1.0, "cut"),
    ]
    hostile = Tree("a", HOSTILE[0], HOSTILE[1], nodes, 9)
    plain = Tree("b", "plain", "2", nodes[:1] + nodes[2:3])
    return [hostile, plain], Words(texts)


def draw(trees: list[Tree], words: Words, out: Path) -> int:
    return write_page([page_row(tree, words) for tree in trees], out)


def test_what_is_on_the_page(tmp_path):
    """Catches pairs, values or paths that are not the tree's, text that can leave its place, and
    pages over their size."""
    trees, words = forest()
    assert draw(trees, words, tmp_path / "page.html") == 2
    page = (tmp_path / "page.html").read_text()
    script = r'<script type="application/json" id="data">(.*?)</script>'
    first, second = json.loads(re.search(script, page, re.DOTALL)[1])
    assert first["nodes"][1] == [0, HOSTILE[0], 4, 0.8, 0.1, 0.5, None, None]
    assert first["solved"] and not second["solved"]
    assert first["pairs"] == [[1, 2], [1, 9]]
    assert first["path"] == [6] and second["path"] == [1]
    assert page.count("</script>") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # no network
    large = tmp_path / "large.html"
    shown = draw(trees * 1000, words, large)
    assert 50 < shown < 2000 and large.stat().st_size < 200_000
    assert f"the first {shown} of 2000" in large.read_text()
    nodes = [TreeNode(-1, [0], [False])] + [TreeNode(0, [1], [True])] * 20000
    long = Tree("c", "x" * 10**6, "1", nodes)
    assert draw([long, *trees], words, tmp_path / "one.html") == 1 and LARGEST < 200_000


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
def test_text_stays_text_in_a_browser(tmp_path):
    """Catches model text that runs as script or becomes markup."""
    trees, words = forest()
    draw(trees, words, tmp_path / "page.html")
    words = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    page = subprocess.run(
        [BROWSER, *FLAGS, *words, f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert "<title>Search trees</title>" in page
    assert "<img" not in page and page.count("<script") == 2
    assert html.escape(HOSTILE[0], quote=False) in page  # the question's heading
    assert page.count('role="button"') == len(trees[0].nodes)
    assert "▲" in page and "stroke-dasharray" in page


def test_the_command(tmp_path, model_folder, model, tokenizer):
    """Catches trees whose tokenizer is not found where it lies, and a command that asks for
    questions that it does not need."""
    write_trees(tmp_path / "trees.jsonl", search_trees(model, tokenizer, QUESTIONS, CONFIG))
    (tmp_path / "empty.jsonl").write_text("")
    words = [sys.executable, ROOT / "eval.py", "--show"]
    for more, status, message in (
        (["trees.jsonl"], 2, "name its folder with --model"),
        (["trees.jsonl", "--model", model_folder], 0, f"trees.html: {len(QUESTIONS)} of"),
        (["empty.jsonl"], 2, "no trees"),
        (["absent.jsonl"], 2, "absent.jsonl"),
    ):
        done = subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        assert done.returncode == status and message in printed, printed
        assert "Traceback" not in printed
    # as in a run folder
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(model_folder / name, tmp_path / name)
    assert subprocess.run([*words, "trees.jsonl"], cwd=tmp_path).returncode == 0
    assert len(read_trees(tmp_path / "trees.jsonl")) == len(QUESTIONS)
