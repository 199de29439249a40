"""Seconds of an optimizer step on searched trees: packed, path by path, and in another version.

    python experiments/step_speed.py --model FOLDER --trees trees.jsonl --dtype bfloat16
                                     [--before CHECKOUT] [--ladder] [--count 4] [--alternations 3]

The sides take turns, there and back, each in a process of its own; medians are printed. `packed`
trains on the likelihood of all steps of `count` trees, drawn from those with more than eight nodes
and a pair of steps, as SVPO's lessons keep them. `leaves` trains on the path from the root to each
leaf of these, alone. `pairs` trains on the two paths of each pair, alone, as trainers of DPO do,
and `packed pairs` on the parts of the trees that the pairs need. C is the tokens of the paths
divided by those of the trees: what packing can save at most. `before` is `packed` in another
checkout of this repository. With `--ladder` also `packed` less one optimisation at a time. A
forward pass takes at most 4,096 tokens, or one tree.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve()
LADDER = ("no bfloat16", "whole mask", "every length", "memory freed")  # what `packed` goes without


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--trees", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--before", help="another checkout")
    parser.add_argument("--ladder", action="store_true", help="less one optimisation at a time")
    parser.add_argument("--count", type=int, default=4, help="trees of a step, at most")
    parser.add_argument("--steps", type=int, default=3, help="steps of a measurement, and one more")
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help="one measurement, of the checkout in --root")
    parser.add_argument("--root", default=str(HERE.parent.parent))
    return parser


def measure(words) -> dict:
    """One side, in this process, with the modules of --root. They may be of an older version."""
    sys.path.insert(0, words.root)
    import torch
    import torch.distributed as dist

    import svpo
    import train
    from model import load_model, tree_mask
    from support import ranks
    from svpo import LossConfig, learn

    torch.set_num_threads(words.threads)
    if hasattr(ranks, "keep_freed_memory") and words.side != "memory freed":  # as the commands do
        ranks.keep_freed_memory()
    older = not hasattr(train, "whole_copy")  # it needs a process group for bfloat16
    if older and words.dtype != "float32":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if words.side == "whole mask":
        svpo.path_mask = lambda ends, block: tree_mask(ends[None])
    if words.side == "every length":
        svpo.TILE = 1
    dtype = "float32" if words.side == "no bfloat16" else words.dtype
    model = load_model(words.model)
    trees = trees_of(words)
    losses = LossConfig("sft", sft_weight=1.0)
    lessons = list(enumerate(learn(tree, losses) for tree in trees))
    config = train.TrainConfig(pack_tokens=4096)
    computing = train.shard(model, dtype) or model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    seconds = []
    for step in range(words.steps + 1):
        begin = time.perf_counter()
        figures, _ = train.backward(computing, lessons, losses, config, 0, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens": sum(len(node.tokens) for _, lesson in lessons for node in lesson.tree.nodes),
        "loss": figures["loss"],
    }


def trees_of(words) -> list:
    """The trees, or paths, that a side trains on."""
    from data import read_trees
    from svpo import LossConfig, learn

    lessons = [
        (learn(tree, LossConfig("svpo")), learn(tree, LossConfig("step-dpo")))
        for tree in read_trees(Path(words.trees))
        if len(tree.nodes) > 8
    ]
    lessons = [(whole, paired) for whole, paired in lessons if paired.pairs]
    lessons = random.Random(0).sample(lessons, min(words.count, len(lessons)))
    trees = [whole.tree for whole, _ in lessons]
    paired = [paired.tree for _, paired in lessons]
    if words.side == "leaves":
        return [path_to(tree, leaf) for tree in trees for leaf in leaves_of(tree)]
    if words.side == "packed pairs":
        return paired
    if words.side == "pairs":
        return [
            path_to(lesson.tree, end)
            for _, lesson in lessons
            for win, lose, _ in lesson.pairs
            for end in (win, lose)
        ]
    return trees


def leaves_of(tree) -> set[int]:
    """The nodes of a tree without children."""
    return set(range(1, len(tree.nodes))) - {node.parent for node in tree.nodes}


def path_to(tree, end: int):
    """The path from the root to a node, as a tree without branches."""
    steps = [0, *tree.path(end)]
    nodes = [replace(tree.nodes[index], parent=place - 1) for place, index in enumerate(steps)]
    return replace(tree, nodes=nodes)


def print_bound(rows: dict[str, list[dict]], seconds: dict[str, float], packed: str, alone: str):
    """Print C of some paths, and how much of it packing reaches."""
    share = rows[alone][0]["tokens"] / rows[packed][0]["tokens"]
    faster = seconds[alone] / seconds[packed]
    print(
        f"{alone} to {packed}: C = {share:.2f}; packing reaches {100 * faster / share:.0f} % of it"
    )


def main():
    words = parser().parse_args()
    if words.side:
        print(json.dumps(measure(words)))
        return
    sys.path.insert(0, words.root)  # not before: `measure` takes the modules of another checkout
    from experiments.bench import last_line

    names = ["packed", "leaves", "packed pairs", "pairs", *(LADDER if words.ladder else [])]
    sides = dict.fromkeys(names, words.root)
    if words.before:
        sides["before"] = words.before
    rows = {side: [] for side in sides}
    for number in range(words.alternations):
        for side, root in list(sides.items())[:: -1 if number % 2 else 1]:
            command = [sys.executable, HERE, *sys.argv[1:], "--side", side, "--root", root]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {side}: {last_line(done.stderr)}")
            rows[side].append(json.loads(last_line(done.stdout)))
    print(f"up to {words.count} trees, {words.dtype}, medians of {words.alternations}")
    seconds = {}
    for side, found in rows.items():
        seconds[side] = statistics.median(row["seconds"] for row in found)
        tokens, loss = found[0]["tokens"], found[0]["loss"]
        print(
            f"{side:12} {seconds[side]:8.2f} s {tokens:7} tokens   loss {loss:.5f}   "
            f"{seconds[side] / seconds['packed']:.2f} times packed"
        )
    print_bound(rows, seconds, "packed", "leaves")
    print_bound(rows, seconds, "packed pairs", "pairs")


if __name__ == "__main__":
    main()
