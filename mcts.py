"""Monte Carlo tree search over reasoning steps, and the driver that runs many searches over one tree-shaped cache.

A search is a generator: it yields the nodes it wants extended (a node once for each sampled child) and receives the
sampled children. `mcts` below is one; the answering strategies of eval.py are others. The driver knows nothing of them:
it feeds one token to every live child of every question, and resumes a generator when all its children are complete.

    python mcts.py --model FOLDER --data SPEC --out trees.jsonl
    torchrun --nproc-per-node 2 mcts.py ...              each rank searches its share, into trees-RANK.jsonl

Dimension key: B rows (questions searched at once), N lanes (children decoded together in a row), T prompt tokens,
S cache slots, C tokens of a step, V vocabulary.
"""
import math
import os
import random
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Question, SourceConfig, StepTokenizer, extract_answer, grader, load_source, parse_args, resume_trees, \
    run_command, to_tree, write_trees
from model import Llama, TreeCache
from support.files import hold, keep_config
from support.graphs import Graphed
from support.reports import watched
from svpo import InputError, flag
from tasks.steps import closed, output_tokens


@dataclass(frozen=True)
class SearchConfig:
    """Tree search. Defaults are our choice; AlphaMath's values stand in the help."""
    simulations: int = flag(16, "simulations a question at most; AlphaMath: 40", built_in=12, least=1)
    expand_width: int = flag(4, "children sampled at once; AlphaMath: 5", least=1)
    c_puct: float = flag(1.25, "weight of exploration (c_puct); AlphaMath: 1.25 in the paper, 1.5 in the code", least=0)
    max_depth: int = flag(8, "steps of a solution at most; AlphaMath: 8", built_in=5, least=1)
    max_step_tokens: int = flag(64, "tokens of a step at most; longer ones are cut and wrong", built_in=16, least=1)
    search_temperature: float = flag(1.0, "temperature of sampling (tau); AlphaMath: 0.6 in round 1, then 1.0", built_in=0.7, least=0)
    leaf_value: bool = flag(True, "back up V of each expanded leaf; without it outcomes alone")
    search_rows: int = flag(8, "questions searched at once", built_in=128, least=1)
    cache_tokens: int = flag(32768, "tokens that the cache holds, over all questions searched at once", built_in=131072, least=1)


@dataclass(eq=False)
class Node:
    """A step and the partial solution that ends with it. One player: values never change sign on the way up."""
    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0  # sum of the sampled tokens' untempered log-probabilities
    value: float = 0.0  # V, read at the step's last token
    ending: str | None = None  # terminal: "answer", "eos", "cut" or "deep"
    reward: float | None = None
    children: list["Node"] = field(default_factory=list)
    visit_count: int = 0  # N
    value_sum: float = 0.0  # W
    closed: bool = False  # nothing below is left to select
    text: str = ""
    sampled: list[bool] = field(default_factory=list)  # which tokens the model wrote; empty: all
    position: int = 0  # tokens on the path, this step's included
    hidden_D: Tensor | None = None  # final hidden state of the last token; this and `place` are the driver's
    place: int = 0  # where the driver's cache keeps the step

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def prior(self) -> float:
        """exp(mean token log-probability), not normalised over siblings (AlphaMath official code)."""
        return math.exp(self.logp / max(1, sum(self.sampled or [True] * len(self.tokens)))) if self.parent else 1.0

    @property
    def q_value(self) -> float:
        """Q, the mean of all values backed up through this node; 0 before the first (AlphaMath eq. 4)."""
        return self.value_sum / self.visit_count if self.visit_count else 0.0

    def path(self) -> list["Node"]:
        """Nodes from below the root down to this one."""
        return [] if self.parent is None else self.parent.path() + [self]


def mcts(root: Node, config: SearchConfig, grade, rng: random.Random):
    """Grow a tree below `root` (AlphaMath section 3.2). `grade(node)` is the outcome of a terminal node, +1 or -1.

    Returns (effective simulations, why it stopped). The driver sends None for children when it has no room for more.
    """
    for simulation in range(config.simulations):
        leaf = select(root, config.c_puct, rng)
        if leaf is None:
            return simulation, "exhausted"
        children = yield [leaf] * config.expand_width
        if children is None:
            return simulation, "slots"
        expand(leaf, children, config.max_depth)
        for child in leaf.children:
            if child.ending:
                child.reward = grade(child)
                backup(child, child.reward)
        if config.leaf_value:
            backup(leaf, leaf.value)
    return config.simulations, "simulations"


def puct(child: Node, c_puct: float) -> float:
    """Selection score (AlphaMath eq. 4): Q + c_puct * prior * sqrt(N_parent) / (1 + N)."""
    return child.q_value + c_puct * child.prior * math.sqrt(child.parent.visit_count) / (1 + child.visit_count)


def select(root: Node, c_puct: float, rng: random.Random) -> Node | None:
    """Walk down by puct to a node without children, never to a terminal one; None when the whole tree is exhausted. A node
    whose children are all terminal or closed is closed, and the walk starts again; the official code ends the search there."""
    node = root
    while not root.closed:
        if not node.children:
            return node
        open_children = [child for child in node.children if not child.ending and not child.closed]
        if not open_children:
            node.closed, node = True, root
            continue
        scores = [puct(child, c_puct) for child in open_children]
        node = rng.choice([child for child, score in zip(open_children, scores) if score == max(scores)])
    return None


def expand(leaf: Node, children: list[Node], max_depth: int):
    """Attach sampled children; identical ones are merged (our choice), unfinished ones at max_depth are too deep."""
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


LINE, EOS, CUT = 1, 2, 3  # how a lane's step has ended


class Driver:
    """Runs one generator a question, many questions at once, each at its own pace.

    In each tick every live lane samples the next token of its step and feeds it. A step's first token is sampled from the
    hidden state that its parent's last token left; its last one is fed for its value and hidden state. So each token of a
    tree is fed exactly once. With `through` > 1 a lane goes on to the next step by itself, up to that many: for generators
    that do not choose between steps. What a question samples, and when it runs out of room, depends on the seed, its id and
    the configuration (and on rounding), not on the questions beside it. Lanes are numbered X = row * lanes + column.

    `paths` solutions are extended at once, `expansions` times at most. The slots hold these paths and their new steps, the
    store keeps the steps of the tree. With `fit` there are as few rows as it takes to give every search all the room that
    it may need; without, a search whose share of the cache is used up receives None for children.
    """
    def __init__(self, model: Llama, tokenizer: StepTokenizer, questions: list[Question], rows: int, lanes: int, temperature: float,
                 config: SearchConfig, expansions: int, seed: int = 0, paths: int = 1, through: int = 1, fit: bool = False,
                 static: bool | None = None):
        self.model, self.tokenizer, self.temperature, self.seed = model.eval(), tokenizer, temperature, seed
        self.lanes, self.through, self.step_tokens = lanes, through, config.max_step_tokens
        self.device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self.tables = tokenizer.tables_4V.numpy()
        if tokenizer.tools and self.step_tokens < 128:
            raise InputError(f"--max-step-tokens {self.step_tokens}: steps with code and its output need at least 128")
        room = model.config.max_position_embeddings - self.step_tokens
        self.waiting = [(question, tokenizer.encode_prompt(question, room)) for question in questions][::-1]
        lengths, new = [len(prompt) for _, prompt in self.waiting] or [1], lanes * self.step_tokens
        beside = through * new if through > 1 else paths * config.max_depth * self.step_tokens + new  # the prompt, in the slots
        places = expansions * new if through == 1 else 0
        if fit:
            rows = max(1, min(rows, config.cache_tokens // (max(lengths) + beside + places)))
        self.share = config.cache_tokens // rows - beside  # for a question's prompt and tree
        if self.share < max(lengths) + (places if fit else new):
            raise InputError(f"--cache-tokens {config.cache_tokens}: {rows} questions at once need at least "
                             f"{rows * (max(lengths) + beside + (places if fit else new))}")
        self.rows = rows = max(1, min(rows, len(questions)))
        self.slots, self.static = max(lengths) + beside, self.device.type == "cuda" if static is None else static
        self.cache = TreeCache(model.config, rows, self.slots + self.static, min(places, self.share - min(lengths)), self.device, dtype)
        self.mask_BNS = np.zeros((rows, lanes, self.slots), dtype=bool)
        self.mask_BNS[:, :, 0] = True  # a lane that sees nothing would compute NaN
        self.hidden_XD = torch.zeros(rows * lanes, model.config.hidden_size, device=self.device, dtype=dtype)
        self.live, self.text = np.zeros((2, rows * lanes), dtype=bool)
        self.position, self.slot, self.length, self.ending = np.zeros((4, rows * lanes), dtype=np.int64)
        self.logp, self.value = np.zeros((2, rows * lanes))
        self.step_XC, self.slot_XC, self.given_XC = np.zeros((3, rows * lanes, self.step_tokens), dtype=np.int64)  # given: -1 is none
        self.uniform_XC = np.zeros((rows * lanes, self.step_tokens), dtype=np.float32)  # the random numbers of each lane's step
        self.device_tick = Graphed(self.compute, self.hidden_XD) if self.static else self.compute
        self.next_slot, self.next_place = np.zeros((2, rows), dtype=np.int64)
        self.parent, self.children = [None] * (rows * lanes), [[]] * rows  # by lane; by row the complete children
        self.searches = [None] * rows  # (question, root, generator, random numbers)
        self.sampled_tokens = self.fed_tokens = self.steps = self.graded = self.solved = 0

    def run(self, start, label: str):
        """Yield (question, root, what the generator of `start(question, root)` returned) as searches end."""
        return watched(self, self.ends(start), label, len(self.waiting))

    @torch.inference_mode()
    def ends(self, start):
        """The same without the bar. What all prompts begin with, a few-shot prompt as a rule, is fed once; rows get copies."""
        prompts = sorted(prompt for _, prompt in self.waiting)  # what the first and the last share, all share
        prefix = os.path.commonprefix([prompts[0][:-1], prompts[-1][:-1]]) if len(prompts) > 1 else []
        if prefix:
            self.feed_prompts([0], [prefix], 0)
            self.prefix_L2SGK = self.cache.slots_L2BSGK[:, :, 0, :len(prefix)].clone()
        while self.waiting or any(self.searches):
            free = [row for row, search in enumerate(self.searches) if search is None]
            if self.waiting and 8 * len(free) >= self.rows:  # a few at a time: their prompts are fed together
                yield from self.refill(free, prefix, start)
            if self.live.any():
                self.tick()
                for row in self.complete():
                    yield from self.resume(row, [child for child in self.children[row] if child])

    def feed_prompts(self, rows: list[int], prompts: list[list[int]], begin: int) -> Tensor:
        """Feed the prompts from token `begin` on; hidden states (R, D) of their last tokens."""
        lengths = np.array([len(prompt) - begin for prompt in prompts])
        token, row, lane = map(self.to_device, (
            np.concatenate([prompt[begin:] for prompt in prompts]), np.repeat(np.arange(len(rows)), lengths),
            np.concatenate([np.arange(length) for length in lengths])))
        longest = int(lengths.max())
        mask_NS = torch.ones(longest, begin + longest, dtype=torch.bool, device=self.device).tril(begin)
        cache = self.cache.at(row, lane, lane + begin, longest, begin + longest, self.to_device(np.array(rows)))
        hidden_1XD = self.model.hidden(token[None], lane[None] + begin, mask_NS.expand(len(rows), 1, -1, -1), cache)
        self.fed_tokens += len(token)
        return hidden_1XD[0, self.to_device(lengths.cumsum() - 1)]

    def refill(self, free: list[int], prefix: list[int], start):
        """Feed the prompts of the next questions together and start their searches."""
        batch = [self.waiting.pop() for _ in free[:len(self.waiting)]]
        rows = free[:len(batch)]
        if prefix:
            self.cache.slots_L2BSGK[:, :, rows, :len(prefix)] = self.prefix_L2SGK[:, :, None]
        hidden_RD = self.feed_prompts(rows, [prompt for _, prompt in batch], len(prefix))
        for row, (question, prompt), hidden_D, value in zip(rows, batch, hidden_RD, self.model.value(hidden_RD).tolist()):
            root = Node(tokens=prompt, value=value, hidden_D=hidden_D, position=len(prompt))
            rng = np.random.default_rng([self.seed, zlib.crc32(question.id.encode())])
            self.searches[row], self.next_place[row] = (question, root, start(question, root), rng), 0
            yield from self.resume(row, None)

    def resume(self, row: int, children: list[Node] | None):
        """Hand the complete children to the row's generator and start the lanes it asks for, or end the search."""
        question, root, search, rng = self.searches[row]
        try:
            parents = search.send(children)
            while not self.lay_out(row, parents, root):
                parents = search.send(None)
        except StopIteration as end:
            self.searches[row] = None
            yield question, root, end.value
            return
        self.children[row] = [None] * self.lanes
        for lane, parent in enumerate(parents, row * self.lanes):
            self.hidden_XD[lane] = parent.hidden_D
            self.begin(lane, parent, rng)

    def lay_out(self, row: int, parents: list[Node], root: Node) -> bool:
        """Bring the paths of the nodes to be extended into the row's slots, behind the prompt; False if there is no room."""
        nodes = {id(node): node for parent in parents for node in parent.path()}
        length, first = len(root.tokens), {}
        for key, node in nodes.items():
            first[key], length = length, length + len(node.tokens)
        if self.through == 1 and self.next_place[row] + len(parents) * self.step_tokens > min(
                self.share - len(root.tokens), self.cache.store_L2BPGK.shape[3]):
            return False
        if nodes:
            places = np.concatenate([np.arange(node.place, node.place + len(node.tokens)) for node in nodes.values()])
            self.cache.fetch(row, self.to_device(places), len(root.tokens))
        self.mask_BNS[row] = False
        self.mask_BNS[row, :, :len(root.tokens)] = True
        for lane, parent in enumerate(parents):
            for node in parent.path():
                self.mask_BNS[row, lane, first[id(node)]:first[id(node)] + len(node.tokens)] = True
        self.next_slot[row] = length
        return True

    def begin(self, lane: int, parent: Node, rng):
        """Start a step of `parent` in a lane, from the hidden state that lies there."""
        self.parent[lane], self.position[lane], self.length[lane], self.logp[lane] = parent, parent.position - 1, 0, 0.0
        self.live[lane], self.ending[lane], self.text[lane] = True, 0, False
        self.uniform_XC[lane], self.given_XC[lane] = rng.random(self.step_tokens), -1

    def tick(self):
        """Sample the next token of every live lane, feed it from a slot of its own, and see whether it ends the step. Where ticks
        are `static`, dead lanes go along, to a slot that nobody reads: then all ticks that read as many slots have the same shapes."""
        live = np.flatnonzero(self.live)
        row, column = np.divmod(live, self.lanes)
        count_B, count = np.bincount(row, minlength=self.rows), self.length[live]
        slot = self.next_slot[row] + np.arange(len(live)) - (count_B.cumsum() - count_B)[row]
        self.next_slot += count_B
        self.slot[:], self.slot[live], self.slot_XC[live, count] = self.slots, slot, slot
        self.mask_BNS[row, column, slot] = True
        self.position[live] += 1
        self.length[live] += 1
        lanes = np.arange(len(self.live)) if self.static else live
        last, block = self.length[lanes] - 1, 256 if self.static else 64
        used = min(self.slots, -(-int(self.next_slot.max()) // block) * block)
        inputs = lanes, self.uniform_XC[lanes, last], self.given_XC[lanes, last], self.slot[lanes], self.position[lanes]
        found = self.device_tick(*map(self.to_device, (*inputs, self.mask_BNS[:, None, :, :used]))).cpu().numpy()
        token, logp, self.value[live] = found[:, live] if self.static else found
        own, token = self.given_XC[live, count] < 0, token.astype(np.int64)
        self.step_XC[live, count] = token
        self.logp[live] += np.where(own, logp, 0.0)
        eos, breaks, text, before = self.tables[:, token] & own
        breaks &= self.text[live] | before  # a line break ends a step once there is visible text before it
        self.text[live] |= text
        if self.tokenizer.xml and breaks.any():
            breaks[breaks] = self.close_tags(live[breaks])
        self.ending[live] = np.where(eos, EOS, np.where(breaks, LINE, np.where(count + 1 >= self.step_tokens, CUT, 0)))
        self.sampled_tokens += int(own.sum())
        self.fed_tokens += len(live)

    def compute(self, lane_X: Tensor, uniform_X: Tensor, given_X: Tensor, slot_X: Tensor, position_X: Tensor, mask_B1NS: Tensor):
        """The part of a tick that the device does: (token, log-probability, value after it) of each lane, (3, X) in float64."""
        token_X, logp_X = self.tokenizer.draw(self.model.logits(self.hidden_XD[lane_X]).float(), uniform_X, self.temperature)
        token_X = torch.where(given_X < 0, token_X, given_X)
        cache = self.cache.at(lane_X // self.lanes, lane_X % self.lanes, slot_X, self.lanes, mask_B1NS.shape[3])
        hidden_XD = self.model.hidden(token_X[None], position_X[None], mask_B1NS, cache)[0]
        self.hidden_XD[lane_X] = hidden_XD
        return torch.stack([token_X.double(), logp_X.double(), self.model.value(hidden_XD).double()])

    def close_tags(self, lanes: np.ndarray) -> list[bool]:
        """Which lanes' XML steps have ended. Where code has, it runs, and what it prints are the lane's next tokens."""
        decode = self.tokenizer.tokenizer.decode
        parts = [tuple(decode(self.step_XC[lane, :self.length[lane] - less]) for less in (0, 1)) for lane in lanes]
        if ready := [(lane, part[0]) for lane, part in zip(lanes, parts)
                     if self.tokenizer.tools and "<code>" in part[0] and closed("code", *part)]:
            solutions = ["".join(node.text for node in self.parent[lane].path()) + text for lane, text in ready]
            room = [self.step_tokens - int(self.length[lane]) for lane, _ in ready]
            for (lane, _), given in zip(ready, output_tokens(self.tokenizer, solutions, room)):
                self.given_XC[lane, self.length[lane]:][:len(given)] = given[:self.step_tokens - self.length[lane]]
        return [closed("step", *part) for part in parts]

    def complete(self) -> list[int]:
        """Make nodes of the steps that have ended; rows of which every lane has."""
        ended = np.flatnonzero(self.live & (self.ending > 0))
        self.steps += len(ended)
        for lane in ended:
            (row, column), parent, count = divmod(lane, self.lanes), self.parent[lane], int(self.length[lane])
            node = Node(parent, self.step_XC[lane, :count].tolist(), float(self.logp[lane]), float(self.value[lane]),
                        sampled=(self.given_XC[lane, :count] < 0).tolist(), position=parent.position + count,
                        hidden_D=self.hidden_XD[lane].clone())
            node.text = self.tokenizer.tokenizer.decode(node.tokens)
            node.ending = {LINE: None, EOS: "eos", CUT: "cut"}[self.ending[lane]]
            if node.ending != "cut" and extract_answer(node.text) is not None:
                node.ending = "answer"
            if node.ending is None and node.position + self.step_tokens > self.model.config.max_position_embeddings:
                node.ending = "deep"  # no room for another step
            self.live[lane] = False
            if node.ending is None and node.depth < self.through > 1:
                self.begin(lane, node, self.searches[row][3])
                continue
            if node.ending is None and self.through == 1:
                node.place, self.next_place[row] = int(self.next_place[row]), self.next_place[row] + count
                self.cache.put_away(row, self.to_device(self.slot_XC[lane, :count]), node.place)
            self.children[row][column] = node
        return [row for row in np.unique(ended // self.lanes).tolist() if not self.live.reshape(self.rows, -1)[row].any()]

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def search_trees(model: Llama, tokenizer: StepTokenizer, questions: list[Question], config: SearchConfig, seed: int = 0,
                 label: str = "search"):
    """An iterator over the tree of each question as its search ends; questions that do not fit raise InputError at once."""
    driver = Driver(model, tokenizer, questions, config.search_rows, config.expand_width, config.search_temperature, config,
                    config.simulations, seed)
    ends = driver.run(lambda question, root: mcts(root, config, grader(question), random.Random(f"{seed} {question.id}")), label)
    return (to_tree(question, root, *end) for question, root, end in ends)


@dataclass(frozen=True)
class TreesConfig:
    """Where the trees go."""
    out: str = flag("", "JSONL file; questions that have a tree there are left out. Its configuration is kept beside it")


def main():
    source, target, search = parse_args(__doc__, (SourceConfig, TreesConfig, SearchConfig), sys.argv[1:], ("model", "data", "out"))
    rank, ranks, out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), Path(target.out)
    model, tokenizer, questions = load_source(source, source.seed)
    hold(out.with_name(out.name + ".lock"))
    path = out if ranks == 1 else out.with_name(f"{out.stem}-{rank}{out.suffix}")
    done = {tree.id for tree in resume_trees(out, rank, ranks)}
    mine = [question for question in questions[rank::ranks] if question.id not in done]
    begin = time.perf_counter()
    trees = search_trees(model, tokenizer, mine, search, source.seed)
    keep_config(out.with_name(out.name + ".config"), (source, search), free=("limit", "device"), write=rank == 0)
    write_trees(path, trees)
    print(f"{path}: {len(mine)} trees in {time.perf_counter() - begin:.1f} s, {len(questions[rank::ranks]) - len(mine)} were there")


if __name__ == "__main__":
    run_command(main)
