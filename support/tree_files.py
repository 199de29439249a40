"""Trees as JSON lines: written as they come, read as from strangers, and found again after an interruption."""
import dataclasses
import glob
import json
import os
import re
from pathlib import Path

from support.files import append, settle
from support.flags import InputError
from svpo import Tree, TreeNode
from tasks.questions import read_rows


def write_trees(path: Path, trees, mode: str = "a"):
    """Append trees, one JSON line each, as they come; with mode "w" they replace what is there."""
    open(path, mode).close()
    for tree in trees:
        append(path, json.dumps(dataclasses.asdict(tree)) + "\n")
    settle(path)


def fault(index: int, node: TreeNode) -> str:
    """What is wrong with a stored node; nothing as a rule."""
    if type(node.parent) is not int or not -1 <= node.parent < index or (node.parent >= 0) != (index > 0):
        return f"its parent is {node.parent!r}, not a node before it"
    if not isinstance(node.tokens, list) or not node.tokens or not all(type(token) is int and 0 <= token < 2**31 for token in node.tokens):
        return "it has no tokens, or other things than token ids"
    if not isinstance(node.sampled, list) or len(node.sampled) != len(node.tokens) or not all(type(mark) is bool for mark in node.sampled):
        return "'sampled' is not true or false for each token"
    numbers = [node.logp, node.prior, node.q_value, node.value, *([] if node.reward is None else [node.reward])]
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers) or type(node.visit_count) is not int or node.visit_count < 0:
        return "logp, prior, q_value, value, reward or visit_count is not a number that it can be"
    return "" if node.ending is None or isinstance(node.ending, str) else "'ending' is not text"


def read_trees(path: str | Path, content: bytes | None = None) -> list[Tree]:
    """All trees of a JSONL file; InputError names the line of a malformed one."""
    trees = []
    for number, row in read_rows(Path(path), content=content):
        try:
            tree = Tree(**{**row, "nodes": [TreeNode(**node) for node in row["nodes"]]})
        except (TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number}: not a tree ({error})")
        if tree.version != 1 or not tree.nodes or [type(tree.simulations), *map(type, (tree.id, tree.question, tree.answer, tree.stopped))] != [int, *[str] * 4]:
            raise InputError(f"{path}, line {number}: version is not 1, there are no nodes, or a field of the tree is of the wrong type")
        for index, node in enumerate(tree.nodes):
            if problem := fault(index, node):
                raise InputError(f"{path}, line {number}, node {index}: {problem}")
        trees.append(tree)
    return trees


def check_tokens(trees: list[Tree], vocabulary: int, path: str | Path):
    """Refuse trees with token ids that a model does not have."""
    for tree in trees:
        if max(token for node in tree.nodes for token in node.tokens) >= vocabulary:
            raise InputError(f"{path}: the tree of question {tree.id} holds token ids of {vocabulary} and more, which this model does not have")


def resume_trees(path: Path, rank: int = 0, ranks: int = 1) -> list[Tree]:
    """The trees of `path` and of every rank's file beside it (stem-RANK.suffix), which may be of another rank count. A torn
    last line is cut off, and said; a file that another rank may be writing is read as far as it is whole."""
    trees = {}
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}*{glob.escape(path.suffix)}")):
        match = re.fullmatch(r"(?:-(\d+))?", file.name.removeprefix(path.stem).removesuffix(path.suffix))
        if not match or file != path and file.with_name(file.name + ".config").exists():  # that one is a search of its own
            continue
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if int(match[1] or 0) % ranks == rank and whole < len(content):
            os.truncate(file, whole)
            print(f"{file}: the last line was torn and has been cut off; its question is searched again")
        found = read_trees(file, content[:whole])
        if doubled := sum(tree.id in trees for tree in found):
            print(f"{file}: {doubled} trees are of questions that have one elsewhere; the first of each counts")
        trees = {tree.id: tree for tree in found} | trees
    return list(trees.values())
