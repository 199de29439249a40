"""Monte Carlo tree search over reasoning steps.

`mcts` is AlphaMath's search of one question, without roll-outs, written for a reader: a generator
that yields the nodes it wants extended and receives their sampled children. The engine (engine.py)
runs many of them at once.

    python mcts.py --model FOLDER --data SPEC --out trees.jsonl
    torchrun --nproc-per-node 2 mcts.py ...     each rank searches its share, into trees-RANK.jsonl
"""

import math
import random
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from data import (
    RECIPES,
    Question,
    SourceConfig,
    StepTokenizer,
    Tree,
    TreeNode,
    fitting,
    outcome_of,
    resume_trees,
    write_trees,
)
from engine import Demand, Engine, Node, context_of, load_source
from model import Llama
from support.files import hold, keep_config
from support.flags import flag, parse_args, run_command
from support.ranks import rank, world_size


@dataclass(frozen=True)
class SearchConfig:
    """Tree search. Defaults are our choice; AlphaMath's values stand in the help.

    data.BUILT_IN has the defaults of the built-in tasks.
    """

    simulations: int = flag(16, "simulations per question, at most; AlphaMath: 40", least=1)
    expand_width: int = flag(4, "children sampled at once; AlphaMath: 5", least=1)
    c_puct: float = flag(
        1.25,
        "weight of exploration (c_puct); AlphaMath: 1.25 in the paper, 1.5 in the code",
        least=0,
    )
    max_depth: int = flag(8, "steps of a solution, at most; AlphaMath: 8", least=1)
    max_step_tokens: int = flag(
        64, "tokens of a step, at most; longer steps are cut and count as wrong", least=1
    )
    search_temperature: float = flag(
        1.0,
        "temperature of sampling (tau); AlphaMath: 0.6 in round 1, then 1.0",
        least=0,
    )
    leaf_value: bool = flag(True, "back up V of each expanded leaf; without it outcomes alone")
    max_tokens: int = flag(
        0, "tokens of a prompt and its solution, at most; 0: the model's context", least=0
    )
    tree_tokens: int = flag(
        4096, "tokens of a prompt and its tree; a search that has used them ends", least=1
    )
    search_rows: int = flag(64, "questions searched at once, as far as the cache goes", least=1)
    cache_tokens: int = flag(
        0, "tokens that the cache holds, at most; 0: as the memory that is free allows", least=0
    )


def mcts(
    root: Node, config: SearchConfig, outcome: Callable[[Node], float], rng: random.Random
) -> Generator[list[Node], list[Node], tuple[int, str]]:
    """Grow a tree below `root` (AlphaMath section 3.2).

    `outcome(node)` is the reward of a terminal node, +1 or -1. Returns the number of effective
    simulations and why the search stopped.
    """
    for simulation in range(config.simulations):
        leaf = select(root, config.c_puct, rng)
        if leaf is None:
            return simulation, "exhausted"
        children = yield [leaf] * config.expand_width
        if not children:
            return simulation, "room"
        expand(leaf, children, config.max_depth)
        for child in leaf.children:
            if child.ending:
                child.reward = outcome(child)
                backup(child, child.reward)
        if config.leaf_value:
            backup(leaf, leaf.value)
    return config.simulations, "simulations"


def select(root: Node, c_puct: float, rng: random.Random) -> Node | None:
    """Walk down by PUCT to a node without children, never to a terminal one.

    A node whose children are all terminal or closed is closed, and the walk starts again; the
    official code ends the search there. None if the whole tree is exhausted.
    """
    node = root
    while not root.closed:
        if not node.children:
            return node
        open_children = [child for child in node.children if not child.ending and not child.closed]
        if not open_children:
            node.closed = True
            node = root
            continue
        scores = [puct(child, c_puct) for child in open_children]
        highest = max(scores)
        best = [child for child, score in zip(open_children, scores) if score == highest]
        node = rng.choice(best)
    return None


def puct(child: Node, c_puct: float) -> float:
    """Selection score (AlphaMath eq. 4): Q + c_puct * prior * sqrt(N_parent) / (1 + N)."""
    exploration = child.prior * math.sqrt(child.parent.visit_count) / (1 + child.visit_count)
    return child.q_value + c_puct * exploration


def expand(leaf: Node, children: list[Node], max_depth: int):
    """Attach sampled children to a leaf.

    Identical children are merged (our choice). Unfinished ones at max_depth are too deep.
    """
    leaf.children = list({tuple(child.tokens): child for child in children}.values())
    for child in leaf.children:
        if child.ending is None and child.depth >= max_depth:
            child.ending = "deep"


def backup(node: Node | None, value: float):
    """Add one evaluation to a node and all its ancestors: N += 1, W += value, undiscounted."""
    while node:
        node.visit_count += 1
        node.value_sum += value
        node = node.parent


# ------------------------------------------------------------------------- searching many questions


def to_tree(question: Question, root: Node, simulations: int, stopped: str) -> Tree:
    """The stored form of a searched tree, breadth-first."""
    nodes = []
    queue = [(root, -1)]
    for node, parent in queue:
        nodes.append(
            TreeNode(
                parent,
                node.tokens,
                node.sampled or [parent >= 0] * len(node.tokens),
                node.logp,
                node.prior,
                node.visit_count,
                node.q_value,
                node.value,
                node.reward,
                node.ending,
            )
        )
        queue += [(child, len(nodes) - 1) for child in node.children]
    return Tree(question.id, question.text, question.answer, nodes, simulations, stopped)


def search_trees(
    model: Llama,
    tokenizer: StepTokenizer,
    questions: list[Question],
    config: SearchConfig,
    seed: int = 0,
    label: str = "search",
) -> Iterator[Tree]:
    """The tree of each question, as its search ends.

    Questions that do not fit raise InputError at once, before the first tree is asked for.
    """
    demand = Demand(config.expand_width, config.search_temperature, config.simulations)
    engine = Engine(model, tokenizer, questions, demand, config, config.search_rows, seed)

    def start(question: Question, root: Node):
        rng = random.Random(f"{seed} {question.id}")
        return mcts(root, config, outcome_of(question), rng)

    ends = engine.run(start, label, outcomes=True)
    return (to_tree(question, root, *result) for question, root, result in ends)


MEMORY_ONLY = ("search_rows", "cache_tokens")  # fields that change memory and speed alone


@dataclass(frozen=True)
class TreesConfig:
    """Where the trees go."""

    out: str = flag(
        "",
        "JSONL file; questions that have a tree there are left out. Its configuration is kept "
        "beside it",
    )


def main():
    kinds = (SourceConfig, TreesConfig, SearchConfig)
    required = ("model", "data", "out")
    source, target, search = parse_args(__doc__, kinds, sys.argv[1:], required, RECIPES)
    out = Path(target.out)
    file = out
    if world_size() > 1:
        file = out.with_name(f"{out.stem}-{rank()}{out.suffix}")
    model, tokenizer, questions = load_source(source, source.seed, "train")
    hold(out.with_name(out.name + ".lock"))
    done = {tree.id for tree in resume_trees(out, rank(), world_size())}
    mine = questions[rank() :: world_size()]
    left = [question for question in mine if question.id not in done]
    left = fitting(left, tokenizer, context_of(model.config, search) - search.max_step_tokens)
    begin = time.perf_counter()
    trees = search_trees(model, tokenizer, left, search, source.seed)
    config_file = out.with_name(out.name + ".config")
    free = ("limit", "device", "dtype", *MEMORY_ONLY)
    keep_config(config_file, (source, search), free, write=rank() == 0)
    write_trees(file, trees)
    seconds = time.perf_counter() - begin
    print(f"{file}: {len(left)} trees in {seconds:.1f} s, {len(mine) - len(left)} were there")


if __name__ == "__main__":
    run_command(main)
