"""Step-level Value Preference Optimization: step pairs read off a search tree, and the losses. Pure functions.

Everything is a function of a few vectors over the nodes (steps) of a packed forest and of index pairs of siblings.
Authorities: SVPO summary = said by summaries of arXiv 2406.10858, whose equations and constants could not be read.

Dimension key: B rows, T tokens, M sampled tokens, E nodes of the forest (a step and the prefix that it completes),
P pairs of siblings, V vocabulary.
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import InputError, Pack, Tree, flag


@dataclass(frozen=True)
class LossConfig:
    """The objective. All weights and thresholds are our choice: the paper's constants are unknown."""
    beta: float = flag(0.3, "strength of the reference in step-DPO; CPL: 0.3")
    policy_weight: float = flag(0.5, "weight of step-DPO")
    sft_weight: float = flag(0.5, "weight of SFT on correct solutions (a_sft)")
    mse_weight: float = flag(1.0, "weight of the value's squared error (a_mse); AlphaMath: 0.1")
    margin_weight: float = flag(0.5, "weight of the value's margin loss (a_margin)")
    margin: float = flag(0.5, "V_win - V_lose that the margin loss asks for")
    pairs: str = flag("all", "all: every pair of siblings that qualifies; best: one pair a parent")
    min_gap: float = flag(0.5, "least Q_win - Q_lose of a pair")

    def __post_init__(self):
        if self.pairs not in ("all", "best"):
            raise InputError(f"--pairs is all or best, not {self.pairs!r}")


def outcomes_below(tree: Tree) -> tuple[list[bool], list[bool]]:
    """For each node: is there a correct terminal at or below it, and is there a wrong one."""
    correct = [node.reward is not None and node.reward > 0 for node in tree.nodes]
    wrong = [node.reward is not None and node.reward < 0 for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, 0, -1):
        parent = tree.nodes[index].parent
        correct[parent] |= correct[index]
        wrong[parent] |= wrong[index]
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


def drop_unvisited(tree: Tree) -> Tree:
    """The tree without the nodes that search never evaluated: no loss reads them."""
    place, nodes = {-1: -1}, []
    for index, node in enumerate(tree.nodes):
        if index == 0 or node.visit_count:
            place[index] = len(nodes)
            nodes.append(dataclasses.replace(node, parent=place[node.parent]))
    return dataclasses.replace(tree, nodes=nodes)


def sft_nodes(tree: Tree) -> list[bool]:
    """Steps of correct solutions (our choice): a correct terminal at or below, and Q > 0, also of every ancestor step."""
    correct, _ = outcomes_below(tree)
    kept = [True] + [False] * (len(tree.nodes) - 1)
    for index, node in enumerate(tree.nodes[1:], 1):
        kept[index] = kept[node.parent] and correct[index] and node.visit_count > 0 and node.q_value > 0
    kept[0] = False
    return kept


def token_logp(logits_MV: Tensor, token_M: Tensor) -> Tensor:
    """log pi of each token, float32, from the logits of the position that predicts it."""
    return -F.cross_entropy(logits_MV.float(), token_M, reduction="none")


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


def weighted_mean(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean, weighted; 0 (with a gradient path) where there is nothing to average."""
    weight = torch.ones_like(x) if weight is None else weight.to(x.dtype)
    return (x * weight).sum() / weight.sum().clamp(min=1e-8)


def svpo_loss(logp_M: Tensor, value_E: Tensor, pack: Pack, trees: list[Tree], config: LossConfig) -> dict[str, Tensor]:
    """The objective over a packed forest: policy + a_sft * SFT + a_mse * MSE + a_margin * margin (SVPO summary).

    `logp_M` are the policy's log-probabilities of the pack's sampled tokens, `value_E` its values of the pack's nodes;
    the reference is the policy that grew the trees, as recorded in them. Returns the total under "loss", each term
    unweighted, and the figures to watch.
    """
    device = logp_M.device
    nodes = pack.node_E
    policy_E = step_logp(logp_M, pack.node_M, len(nodes))
    ref_E = torch.tensor([node.logp for node in nodes], device=device)
    q_E = torch.tensor([node.q_value for node in nodes], device=device)
    visited_E = torch.tensor([node.visit_count > 0 for node in nodes], device=device)
    good_E = torch.tensor([good for tree in trees for good in sft_nodes(tree)], device=device)
    found = [(first + w, first + l, weight) for tree, first in zip(trees, pack.first_node)
             for w, l, weight in sibling_pairs(tree, config.pairs, config.min_gap)]
    win_P, lose_P = (torch.tensor([pair[side] for pair in found], dtype=torch.long, device=device) for side in (0, 1))
    weight_P = torch.tensor([pair[2] for pair in found], device=device)
    terms = {
        "policy": weighted_mean(step_dpo(policy_E[win_P], policy_E[lose_P], ref_E[win_P], ref_E[lose_P], config.beta), weight_P),
        "sft": -weighted_mean(logp_M, good_E[pack.node_M]),
        "mse": weighted_mean(value_mse(value_E, q_E), visited_E),
        "margin": weighted_mean(value_margin(value_E[win_P], value_E[lose_P], config.margin), weight_P)}
    loss = (config.policy_weight * terms["policy"] + config.sft_weight * terms["sft"]
            + config.mse_weight * terms["mse"] + config.margin_weight * terms["margin"])
    with torch.no_grad():
        reward_E = config.beta * (policy_E - ref_E)
        figures = {"pairs": torch.tensor(float(len(found))),
                   "win_reward": weighted_mean(reward_E[win_P], weight_P), "lose_reward": weighted_mean(reward_E[lose_P], weight_P),
                   "reward_accuracy": weighted_mean((reward_E[win_P] > reward_E[lose_P]).float(), weight_P),
                   "value_accuracy": weighted_mean((value_E[win_P] > value_E[lose_P]).float(), weight_P)}
    return {"loss": loss, **terms, **figures}
