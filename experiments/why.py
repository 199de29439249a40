"""Why it works or fails: what Q and V know, by depth and stage, of the runs of experiments/run.py.

    python experiments/why.py --seed 0          the models of runs/experiments/seed0, of row "svpo" in table objectives and of "3 rounds" in ablation

Writes lines of experiments/why.jsonl: loss curves of four rows; pairs a tree by depth; V, implicit reward and mean log-probability as judges of siblings, by depth, with
calibration; and how Q of the search agrees with 64 roll-outs of the same policy from each of 200 nodes.
"""
import argparse
import json
import random
import statistics
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
from support.files import head_commit, publish  # noqa: E402
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
        grade, left = grader(question), SEARCH.max_depth - len(path(*chosen[int(question.id)]))
        return [grade(last) if last.depth <= left else -1.0 for last in (yield [root] * count)]  # the search calls longer ones wrong, too
    driver = Driver(model, PrefixTokenizer(tokenizer, prefixes), questions, 8, count, SEARCH.search_temperature, SEARCH, 1, seed,
                    through=SEARCH.max_depth, fit=True)
    found = {question.id: statistics.fmean(ends) for question, _, ends in driver.run(outcomes, "roll-outs")}
    return [{"monte_carlo": found[str(number)], "q": tree.nodes[index].q_value, "n": tree.nodes[index].visit_count, "v": tree.nodes[index].value,
             "depth": len(path(tree, index))} for number, (tree, index) in enumerate(chosen)]


def agreement(rows: list[dict], key: str) -> dict | None:
    """Correlation with the roll-outs, mean absolute error, and how often the sign is the same where the roll-outs are beyond 0.25; None of a few
    rows, or of rows that do not differ."""
    true, found = np.array([row["monte_carlo"] for row in rows]), np.array([row[key] for row in rows])
    if len(rows) < 10 or not true.std() or not found.std():
        return None
    clear = np.abs(true) > 0.25
    return {"correlation": float(np.corrcoef(true, found)[0, 1]), "error": float(np.abs(true - found).mean()),
            "same_sign": float((np.sign(found) == np.sign(true))[clear].mean()) if clear.any() else None, "nodes": len(rows)}


def add(line: dict):
    """Add a line, in the place of one of the same stage, trees, row and seed; one process at a time."""
    path = HERE / "why.jsonl"
    rows = [json.loads(old) for old in path.read_text().splitlines()] if path.exists() else []
    keys = ("stage", "trees", "curves", "seed")
    rows = [row for row in rows if [row.get(key) for key in keys] != [line.get(key) for key in keys]] + [line]
    publish(path, lambda aside: aside.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def curves(folder: Path, width: int = 25) -> dict[str, list]:
    """Means over `width` steps of what a round's log holds."""
    rows = [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if row["stage"] == "round1"]
    parts = [rows[place:place + width] for place in range(0, len(rows), width)]
    return {"step": [part[0]["step"] for part in parts]} | {
        name: [statistics.fmean([row[name] for row in part if name in row] or [0]) for part in parts]
        for name in ("loss", "policy", "mse", "sft", "win_reward", "lose_reward", "reward_accuracy", "value_accuracy", "grad_norm")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    config = parser.parse_args()
    mark = {"seed": config.seed, "commit": head_commit()[:7]}
    for name in ("objectives-svpo", "objectives-step-dpo", "ablation-outcomes-only", "ablation-ten-times-the-learning-rate"):
        if (config.runs / f"{name}-{config.seed}" / "log.jsonl").exists():
            add({"curves": name.partition("-")[2], **mark, **curves(config.runs / f"{name}-{config.seed}")})
    valid, first = load_questions("arithmetic:valid", 300, config.seed), None
    for stage, folder in (("sft", config.runs / f"seed{config.seed}" / "sft"), ("round 1", config.runs / f"objectives-svpo-{config.seed}" / "round1"),
                          ("round 3", config.runs / f"ablation-3-rounds-{config.seed}" / "round3")):
        model, tokenizer = load_model(folder), StepTokenizer.load(folder)
        trees = grow_judged(model, tokenizer, valid, SEARCH, config.seed)
        searched = {"its own policy": trees}
        if stage == "sft":  # those that a round is trained on, with V in the search
            first, searched["training"] = trees, read_trees(config.runs / f"seed{config.seed}" / "trees.jsonl")[:300]
        else:  # the same pairs for all; their policy is the reference of the implicit reward
            add({"stage": stage, "trees": "the sft policy", **mark, "diagnosis": diagnose(first, rescore(model, first))})
        for name, grown in searched.items():
            judged = rescore(model, grown)
            with_values = [replace(tree, nodes=[replace(node, value=new.value) for node, new in zip(tree.nodes, scored.nodes)])
                           for tree, scored in zip(grown, judged)]
            rows = roll_outs(model, tokenizer, with_values, 200, 64, config.seed)
            line = {"stage": stage, "trees": name, **mark, "diagnosis": diagnose(grown, judged), "q": agreement(rows, "q"), "v": agreement(rows, "v"),
                    "undecided": agreement([row for row in rows if abs(row["monte_carlo"]) <= 0.9], "q"),  # the policy may still end right or wrong
                    "by_depth": {depth: agreement([row for row in rows if row["depth"] == depth], "q") for depth in (1, 2, 3)},
                    "nodes": [{name: value and round(value, 3) for name, value in row.items()} for row in rows] if config.seed == 0 else []}
            add(line)
            print(f"{stage}, trees of {name}: Q {line['q']}, V {line['v']}")


if __name__ == "__main__":
    run_command(main)
