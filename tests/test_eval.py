"""Beam search on a hand-made tree, strategy names, and the figures of the tables."""
import math

import pytest

from eval import beam_search, one_path, plan, sibling_accuracy, standard_error
from mcts import Node
from svpo import InputError, Tree, TreeNode


def run(search, grow):
    """Drive a generator: `grow(parent, copy)` makes the child that is sampled as copy number `copy` of its parent.
    Returns (what it returned, how many children it asked for each time)."""
    asked, children = [], None
    while True:
        try:
            wanted = search.send(children)
        except StopIteration as end:
            return end.value, asked
        asked.append(len(wanted))
        seen = {}
        children = []
        for parent in wanted:
            seen[id(parent)] = seen.get(id(parent), -1) + 1
            children.append(grow(parent, seen[id(parent)]))


def test_beam_search_by_hand():
    """Catches a beam ranked by anything but V of the newest step, a beam that does not shrink, B1 * B2 missing at the
    root, and an answer that is not the finished solution of highest V."""
    values = {(): [0.1, 0.9, 0.8, -0.5], (1,): [0.2, 0.7], (2,): [0.95, -0.9], (2, 0): [0.3, 0.6]}
    ending = {(1, 1): "answer", (2, 0, 1): "answer"}

    def grow(parent, copy):
        path = tuple(node.tokens[0] for node in parent.path()) + (copy,)
        return Node(parent, [copy], -1.0, values[path[:-1]][copy], ending.get(path))
    answer, asked = run(beam_search(Node(tokens=[9]), 2, 2, 5), grow)
    # step 1 keeps 0.9 and 0.8; step 2 keeps 0.95 and 0.7, which is finished; one place is left and 0.6 takes it
    assert asked == [4, 4, 2] and [node.tokens[0] for node in answer.path()] == [1, 1] and answer.value == 0.7


def test_beam_search_drops_what_cannot_answer():
    """Catches cut, answerless and too deep steps of high value that win, and duplicates that fill the beam."""
    def grow(parent, copy):
        if copy == 3:
            return Node(parent, [7], -1.0, -0.9, "answer")
        return Node(parent, [copy], -1.0, 0.9, ("cut", "eos", None)[copy])
    answer, asked = run(beam_search(Node(tokens=[9]), 1, 4, 1), grow)
    assert answer.tokens == [7] and asked == [4]
    answer, asked = run(beam_search(Node(tokens=[9]), 2, 2, 3), lambda parent, copy: Node(parent, [5], -1.0, 0.5))
    assert answer is None and asked == [4, 2, 2]  # four equal children are one
    assert run(one_path(Node(tokens=[9]), 3), lambda parent, copy: Node(parent, [5]))[0].depth == 3


def test_plan():
    """Catches names that are taken for others."""
    assert plan("greedy") == plan("sampled") == (0, 1) and plan("beam:3,5") == (3, 5)
    for name in ("beam", "beam:3", "beam:0,5", "beam:a,b", "3,5", "greed"):
        with pytest.raises(InputError, match="unknown strategy"):
            plan(name)


def test_sibling_accuracy_counts_trees():
    """Catches a mean over pairs, ties that count as right, and NaN where there is nothing to measure."""
    def tree(*values):  # one winner, then losers
        nodes = [TreeNode(-1, [1], [False], visit_count=5)]
        for index, value in enumerate(values):
            reward = -1.0 if index else 1.0
            nodes.append(TreeNode(0, [1], [True], visit_count=1, q_value=reward, value=value, reward=reward))
        return Tree("t", "?", "1", nodes)
    figures = sibling_accuracy([tree(0.5, 0.0, 0.1, 0.5), tree(0.0, 0.2), tree(0.3)])
    assert figures["trees"] == 2 and figures["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["standard_error"] == pytest.approx(math.sqrt(2 * (1 / 3) ** 2 / 2))
    assert sibling_accuracy([tree(0.3)]) == {"trees": 0, "accuracy": None, "standard_error": None}
    assert standard_error(0.5, 100) == pytest.approx(0.05)
