"""Why it works or fails: what Q and V know, by depth and stage, of the runs of experiments/run.py.

    python experiments/why.py --seed 0          the models of runs/experiments/seed0 and of its row "svpo" in table objectives

Appends to experiments/why.jsonl: pairs a tree by depth; V, implicit reward and mean log-probability as judges of siblings, by depth, with
calibration; and how Q of the search agrees with 64 roll-outs of the same policy from each of 200 nodes.
"""
import argparse
import json
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402

from data import Question, StepTokenizer, load_questions, parse_args, read_trees, run_command  # noqa: E402
from eval import diagnose, grow_judged, rescore  # noqa: E402
from mcts import Driver, SearchConfig, grader  # noqa: E402
from model import load_model  # noqa: E402
from svpo import path  # noqa: E402
from train import RunConfig  # noqa: E402

SEARCH = parse_args("", (RunConfig, SearchConfig), [])[1]  # the built-in task's


class PrefixTokenizer(StepTokenizer):
    """Prompts that are a question and the beginning of a solution."""
    def __init__(self, tokenizer: StepTokenizer, prefixes: dict[str, list[int]]):
        super().__init__(tokenizer.tokenizer, tokenizer.eos_ids, tokenizer.template)
        self.prefixes = prefixes

    def encode_prompt(self, question: Question, room: int | None = None) -> list[int]:
        return self.prefixes[question.id]


def roll_outs(model, tokenizer: StepTokenizer, trees: list, nodes: int, count: int, seed: int) -> list[dict]:
    """Mean outcome of `count` whole solutions from each of `nodes` visited, unfinished nodes, beside the search's Q, N and V."""
    places = [(tree, index) for tree in trees for index, node in enumerate(tree.nodes) if index and node.visit_count and node.reward is None]
    chosen, questions, prefixes = random.Random(seed).sample(places, nodes), [], {}
    for number, (tree, index) in enumerate(chosen):
        questions.append(Question(str(number), tree.question, tree.answer))
        prefixes[str(number)] = [token for place in [0, *path(tree, index)] for token in tree.nodes[place].tokens]

    def outcomes(question, root):
        grade = grader(question)
        return [grade(last) for last in (yield [root] * count)]
    driver = Driver(model, PrefixTokenizer(tokenizer, prefixes), questions, 8, count, SEARCH.search_temperature, SEARCH, 1, seed,
                    through=SEARCH.max_depth, fit=True)
    found = {question.id: statistics.fmean(ends) for question, _, ends in driver.run(outcomes, "roll-outs")}
    return [{"monte_carlo": found[str(number)], "q": tree.nodes[index].q_value, "n": tree.nodes[index].visit_count, "v": tree.nodes[index].value,
             "depth": len(path(tree, index))} for number, (tree, index) in enumerate(chosen)]


def agreement(rows: list[dict], key: str) -> dict:
    """Correlation with the roll-outs, mean absolute error, and how often the sign is the same (where the roll-outs have one)."""
    true, found = np.array([row["monte_carlo"] for row in rows]), np.array([row[key] for row in rows])
    clear = np.abs(true) > 0.25
    return {"correlation": float(np.corrcoef(true, found)[0, 1]), "error": float(np.abs(true - found).mean()),
            "same_sign": float((np.sign(found) == np.sign(true))[clear].mean()), "clear": int(clear.sum())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    config = parser.parse_args()
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    valid = load_questions("arithmetic:valid", 300, config.seed)
    for stage, folder in (("sft", config.runs / f"seed{config.seed}" / "sft"), ("round 1", config.runs / f"objectives-svpo-{config.seed}" / "round1")):
        model, tokenizer = load_model(folder), StepTokenizer.load(folder)
        trees = grow_judged(model, tokenizer, valid, SEARCH, config.seed)
        searched = {"its own policy": trees}
        if stage == "sft":  # those that a round is trained on, with V in the search
            searched["training"] = read_trees(config.runs / f"seed{config.seed}" / "trees.jsonl")[:300]
        for name, grown in searched.items():
            judged = rescore(model, grown)
            with_values = [replace(tree, nodes=[replace(node, value=new.value) for node, new in zip(tree.nodes, scored.nodes)])
                           for tree, scored in zip(grown, judged)]
            rows = roll_outs(model, tokenizer, with_values, 200, 64, config.seed)
            line = {"stage": stage, "trees": name, "seed": config.seed, "commit": commit, "diagnosis": diagnose(grown, judged),
                    "q": agreement(rows, "q"), "v": agreement(rows, "v"),
                    "q_by_visits": {label: agreement([row for row in rows if low <= row["n"] < high], "q")
                                    for label, low, high in (("1-2", 1, 3), ("3-6", 3, 7), ("7 and more", 7, 10**9))}, "nodes": rows}
            with open(HERE / "why.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{stage}, trees of {name}: Q {line['q']}, V {line['v']}")


if __name__ == "__main__":
    run_command(main)
