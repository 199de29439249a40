"""Seconds of an optimizer step on searched trees: packed, path by path, and in another version.

    python experiments/step_speed.py --model FOLDER --trees trees.jsonl --dtype bfloat16
                                     [--before CHECKOUT] [--count 4] [--alternations 3]

The sides take turns, each in a process of its own; medians are printed. `packed` trains on the
likelihood of all steps of `count` trees, drawn from those with more than eight nodes, as SVPO's
lessons keep them. `paths` trains on the path from the root to each leaf of these, alone. C is the
tokens of the paths divided by those of the trees: what packing can save at most. `before` is
`packed` in another checkout of this repository. A forward pass takes at most 4,096 tokens, or one
tree.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--trees", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--before", help="another checkout")
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

    import train
    from data import read_trees
    from model import load_model
    from support import ranks
    from svpo import LossConfig, learn

    torch.set_num_threads(words.threads)
    if hasattr(ranks, "keep_freed_memory"):  # as the commands do
        ranks.keep_freed_memory()
    older = not hasattr(train, "whole_copy")  # it needs a process group for bfloat16
    if older and words.dtype != "float32":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = load_model(words.model)
    trees = [tree for tree in read_trees(Path(words.trees)) if len(tree.nodes) > 8]
    trees = random.Random(0).sample(trees, min(words.count, len(trees)))
    trees = [learn(tree, LossConfig("svpo")).tree for tree in trees]
    if words.side == "paths":
        trees = [path for tree in trees for path in leaf_paths(tree)]
    losses = LossConfig("sft", sft_weight=1.0)
    lessons = list(enumerate(learn(tree, losses) for tree in trees))
    config = train.TrainConfig(pack_tokens=4096)
    computing = train.shard(model, words.dtype) or model
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


def leaf_paths(tree) -> list:
    """The path from the root to each leaf, as a tree without branches."""
    from dataclasses import replace

    parents = {node.parent for node in tree.nodes}
    paths = []
    for leaf in set(range(1, len(tree.nodes))) - parents:
        steps = [0, *tree.path(leaf)]
        nodes = [replace(tree.nodes[index], parent=place - 1) for place, index in enumerate(steps)]
        paths.append(replace(tree, nodes=nodes))
    return paths


def main():
    words = parser().parse_args()
    if words.side:
        print(json.dumps(measure(words)))
        return
    sys.path.insert(0, words.root)  # not before: `measure` takes the modules of another checkout
    from experiments.bench import last_line

    sides = {"packed": words.root, "paths": words.root}
    if words.before:
        sides["before"] = words.before
    rows = {side: [] for side in sides}
    for _ in range(words.alternations):
        for side, root in sides.items():
            command = [sys.executable, HERE, *sys.argv[1:], "--side", side, "--root", root]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {side}: {last_line(done.stderr)}")
            rows[side].append(json.loads(last_line(done.stdout)))
    print(f"up to {words.count} trees, {words.dtype}, medians of {words.alternations}")
    packed = statistics.median(row["seconds"] for row in rows["packed"])
    for side, found in rows.items():
        seconds = statistics.median(row["seconds"] for row in found)
        print(
            f"{side:8} {seconds:8.2f} s {found[0]['tokens']:7} tokens   loss {found[0]['loss']:.5f}"
            f"   {seconds / packed:.2f} times packed"
        )
    share = rows["paths"][0]["tokens"] / rows["packed"][0]["tokens"]
    faster = statistics.median(row["seconds"] for row in rows["paths"]) / packed
    print(f"C = {share:.2f}; packing reaches {100 * faster / share:.0f} % of it")


if __name__ == "__main__":
    main()
