"""Rewards of one's own: what they are called with, may return, and what is learned of them."""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_mcts import CONFIG, QUESTIONS
from test_svpo import node, tree_of
from test_train import command

from data import Question, check_reward, load_reward, outcome_of, read_trees
from engine import Node
from eval import diagnose, page_row
from mcts import search_trees
from support.flags import InputError
from svpo import (
    LossConfig,
    correct_solutions,
    good_steps,
    group_advantages,
    learn,
    outcomes_below,
    sibling_pairs,
    solution_pair,
)
from train import grow_groups

LENGTHS = "def score(question, text):\n    return (len(text) % 7 - 3) / 3\n"
NAMED = Question("q7", "1+1", "2")


@pytest.fixture
def lengths(tmp_path, monkeypatch) -> str:
    """A reward of many values, which has nothing to do with answers; its flag's value."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths.py").write_text(LENGTHS)
    return f"{tmp_path / 'lengths.py'}:score"


def by_length(text: str) -> float:
    return (len(text) % 7 - 3) / 3


def texts_of(tree, tokenizer) -> list[str]:
    """The solution down to each node of a tree."""
    steps = [tokenizer.tokenizer.decode(item.tokens) for item in tree.nodes]
    return ["".join(steps[step] for step in tree.path(index)) for index in range(len(steps))]


#             root 0
#      1 (+.4)        2 (-.3)      3 (0, ends with reward 0)
#   4: +.2  5: +.6  6: -.9  7: +.3
GRADED = tree_of(
    node(-1, 0.05, 5),
    node(0, 0.4, 2),
    node(0, -0.3, 2),
    node(0, 0.0, 1, 0.0),
    node(1, 0.2, 1, 0.2),
    node(1, 0.6, 1, 0.6),
    node(2, -0.9, 1, -0.9),
    node(2, 0.3, 1, 0.3),
)


def test_what_is_read_off_graded_rewards():
    """Catches code that takes right ends for those of reward +1 and wrong ones for -1, and a reward
    of 0 that counts as either."""
    assert outcomes_below(GRADED) == ([3, 2, 1, 0, 1, 1, 0, 1], [1, 0, 1, 0, 0, 0, 1, 0])
    assert sibling_pairs(GRADED) == [(1, 2, 0.5), (7, 6, 0.5)]
    assert sibling_pairs(GRADED, min_gap=0.8) == [(7, 6, 1.0)]
    # mean Q along the paths: 0.3, 0.5 and 0.0 of the right ones, -0.6 of the wrong one
    assert solution_pair(GRADED) == [(5, 6, 1.0)]
    assert [count for _, count in correct_solutions(GRADED)] == [3, 2, 1, 0, 1, 1, 0, 1]
    assert [good for good, _ in good_steps(GRADED)] == [0, 1, 0, 0, 1, 1, 0, 0]
    assert learn(GRADED, LossConfig("rft")).tree.nodes[-1].reward == 0.3
    words = type("Words", (), {"tokenizer": type("All", (), {"decode": lambda *_: "x"})()})()
    assert page_row(GRADED, words)["solved"]
    assert not page_row(replace(GRADED, nodes=GRADED.nodes[:4]), words)["solved"]


def test_calibration_of_graded_rewards():
    """Catches a value that is held against the share of right ends where it learned their mean
    reward, and ends of reward 0 that are left out."""
    found = diagnose([GRADED], [GRADED])
    # V is 0 everywhere; the ends have (reward + 1) / 2 = .5 .6 .8 .05 .65, steps 1 and 2 the means
    chances = [0.7, 0.35, 0.5, 0.6, 0.8, 0.05, 0.65]
    (cell,) = found["calibration"]
    assert cell["steps"] == 7 and cell["found"] == pytest.approx(sum(chances) / 7)


def test_advantages_of_graded_rewards():
    """Catches a standard deviation that holds for +1 and -1 alone, advantages that are not the sum
    over the samples of a step, and equal rewards whose rounding becomes an advantage."""
    # samples: 0.9 through node 1; 0.1 and 0.1 (one node of two visits) and -1 through node 2
    group = tree_of(
        node(-1, 0.1 / 4, 4),
        node(0, 0.9, 1),
        node(0, -0.8 / 3, 3),
        node(1, 0.9, 1, 0.9),
        node(2, 0.1, 2, 0.1),
        node(2, -1.0, 1, -1.0),
    )
    rewards = torch.tensor([0.9, 0.1, 0.1, -1.0], dtype=torch.float64)
    advantage = (rewards - rewards.mean()) / rewards.std(correction=0)
    by_hand = [0, advantage[0], advantage[1:].sum(), advantage[0], advantage[1:3].sum()]
    weights, counts = zip(*group_advantages(group))
    assert weights == pytest.approx([*map(float, by_hand), float(advantage[3])])
    assert counts == (4, 1, 3, 1, 2, 1)
    mean = sum([0.1] * 10) / 10
    assert mean != 0.1
    same = tree_of(node(-1, mean, 10), node(0, 0.1, 4, 0.1), node(0, 0.1, 6, 0.1))
    assert [weight for weight, _ in group_advantages(same)] == [0, 0, 0]


def test_which_ends_are_scored(tmp_path):
    """Catches a function that gets one step in place of the solution, that is called for solutions
    that are not finished, or not for those that end without an answer."""
    text = "seen = []\ndef score(question, text):\n    seen.append((question.id, text))\n"
    (tmp_path / "echo.py").write_text(text + "    return 0.25\n")
    reward = f"{tmp_path / 'echo.py'}:score"
    outcome = outcome_of(NAMED, reward)
    root = Node(tokens=[1])
    first = Node(root, text="1+1=2\n")
    for ending, wanted in (("answer", 0.25), ("eos", 0.25), ("cut", -1.0), ("deep", -1.0)):
        assert outcome(Node(first, ending=ending, text=f"#### {ending}")) == wanted
    seen = load_reward(reward)[0].__globals__["seen"]
    assert seen == [("q7", "1+1=2\n#### answer"), ("q7", "1+1=2\n#### eos")]
    assert outcome_of(NAMED)(Node(first, ending="answer", text="#### 2")) == 1.0
    assert outcome_of(NAMED)(Node(first, ending="eos", text="#### 2")) == -1.0


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 1.5", r"question q7: it returned 1.5, not a number within \[-1, 1\]"),
        ("return float('nan')", "returned nan"),
        ("return None", "returned NoneType"),
        ("raise SystemExit(0)", "question q7: SystemExit: 0"),
        ("raise type('E', (Exception,), {'__str__': lambda _: 1 / 0})", "question q7: E"),
        ("return True", "returned True"),
        ("return '1'", "returned '1'"),
        ("return question.text / 2", "question q7: TypeError: unsupported operand"),
        ("raise KeyError('height')", "question q7: KeyError: 'height'"),
        ("raise StopIteration", "question q7: StopIteration"),
    ],
)
def test_what_a_reward_returns_is_checked(tmp_path, body, message):
    """Catches a number that no loss expects, true and false that become 1 and 0, and a traceback
    or a search that ends silently where the function fails."""
    (tmp_path / "bad.py").write_text(f"def score(question, text):\n    {body}\n")
    outcome = outcome_of(NAMED, f"{tmp_path / 'bad.py'}:score")
    with pytest.raises(InputError, match=message) as error:
        outcome(Node(Node(tokens=[1]), ending="answer", text="#### 2"))
    assert f"--reward {tmp_path / 'bad.py'}:score" in str(error.value)


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    """Catches a reward of numpy's that is refused, and bounds that are not within."""
    text = "import numpy\ndef score(question, text):\n    return numpy.float32(text)\n"
    (tmp_path / "wide.py").write_text(text)
    outcome = outcome_of(NAMED, f"{tmp_path / 'wide.py'}:score")
    for number in ("-1", "1", "0.5"):
        found = outcome(Node(Node(tokens=[1]), ending="eos", text=number))
        assert type(found) is float and found == float(number)


def test_files_that_hold_no_reward(tmp_path):
    """Catches a traceback, or hours of work before a wrong --reward is noticed."""
    (tmp_path / "typo.py").write_text("def score(question, text)\n    return 1\n")
    (tmp_path / "fails.py").write_text("import no_such_module\n")
    (tmp_path / "other.py").write_text("score = 1\n")
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
        "class Weights:\n    length: float = 0.5\ndef score(question, text):\n"
        "    return Weights().length\n"
    )
    for name, message in (
        ("absent.py:score", "no such file"),
        ("own.py", "must be FILE.py:FUNCTION"),
        ("typo.py:score", "typo.py: SyntaxError: expected ':'"),
        ("fails.py:score", "fails.py: ModuleNotFoundError: No module named 'no_such_module'"),
        ("other.py:score", "has no function 'score'"),
        ("own.py:scores", "has no function 'scores'"),
    ):
        with pytest.raises(InputError, match=message) as error:
            check_reward(f"{tmp_path / name}")
        assert "\n" not in str(error.value)
    check_reward(f"{tmp_path / 'own.py'}:score")
    check_reward("")


def test_search_and_groups_use_it(model, tokenizer, lengths):
    """Catches a search or a group that is rewarded by answers: each end has the reward of its text,
    Q is their mean, and the advantages are those of the samples one by one."""
    config = replace(CONFIG, reward=lengths, leaf_value=False)
    rewards = set()
    for tree in search_trees(model, tokenizer, QUESTIONS, config):
        texts = texts_of(tree, tokenizer)
        for item, text in zip(tree.nodes, texts):
            if item.ending:
                finished = item.ending not in ("cut", "deep")
                assert item.reward == (by_length(text) if finished else -1.0)
                rewards.add(item.reward)
        ends = [item.reward for item in tree.nodes if item.ending]
        assert tree.nodes[0].q_value == pytest.approx(sum(ends) / len(ends))
    assert len(rewards) > 4 and any(abs(reward) < 0.9 for reward in rewards)
    groups = grow_groups(model, tokenizer, QUESTIONS, replace(config, max_step_tokens=6), 40, 0)
    spreads = 0
    for tree in groups:
        samples = []  # (its reward, the steps on its path)
        for index, item in enumerate(tree.nodes):
            if item.ending:
                samples += [(item.reward, tree.path(index))] * item.visit_count
        found = torch.tensor([reward for reward, _ in samples], dtype=torch.float64)
        advantage = (found - found.mean()) / found.std(correction=0).clamp(min=1e-9)
        wanted = [0.0] * len(tree.nodes)
        for (_, path), gain in zip(samples, advantage.tolist()):
            for step in path:
                wanted[step] += gain
        weights = [weight for weight, _ in group_advantages(tree)]
        assert len(samples) == 40 and weights == pytest.approx(wanted, abs=1e-6)
        spreads += len(set(found.tolist())) > 2
    assert spreads


def test_training_with_it(tmp_path, model_folder, lengths):
    """Catches a run that ends its search without the reward, a table without it, a run or a search
    that goes on with another file under the same name, and trees of another reward."""
    rows = [{"question": f"{a}+{a * 2 % 7}", "answer": "2", "id": str(a)} for a in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", model_folder, "--data", "sums.jsonl", "--simulations", "6"]
    words += ["--max-step-tokens", "8", "--max-depth", "3", "--dtype", "float32"]
    words += ["--reward", "lengths.py:score"]
    train = ["--tune-batch", "5", "--tune-epochs", "1", "--rounds", "1", "--min-gap", "0.1"]
    train += ["--pairs", "best"]
    done = command(ROOT / "train.py", *words, *train, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  reward  ") == 4  # after each stage, and in the table of both
    (line,) = [json.loads(line) for line in open("run/log.jsonl")]
    trees = read_trees("run/round1/trees-0.jsonl")
    pairs = [pair for tree in trees for pair in sibling_pairs(tree, "best", 0.1)]
    assert line["pairs"] == len(pairs) > 2 and line["policy"] and line["mse"] and line["sft"]
    command(ROOT / "mcts.py", *words, "--out", "trees.jsonl", cwd=tmp_path)
    more = ["--strategy", "sampled", "beam:2,2", "--json", "out.json"]
    answered = command(ROOT / "eval.py", *words, *more, cwd=tmp_path)
    assert answered.returncode == 0 and "mean reward" in answered.stdout, answered.stderr
    for row in json.loads((tmp_path / "out.json").read_text())["answers"]:
        rewards = [answer["reward"] for answer in row["answers"]]
        wanted = [by_length(one["text"]) if one["text"] else -1 for one in row["answers"]]
        assert rewards == wanted and len(set(rewards)) > 1
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))
    (tmp_path / "lengths.py").write_text(LENGTHS.replace("% 7", "% 5"))
    same_time = (tmp_path / "run" / "config.json").stat().st_mtime
    os.utime(tmp_path / "lengths.py", (same_time, same_time))
    for script, more, message in (
        ("train.py", [*train, "--out", "run"], "other reward under the same names"),
        ("mcts.py", ["--out", "trees.jsonl"], "other reward under the same names"),
        ("train.py", ["--trees", "trees.jsonl", "--out", "new"], "with another --reward"),
    ):
        done = command(ROOT / script, *words, *more, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
