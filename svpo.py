"""Step-level Value Preference Optimization: the tree as the datum, the step pairs read off it, and the losses.

A `Tree` holds all solutions tried for one question; a worked solution is a tree with one branch. `pack` lays a forest
out depth-first, each unique token once, so that one forward pass serves every loss; each loss is then a function of a
few vectors over the nodes (steps) and of index pairs of siblings. Pure functions, no input or output.
Authorities: SVPO summary = said by summaries of arXiv 2406.10858, whose equations and constants could not be read.

Dimension key: B rows, T tokens, M sampled tokens, E nodes of the forest (a step and the prefix that it completes),
P pairs of siblings, V vocabulary.
"""
import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """Bad input from the user: the commands print it as one line and end with status 2."""


def flag(default, help: str, built_in=None, least=None, choices=None):
    """A dataclass field that becomes a command-line flag. `built_in` is its default for the built-in task, `least` the
    smallest value accepted, `choices` the only ones."""
    return field(default=default, metadata={"help": help, "built_in": default if built_in is None else built_in, "least": least,
                                            "choices": choices})


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


# --------------------------------------------------------------------------------------------- packing

@dataclass
class Pack:
    """A forest in depth-first order: each unique token once. Flat indices count through (B, T) row by row."""
    token_BT: Tensor
    position_BT: Tensor  # depth in tokens from the tree's own first token
    subtree_end_BT: Tensor  # where in the row the subtree of the token's node ends; padding sees only itself
    target_M: Tensor  # flat index of every sampled token
    predictor_M: Tensor  # flat index of the token before it on its path, whose hidden state predicts it
    node_M: Tensor  # which of the E nodes it belongs to
    last_E: Tensor  # flat index of each node's last token, where its value is read
    node_E: list[TreeNode] = field(repr=False)  # the nodes, tree by tree in their stored order
    first_node: list[int] = field(repr=False)  # index in node_E of each tree's root


def flatten(tree: Tree):
    """Depth-first order: (node index, first position) pairs, and each node's subtree length in tokens."""
    children, length = [[] for _ in tree.nodes], [len(node.tokens) for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, 0, -1):
        length[tree.nodes[index].parent] += length[index]
        children[tree.nodes[index].parent].insert(0, index)
    order, stack = [], [(0, 0)]
    while stack:
        index, position = stack.pop()
        order.append((index, position))
        stack += [(child, position + len(tree.nodes[index].tokens)) for child in reversed(children[index])]
    return order, length


def pack(trees: list[Tree], row_tokens: int = 0) -> Pack:
    """Pack trees into rows of at most `row_tokens` tokens, or of the largest tree if that is longer (first fit,
    largest first). Every node keeps its place in `node_E`, so losses do not depend on the packing."""
    flat = [flatten(tree) for tree in trees]
    size = [length[0] for _, length in flat]
    width = max([row_tokens, *size])
    free, place = [], {}  # tokens left in each row; tree -> (row, column)
    for index in sorted(range(len(trees)), key=lambda index: -size[index]):
        row = next((row for row, left in enumerate(free) if left >= size[index]), len(free))
        if row == len(free):
            free.append(width)
        place[index] = (row, width - free[row])
        free[row] -= size[index]
    width -= min(free)
    token = [[0] * width for _ in free]
    position = [[0] * width for _ in free]
    end = [list(range(1, width + 1)) for _ in free]
    target, predictor, owner, last, nodes, first_node = [], [], [], [], [], []
    for index, tree in enumerate(trees):
        row, column = place[index]
        base, tails = len(nodes), {-1: None}
        first_node.append(base)
        last += [0] * len(tree.nodes)
        for node_index, depth in flat[index][0]:
            node, length = tree.nodes[node_index], flat[index][1][node_index]
            count = len(node.tokens)
            token[row][column:column + count] = node.tokens
            position[row][column:column + count] = range(depth, depth + count)
            end[row][column:column + count] = [column + length] * count
            before = tails[node.parent]
            for offset, sampled in enumerate(node.sampled):
                here = row * width + column + offset
                if sampled and before is not None:
                    target.append(here)
                    predictor.append(before)
                    owner.append(base + node_index)
                before = here
            tails[node_index] = last[base + node_index] = before
            column += count
        nodes += tree.nodes
    tensors = [torch.tensor(part, dtype=torch.long) for part in (token, position, end, target, predictor, owner, last)]
    return Pack(*tensors, nodes, first_node)


# --------------------------------------------------------------------------------------------- objective

@dataclass(frozen=True)
class LossConfig:
    """The objective. All weights and thresholds are our choice: the paper's constants are unknown."""
    beta: float = flag(0.3, "strength of the reference in step-DPO; CPL: 0.3", least=0)
    policy_weight: float = flag(0.5, "weight of step-DPO", built_in=0.05, least=0)
    sft_weight: float = flag(0.5, "weight of SFT on correct solutions (a_sft)", built_in=1.0, least=0)
    mse_weight: float = flag(1.0, "weight of the value's squared error (a_mse); AlphaMath: 0.1", least=0)
    margin_weight: float = flag(0.5, "weight of the value's margin loss (a_margin)", least=0)
    margin: float = flag(0.5, "V_win - V_lose that the margin loss asks for", least=0)
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
        kept[index] = kept[node.parent] and correct[index] > 0 and node.visit_count > 0 and node.q_value > 0
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
    node_M = pack.node_M.to(device)
    policy_E = step_logp(logp_M, node_M, len(nodes))
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
        "sft": -weighted_mean(logp_M, good_E[node_M]),
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
