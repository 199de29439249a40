"""Monte Carlo tree search over reasoning steps, and the driver that runs many searches over one tree-shaped cache.

A search is a generator: it yields the nodes it wants extended (a node once for each sampled child) and receives the
sampled children. `mcts` below is one; the answering strategies of eval.py are others. The driver knows nothing of them:
it feeds one token to every live child of every question, and resumes a generator when all its children are complete.

    python mcts.py --model FOLDER --data SPEC --out trees.jsonl

Dimension key: B rows (questions searched at once), N lanes (children decoded together in a row), T prompt tokens,
S cache slots, C tokens of a step, V vocabulary.
"""
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Question, StepTokenizer, extract_answer, is_correct, keep_config, load_questions, parse_args, \
    read_template, resume_trees, run_command, write_tree
from model import Llama, TreeCache, find_folder, load_model
from svpo import InputError, Tree, TreeNode, flag


@dataclass(frozen=True)
class SearchConfig:
    """Tree search. Defaults are our choice; AlphaMath's values stand in the help."""
    simulations: int = flag(16, "simulations a question at most; AlphaMath: 40", built_in=12, least=1)
    expand_width: int = flag(4, "children sampled at once; AlphaMath: 5", least=1)
    c_puct: float = flag(1.25, "weight of exploration; AlphaMath: 1.25 in the paper, 1.5 in the code", least=0)
    max_depth: int = flag(8, "steps of a solution at most; AlphaMath: 8", built_in=5, least=1)
    max_step_tokens: int = flag(64, "tokens of a step at most; longer ones are cut and wrong", built_in=16, least=1)
    search_temperature: float = flag(1.0, "sampling temperature; AlphaMath: 0.6 in round 1, then 1.0", built_in=0.7, least=0)
    leaf_value: bool = flag(True, "back up V of each expanded leaf; without it outcomes alone")
    search_rows: int = flag(8, "questions searched at once", built_in=128, least=1)
    row_slots: int = flag(4096, "tokens that the cache holds of one question", built_in=768, least=8)


@dataclass(eq=False)
class Node:
    """A step and the partial solution that ends with it. One player: values never change sign on the way up."""
    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0  # sum of untempered log-probabilities of the step's tokens
    value: float = 0.0  # V, read at the step's last token
    ending: str | None = None  # terminal: "answer", "eos", "cut" or "deep"
    reward: float | None = None
    children: list["Node"] = field(default_factory=list)
    visit_count: int = 0  # N
    value_sum: float = 0.0  # W
    closed: bool = False  # nothing below is left to select
    text: str = ""
    visible_S: Tensor | None = None  # cache slots of the path's tokens; kept by the driver
    position: int = 0  # tokens on the path, this step's included

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def prior(self) -> float:
        """exp(mean token log-probability), not normalised over siblings (AlphaMath official code)."""
        return math.exp(self.logp / max(1, len(self.tokens))) if self.parent else 1.0

    @property
    def q_value(self) -> float:
        """Q, the mean of all values backed up through this node; 0 before the first (AlphaMath eq. 4)."""
        return self.value_sum / self.visit_count if self.visit_count else 0.0

    def path(self) -> list["Node"]:
        """Nodes from below the root down to this one."""
        return [] if self.parent is None else self.parent.path() + [self]


# --------------------------------------------------------------------------------------------- the search

def mcts(root: Node, config: SearchConfig, grade, rng: random.Random):
    """Grow a tree below `root` (AlphaMath section 3.2). `grade(node)` is the outcome of a terminal node, +1 or -1.

    Returns (effective simulations, why it stopped).
    """
    for simulation in range(config.simulations):
        leaf = select(root, config.c_puct, rng)
        if leaf is None:
            return simulation, "exhausted"
        children = yield [leaf] * config.expand_width
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
    """Walk down by puct to a node without children; None when the whole tree is exhausted.

    Terminal children are never selected. A node whose children are all terminal or closed is closed, and the walk
    starts again at the root; the official code ends the whole search there.
    """
    node = root
    while not root.closed:
        if not node.children:
            return node
        open_children = [child for child in node.children if not child.ending and not child.closed]
        if not open_children:
            node.closed, node = True, root
            continue
        scores = [puct(child, c_puct) for child in open_children]
        best = max(scores)
        node = rng.choice([child for child, score in zip(open_children, scores) if score == best])
    return None


def expand(leaf: Node, children: list[Node], max_depth: int):
    """Attach sampled children; identical ones are merged (our choice), unfinished ones at max_depth are too deep."""
    different = {}
    for child in children:
        different.setdefault(tuple(child.tokens), child)
    leaf.children = list(different.values())
    for child in leaf.children:
        if child.ending is None and child.depth >= max_depth:
            child.ending = "deep"


def backup(node: Node, value: float):
    """Add one evaluation to a node and all its ancestors: N += 1, W += value, undiscounted."""
    while node is not None:
        node.visit_count += 1
        node.value_sum += value
        node = node.parent


def grader(question: Question):
    """Outcome of a terminal node: +1 where its answer is right, else -1 (no answer, cut and too deep included)."""
    def grade(node: Node) -> float:
        return 1.0 if node.ending == "answer" and is_correct(extract_answer(node.text), question.answer) else -1.0
    return grade


def to_tree(question: Question, root: Node, simulations: int, stopped: str) -> Tree:
    """The stored form of a searched tree, breadth-first."""
    nodes, queue = [], [(root, -1)]
    for node, parent in queue:
        nodes.append(TreeNode(parent, node.tokens, [parent >= 0] * len(node.tokens), node.logp, node.prior,
                              node.visit_count, node.q_value, node.value, node.reward, node.ending))
        queue += [(child, len(nodes) - 1) for child in node.children]
    return Tree(question.id, question.text, question.answer, nodes, simulations, stopped)


# --------------------------------------------------------------------------------------------- the driver

class Driver:
    """Runs one generator a cache row; rows never wait for each other and are refilled when their question ends.

    A tick feeds one token of every live lane. A lane starts by feeding its parent's last token once more, for the
    logits (its key goes to the waste slot 0, the original is what it sees), and ends by feeding the step's last token,
    for the value. Temperature 0 takes the likeliest token.
    """
    def __init__(self, model: Llama, tokenizer: StepTokenizer, rows: int, lanes: int, temperature: float,
                 max_step_tokens: int, row_slots: int, seed: int = 0):
        self.model, self.tokenizer, self.temperature = model.eval(), tokenizer, temperature
        self.device = next(model.parameters()).device
        self.max_step_tokens, self.slots = max_step_tokens, row_slots
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.cache = TreeCache(model.config, rows, row_slots, self.device, next(model.parameters()).dtype)
        self.tables = [table.to(self.device) for table in (tokenizer.is_eos_V, tokenizer.breaks_line_V,
                                                           tokenizer.has_text_V, tokenizer.text_before_break_V)]
        self.vocabulary = len(tokenizer.is_eos_V)  # a model's logits may be padded beyond it
        self.context = min(row_slots, model.config.max_position_embeddings)

        def lane(dtype, *more):
            return torch.zeros(rows, lanes, *more, dtype=dtype, device=self.device)
        self.token_BN, self.position_BN, self.slot_BN, self.length_BN = (lane(torch.long) for _ in range(4))
        self.live_BN, self.ending_BN, self.eos_BN, self.cut_BN, self.text_BN = (lane(torch.bool) for _ in range(5))
        self.logp_BN, self.value_BN = lane(torch.float32), lane(torch.float32)
        self.mask_BNS = lane(torch.bool, row_slots)
        self.mask_BNS[:, :, 0] = True  # a lane without work sees the waste slot only
        self.step_BNC = lane(torch.long, max_step_tokens)
        self.next_slot_B = torch.ones(rows, dtype=torch.long, device=self.device)
        self.searches = [None] * rows  # (question, root, generator) of each busy row
        self.wanted = [[] for _ in range(rows)]  # nodes whose children are being decoded, lane by lane
        self.sampled_tokens = self.fed_tokens = 0

    @torch.inference_mode()
    def run(self, questions: list[Question], start):
        """Yield (question, root, what the generator returned) as searches end; `start(question, root)` makes one."""
        waiting = list(reversed(questions))
        while waiting or any(self.searches):
            free = [row for row, search in enumerate(self.searches) if search is None]
            if waiting and (4 * len(free) >= len(self.searches) or len(waiting) <= len(free)):
                yield from self.refill(free, waiting, start)
            if not any(self.searches):
                continue
            self.tick()
            ended_B = (~self.live_BN).all(dim=1).tolist()
            for row, search in enumerate(self.searches):
                if search and ended_B[row]:
                    yield from self.resume(row, self.collect(row))

    def refill(self, free: list[int], waiting: list[Question], start):
        """Feed the prompts of the next questions together and start their searches."""
        batch = [waiting.pop() for _ in free[:len(waiting)]]
        prompts = [self.tokenizer.encode_prompt(question.text) for question in batch]
        longest = max(map(len, prompts))
        for question, prompt in zip(batch, prompts):
            check_length(question, prompt, self.max_step_tokens, self.context)
        token_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        length_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        position_BT = torch.arange(longest, device=self.device).expand_as(token_BT)
        inside_BT = position_BT < length_B[:, None]
        slot_S = torch.arange(longest + 1, device=self.device)  # slot 0 is waste, token t goes to slot t + 1
        mask_BTS = (slot_S <= position_BT[..., None] + 1) & ((slot_S > 0) | ~inside_BT[..., None])
        rows = torch.tensor(free[:len(batch)], device=self.device)
        cache = self.cache.at((position_BT + 1) * inside_BT, longest + 1, rows)
        hidden_BTD = self.model.hidden(token_BT, position_BT, mask_BTS.unsqueeze(1), cache)
        value_B = self.model.value(hidden_BTD[torch.arange(len(batch)), length_B - 1]).tolist()
        self.next_slot_B[rows] = length_B + 1
        self.fed_tokens += sum(map(len, prompts))
        visible_BS = torch.zeros(len(batch), self.slots, dtype=torch.bool, device=self.device)
        visible_BS[:, 1:longest + 1] = inside_BT
        for row, question, prompt, value, visible_S in zip(free, batch, prompts, value_B, visible_BS):
            root = Node(tokens=prompt, value=value, visible_S=visible_S, position=len(prompt))
            self.searches[row] = (question, root, start(question, root))
            yield from self.resume(row, None)

    def resume(self, row: int, children: list[Node] | None):
        """Hand the complete children to the row's generator and start the lanes it asks for, or end the search."""
        question, root, search = self.searches[row]
        self.wanted[row] = []
        try:
            if children and any(child is None for child in children):
                search.close()
                raise StopIteration(None)
            self.wanted[row] = search.send(children)
        except StopIteration as end:
            self.searches[row] = None
            yield question, root, end.value
            return
        count = len(self.wanted[row])
        if not 0 < count <= self.live_BN.shape[1]:
            raise ValueError(f"a search asked for {count} children at once, the driver has {self.live_BN.shape[1]} lanes")
        parents = self.wanted[row]
        self.mask_BNS[row, :count] = torch.stack([node.visible_S for node in parents])
        self.token_BN[row, :count] = torch.tensor([node.tokens[-1] for node in parents])
        self.position_BN[row, :count] = torch.tensor([node.position - 1 for node in parents])
        for state, fresh in ((self.slot_BN, 0), (self.length_BN, 0), (self.logp_BN, 0.0), (self.ending_BN, False),
                             (self.text_BN, False), (self.eos_BN, False), (self.cut_BN, False), (self.live_BN, True)):
            state[row, :count] = fresh

    def tick(self):
        """Feed one token of every live lane; read the values of steps that it completes, sample the others on."""
        used = min(self.slots, -(-(int(self.next_slot_B.max()) + 1) // 32) * 32)
        cache = self.cache.at(self.slot_BN, used)
        hidden_BND = self.model.hidden(self.token_BN, self.position_BN, self.mask_BNS[:, None, :, :used], cache)
        self.fed_tokens += int(self.live_BN.sum())
        complete_BN = self.live_BN & self.ending_BN
        self.value_BN = torch.where(complete_BN, self.model.value(hidden_BND), self.value_BN)
        self.live_BN = self.live_BN & ~complete_BN
        token_BN, logp_BN = self.sample(self.model.logits(hidden_BND).float())
        new_slot_BN = self.next_slot_B[:, None] + self.live_BN.cumsum(dim=1) - 1
        full_B = (self.next_slot_B + self.live_BN.sum(dim=1)) > self.slots
        if full_B.any():  # such a row cannot go on: its lanes end at once, without a value
            self.length_BN[full_B] = 0
            self.live_BN = self.live_BN & ~full_B[:, None]
        live = self.live_BN
        self.sampled_tokens += int(live.sum())
        self.slot_BN = torch.where(live, new_slot_BN, 0)
        self.next_slot_B = self.next_slot_B + live.sum(dim=1)
        self.mask_BNS.scatter_(2, self.slot_BN[..., None], True)
        self.token_BN = torch.where(live, token_BN, self.token_BN)
        self.position_BN = self.position_BN + live
        column_BN = self.length_BN.clamp(max=self.max_step_tokens - 1)[..., None]
        self.step_BNC.scatter_(2, column_BN, torch.where(live[..., None], token_BN[..., None],
                                                         self.step_BNC.gather(2, column_BN)))
        self.length_BN = self.length_BN + live
        self.logp_BN = self.logp_BN + torch.where(live, logp_BN, 0.0)
        eos_BN, breaks_BN, text_BN, before_BN = (table[token_BN] for table in self.tables)
        self.eos_BN = torch.where(live, eos_BN, self.eos_BN)
        whole_BN = eos_BN | (breaks_BN & (self.text_BN | before_BN))
        self.cut_BN = torch.where(live, ~whole_BN & (self.length_BN >= self.max_step_tokens), self.cut_BN)
        self.ending_BN = torch.where(live, whole_BN | self.cut_BN, self.ending_BN)
        self.text_BN = self.text_BN | (live & text_BN)

    def sample(self, logits_BNV: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens (B, N) at the driver's temperature, and their untempered log-probabilities. Ids that the
        tokenizer does not have are never sampled, but count in the softmax, as they do in training."""
        logp_BNV = logits_BNV.log_softmax(dim=-1)[..., :self.vocabulary]
        if self.temperature == 0:
            token_BN = logp_BNV.argmax(dim=-1)
        else:
            weight_BNV = (logp_BNV / self.temperature).softmax(dim=-1)
            token_BN = torch.multinomial(weight_BNV.flatten(0, 1), 1, generator=self.generator).view(logp_BNV.shape[:2])
        return token_BN, logp_BNV.gather(2, token_BN[..., None]).squeeze(2)

    def collect(self, row: int) -> list[Node | None]:
        """The row's complete children as nodes; None for those that found no slot."""
        count = len(self.wanted[row])
        visible_NS = self.mask_BNS[row, :count].clone()
        visible_NS[:, 0] = False  # lanes that ended before their siblings have been writing to the waste slot
        state = zip(self.wanted[row], self.step_BNC[row, :count].tolist(), self.length_BN[row, :count].tolist(),
                    self.logp_BN[row, :count].tolist(), self.value_BN[row, :count].tolist(),
                    self.eos_BN[row, :count].tolist(), self.cut_BN[row, :count].tolist(), visible_NS)
        nodes = []
        for parent, tokens, length, logp, value, eos, cut, visible_S in state:
            if length == 0:
                return [None]
            node = Node(parent, tokens[:length], logp, value, visible_S=visible_S, position=parent.position + length)
            node.text = self.tokenizer.tokenizer.decode(node.tokens)
            stated = extract_answer(node.text) is not None
            node.ending = "cut" if cut else "answer" if stated else "eos" if eos else None
            if node.ending is None and node.position + self.max_step_tokens >= self.context:
                node.ending = "deep"  # no room for another step
            nodes.append(node)
        return nodes


def check_length(question: Question, prompt: list[int], max_step_tokens: int, context: int):
    """Refuse a question that leaves no room for one step; a row spends one slot on waste."""
    if len(prompt) + max_step_tokens >= context:
        raise InputError(f"question {question.id}: its prompt of {len(prompt)} tokens and one step of {max_step_tokens} "
                         f"do not fit {context} tokens (the model's context or --row-slots)")


def search_trees(model: Llama, tokenizer: StepTokenizer, questions: list[Question], config: SearchConfig, seed: int = 0,
                 label: str = "search"):
    """Yield the tree of each question as its search ends, with a progress bar of rates and time left."""
    driver = Driver(model, tokenizer, min(config.search_rows, len(questions)), config.expand_width,
                    config.search_temperature, config.max_step_tokens, config.row_slots, seed)

    def start(question, root):
        return mcts(root, config, grader(question), random.Random(f"{seed} {question.id}"))
    with tqdm(total=len(questions), desc=label, unit="tree", mininterval=1.0, dynamic_ncols=True) as bar:
        begin = time.perf_counter()
        for question, root, end in driver.run(questions, start):
            simulations, stopped = end or (sum(1 for _ in expanded(root)), "slots")
            yield to_tree(question, root, simulations, stopped)
            bar.update()
            bar.set_postfix_str(f"{driver.sampled_tokens / (time.perf_counter() - begin):.0f} tokens/s")


def expanded(root: Node):
    """All nodes of a tree that have children."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node.children:
            yield node
            stack += node.children


@dataclass(frozen=True)
class TreesConfig:
    """Which questions to search with which model, and where the trees go."""
    model: str = flag("", "model folder, preset or repository id")
    data: str = flag("", "arithmetic:search or a JSONL file of questions")
    out: str = flag("", "JSONL file of trees; questions that already have a tree there are left out. Its configuration is "
                        "kept beside it")
    prompt: str = flag("", "file with the text around {question}")
    limit: int = flag(0, "search the first N questions; 0: all (500 built-in ones)", least=0)
    seed: int = flag(0, "seed of sampling and of built-in questions")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")


def main():
    config, search = parse_args(__doc__, (TreesConfig, SearchConfig), sys.argv[1:], ("model", "data", "out"))
    questions = load_questions(config.data, config.limit or None, config.seed)
    folder = find_folder(config.model)
    tokenizer = StepTokenizer.load(folder, read_template(config.prompt))
    model = load_model(folder, config.device)
    for question in questions:
        check_length(question, tokenizer.encode_prompt(question.text), search.max_step_tokens,
                     min(search.row_slots, model.config.max_position_embeddings))
    path = Path(config.out)
    keep_config(path.with_name(path.name + ".config"), (config, search), free=("out", "limit", "device"))
    done = {tree.id for tree in resume_trees(path)}
    left = [question for question in questions if question.id not in done]
    with open(path, "a") as file:
        for tree in search_trees(model, tokenizer, left, search, config.seed):
            write_tree(file, tree)
    print(f"{path}: {len(left)} trees written, {len(questions) - len(left)} were there")


if __name__ == "__main__":
    run_command(main)
