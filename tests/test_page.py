"""The tree page: what is on it, and that text of models stays text, in a real browser where one is installed."""
import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from data import read_trees, write_trees
from svpo import Tree, TreeNode
from support.page import LARGEST, write_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = ["</script><script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">", "<!--", "]]>", "${document.title='owned'}", "\u2028'\"\\"]


class Words:
    """A tokenizer whose tokens are whole texts."""
    def __init__(self, texts: list[str]):
        self.tokenizer, self.texts = self, texts

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[index] for index in ids)


def forest() -> tuple[list[Tree], Words]:
    texts = ["1+1\n", *HOSTILE]
    nodes = [TreeNode(-1, [0], [False], visit_count=9)]
    nodes += [TreeNode(0, [index], [True], -1.0, 0.5, 4, 0.8 if index % 2 else -0.8, 0.1 * index, None, None) for index in range(1, len(texts))]
    nodes += [TreeNode(1, [1], [True], -1.0, 0.5, 1, 1.0, 0.9, 1.0, "answer"), TreeNode(2, [2], [True], -1.0, 0.5, 1, -1.0, -0.9, -1.0, "answer"),
              TreeNode(0, [3], [True], -1.0, 0.5, 1, -1.0, 0.95, -1.0, "cut")]
    return [Tree("a", HOSTILE[0], HOSTILE[1], nodes, 9), Tree("b", "plain", "2", nodes[:1] + nodes[2:3])], Words(texts)


def test_what_is_on_the_page(tmp_path):
    """Catches pairs, values or paths that are not the tree's, text that can leave its place, and pages over their size."""
    trees, words = forest()
    assert write_page(trees, words, tmp_path / "page.html") == 2
    page = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data[0]["nodes"][1] == [0, HOSTILE[0], 4, 0.8, 0.1, 0.5, None, None] and data[0]["solved"] and not data[1]["solved"]
    assert data[0]["pairs"] == [[1, 2], [1, 9]] and data[0]["path"] == [6] and data[1]["path"] == [1]
    assert page.count("</script>") == 2 and "http" not in page.replace("http://www.w3.org/2000/svg", "")  # no network
    shown = write_page(trees * 1000, words, tmp_path / "large.html")
    assert 50 < shown < 2000 and (tmp_path / "large.html").stat().st_size < 200_000 and f"the first {shown} of 2000" in (tmp_path / "large.html").read_text()
    long = Tree("c", "x" * 10**6, "1", [TreeNode(-1, [0], [False])] + [TreeNode(0, [1], [True])] * 20000)
    assert write_page([long, *trees], words, tmp_path / "one.html") == 1 and LARGEST < 200_000


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
def test_text_stays_text_in_a_browser(tmp_path):
    """Catches model text that runs as script or becomes markup."""
    trees, words = forest()
    write_page(trees, words, tmp_path / "page.html")
    done = subprocess.run([BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
                          capture_output=True, text=True, timeout=120)
    page = done.stdout
    assert "<title>Search trees</title>" in page and "<img" not in page and page.count("<script") == 2
    assert html.escape(HOSTILE[0], quote=False) in page  # the question's heading
    assert page.count('role="button"') == len(trees[0].nodes) and "▲" in page and "stroke-dasharray" in page


def test_the_command(tmp_path, model_folder, model, tokenizer):
    """Catches trees whose tokenizer is not found where it lies, and a command that asks for questions that it does not need."""
    from mcts import search_trees
    from test_mcts import CONFIG, QUESTIONS
    write_trees(tmp_path / "trees.jsonl", search_trees(model, tokenizer, QUESTIONS, CONFIG))
    (tmp_path / "empty.jsonl").write_text("")
    words = [sys.executable, ROOT / "eval.py", "--show"]
    for more, status, message in ((["trees.jsonl"], 2, "name its folder with --model"), (["trees.jsonl", "--model", model_folder], 0, f"trees.html: {len(QUESTIONS)} of"),
                                  (["empty.jsonl"], 2, "no trees"), (["absent.jsonl"], 2, "absent.jsonl")):
        done = subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status and message in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    shutil.copyfile(model_folder / "tokenizer.json", tmp_path / "tokenizer.json")  # as in a run folder
    assert subprocess.run([*words, "trees.jsonl"], cwd=tmp_path).returncode == 0
    assert len(read_trees(tmp_path / "trees.jsonl")) == len(QUESTIONS)
