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
    check_reward,
    check_trees,
    fitting,
    identity_of,
    outcome_of,
    question_files,
    resume_trees,
    write_trees,
)
from engine import Demand, Engine, Node, context_of, load_source
from model import Llama
from support.files import check_output, hold, keep_config
from support.flags import flag, parse_args, run_command
from support.hugging_face import find_folder, model_files
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
    in_flight: int = flag(
        1,
        "expansions of a tree at once: more keep the lanes busy, but choose leaves knowing less",
        least=1,
    )
    reward: str = flag(
        "",
        "FILE.py:FUNCTION that scores finished solutions, function(question, text) within [-1, 1]; "
        "empty: +1 for a right answer, else -1",
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
) -> Generator[list[Node], list[Node] | None, tuple[int, str]]:
    """Grow a tree below `root` (AlphaMath section 3.2).

    `outcome(node)` is the reward of a terminal node, in [-1, 1]. Returns the number of effective
    simulations and why the search stopped. At most `config.in_flight` expansions are open at once:
    the engine sends None to ask for the next one before the children of the last are complete, and
    an empty list to wait is the answer if there is none.
    """
    asked = simulations = 0
    full = False  # no room until more children are complete
    while True:
        leaf = None
        if asked < config.simulations and not full:
            leaf = select(root, config.c_puct, rng)
        if not leaf and asked == simulations:  # nothing is in flight
            return simulations, "simulations" if asked == config.simulations else "exhausted"
        if leaf:
            asked += 1
            fly(leaf, 1)
        children = yield [leaf] * config.expand_width if leaf else []
        if children is None:  # none are complete, but more may be asked for
            continue
        if not children:
            fly(leaf, -1)
            asked -= 1
            if asked == simulations:
                return simulations, "room"
            full = True
            continue
        full = False
        simulations += 1
        leaf = children[0].parent
        fly(leaf, -1)
        expand(leaf, children, config.max_depth)
        for child in leaf.children:
            if child.ending:
                child.reward = outcome(child)
                backup(child, child.reward)
        if config.leaf_value:
            backup(leaf, leaf.value)


def select(root: Node, c_puct: float, rng: random.Random) -> Node | None:
    """Walk down by PUCT to a node without children, never to a terminal one, nor to one in flight.

    A node whose children are all terminal or closed is closed, and the walk starts again; the
    official code ends the search there. None if the whole tree is exhausted or in flight.
    """
    node = root
    while not root.closed and not busy(root):
        if not node.children:
            return node
        children = open_children(node)
        if not children:
            node.closed = True
            node = root
            continue
        free = [child for child in children if not busy(child)]
        scores = [puct(child, c_puct) for child in free]
        highest = max(scores)
        best = [child for child, score in zip(free, scores) if score == highest]
        node = rng.choice(best)
    return None


def puct(child: Node, c_puct: float) -> float:
    """Selection score (AlphaMath eq. 4): Q + c_puct * prior * sqrt(N_parent) / (1 + N).

    Here, but not in Q, N counts the expansions in flight as visits (WU-UCT, arXiv 1810.11755).
    """
    visits = child.visit_count + child.in_flight
    parent_visits = child.parent.visit_count + child.parent.in_flight
    exploration = child.prior * math.sqrt(parent_visits) / (1 + visits)
    return child.q_value + c_puct * exploration


def open_children(node: Node) -> list[Node]:
    """The children that are neither terminal nor closed."""
    return [child for child in node.children if not child.ending and not child.closed]


def busy(node: Node) -> bool:
    """Whether all leaves below a node that may be selected, or the leaf itself, are in flight."""
    return node.in_flight > 0 and all(map(busy, open_children(node)))


def fly(node: Node | None, change: int):
    """Count a leaf whose children are being sampled (`change` 1), or no longer (-1)."""
    while node:
        node.in_flight += change
        node = node.parent


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


def demand_of(config: SearchConfig) -> Demand:
    """What `mcts` may ask of the engine."""
    width, temperature = config.expand_width, config.search_temperature
    return Demand(width, temperature, config.simulations, in_flight=config.in_flight)


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
    demand = demand_of(config)
    engine = Engine(model, tokenizer, questions, demand, config, config.search_rows, seed)

    def start(question: Question, root: Node):
        rng = random.Random(f"{seed} {question.id}")
        return mcts(root, config, outcome_of(question, config.reward), rng)

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
    check_reward(search.reward)
    out = Path(target.out)
    file = out
    if world_size() > 1:
        file = out.with_name(f"{out.stem}-{rank()}{out.suffix}")
    inputs = [*question_files(source, "train"), *model_files(source.model), source.prompt]
    for name in (file, out.with_name(out.name + ".config"), out.with_name(out.name + ".lock")):
        check_output(name, "--out", inputs)
    model, tokenizer, questions = load_source(source, source.seed, "train")
    hold(out.with_name(out.name + ".lock"))
    found = resume_trees(out, rank(), world_size())
    check_trees(found, questions, f"--out {out}")
    done = {tree.id for tree in found}
    mine = questions[rank() :: world_size()]
    left = [question for question in mine if question.id not in done]
    left = fitting(left, tokenizer, context_of(model.config, search) - search.max_step_tokens)
    begin = time.perf_counter()
    trees = search_trees(model, tokenizer, left, search, source.seed)
    config_file = out.with_name(out.name + ".config")
    free = ("limit", "device", "dtype", *MEMORY_ONLY)
    identity = identity_of(find_folder(source.model), [tokenizer], search.reward)
    keep_config(config_file, (source, search), free, identity, write=rank() == 0)
    write_trees(file, trees)
    seconds = time.perf_counter() - begin
    print(f"{file}: {len(left)} trees in {seconds:.1f} s, {len(mine) - len(left)} were there")


if __name__ == "__main__":
    run_command(main)
