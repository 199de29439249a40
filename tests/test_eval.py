"""Beam search on a hand-made tree, strategy names, and the figures of the tables."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from data import Question, Tree, TreeNode
from engine import Demand, Node
from eval import (
    STRATEGIES,
    AnswerConfig,
    Strategy,
    beam_search,
    best_value,
    diagnose,
    majority,
    parse_strategy,
    samples,
    sibling_accuracy,
    soft_auc,
    tree_search,
    weighted,
)
from mcts import SearchConfig
from support.flags import InputError


def run(search, grow):
    """Drive a generator: `grow(parent, copy)` makes the child that is sampled as copy number `copy`
    of its parent. Returns (what it returned, how many children it asked for each time)."""
    asked = []
    children = None
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
    """Catches a beam ranked by anything but V of the newest step, a beam that does not shrink, B1 *
    B2 missing at the root, and an answer that is not the finished solution of highest V."""
    values = {(): [0.1, 0.9, 0.8, -0.5], (1,): [0.2, 0.7], (2,): [0.95, -0.9], (2, 0): [0.3, 0.6]}
    ending = {(1, 1): "answer", (2, 0, 1): "answer"}

    def grow(parent, copy):
        path = tuple(node.tokens[0] for node in parent.path()) + (copy,)
        return Node(parent, [copy], -1.0, values[path[:-1]][copy], ending.get(path))

    answer, asked = run(beam_search(Node(tokens=[9]), 2, 2, 5), grow)
    # step 1 keeps 0.9 and 0.8; step 2 keeps 0.95 and 0.7, which is finished;
    # one place is left and 0.6 takes it
    assert asked == [4, 4, 2]
    assert [node.tokens[0] for node in answer.path()] == [1, 1] and answer.value == 0.7


def test_beam_search_drops_what_cannot_answer():
    """Catches cut, answerless and too deep steps of high value that win, and duplicates that fill
    the beam."""

    def grow(parent, copy):
        if copy == 3:
            return Node(parent, [7], -1.0, -0.9, "answer")
        return Node(parent, [copy], -1.0, 0.9, ("cut", "eos", None)[copy])

    answer, asked = run(beam_search(Node(tokens=[9]), 1, 4, 1), grow)
    assert answer.tokens == [7] and asked == [4]

    def grow_alike(parent, copy):
        return Node(parent, [5], -1.0, 0.5)

    answer, asked = run(beam_search(Node(tokens=[9]), 2, 2, 3), grow_alike)
    assert answer is None and asked == [4, 2, 2]  # four equal children are one


def test_choosing_among_samples():
    """Catches votes by text instead of by value of the number, unanswered solutions that vote, and
    a best by likelihood."""
    found = [
        Node(None, [0], -9.0, 0.1, "answer", text="#### 18.0"),
        Node(None, [1], -1.0, 0.9, "answer", text="#### 7"),
        Node(None, [2], -9.0, 0.2, "answer", text="x #### 18"),
        *(Node(None, [3], -1.0, 1.0, "cut", text="#### 5") for _ in range(3)),
    ]

    def grow(parent, copy):
        return found[copy]

    assert run(samples(Node(tokens=[9]), 6, majority), grow) == (found[0], [6])
    assert run(samples(Node(tokens=[9]), 6, best_value), grow) == (found[1], [6])
    assert run(samples(Node(tokens=[9]), 2, majority), lambda parent, copy: found[-1])[0] is None


def test_votes_are_weighted_by_the_chance_to_be_right():
    """Catches votes that are weighted by V itself, whose sign would count a bad solution against
    its own answer, counts in place of weights, answers that are compared as text, and a beam whose
    finished solutions do not vote."""

    def node(number, value, text):
        return Node(None, [number], -1.0, value, "answer", text=text)

    # chances: 18 has 0.3 + 0.25 = 0.55, 7 has 0.6, 5 has 3 * 0.15 = 0.45
    found = [node(0, -0.4, "#### 18"), node(1, 0.2, "#### 7"), node(2, -0.5, "#### 18.0")]
    found += [node(3, -0.7, "#### 5") for _ in range(3)]
    # 18 has 0.65 + 0.25 = 0.9 and wins, although each of its votes is not the best one
    close = [node(0, 0.3, "#### 18"), node(1, 0.7, "#### 7"), node(2, -0.5, "x #### 18.0")]

    def chosen(name, nodes):
        search = parse_strategy(name).start(Question("q", "?", "1"), Node(tokens=[9]))
        return run(search, lambda parent, copy: nodes[copy])[0]

    assert chosen("weighted:6", found) is found[1]
    assert chosen("majority:6", found) is found[3]
    assert chosen("weighted:3", close) is close[0] and chosen("best:3", close) is close[1]
    assert weighted(found[:1]) is found[0]

    def grow(parent, copy):  # the three of highest V finish at once
        one = close[copy] if copy < 3 else node(copy, -0.9, "#### 1")
        return Node(parent, one.tokens, -1.0, one.value, "answer", text=one.text)

    for name, tokens in (("vote:3,3", [0]), ("beam:3,3", [1])):
        search = parse_strategy(name).start(Question("q", "?", "1"), Node(tokens=[9]))
        answer, asked = run(search, grow)
        assert answer.tokens == tokens and asked == [9], name


def test_a_reward_also_judges_what_states_no_answer():
    """Catches answers without a statement that are taken where nobody can grade them, and refused
    where --reward can; a vote cannot compare them."""

    def grow(parent, copy):
        return Node(parent, [copy], -1.0, (0.9, 0.1)[copy % 2], ("eos", "answer")[copy % 2])

    for name in ("greedy", "sampled", "best:2", "beam:1,2", "mcts:2", "majority:2", "vote:1,2"):
        found = []
        for reward in ("", "mine.py:score"):
            chosen = parse_strategy(name, SearchConfig(reward=reward, expand_width=2))
            search = chosen.start(Question("q", "?", "1"), Node(tokens=[9]))
            found.append(run(search, grow)[0])
        stated = None if name in ("greedy", "sampled") else [1]
        votes = name in ("majority:2", "vote:1,2")
        tokens = [node and node.tokens for node in found]
        assert tokens == [stated, stated if votes else [0]], name


@pytest.mark.parametrize("strategy", ["greedy", "majority:3", "weighted:3", "beam:2,2", "mcts:3"])
def test_no_room_is_no_answer(strategy):
    """Catches a strategy that trips over the empty list that it receives where the cache has no
    room, or answers with the question."""
    chosen = parse_strategy(strategy, SearchConfig())
    search = chosen.start(Question("q", "?", "1"), Node(tokens=[9]))
    next(search)
    with pytest.raises(StopIteration) as end:
        search.send([])
    assert end.value.value is None


def test_tree_search_answers_by_its_own_value():
    """Catches an inference that grades with the right answer, and a walk down to a node that states
    none."""
    config = SearchConfig(simulations=5, expand_width=2)

    def grow(parent, copy):
        if parent.parent is None:
            return Node(parent, [copy], -1.0, (0.9, -0.4)[copy], ("cut", None)[copy])
        return Node(parent, [copy], -1.0, (0.2, 0.6)[copy], "answer")

    answer, asked = run(tree_search(Node(tokens=[9]), config, random.Random(0)), grow)
    assert [node.tokens for node in answer.path()] == [[1], [1]]
    assert answer.reward == 0.6 and asked == [2, 2]


def test_diagnosis_by_hand():
    """Catches depths that are off by one, a reward that ignores the reference, a mean that is a
    sum, and a wrong AUC."""
    found = soft_auc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert found == pytest.approx(3.5 / 4)
    assert soft_auc(np.array([0.1, 0.9]), np.array([1.0, 1.0])) is None
    nodes = [
        TreeNode(-1, [1], [False], visit_count=5),
        TreeNode(0, [1, 2], [True, True], -1.0, visit_count=1, q_value=1.0, reward=1.0),
        TreeNode(0, [1], [True], -2.0, visit_count=1, q_value=-1.0, reward=-1.0),
    ]
    tree = Tree("t", "?", "1", nodes)
    better = replace(nodes[1], logp=-1.5, value=0.5)
    worse = replace(nodes[2], logp=-1.0, value=-0.9)
    judged = replace(tree, nodes=[nodes[0], better, worse])
    found = diagnose([tree, tree], [judged, judged])
    # V: 0.5 > -0.9; reward: -1.5 + 1 < -1 + 2; mean log-probability: -0.75 > -1
    assert found["by_depth"] == [
        {"depth": 1, "pairs_a_tree": 1.0, "value": 1.0, "implicit_reward": 0.0, "mean_logp": 1.0}
    ]
    assert found["auc_ends"] == 1.0 and found["auc_steps"] is None
    assert found["calibration_error"] == pytest.approx((0.25 + 0.05) / 2)
    assert [(row["steps"], row["found"]) for row in found["calibration"]] == [(2, 0.0), (2, 1.0)]
    blank = replace(tree, nodes=nodes[:1])
    assert diagnose([blank], [blank]) == {
        "by_depth": [],
        "calibration": [],
        "auc_steps": None,
        "auc_ends": None,
        "calibration_error": None,
    }


def test_names_of_strategies():
    """Catches names that are taken for others, and demands on the engine that are another's."""
    wanted = {  # lanes, paths, expansions, steps of a lane, temperature
        "greedy": (1, 1, 1, 8, 0),
        "sampled": (1, 1, 1, 8, 1),
        "majority:7": (7, 1, 1, 8, 0.6),
        "best:3": (3, 1, 1, 8, 0.6),
        "weighted:4": (4, 1, 1, 8, 0.6),
        "beam:3,5": (15, 3, 8, 1, 0.6),
        "vote:2,3": (6, 2, 8, 1, 0.6),
        "mcts:9": (4, 1, 9, 1, 0.6),
    }
    for name, figures in wanted.items():
        demand = parse_strategy(name).demand
        found = (demand.lanes, demand.paths, demand.expansions, demand.steps_per_lane)
        assert (*found, demand.temperature) == figures, name
    wrong = "beam beam:3 beam:0,5 beam:a,b 3,5 greed greedy:2 majority mcts:0 best:1,2 hope:3"
    wrong += " vote:3 vote weighted weighted:2,2"
    for name in wrong.split():
        with pytest.raises(InputError, match="unknown strategy"):
            parse_strategy(name)


def test_a_strategy_of_your_own(monkeypatch):
    """Catches an entry of STRATEGIES that is not found or gets other numbers, and a traceback where
    its numbers do not fit."""

    def make(numbers, search, temperature):
        first, second = numbers
        return Strategy(Demand(first, temperature, expansions=second), None)

    monkeypatch.setitem(STRATEGIES, "mine", make)
    config = AnswerConfig(answer_temperature=0.4)
    assert parse_strategy("mine:2,3", None, config).demand == Demand(2, 0.4, 3)
    with pytest.raises(InputError, match="--strategy mine:2: its numbers do not fit"):
        parse_strategy("mine:2")
    with pytest.raises(InputError, match="there are greedy, .*, mine"):
        parse_strategy("other")


def test_sibling_accuracy_counts_trees():
    """Catches a mean over pairs, ties that do not count half, and NaN where there is nothing to
    measure."""

    def tree(*values):  # one winner, then losers
        nodes = [TreeNode(-1, [1], [False], visit_count=5)]
        for index, value in enumerate(values):
            reward = -1.0 if index else 1.0
            figures = {"q_value": reward, "value": value, "reward": reward}
            nodes.append(TreeNode(0, [1], [True], visit_count=1, **figures))
        return Tree("t", "?", "1", nodes)

    figures = sibling_accuracy([tree(0.5, 0.0, 0.1, 0.5), tree(0.0, 0.2), tree(0.3)])
    assert figures["trees"] == 2 and figures["accuracy"] == pytest.approx((2.5 / 3 + 0) / 2)
    assert figures["standard_error"] == pytest.approx(math.sqrt(2 * (2.5 / 6) ** 2 / 2))
    assert sibling_accuracy([tree(0.3)]) == {"trees": 0, "accuracy": None, "standard_error": None}
