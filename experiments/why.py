"""Why it works or fails: what Q and V know, by depth and stage, of the runs of experiments/run.py.

    python experiments/why.py --seed 0

It reads the runs of a seed in runs/experiments: the SFT model, row "svpo" of table objectives, "3
rounds" of ablation, and the logs of four rows. It writes lines of experiments/why.jsonl:

- the loss curves of the four rows;
- pairs a tree by depth;
- V, implicit reward and mean log-probability as judges of siblings by depth, and the calibration of
  V;
- how Q of the search agrees with 64 roll-outs of the same policy from each of 200 nodes.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np

from data import (
    RECIPES,
    Question,
    StepTokenizer,
    Tree,
    TreeNode,
    load_questions,
    outcome_of,
    read_trees,
)
from engine import Demand, Engine, Node
from eval import diagnose, grow_judged
from mcts import SearchConfig
from model import Llama, load_model
from support.files import head_commit, publish
from support.flags import parse_args, run_command
from svpo import rescore
from train import RunConfig

SEARCH = parse_args("", (RunConfig, SearchConfig), [], recipes=RECIPES)[1]
CURVES = (  # folders of runs whose logs become curves, without the seed
    "objectives-svpo",
    "objectives-step-dpo",
    "ablation-outcomes-only",
    "ablation-ten-times-the-learning-rate",
)
FIGURES = (  # of an optimizer step
    "loss",
    "policy",
    "mse",
    "sft",
    "win_reward",
    "lose_reward",
    "reward_accuracy",
    "value_accuracy",
    "grad_norm",
)


# ---------------------------------------------------------------------------------------- roll-outs


class PrefixTokenizer(StepTokenizer):
    """A tokenizer whose prompts are a question and the beginning of a solution."""

    def __init__(self, tokenizer: StepTokenizer, prefixes: dict[str, list[int]]):
        super().__init__(tokenizer.tokenizer, tokenizer.eos_ids, tokenizer.template)
        self.prefixes = prefixes

    def encode_prompt(self, question: Question, room: int | None = None) -> list[int]:
        return self.prefixes[question.id]


@dataclass
class Place:
    """A node to roll out from."""

    tree: Tree
    node: TreeNode
    path: list[int]


def open_places(trees: list[Tree]) -> list[Place]:
    """The visited, unfinished nodes of trees, without the roots."""
    places = []
    for tree in trees:
        for index, node in enumerate(tree.nodes):
            if index and node.visit_count and node.reward is None:
                places.append(Place(tree, node, tree.path(index)))
    return places


def roll_out(
    question: Question, root: Node, count: int, depth: int, reward: str = ""
) -> Generator[list[Node], list[Node], list[float]]:
    """A search that returns the outcomes of `count` solutions.

    Those of more than `depth` steps are wrong, as they are in the search.
    """
    outcome = outcome_of(question, reward)
    solutions = yield [root] * count
    return [outcome(last) if last.depth <= depth else -1.0 for last in solutions]


def roll_outs(
    model: Llama,
    tokenizer: StepTokenizer,
    trees: list[Tree],
    nodes: int,
    count: int,
    seed: int,
    search: SearchConfig = SEARCH,
) -> list[dict]:
    """Mean outcome of `count` solutions from each of `nodes` nodes, beside the search's Q, N, V.

    `search` is the configuration that the trees were grown with. Fewer nodes if there are no more.
    """
    places = open_places(trees)
    chosen = random.Random(seed).sample(places, min(nodes, len(places)))
    questions = []
    prefixes = {}
    for number, place in enumerate(chosen):
        questions.append(Question(str(number), place.tree.question, place.tree.answer))
        steps = [place.tree.nodes[index].tokens for index in (0, *place.path)]
        prefixes[str(number)] = [token for step in steps for token in step]
    demand = Demand(count, search.search_temperature, expansions=1, steps_per_lane=search.max_depth)
    prefixed = PrefixTokenizer(tokenizer, prefixes)
    engine = Engine(model, prefixed, questions, demand, search, 8, seed, fit=True)

    def start(question, root):
        left = search.max_depth - len(chosen[int(question.id)].path)
        return roll_out(question, root, count, left, search.reward)

    outcomes = {question.id: found for question, _, found in engine.run(start, "roll-outs")}
    rows = []
    for number, place in enumerate(chosen):
        rows.append(
            {
                "monte_carlo": statistics.fmean(outcomes[str(number)]),
                "q": place.node.q_value,
                "n": place.node.visit_count,
                "v": place.node.value,
                "depth": len(place.path),
            }
        )
    return rows


def agreement(rows: list[dict], key: str) -> dict | None:
    """How a column agrees with the roll-outs; None for a few rows, or rows that do not differ.

    Correlation, mean absolute error, and how often the sign is the same where the roll-outs are
    beyond 0.25.
    """
    true = np.array([row["monte_carlo"] for row in rows])
    found = np.array([row[key] for row in rows])
    if len(rows) < 10 or not true.std() or not found.std():
        return None
    clear = np.abs(true) > 0.25
    same_sign = np.sign(found) == np.sign(true)
    return {
        "correlation": float(np.corrcoef(true, found)[0, 1]),
        "error": float(np.abs(true - found).mean()),
        "same_sign": float(same_sign[clear].mean()) if clear.any() else None,
        "nodes": len(rows),
    }


# ---------------------------------------------------------------------------------- lines of a file


def add(line: dict):
    """Add a line to why.jsonl, in the place of one of the same stage, trees, row and seed.

    Only one process may write at a time.
    """
    file = HERE / "why.jsonl"
    old = file.read_text().splitlines() if file.exists() else []
    keys = ("stage", "trees", "curves", "seed")
    identity = [line.get(key) for key in keys]
    rows = [row for row in map(json.loads, old) if [row.get(key) for key in keys] != identity]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, line])
    publish(file, lambda partial: partial.write_text(text))


def curves(folder: Path, width: int = 25) -> dict[str, list]:
    """Means over `width` steps of what the log of a run holds of round 1."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "round1"]
    parts = [rows[first : first + width] for first in range(0, len(rows), width)]
    found = {"step": [part[0]["step"] for part in parts]}
    for name in FIGURES:
        values = [[row[name] for row in part if name in row] for part in parts]
        found[name] = [statistics.fmean(part or [0]) for part in values]
    return found


def judge(
    model: Llama, tokenizer: StepTokenizer, trees: list[Tree], seed: int
) -> dict[str, object]:
    """What Q of searched trees and V of a model know. The nodes stand in the line of seed 0."""
    judged = rescore(model, trees)
    pairs = zip(trees, judged)
    rows = roll_outs(model, tokenizer, [with_values(*pair) for pair in pairs], 200, 64, seed)
    undecided = [row for row in rows if abs(row["monte_carlo"]) <= 0.9]  # may still end both ways
    by_depth = {}
    for depth in (1, 2, 3):
        by_depth[depth] = agreement([row for row in rows if row["depth"] == depth], "q")
    nodes = [{name: round(value, 3) for name, value in row.items()} for row in rows]
    return {
        "diagnosis": diagnose(trees, judged),
        "q": agreement(rows, "q"),
        "v": agreement(rows, "v"),
        "undecided": agreement(undecided, "q"),
        "by_depth": by_depth,
        "nodes": nodes if seed == 0 else [],
    }


def with_values(tree: Tree, judged: Tree) -> Tree:
    """A tree with the values of another one of the same nodes."""
    pairs = zip(tree.nodes, judged.nodes)
    return replace(tree, nodes=[replace(node, value=other.value) for node, other in pairs])


def stage_folders(runs: Path, seed: int) -> dict[str, Path]:
    """The model of each stage; the SFT model comes first."""
    return {
        "sft": runs / f"seed{seed}" / "sft",
        "round 1": runs / f"objectives-svpo-{seed}" / "round1",
        "round 3": runs / f"ablation-3-rounds-{seed}" / "round3",
    }


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    config = parser.parse_args()
    seed = config.seed
    mark = {"seed": seed, "commit": head_commit()[:7]}
    for name in CURVES:
        folder = config.runs / f"{name}-{seed}"
        if (folder / "log.jsonl").exists():
            add({"curves": name.partition("-")[2], **mark, **curves(folder)})
    valid = load_questions("arithmetic:valid", 300, seed)
    sft_trees = []
    for stage, folder in stage_folders(config.runs, seed).items():
        model = load_model(folder)
        tokenizer = StepTokenizer.load(folder)
        trees = grow_judged(model, tokenizer, valid, SEARCH, seed)
        searched = {"its own policy": trees}
        if stage == "sft":  # those that a round learns from, too, with V in their search
            sft_trees = trees
            searched["training"] = read_trees(config.runs / f"seed{seed}" / "trees.jsonl")[:300]
        else:  # the same pairs for all; their policy is the reference of the implicit reward
            found = diagnose(sft_trees, rescore(model, sft_trees))
            add({"stage": stage, "trees": "the sft policy", **mark, "diagnosis": found})
        for name, grown in searched.items():
            line = {"stage": stage, "trees": name, **mark, **judge(model, tokenizer, grown, seed)}
            add(line)
            print(f"{stage}, trees of {name}: Q {line['q']}, V {line['v']}")


if __name__ == "__main__":
    run_command(main)
