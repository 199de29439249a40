"""What a search found on real text, and whether a language model still reads other text as well.

    python experiments/found.py trees --model FOLDER --trees FILE [--roll-outs 32] [--json FILE]
                                solved questions, pairs by depth, Q against roll-outs
    python experiments/found.py pairs --model FOLDER --trees FILE [--count 20]
                                pairs to read: question, steps so far, winner and loser
    python experiments/found.py perplexity --model FOLDER --data-dir FOLDER [--limit 200]
                                of the worked solutions of MATH, a benchmark that is not trained on

With `trees` and `pairs`, the model is the one that grew them. Roll-outs are sampled as the search
was, by the configuration that mcts.py keeps beside the trees.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch

from data import (
    Question,
    SourceConfig,
    StepTokenizer,
    Tree,
    find_source,
    read_trees,
    solution_tree,
)
from engine import load_source
from experiments.why import agreement, roll_outs
from mcts import SearchConfig
from model import load_model
from support.files import read_json, write_json
from support.flags import fast_dtype, run_command, visible
from svpo import outcomes_below, rescore, sibling_pairs


def describe(trees: list[Tree]) -> dict:
    """What the trees hold: solved share, pairs a tree by depth, ends, simulations, visits."""
    ends = Counter(node.ending for tree in trees for node in tree.nodes if node.ending)
    depths = Counter(len(tree.path(win)) for tree in trees for win, _, _ in sibling_pairs(tree))
    tokens = [sum(len(node.tokens) for node in tree.nodes[1:]) for tree in trees]
    return {
        "trees": len(trees),
        "solved": statistics.fmean(solved(tree) for tree in trees),
        "pairs_a_tree": {depth: count / len(trees) for depth, count in sorted(depths.items())},
        "trees_with_pairs": statistics.fmean(bool(sibling_pairs(tree)) for tree in trees),
        "ends": {ending: count / ends.total() for ending, count in ends.most_common()},
        "simulations": statistics.fmean(tree.simulations for tree in trees),
        "tokens_a_tree": statistics.fmean(tokens),
    }


def solved(tree: Tree) -> bool:
    return outcomes_below(tree)[0][0] > 0


def compare_roll_outs(
    model, tokenizer: StepTokenizer, trees: list[Tree], count: int, seed: int, search: SearchConfig
) -> dict:
    """Q against `count` solutions from each of 100 steps, of trees with right and wrong ends."""
    mixed = [tree for tree in trees if all(ends[0] for ends in outcomes_below(tree))]
    rows = roll_outs(model, tokenizer, mixed, 100, count, seed, search)
    return {"q": agreement(rows, "q"), "steps": rows}


def print_pairs(tokenizer: StepTokenizer, trees: list[Tree], count: int, seed: int):
    """Print pairs of different trees, drawn at random."""

    def text(node):
        return visible(tokenizer.tokenizer.decode(node.tokens).strip())

    paired = [tree for tree in trees if sibling_pairs(tree)]
    rng = random.Random(seed)
    for number, tree in enumerate(rng.sample(paired, min(count, len(paired))), 1):
        win, lose, _ = rng.choice(sibling_pairs(tree))
        print(f"\n{number}. {visible(tree.question)} (answer {tree.answer})")
        for index in tree.path(win)[:-1]:
            print(f"   step  {text(tree.nodes[index])}")
        for sign, index in (("+", win), ("-", lose)):
            node = tree.nodes[index]
            print(f"      {sign}  {text(node)}   (N {node.visit_count}, Q {node.q_value:+.2f})")


def perplexity(model, tokenizer: StepTokenizer, questions: list[Question]) -> dict:
    """exp of the mean negative log-probability of a token of worked solutions.

    The standard error is that of the mean over solutions, by the delta method.
    """
    trees = rescore(model, [solution_tree(question, tokenizer) for question in questions])
    rows = []  # nats and tokens of each solution
    for tree in trees:
        tokens = sum(sum(node.sampled) for node in tree.nodes)
        rows.append((-sum(node.logp for node in tree.nodes), tokens))
    total = sum(tokens for _, tokens in rows)
    mean = sum(nats for nats, _ in rows) / total
    spread = sum((nats - mean * tokens) ** 2 for nats, tokens in rows)
    error = math.sqrt(spread) / total
    value = math.exp(mean)
    return {"perplexity": value, "standard_error": value * error, "solutions": len(rows)}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("command", choices=["trees", "pairs", "perplexity"])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--trees", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="perplexity: solutions")
    parser.add_argument("--roll-outs", type=int, default=0, help="of each of 100 steps")
    parser.add_argument("--count", type=int, default=20, help="pairs to print")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    config = parser.parse_args()
    if config.command != "perplexity" and not config.trees:
        parser.error(f"{config.command} needs --trees")
    source = SourceConfig(str(config.model), limit=config.limit)
    if config.command == "perplexity":
        source = replace(source, data="math:test", data_dir=str(config.data_dir or ""))
        found = perplexity(*load_source(source, config.seed, "test"))
    else:
        trees = read_trees(config.trees)
        _, tokenizer = find_source(source)
        if config.command == "pairs":
            print_pairs(tokenizer, trees, config.count, config.seed)
            return
        found = describe(trees)
        if config.roll_outs:
            model = load_model(config.model, dtype=getattr(torch, fast_dtype("cpu")))
            kept = read_json(config.trees.with_name(config.trees.name + ".config"))
            search = SearchConfig(**kept["SearchConfig"])  # temperature and limits
            found |= compare_roll_outs(
                model, tokenizer, trees, config.roll_outs, config.seed, search
            )
    print(json.dumps({key: value for key, value in found.items() if key != "steps"}, indent=1))
    if config.json:
        write_json(config.json, found)


if __name__ == "__main__":
    run_command(main)
