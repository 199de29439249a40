"""Step-level Value Preference Optimization: the tree as the datum, the step pairs read off it, and the losses.

A `Tree` holds all solutions tried for one question; a worked solution is a tree with one branch. `pack` (support/packing.py)
lays a forest out depth-first, each unique token once, so that one forward pass under `model.tree_mask` serves every loss;
each loss is then a function of a few vectors over the nodes (steps) and of index pairs of siblings. Pure functions.
Authorities: SVPO summary = said by summaries of arXiv 2406.10858, whose equations and constants could not be read.

Dimension key: B rows, T tokens, M sampled tokens, E nodes of the forest (a step and the prefix that it completes),
P pairs of siblings, V vocabulary.
"""
import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.flags import InputError, flag  # noqa: F401  (passed on)
from support.packing import pack

LOGITS = 2**24  # logits computed at once: 64 MB in float32


# --------------------------------------------------------------------------------------------- trees

@dataclass
class TreeNode:
    """One step of a tree as it is stored; node 0 is the question's prompt."""
    parent: int  # index into Tree.nodes, always smaller than the node's own; -1 for the root
    tokens: list[int]
    sampled: list[bool]  # which tokens the model wrote; the others are fed and carry no loss
    logp: float = 0.0  # sum of the sampled tokens' untempered log-probabilities under the policy that grew the tree
    prior: float = 1.0  # exp(mean token log-probability)
    visit_count: int = 0
    q_value: float = 0.0
    value: float = 0.0  # the value head's V when the tree was grown
    reward: float | None = None  # +1 or -1 at terminal nodes
    ending: str | None = None  # terminal nodes: "answer", "eos", "cut" (too long) or "deep"


@dataclass
class Tree:
    id: str
    question: str
    answer: str
    nodes: list[TreeNode]
    simulations: int = 0  # effective number
    stopped: str = "simulations"  # or "exhausted", or "slots" when the cache row was full
    version: int = 1


# --------------------------------------------------------------------------------------------- objectives

@dataclass(frozen=True)
class LossConfig:
    """The objective. All weights and thresholds are our choice: the paper's constants are unknown."""
    objective: str = flag("svpo", "svpo, step-dpo, dpo (whole solutions), rft, alphamath or grpo")
    beta: float = flag(0.3, "strength of the reference in DPO (beta); arXiv 2409.08642: 0.3", least=0)
    policy_weight: float = flag(0.5, "weight of the preference loss (a_policy)", built_in=0.05, least=0)
    sft_weight: float = flag(0.5, "weight of the likelihood of good steps (a_sft)", built_in=1.0, least=0)
    mse_weight: float = flag(1.0, "weight of the value's squared error (a_mse); AlphaMath: 0.1", least=0)
    margin_weight: float = flag(0.5, "weight of the value's margin loss (a_margin)", least=0)
    margin: float = flag(0.5, "V_win - V_lose that the margin loss asks for (m)", least=0)
    pairs: str = flag("all", "all: every pair of siblings that qualifies; best: one pair a parent", choices=("all", "best"))
    min_gap: float = flag(0.5, "least Q_win - Q_lose of a pair", least=0)


def outcomes_below(tree: Tree) -> tuple[list[int], list[int]]:
    """For each node: the number of correct terminals at or below it, and of wrong ones."""
    correct = [int(node.reward is not None and node.reward > 0) for node in tree.nodes]
    wrong = [int(node.reward is not None and node.reward < 0) for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, 0, -1):
        parent = tree.nodes[index].parent
        correct[parent] += correct[index]
        wrong[parent] += wrong[index]
    return correct, wrong


def sibling_pairs(tree: Tree, pairs: str = "all", min_gap: float = 0.0) -> list[tuple[int, int, float]]:
    """(winner, loser, weight) node indices of the step preferences in a tree.

    SVPO summary: siblings under one prefix, ranked by Q, filtered by outcome. Our choice of filters: both visited,
    Q_win > 0 with a correct terminal at or below it, Q_lose < 0 with a wrong one, gap at least `min_gap`. "best" keeps
    the highest against the lowest Q of each parent with weight 1, "all" keeps every pair with weight 1 / pairs in the tree.
    """
    correct, wrong = outcomes_below(tree)
    winners, losers = {}, {}
    for index, node in enumerate(tree.nodes[1:], 1):
        if node.visit_count and node.q_value > 0 and correct[index]:
            winners.setdefault(node.parent, []).append(index)
        if node.visit_count and node.q_value < 0 and wrong[index]:
            losers.setdefault(node.parent, []).append(index)

    def q(index):
        return tree.nodes[index].q_value
    found = []
    for parent in winners.keys() & losers.keys():
        win, lose = winners[parent], losers[parent]
        if pairs == "best":
            win, lose = [max(win, key=q)], [min(lose, key=q)]
        found += [(w, l) for w in win for l in lose if q(w) - q(l) >= min_gap]
    weight = 1.0 if pairs == "best" else 1.0 / max(1, len(found))
    return [(w, l, weight) for w, l in sorted(found)]


def path(tree: Tree, index: int) -> list[int]:
    """The nodes of a partial solution, from below the root to `index`."""
    nodes = []
    while index > 0:
        nodes.append(index)
        index = tree.nodes[index].parent
    return nodes[::-1]


def solution_pair(tree: Tree, *_) -> list[tuple[int, int, float]]:
    """The last steps of the best whole solution and the worst, weight 1: a correct one of highest mean Q along its path and
    a wrong one of lowest (our choice)."""
    def q(index):
        return statistics.fmean(tree.nodes[step].q_value for step in path(tree, index))
    correct, wrong = ([index for index, node in enumerate(tree.nodes) if index and node.reward == reward]
                      for reward in (1.0, -1.0))
    return [(max(correct, key=q), min(wrong, key=q), 1.0)] if correct and wrong else []


def good_steps(tree: Tree) -> list[tuple[float, float]]:
    """Of each node (weight, count), as in the next three functions: its tokens' log pi enter the sum `weight` times, and the divisor
    `count` times. SVPO's extra SFT term, our choice: steps with a correct terminal at or below and Q > 0, also of every ancestor."""
    correct, _ = outcomes_below(tree)
    kept = [True] + [False] * (len(tree.nodes) - 1)
    for index, node in enumerate(tree.nodes[1:], 1):
        kept[index] = kept[node.parent] and correct[index] > 0 and node.visit_count > 0 and node.q_value > 0
    return [(float(good), float(good)) for good in [False, *kept[1:]]]


def correct_solutions(tree: Tree) -> list[tuple[float, float]]:
    """Every correct solution once: a step counts as often as it is part of one (RFT, arXiv 2308.01825; AlphaMath eq. 7)."""
    return [(float(count), float(count)) for count in outcomes_below(tree)[0]]


def group_advantages(tree: Tree) -> list[tuple[float, float]]:
    """GRPO (arXiv 2402.03300 eq. 3, one step on fresh samples, no KL term): each sample's advantage (r - mean r) / std r
    on all its tokens. Where N samples of mean reward Q share a step, that sums to N (Q - Q_root) / std r."""
    mean = tree.nodes[0].q_value
    spread = math.sqrt(max(0.0, 1 - mean * mean))  # of rewards that are +1 or -1
    return [((node.visit_count * (node.q_value - mean) / spread if spread else 0.0), float(node.visit_count)) for node in tree.nodes]


def all_steps(tree: Tree) -> list[tuple[float, float]]:
    """SFT on worked solutions."""
    return [(1.0, 1.0)] * len(tree.nodes)


def token_logp(hidden_MD: Tensor, weight_VD: Tensor, token_M: Tensor) -> Tensor:
    """log pi of each token, float32, from the final hidden state that predicts it. The logits exist for a chunk of tokens
    at a time, also in the backward pass, which computes them again: no (M, V) matrix is kept."""
    def chunk_logp(hidden_CD, token_C):
        return -F.cross_entropy(F.linear(hidden_CD, weight_VD).float(), token_C, reduction="none")
    size = max(1, LOGITS // len(weight_VD))
    if len(token_M) <= size:
        return chunk_logp(hidden_MD, token_M)
    return torch.cat([checkpoint(chunk_logp, hidden_CD, token_C, use_reentrant=False)
                      for hidden_CD, token_C in zip(hidden_MD.split(size), token_M.split(size))])


def step_logp(logp_M: Tensor, node_M: Tensor, nodes: int) -> Tensor:
    """log pi(step | prefix) of each node (E,): the SUM over the step's sampled tokens.

    A sum because the probability of a step is the product of its tokens'; a mean would be the log-probability of no
    event, and DPO's implicit reward beta * (log pi - log ref) would change with the length of a step.
    """
    return torch.zeros(nodes, dtype=logp_M.dtype, device=logp_M.device).index_add(0, node_M, logp_M)


def step_dpo(policy_win_P: Tensor, policy_lose_P: Tensor, ref_win_P: Tensor, ref_lose_P: Tensor, beta: float) -> Tensor:
    """Preference loss of each pair (P,): -log sigmoid(beta * [(log pi_w - log ref_w) - (log pi_l - log ref_l)]).

    DPO's sigmoid loss (arXiv 2305.18290 eq. 7) on one step after a shared prefix; the prefix carries no loss.
    """
    return -F.logsigmoid(beta * ((policy_win_P - ref_win_P) - (policy_lose_P - ref_lose_P)))


def value_mse(value_E: Tensor, q_E: Tensor) -> Tensor:
    """Squared error of V against the search's Q, for each node (E,) (SVPO summary; AlphaMath's value loss)."""
    return (value_E - q_E).square()


def value_margin(value_win_P: Tensor, value_lose_P: Tensor, margin: float) -> Tensor:
    """Hinge max(0, margin - (V_win - V_lose)) of each pair (P,) (SVPO summary: margin loss)."""
    return F.relu(margin - (value_win_P - value_lose_P))


@dataclass(frozen=True)
class Objective:
    """What is learned from a tree; a new one is an entry of OBJECTIVES."""
    pairs: Callable | None = None  # (tree, config.pairs, config.min_gap) -> [(winner, loser, weight)]
    likelihood: Callable | None = None  # tree -> [(weight, count)], one for each node
    value: bool = False  # V learns: squared error against Q, and the margin of pairs
    whole: bool = False  # a pair compares whole solutions, not two steps after the same prefix
    preference: Callable = step_dpo


OBJECTIVES = {
    "svpo": Objective(sibling_pairs, good_steps, value=True),
    "step-dpo": Objective(sibling_pairs),
    "dpo": Objective(solution_pair, whole=True),
    "rft": Objective(likelihood=correct_solutions),
    "alphamath": Objective(likelihood=correct_solutions, value=True),
    "grpo": Objective(likelihood=group_advantages),  # its trees are groups of samples of the policy as it is
    "sft": Objective(likelihood=all_steps),  # its trees are worked solutions
}


@dataclass
class Lesson:
    """What an objective reads off one tree."""
    tree: Tree  # without the steps that no loss reads
    pairs: list[tuple[list[int], list[int], float]]  # nodes whose log pi add up on the winner's side, on the loser's; weight
    likelihood: list[tuple[float, float]]  # of each node: weight and count of its tokens' log pi
    value: list[bool]  # of each node: whether V learns its Q
    pairwise_tokens: int = 0  # what training pair by pair would feed: prefix and step, for both sides


def learn(tree: Tree, config: LossConfig) -> Lesson:
    """The lesson of a tree under `config.objective`."""
    objective = OBJECTIVES[config.objective]
    pairs = [(*(path(tree, index) if objective.whole else [index] for index in pair[:2]), pair[2])
             for pair in (objective.pairs(tree, config.pairs, config.min_gap) if objective.pairs else [])]
    likelihood = objective.likelihood(tree) if objective.likelihood else [(0.0, 0.0)] * len(tree.nodes)
    value = [objective.value and node.visit_count > 0 for node in tree.nodes]
    read = {index for win, lose, _ in pairs for index in win + lose}
    read |= {index for index in range(len(tree.nodes)) if value[index] or likelihood[index][1] > 0}
    kept = sorted({0} | {step for index in read for step in path(tree, index)})  # with all that stands above them
    place = {-1: -1} | {index: new for new, index in enumerate(kept)}
    nodes = [dataclasses.replace(tree.nodes[index], parent=place[tree.nodes[index].parent]) for index in kept]
    pairwise = sum(len(tree.nodes[step].tokens) for pair in pairs for side in pair[:2] for step in [0, *path(tree, side[-1])])
    return Lesson(dataclasses.replace(tree, nodes=nodes),
                  [([place[index] for index in win], [place[index] for index in lose], weight)
                   for win, lose, weight in pairs],
                  [likelihood[index] for index in kept], [value[index] for index in kept], pairwise)


class Batch:
    """Lessons in one pack, as tensors on `device`: pairs P, and vectors over the nodes E of the pack."""
    def __init__(self, lessons: list[Lesson], row_tokens: int = 0, device="cpu"):
        self.packed = packed = pack([lesson.tree for lesson in lessons], row_tokens, device)
        pairs = [([first + index for index in win], [first + index for index in lose], weight)
                 for lesson, first in zip(lessons, packed.first_node) for win, lose, weight in lesson.pairs]
        likelihood = torch.tensor([pair for lesson in lessons for pair in lesson.likelihood]).T
        self.needed_E = likelihood[1] > 0  # whose log pi a loss reads
        self.needed_E[[index for win, lose, _ in pairs for index in win + lose]] = True

        def tensor(values, dtype=torch.float32):
            return torch.tensor(values, dtype=dtype, device=device)
        self.win_P, self.lose_P = (tensor([pair[side][-1] for pair in pairs], torch.long) for side in (0, 1))
        self.sides = [tensor([[index for pair in pairs for index in pair[side]],  # nodes, and the pair each counts for
                              [number for number, pair in enumerate(pairs) for _ in pair[side]]], torch.long) for side in (0, 1)]
        self.weight_P, self.weight_E = tensor([pair[2] for pair in pairs]), likelihood[0].to(device)
        self.value_mask_E = tensor([float(value) for lesson in lessons for value in lesson.value])  # 1 where V learns its Q
        self.ref_E, self.q_E = (tensor([getattr(node, name) for node in packed.node_E]) for name in ("logp", "q_value"))
        self.counts = torch.tensor([
            sum(pair[2] for pair in pairs), likelihood[1][packed.node_M].sum(), self.value_mask_E.sum(), len(pairs),
            sum(len(node.tokens) for node in packed.node_E), sum(lesson.pairwise_tokens for lesson in lessons)], dtype=torch.float64)


COUNTS = ("pair_weight", "likelihood_tokens", "value_nodes", "pairs", "unique_tokens", "pairwise_tokens")  # Batch.counts
COUNTED = {"policy": 0, "sft": 1, "mse": 2, "margin": 0, "win_reward": 0, "lose_reward": 0, "reward_accuracy": 0, "value_accuracy": 0,
           "value_error": 2}  # which of them divides each sum of `loss_sums`, once it is that of the whole optimizer step


def loss_sums(logp_M: Tensor, value_E: Tensor, node_M: Tensor, batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Sums over a batch, named as in COUNTED: the loss terms and the figures to watch. `logp_M` are the policy's
    log-probabilities of the tokens of the nodes `node_M`, `value_E` its values of all nodes."""
    objective, weight_P = OBJECTIVES[config.objective], batch.weight_P
    policy_E = step_logp(logp_M, node_M, len(value_E))
    (policy_win_P, policy_lose_P), (ref_win_P, ref_lose_P) = (
        [x_E.new_zeros(len(weight_P)).index_add(0, pair_X, x_E[node_X]) for node_X, pair_X in batch.sides]
        for x_E in (policy_E, batch.ref_E))
    value_win_P, value_lose_P = value_E[batch.win_P], value_E[batch.lose_P]
    reward_win_P = config.beta * (policy_win_P - ref_win_P).detach()
    reward_lose_P = config.beta * (policy_lose_P - ref_lose_P).detach()
    terms = {"policy": weight_P * objective.preference(policy_win_P, policy_lose_P, ref_win_P, ref_lose_P, config.beta),
             "sft": -batch.weight_E[node_M] * logp_M,
             "mse": batch.value_mask_E * value_mse(value_E, batch.q_E),
             "margin": objective.value * weight_P * value_margin(value_win_P, value_lose_P, config.margin),
             "win_reward": weight_P * reward_win_P, "lose_reward": weight_P * reward_lose_P,
             "reward_accuracy": weight_P * (reward_win_P > reward_lose_P),
             "value_accuracy": weight_P * (value_win_P > value_lose_P),
             "value_error": batch.value_mask_E * (value_E - batch.q_E).detach().abs()}
    return {name: term.sum() for name, term in terms.items()}


def total_loss(sums: dict[str, Tensor], counts: Tensor, config: LossConfig) -> Tensor:
    """a_policy * policy + a_sft * SFT + a_mse * MSE + a_margin * margin (SVPO summary; a_policy ours), each divided by its count."""
    weights = {"policy": config.policy_weight, "sft": config.sft_weight, "mse": config.mse_weight, "margin": config.margin_weight}
    return sum(weight * sums[name] / max(float(counts[COUNTED[name]]), 1e-8) for name, weight in weights.items())
