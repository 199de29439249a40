"""Step-level Value Preference Optimization: from trees to a gradient.

What an objective learns is read off a searched tree as a `Lesson`: pairs of siblings, the
likelihood of steps, and targets of V. `pack` lays the trees of some lessons out depth-first, each
unique token once, so that one forward pass serves every loss (`score`); each token sees its own
path alone (`model.tree_mask`).
Each loss is then a function of a few vectors over the nodes and of index pairs (`loss_sums`).

Authorities: SVPO summary = said by summaries of arXiv 2406.10858, whose equations and constants
could not be read; AlphaMath = arXiv 2405.03553; our choice = everything else.

Dimension key: T tokens of a pack, X entries of one flat list, M sampled tokens, E nodes of a pack
(a step and the prefix that it completes), P pairs, D width.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import Tree, TreeNode
from model import TILE, Llama, block_mask, path_mask, token_logp
from support.files import digest, publish
from support.flags import InputError, flag
from support.ranks import gather, on_rank_0, rank_share

PASS_TOKENS = 8192  # of a forward pass without gradients
PENALTY = 0.03  # of the weights of `fit_value`


@dataclass(frozen=True)
class LossConfig:
    """The objective. All weights and thresholds are our choice: the paper's are unknown."""

    objective: str = flag(
        "svpo",
        "svpo, svpo-good-steps, step-dpo, dpo (solutions), dvo, rft, alphamath, tree-grpo, grpo or "
        "lambda-grpo",
    )
    beta: float = flag(
        0.3, "strength of the reference in DPO (beta); arXiv 2409.08642: 0.3", least=0
    )
    policy_weight: float = flag(0.5, "weight of the preference loss (a_policy)", least=0)
    sft_weight: float = flag(0.5, "weight of the likelihood of right solutions (a_sft)", least=0)
    mse_weight: float = flag(
        0.1, "weight of the value's squared error (a_mse); AlphaMath: 0.1", least=0
    )
    margin_weight: float = flag(0.05, "weight of the value's margin loss (a_margin)", least=0)
    margin: float = flag(0.5, "V_win - V_lose that the margin loss asks for (m)", least=0)
    pairs: str = flag(
        "all",
        "all: every pair of siblings that qualifies; best: one pair per parent",
        choices=("all", "best"),
    )
    min_gap: float = flag(0.5, "least Q_win - Q_lose of a pair", least=0)


# -------------------------------------------------------------------------- what is read off a tree


def outcomes_below(tree: Tree) -> tuple[list[int], list[int]]:
    """For each node, the number of correct terminals at or below it, and of wrong ones.

    A reward above 0 is correct, one below 0 wrong; 0 is neither.
    """
    correct = [int(node.reward is not None and node.reward > 0) for node in tree.nodes]
    wrong = [int(node.reward is not None and node.reward < 0) for node in tree.nodes]
    return sums_below(tree, correct), sums_below(tree, wrong)


def sums_below(tree: Tree, figures: list) -> list:
    """For each node, the sum of the figures of the nodes at or below it."""
    sums = list(figures)
    for index in range(len(tree.nodes) - 1, 0, -1):
        sums[tree.nodes[index].parent] += sums[index]
    return sums


def sibling_pairs(
    tree: Tree, pairs: str = "all", min_gap: float = 0.0
) -> list[tuple[int, int, float]]:
    """The step preferences in a tree, as (winner, loser, weight) with indices of nodes.

    SVPO summary: siblings under one prefix, ranked by Q, filtered by outcome. Our choice of
    filters: both visited; Q_win > 0 with a correct terminal at or below it; Q_lose < 0 with a wrong
    one; a gap of at least `min_gap`. "best" keeps the highest against the lowest Q of each parent,
    with weight 1. "all" keeps every pair, with weight 1 / pairs in the tree.
    """
    correct, wrong = outcomes_below(tree)
    winners = {}
    losers = {}
    for index, node in enumerate(tree.nodes[1:], 1):
        if node.visit_count and node.q_value > 0 and correct[index]:
            winners.setdefault(node.parent, []).append(index)
        if node.visit_count and node.q_value < 0 and wrong[index]:
            losers.setdefault(node.parent, []).append(index)

    def q(index):
        return tree.nodes[index].q_value

    found = []
    for parent in winners.keys() & losers.keys():
        candidates = itertools.product(winners[parent], losers[parent])
        if pairs == "best":
            candidates = [(max(winners[parent], key=q), min(losers[parent], key=q))]
        found += [(win, lose) for win, lose in candidates if q(win) - q(lose) >= min_gap]
    weight = 1.0 if pairs == "best" else 1.0 / max(1, len(found))
    return [(win, lose, weight) for win, lose in sorted(found)]


def solution_pair(tree: Tree, *_) -> list[tuple[int, int, float]]:
    """The last steps of the best whole solution and of the worst, with weight 1.

    Our choice: the correct one of highest mean Q along its path, and the wrong one of lowest.
    """

    def mean_q(index):
        return statistics.fmean(tree.nodes[step].q_value for step in tree.path(index))

    rewards = [node.reward for node in tree.nodes]
    correct = [index for index, reward in enumerate(rewards) if index and (reward or 0) > 0]
    wrong = [index for index, reward in enumerate(rewards) if index and (reward or 0) < 0]
    if not correct or not wrong:
        return []
    return [(max(correct, key=mean_q), min(wrong, key=mean_q), 1.0)]


# The next six return (weight, count) of each node: the log-probabilities of its tokens enter the
# loss `weight` times, and their number enters the divisor `count` times. The two differ in
# advantages only, which may be negative.


def good_steps(tree: Tree) -> list[tuple[float, float]]:
    """The steps that search thinks good, in place of all that end right.

    These have Q > 0 and a correct terminal at or below them, as all their ancestors have.
    """
    correct, _ = outcomes_below(tree)
    good = [True] + [False] * (len(tree.nodes) - 1)
    for index, node in enumerate(tree.nodes[1:], 1):
        reached = correct[index] > 0 and node.visit_count > 0
        good[index] = good[node.parent] and reached and node.q_value > 0
    return [(float(step), float(step)) for step in [False, *good[1:]]]


def correct_solutions(tree: Tree) -> list[tuple[float, float]]:
    """Every correct solution once (SVPO summary; RFT, arXiv 2308.01825; AlphaMath eq. 7).

    A step counts as often as it is part of one.
    """
    correct, _ = outcomes_below(tree)
    return [(float(count), float(count)) for count in correct]


def group_advantages(tree: Tree) -> list[tuple[float, float]]:
    """GRPO (arXiv 2402.03300 eq. 3): each sample's advantage (r - mean r) / std r on its tokens.

    One step on fresh samples, no KL term. Where N samples of mean reward Q share a step, their
    advantages sum to N (Q - Q_root) / std r. If all rewards are equal, the advantages are 0.
    """
    mean = tree.nodes[0].q_value
    squares = sum(node.visit_count * (node.reward or 0) ** 2 for node in tree.nodes)
    variance = squares / max(1, tree.nodes[0].visit_count) - mean * mean
    spread = math.sqrt(variance) if variance > 1e-12 else 0.0  # equal rewards, but for rounding
    found = []
    for node in tree.nodes:
        advantage = node.visit_count * (node.q_value - mean) / spread if spread else 0.0
        found.append((advantage, float(node.visit_count)))
    return found


def shared_advantages(tree: Tree) -> list[tuple[float, float]]:
    """lambda-GRPO (arXiv 2509.21154): the loss of a step that N samples share, divided by N.

    Our choice: what is shared are whole steps, and the divisor of the sum stays GRPO's.
    """
    advantages = zip(group_advantages(tree), tree.nodes)
    return [(sum_of / max(1, node.visit_count), count) for (sum_of, count), node in advantages]


def sibling_advantages(tree: Tree) -> list[tuple[float, float]]:
    """The advantage of each visited step among its visited siblings: (Q - mean Q) / std Q.

    After Tree-GRPO (arXiv 2509.21240). Our choice: siblings are the group, Q takes the place of the
    reward, each step counts once, siblings with equal Q have no advantage, and the trees are those
    of the policy before training.
    """
    found = [(0.0, 0.0)] * len(tree.nodes)
    for group in visited_siblings(tree):
        q = [tree.nodes[index].q_value for index in group]
        spread = statistics.pstdev(q)
        if spread > 1e-6:  # equal, but for rounding
            for index, mine in zip(group, q):
                found[index] = ((mine - statistics.fmean(q)) / spread, 1.0)
    return found


def visited_siblings(tree: Tree) -> list[list[int]]:
    """The visited children of each node that has any."""
    groups = {}
    for index, node in enumerate(tree.nodes[1:], 1):
        if node.visit_count:
            groups.setdefault(node.parent, []).append(index)
    return list(groups.values())


def all_steps(tree: Tree) -> list[tuple[float, float]]:
    """SFT on worked solutions."""
    return [(1.0, 1.0)] * len(tree.nodes)


# The next two return a target of each node, or None where there is none.


def visited_q(tree: Tree) -> list[float | None]:
    """Q of the nodes that the search has visited, the root too (AlphaMath eq. 7)."""
    return [node.q_value if node.visit_count else None for node in tree.nodes]


def gains(tree: Tree) -> list[float | None]:
    """Q of each visited step less Q of the prefix before it: what the step gains."""
    found = [None]
    for node in tree.nodes[1:]:
        gain = node.q_value - tree.nodes[node.parent].q_value
        found.append(gain if node.visit_count else None)
    return found


# ----------------------------------------------------------------------------------------- losses


def step_logp(logp_M: Tensor, node_M: Tensor, nodes: int) -> Tensor:
    """log pi(step | prefix) of each node (E,): the SUM over the step's sampled tokens.

    A sum, because the probability of a step is the product of its tokens'. A mean would be the
    log-probability of no event, and DPO's implicit reward beta * (log pi - log ref) would change
    with the length of a step.
    """
    zero_E = torch.zeros(nodes, dtype=logp_M.dtype, device=logp_M.device)
    return zero_E.index_add(0, node_M, logp_M)


def step_dpo(
    policy_win_P: Tensor, policy_lose_P: Tensor, ref_win_P: Tensor, ref_lose_P: Tensor, beta: float
) -> Tensor:
    """Preference loss of each pair (P,):
    -log sigmoid(beta * [(log pi_w - log ref_w) - (log pi_l - log ref_l)]).

    DPO's sigmoid loss (arXiv 2305.18290 eq. 7) on one step after a shared prefix; the prefix
    carries no loss.
    """
    return -F.logsigmoid(beta * ((policy_win_P - ref_win_P) - (policy_lose_P - ref_lose_P)))


def implicit_mse(policy_E: Tensor, ref_E: Tensor, target_E: Tensor, beta: float) -> Tensor:
    """Squared error of the implicit reward of each node (E,):
    (beta * (log pi - log ref) - target)^2.

    DVO (arXiv 2502.13723), whose published trainer takes the gain in value as the target. Its paper
    could not be read.
    """
    return (beta * (policy_E - ref_E) - target_E).square()


def value_mse(value_E: Tensor, q_E: Tensor) -> Tensor:
    """Squared error of V against the search's Q, of each node (E,) (SVPO summary; AlphaMath)."""
    return (value_E - q_E).square()


def value_margin(value_win_P: Tensor, value_lose_P: Tensor, margin: float) -> Tensor:
    """Hinge max(0, margin - (V_win - V_lose)) of each pair (P,) (SVPO summary: margin loss)."""
    return F.relu(margin - (value_win_P - value_lose_P))


# ------------------------------------------------------------------------- objectives and lessons


@dataclass(frozen=True)
class Objective:
    """What is learned from a tree; a new one is an entry of OBJECTIVES."""

    # (tree, config.pairs, config.min_gap) -> [(winner, loser, weight)]
    pairs: Callable | None = None
    # tree -> [(weight, count)], one for each node
    likelihood: Callable | None = None
    # tree -> [target of V], one for each node, None where there is none; V learns these, and the
    # margin of pairs
    value: Callable | None = None
    # a pair compares the log-probabilities of whole solutions, not of one step after a prefix
    whole_solutions: bool = False
    preference: Callable = step_dpo
    # tree -> [target of the implicit reward], in place of pairs
    implicit: Callable | None = None
    groups: bool = False  # learns from fresh groups of samples, without a search

    @property
    def reference(self) -> bool:
        """Whether a loss compares the policy with the one that grew the trees."""
        return bool(self.pairs or self.implicit)


OBJECTIVES = {
    "svpo": Objective(sibling_pairs, correct_solutions, visited_q),
    "svpo-good-steps": Objective(sibling_pairs, good_steps, visited_q),
    "step-dpo": Objective(sibling_pairs),
    "dpo": Objective(solution_pair, whole_solutions=True),
    "dvo": Objective(implicit=gains),
    "rft": Objective(likelihood=correct_solutions),
    "alphamath": Objective(likelihood=correct_solutions, value=visited_q),
    "tree-grpo": Objective(likelihood=sibling_advantages),
    "grpo": Objective(likelihood=group_advantages, groups=True),
    "lambda-grpo": Objective(likelihood=shared_advantages, groups=True),
    "sft": Objective(likelihood=all_steps),  # on worked solutions
}


def pairs_of(tree: Tree, config: LossConfig) -> list[tuple[int, int, float]]:
    """The pairs of a tree under `config.objective`, as (winner, loser, weight)."""
    pairs = OBJECTIVES[config.objective].pairs
    return pairs(tree, config.pairs, config.min_gap) if pairs else []


@dataclass
class Lesson:
    """What an objective reads off one tree."""

    tree: Tree  # without the steps that no loss reads
    pairs: list[tuple[int, int, float]]  # winner, loser, weight
    likelihood: list[tuple[float, float]]  # of each node: weight and count of its tokens' log pi
    value: list[float | None]  # of each node: the target of V, if there is one
    implicit: list[float | None]  # and of the implicit reward
    pairwise_tokens: int = 0  # what training pair by pair would feed: prefix and step, both sides


def learn(tree: Tree, config: LossConfig) -> Lesson:
    """The lesson of a tree under `config.objective`."""
    objective = OBJECTIVES[config.objective]
    count = len(tree.nodes)
    pairs = pairs_of(tree, config)
    likelihood = objective.likelihood(tree) if objective.likelihood else [(0.0, 0.0)] * count
    value = objective.value(tree) if objective.value else [None] * count
    implicit = objective.implicit(tree) if objective.implicit else [None] * count
    ends = [end for win, lose, _ in pairs for end in (win, lose)]
    read = {index for index in range(count) if likelihood[index][1] > 0}
    read.update(index for index in range(count) if value[index] is not None)
    read.update(index for index in range(count) if implicit[index] is not None)
    kept = with_ancestors(tree, read.union(ends))
    place = {index: new for new, index in enumerate(kept)}
    prefixes = [[0, *tree.path(end)] for end in ends]
    return Lesson(
        only(tree, kept),
        [(place[win], place[lose], weight) for win, lose, weight in pairs],
        [likelihood[index] for index in kept],
        [value[index] for index in kept],
        [implicit[index] for index in kept],
        sum(len(tree.nodes[step].tokens) for prefix in prefixes for step in prefix),
    )


def with_ancestors(tree: Tree, indices: Iterable[int]) -> list[int]:
    """The root, these nodes and all nodes on the paths to them, in order."""
    kept = {0}
    for index in indices:
        kept.update(tree.path(index))
    return sorted(kept)


def only(tree: Tree, kept: list[int]) -> Tree:
    """The tree without the nodes that are not `kept`, which hold the parents of each."""
    place = {index: new for new, index in enumerate(kept)}
    place[-1] = -1  # the parent of the root
    nodes = []
    for index in kept:
        node = tree.nodes[index]
        nodes.append(dataclasses.replace(node, parent=place[node.parent]))
    return dataclasses.replace(tree, nodes=nodes)


# ---------------------------------------------------------------------------------------- packing


@dataclass
class Pack:
    """A forest as one flat line of tokens, each tree depth-first, each unique token once."""

    token_T: Tensor
    position_T: Tensor  # depth in tokens from the tree's own first token
    subtree_end_T: Tensor  # where the subtree of the token's node ends
    target_M: Tensor  # index of every sampled token
    predictor_M: Tensor  # index of the token before it on its path, which predicts it
    node_M: Tensor  # which of the E nodes it belongs to
    last_E: Tensor  # index of each node's last token, where its value is read
    nodes: list[TreeNode] = field(repr=False)  # all E nodes, tree by tree in their stored order
    first_node: list[int] = field(repr=False)  # of each tree, the index of its root in `nodes`


def depth_first(tree: Tree) -> tuple[list[tuple[int, int]], list[int]]:
    """(node, position of its first token) in depth-first order; tokens of each node's subtree."""
    children = [[] for _ in tree.nodes]
    subtree = [len(node.tokens) for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, 0, -1):
        parent = tree.nodes[index].parent
        subtree[parent] += subtree[index]
        children[parent].insert(0, index)
    order = []
    stack = [(0, 0)]
    while stack:
        index, position = stack.pop()
        order.append((index, position))
        after = position + len(tree.nodes[index].tokens)
        stack += [(child, after) for child in reversed(children[index])]
    return order, subtree


def pack(trees: list[Tree]) -> Pack:
    """Lay trees out one after another (on the CPU)."""
    nodes = [node for tree in trees for node in tree.nodes]
    first_node = [0, *itertools.accumulate(len(tree.nodes) for tree in trees)][:-1]
    token, position, subtree_end = [], [], []
    target, predictor, owner = [], [], []
    last = [0] * len(nodes)
    for tree, first in zip(trees, first_node):
        order, subtree = depth_first(tree)
        for index, depth in order:
            node = tree.nodes[index]
            count = len(node.tokens)
            begin = len(token)
            before = last[first + node.parent] if node.parent >= 0 else None
            for here, sampled in enumerate(node.sampled, begin):
                if sampled and before is not None:
                    target.append(here)
                    predictor.append(before)
                    owner.append(first + index)
                before = here
            last[first + index] = before
            token += node.tokens
            position += range(depth, depth + count)
            subtree_end += [begin + subtree[index]] * count
    lists = (token, position, subtree_end, target, predictor, owner, last)
    return Pack(*(torch.tensor(one, dtype=torch.long) for one in lists), nodes, first_node)


def group_by_tokens(trees: list[Tree], tokens: int) -> list[list[int]]:
    """Indices of whole trees in turn, in groups of at most `tokens` tokens; 0: one group.

    A tree that is larger is a group of its own.
    """
    groups = []
    left = 0
    for index, tree in enumerate(trees):
        size = tree.tokens()
        if not groups or left < size and tokens:
            groups.append([])
            left = tokens
        groups[-1].append(index)
        left -= size
    return groups


# ------------------------------------------------------------------------------- the forward pass


def score(
    model: Llama,
    packed: Pack,
    needed_E: Tensor | None = None,
    dropout_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi of each sampled token (M,), V of each node (E,), and the node of each token (M,).

    One forward pass over a pack. The tokens are those of the `needed_E` nodes if these are given.
    `dropout_ED` is multiplied with the hidden states that values are read from.
    """
    weight = model.output_weight()
    device = weight.device
    chosen = slice(None) if needed_E is None else needed_E[packed.node_M]
    token_M = packed.token_T[packed.target_M][chosen]
    predictor_M = packed.predictor_M[chosen]
    node_M = packed.node_M[chosen].to(device)
    last_E = packed.last_E.to(device)
    spare = -len(token_M) % block_of(weight)

    def padded(index_X):
        return F.pad(index_X, (0, spare)).to(device)

    def read(hidden_1TD):
        hidden_TD = hidden_1TD[0]
        hidden_MD = hidden_TD[padded(predictor_M)]
        logp_M = token_logp(hidden_MD, model.output_weight(), padded(token_M))
        return logp_M[: len(token_M)], model.value(hidden_TD[last_E], dropout_ED)

    logp_M, value_E = feed(model, packed, read)
    return logp_M, value_E, node_M


def feed(model: Llama, packed: Pack, read: Callable[[Tensor], object]):
    """What `read` makes of the final hidden states (1, T, D) of a pack, after one forward pass."""
    weight = model.output_weight()
    device = weight.device
    block = block_of(weight)
    line = -len(packed.token_T) % block
    end_T = packed.subtree_end_T
    alone_T = len(end_T) + 1 + torch.arange(line)  # padding sees only itself
    end_T = torch.cat([end_T, alone_T]).to(device)
    mask = block_mask(end_T[None]) if device.type == "cuda" else path_mask(end_T, block)
    token_1T = F.pad(packed.token_T, (0, line)).to(device)[None]
    position_1T = F.pad(packed.position_T, (0, line)).to(device)[None]
    return model(token_1T, position_1T, mask, read=read)


def block_of(weight: Tensor) -> int:
    """How many tokens, keys of a path or predictions are computed together; whole blocks of them.

    flex_attention needs them, and CPUs compile bfloat16 kernels for each new length, at 8 ms and
    half a megabyte for each product of matrices. In float32 they do not.
    """
    return 1 if weight.device.type == "cpu" and weight.dtype == torch.float32 else TILE


@torch.inference_mode()
def rescore(model: Llama, trees: list[Tree], pack_tokens: int = 0) -> list[Tree]:
    """The same trees with the values and log-probabilities of this model.

    `pack_tokens` bounds one forward pass; 0: PASS_TOKENS.
    """
    rescored = []
    for group in group_by_tokens(trees, pack_tokens or PASS_TOKENS):
        chunk = [trees[index] for index in group]
        logp_M, value_E, node_M = score(model, pack(chunk))
        logp_E = step_logp(logp_M, node_M, len(value_E))
        scores = zip(logp_E.tolist(), value_E.tolist())
        for tree in chunk:
            nodes = []
            for node in tree.nodes:
                logp, value = next(scores)
                nodes.append(dataclasses.replace(node, logp=logp, value=value))
            rescored.append(dataclasses.replace(tree, nodes=nodes))
    return rescored


@torch.inference_mode()
def fit_value(
    model: Llama, lessons: list[Lesson], pack_tokens: int = 0
) -> tuple[Tensor, Tensor] | None:
    """The value head by least squares: weight (1, D) and bias (1,).

    None if the head is not linear, or if there is no target. Its inputs are the model's hidden
    states at the nodes that have a target. A fresh head learns slowly at the rate of a pretrained
    model, and its gradients disturb the layers below (linear probing before fine-tuning, arXiv
    2202.10054). Each input is scaled to a standard deviation of 1, and the square of each weight
    then costs PENALTY. Each rank reads its share of the trees.
    """
    if not isinstance(model.value_head, torch.nn.Linear):
        return None
    width = model.config.hidden_size
    device = model.output_weight().device
    sums = torch.zeros(width + 2, width + 2, dtype=torch.float64, device=device)
    mine = rank_share([lesson for lesson in lessons if any(q is not None for q in lesson.value)])
    for group in group_by_tokens([lesson.tree for lesson in mine], pack_tokens or PASS_TOKENS):
        packed = pack([mine[index].tree for index in group])
        value = [target for index in group for target in mine[index].value]
        known = [node for node, target in enumerate(value) if target is not None]
        last_E = packed.last_E[known].to(device)
        hidden_ED = feed(model, packed, lambda hidden_1TD, last_E=last_E: hidden_1TD[0][last_E])
        q_E1 = torch.tensor([[value[node]] for node in known], device=device)
        row_EX = torch.cat([hidden_ED.double(), torch.ones_like(q_E1), q_E1], 1)
        sums += row_EX.T @ row_EX
    if dist.is_initialized():
        dist.all_reduce(sums)
    if not sums[-2, -2]:
        return None
    mean_XX = sums / sums[-2, -2]
    mean_D, q = mean_XX[:-2, -2], mean_XX[-1, -2]
    covariance_DD = mean_XX[:-2, :-2] - mean_D.outer(mean_D)
    scale_D = covariance_DD.diagonal().clamp(min=1e-12).sqrt()
    system_DD = covariance_DD / scale_D.outer(scale_D) + PENALTY * torch.eye(width).to(sums)
    weight_D = torch.linalg.solve(system_DD, (mean_XX[:-2, -1] - mean_D * q) / scale_D) / scale_D
    return weight_D[None], (q - mean_D @ weight_D)[None]


# ------------------------------------------------------------------------------- from pack to loss

COUNTS = (  # what a batch counts
    "preferences",
    "pair_weight",
    "likelihood_tokens",
    "value_nodes",
    "pairs",
    "unique_tokens",
    "pairwise_tokens",
)
DIVISORS = {  # the count of the whole optimizer step that divides each sum of `loss_sums`
    "policy": "preferences",
    "sft": "likelihood_tokens",
    "mse": "value_nodes",
    "margin": "pair_weight",
    "win_reward": "pair_weight",
    "lose_reward": "pair_weight",
    "reward_accuracy": "pair_weight",
    "value_accuracy": "pair_weight",
    "value_error": "value_nodes",
}


class Batch:
    """Lessons in one pack, as tensors on `device`: pairs P, and vectors over the nodes E."""

    def __init__(self, lessons: list[Lesson], config: LossConfig, device="cpu"):
        self.packed = packed = pack([lesson.tree for lesson in lessons])

        def tensor(values, dtype=torch.float32):
            return torch.tensor(values, dtype=dtype, device=device)

        pairs = []
        paths = []  # (step, end) of every step on the path to an end, if these are compared whole
        for lesson, first in zip(lessons, packed.first_node):
            for win, lose, weight in lesson.pairs:
                pairs.append((first + win, first + lose, weight))
                for end in (win, lose) if OBJECTIVES[config.objective].whole_solutions else ():
                    paths += [(first + step, first + end) for step in lesson.tree.path(end)]
        self.win_P = tensor([win for win, _, _ in pairs], torch.long)
        self.lose_P = tensor([lose for _, lose, _ in pairs], torch.long)
        self.weight_P = tensor([weight for _, _, weight in pairs])
        self.path_step_X = tensor([step for step, _ in paths], torch.long)
        self.path_end_X = tensor([end for _, end in paths], torch.long)
        weights = [weight for lesson in lessons for weight, _ in lesson.likelihood]
        counts_E = torch.tensor([count for lesson in lessons for _, count in lesson.likelihood])
        self.weight_E = tensor(weights)  # how often the log pi of a node's tokens enters the sum

        def targets(of_lessons):
            """A mask of the nodes that have a target, and the targets (0 without one)."""
            found = list(itertools.chain(*of_lessons))
            mask_E = tensor([float(target is not None) for target in found])
            return mask_E, tensor([target or 0.0 for target in found])

        self.value_mask_E, self.value_target_E = targets(one.value for one in lessons)
        self.implicit_mask_E, self.implicit_target_E = targets(one.implicit for one in lessons)
        self.ref_E = tensor([node.logp for node in packed.nodes])
        # the nodes whose log pi a loss reads, on the CPU
        self.needed_E = (counts_E > 0) | (self.implicit_mask_E.cpu() > 0)
        self.needed_E[[end for win, lose, _ in pairs for end in (win, lose)]] = True
        self.needed_E[[step for step, _ in paths]] = True
        pair_weight = sum(weight for _, _, weight in pairs)
        self.counts = {
            "preferences": pair_weight + self.implicit_mask_E.sum().item(),
            "pair_weight": pair_weight,
            "likelihood_tokens": counts_E[packed.node_M].sum().item(),
            "value_nodes": self.value_mask_E.sum().item(),
            "pairs": len(pairs),
            "unique_tokens": sum(len(node.tokens) for node in packed.nodes),
            "pairwise_tokens": sum(lesson.pairwise_tokens for lesson in lessons),
        }

    def path_logp(self, logp_E: Tensor) -> Tensor:
        """log pi of whole solutions at their last steps (E,), from log pi of steps (E,)."""
        zero_E = logp_E.new_zeros(len(logp_E))
        return zero_E.index_add(0, self.path_end_X, logp_E[self.path_step_X])


def loss_sums(
    logp_M: Tensor, value_E: Tensor, node_M: Tensor, batch: Batch, config: LossConfig
) -> dict[str, Tensor]:
    """The sums over a batch that DIVISORS names: the loss terms and the figures to watch.

    `logp_M` are the policy's log-probabilities of the tokens of the nodes `node_M`, and `value_E`
    its values of all nodes, as `score` returns them.
    """
    objective = OBJECTIVES[config.objective]
    weight_P = batch.weight_P
    policy_E = step_logp(logp_M, node_M, len(value_E))
    ref_E = batch.ref_E
    if objective.whole_solutions:
        policy_E = batch.path_logp(policy_E)
        ref_E = batch.path_logp(ref_E)
    policy_win_P, policy_lose_P = policy_E[batch.win_P], policy_E[batch.lose_P]
    ref_win_P, ref_lose_P = ref_E[batch.win_P], ref_E[batch.lose_P]
    value_win_P, value_lose_P = value_E[batch.win_P], value_E[batch.lose_P]
    preference_P = objective.preference(
        policy_win_P, policy_lose_P, ref_win_P, ref_lose_P, config.beta
    )
    if objective.implicit:
        error_E = implicit_mse(policy_E, ref_E, batch.implicit_target_E, config.beta)
        preference = batch.implicit_mask_E * error_E
    else:
        preference = weight_P * preference_P
    margin_P = value_margin(value_win_P, value_lose_P, config.margin)
    reward_win_P = config.beta * (policy_win_P - ref_win_P).detach()
    reward_lose_P = config.beta * (policy_lose_P - ref_lose_P).detach()
    terms = {
        "policy": preference,
        "sft": -batch.weight_E[node_M] * logp_M,
        "mse": batch.value_mask_E * value_mse(value_E, batch.value_target_E),
        "margin": bool(objective.value) * weight_P * margin_P,
        "win_reward": weight_P * reward_win_P,
        "lose_reward": weight_P * reward_lose_P,
        "reward_accuracy": weight_P * (reward_win_P > reward_lose_P),
        "value_accuracy": weight_P * (value_win_P > value_lose_P),
        "value_error": batch.value_mask_E * (value_E - batch.value_target_E).detach().abs(),
    }
    return {name: term.sum() for name, term in terms.items()}


def total_loss(sums: dict[str, Tensor], counts: Mapping[str, float], config: LossConfig) -> Tensor:
    """a_policy * policy + a_sft * SFT + a_mse * MSE + a_margin * margin.

    SVPO summary; a_policy is ours. Each sum is divided by its count.
    """
    weights = {
        "policy": config.policy_weight,
        "sft": config.sft_weight,
        "mse": config.mse_weight,
        "margin": config.margin_weight,
    }
    terms = []
    for name, weight in weights.items():
        terms.append(weight * sums[name] / max(counts[DIVISORS[name]], 1e-8))
    return sum(terms)


# ---------------------------------------------------------------------------------- the reference


def fingerprints(model: Llama, trees: list[Tree]) -> dict[str, str]:
    """Hashes of a model's weights, and of the tokens of trees."""
    weights = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
        weights.update(name.encode() + numbers.tobytes())
    steps = hashlib.blake2b(digest_size=8)
    for tree in trees:
        nodes = [(node.parent, node.tokens) for node in tree.nodes]
        steps.update(json.dumps([tree.id, nodes]).encode())
    return {"weights": weights.hexdigest(), "trees": steps.hexdigest()}


def compared(lesson: Lesson) -> list[int]:
    """The nodes whose log pi a loss compares with the reference's, and those before them."""
    ends = [end for win, lose, _ in lesson.pairs for end in (win, lose)]
    ends += [index for index, target in enumerate(lesson.implicit) if target is not None]
    return with_ancestors(lesson.tree, ends)


def add_reference(model: Llama, lessons: list[Lesson], file: Path, pack_tokens: int = 0):
    """Set the log-probabilities of `compared` nodes to those of the policy, before it is trained.

    They are read from `file`, or computed by one pass (`rescore`, each rank its share) and kept
    there with fingerprints. InputError if the file belongs to other weights, trees or nodes.
    """
    trees = [lesson.tree for lesson in lessons]
    kept = list(map(compared, lessons))
    read = [(tree, indices) for tree, indices in zip(trees, kept) if len(indices) > 1]
    nodes = [tree.nodes[index] for tree, indices in read for index in indices]
    marks = {**fingerprints(model, trees), "nodes": digest(kept)}
    if file.exists():
        logp = read_reference(file, marks, len(nodes))
    else:
        parts = [only(tree, indices) for tree, indices in read]
        numbers = rank_share(range(len(parts)))
        rescored = rescore(model, rank_share(parts), pack_tokens)
        mine = [(n, [node.logp for node in tree.nodes]) for n, tree in zip(numbers, rescored)]
        logp = [value for _, values in sorted(gather(mine)) for value in values]
        tensors = {"logp": torch.tensor(logp)}
        marks["logp"] = digest(tensors["logp"].tolist())
        on_rank_0(lambda: publish(file, lambda partial: save_file(tensors, partial, marks)))
    for node, value in zip(nodes, logp):
        node.logp = value


def read_reference(file: Path, marks: dict[str, str], nodes: int) -> list[float]:
    """The log-probabilities of `nodes` nodes in a file that must have these fingerprints."""
    try:
        with safe_open(file, "pt") as stored:
            found = stored.metadata() or {}
            logp = stored.get_tensor("logp").tolist()
    except SafetensorError as error:
        raise InputError(f"{file}: not readable ({error}); delete it to have it computed again")
    if found.get("logp") != digest(logp):
        raise InputError(f"{file}: damaged; delete it to have it computed again")
    for name, mark in marks.items():
        if found.get(name) != mark:
            raise InputError(
                f"{file} was computed with other {name} ({found.get(name)}, not {mark}); delete it "
                "to have it computed again"
            )
    if len(logp) != nodes:
        raise InputError(f"{file}: {len(logp)} log-probabilities, not {nodes}; delete it")
    return logp
