"""Pairs on hand-built trees, losses against closed forms, and packed trees against separate paths."""
import math

import pytest
import torch
import torch.nn.functional as F

from data import Tree, TreeNode, pack
from model import tree_mask
from mcts import SearchConfig, search_trees
from svpo import LossConfig, drop_unvisited, sft_nodes, sibling_pairs, step_dpo, step_logp, svpo_loss, value_margin, value_mse
from test_mcts import QUESTIONS


def node(parent, q, n=1, reward=None, tokens=(5,), logp=-1.0):
    return TreeNode(parent, list(tokens), [parent >= 0] * len(tokens), logp, 0.5, n, q, 0.0, reward, "answer" if reward else None)


#             root 0
#    1 (+.5)    2 (-.5)    3 (+.25, only wrong leaves)    4 (not visited)
#   5+  6-      7-                8-
TREE = Tree("t", "?", "1", [
    node(-1, 0.1, 9), node(0, 0.5, 4), node(0, -0.5, 2), node(0, 0.25, 2), node(0, 0.0, 0),
    node(1, 1.0, 1, 1.0), node(1, -1.0, 1, -1.0), node(2, -1.0, 1, -1.0), node(3, -1.0, 1, -1.0)])


def test_sibling_pairs_by_hand():
    """Catches pairs of unvisited nodes, across parents, without an outcome below, or under the gap."""
    assert sibling_pairs(TREE, "all", 0.0) == [(1, 2, 0.5), (5, 6, 0.5)]
    assert sibling_pairs(TREE, "all", 1.5) == [(5, 6, 1.0)]
    assert sibling_pairs(Tree("t", "?", "1", TREE.nodes[:5])) == []


def test_best_keeps_one_pair_a_parent():
    """Catches `best` that keeps all pairs, or the wrong extremes."""
    tree = Tree("t", "?", "1", [node(-1, 0, 4), node(0, 1.0, 1, 1.0), node(0, 0.9, 1, 1.0), node(0, -1.0, 1, -1.0), node(0, -0.8, 1, -1.0)])
    assert sibling_pairs(tree, "best") == [(1, 3, 1.0)]
    assert len(sibling_pairs(tree, "all")) == 4 and sibling_pairs(tree, "all")[0][2] == 0.25


def test_sft_takes_correct_paths_only():
    """Catches SFT on wrong steps, on the prompt, and on a right step below a step that search thinks wrong."""
    assert sft_nodes(TREE) == [False, True, False, False, False, True, False, False, False]
    lucky = Tree("t", "?", "1", [node(-1, 0, 4), node(0, -0.2, 3), node(1, 1.0, 1, 1.0)])
    assert sft_nodes(lucky) == [False] * 3


def test_unvisited_nodes_are_dropped_with_parents_renumbered():
    """Catches children that point at the wrong parent after pruning."""
    pruned = drop_unvisited(Tree("t", "?", "1", TREE.nodes[:2] + [TREE.nodes[4]] + [node(1, 1.0, 1, 1.0, tokens=(9,))]))
    assert [(item.parent, item.tokens) for item in pruned.nodes] == [(-1, [5]), (0, [5]), (1, [9])]


def test_step_dpo_closed_form():
    """Catches a swapped sign, a lost reference or a lost beta."""
    one = torch.tensor([-2.0]), torch.tensor([-3.0]), torch.tensor([-2.5]), torch.tensor([-1.5])
    wanted = math.log(1 + math.exp(-0.3 * ((-2.0 + 2.5) - (-3.0 + 1.5))))
    assert step_dpo(*one, beta=0.3).item() == pytest.approx(wanted, rel=1e-6)
    same = torch.zeros(3)
    assert step_dpo(same, same, same, same, 0.1).tolist() == pytest.approx([math.log(2)] * 3)


def test_value_losses_closed_form():
    """Catches a margin with the wrong sign, and a mean taken inside."""
    assert value_mse(torch.tensor([0.5, -1.0]), torch.tensor([1.0, -1.0])).tolist() == [0.25, 0.0]
    assert value_margin(torch.tensor([0.5, 0.0]), torch.tensor([-0.5, 0.25]), 0.5).tolist() == [0.0, 0.75]


def test_step_logp_sums():
    """Catches a mean over tokens, and tokens booked on the wrong step."""
    assert step_logp(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1, 1, 3]), 4).tolist() == [0, -3, 0, -4]


def searched(model, tokenizer):
    """Real search trees with ragged prompts; Q redrawn so that there are pairs, terminals and several depths."""
    trees = list(search_trees(model, tokenizer, QUESTIONS, SearchConfig(
        simulations=6, expand_width=3, max_depth=3, max_step_tokens=5, search_rows=3, cache_tokens=1500)))
    rng = torch.Generator().manual_seed(0)
    for tree in trees:
        for item in tree.nodes[1:]:
            item.visit_count = 1
            item.reward = None if item.ending is None else (1.0 if torch.rand((), generator=rng) < 0.5 else -1.0)
            item.q_value = item.reward or (torch.rand((), generator=rng).item() * 2 - 1)
    return trees


def by_path(model, trees):
    """log pi of each sampled token and V of each node from one plain causal forward per node."""
    logp, value = [], []
    for tree in trees:
        for index, item in enumerate(tree.nodes):
            path = [index]
            while path[0]:
                path.insert(0, tree.nodes[path[0]].parent)
            tokens = [token for step in path for token in tree.nodes[step].tokens]
            logits_1TV, value_1T = model(torch.tensor([tokens]))
            value.append(value_1T[0, -1])
            first = len(tokens) - len(item.tokens)
            rows = logits_1TV[0].log_softmax(-1)
            logp.append(sum(rows[first + offset - 1, token] for offset, token in enumerate(item.tokens)) if index else torch.zeros(()))
    return torch.stack(logp), torch.stack(value)


def reference_loss(policy_E, value_E, trees, config):
    """The objective written out pair by pair and node by node."""
    nodes = [item for tree in trees for item in tree.nodes]
    base, dpo, margin, weights, sft, sft_tokens = 0, 0, 0, 0, 0, 0
    for tree in trees:
        for w, l, weight in sibling_pairs(tree, config.pairs, config.min_gap):
            win, lose = base + w, base + l
            gap = (policy_E[win] - nodes[win].logp) - (policy_E[lose] - nodes[lose].logp)
            dpo = dpo - weight * F.logsigmoid(config.beta * gap)
            margin = margin + weight * (config.margin - (value_E[win] - value_E[lose])).clamp(min=0)
            weights += weight
        for index, good in enumerate(sft_nodes(tree)):
            if good:
                sft, sft_tokens = sft - policy_E[base + index], sft_tokens + len(tree.nodes[index].tokens)
        base += len(tree.nodes)
    mse = sum((value_E[index] - item.q_value) ** 2 for index, item in enumerate(nodes) if item.visit_count)
    return (config.policy_weight * dpo / weights + config.sft_weight * sft / sft_tokens
            + config.mse_weight * mse / sum(item.visit_count > 0 for item in nodes) + config.margin_weight * margin / weights)


@pytest.mark.parametrize("row_tokens", [0, 300])
def test_packed_trees_equal_separate_paths(model, tokenizer, row_tokens):
    """Catches every fault of mask, positions, packing or gathering: log-probabilities, values, loss and gradients to 1e-5."""
    from eval import forward_pack
    trees = searched(model, tokenizer)
    config = LossConfig(pairs="all", min_gap=0.2)
    assert sum(len(sibling_pairs(tree, "all", 0.2)) for tree in trees) > 10
    packed = pack(trees, row_tokens)
    assert sum(len(item.tokens) for item in packed.node_E) <= packed.token_BT.numel()
    logp_M, value_E = forward_pack(model, packed)
    path_logp_E, path_value_E = by_path(model, trees)
    torch.testing.assert_close(step_logp(logp_M, packed.node_M, len(packed.node_E)), path_logp_E, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value_E, path_value_E, atol=1e-5, rtol=0)
    loss = svpo_loss(logp_M, value_E, packed, trees, config)["loss"]
    wanted = reference_loss(path_logp_E, path_value_E, trees, config)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_forest_without_pairs_still_trains(model, tokenizer):
    """Catches a division by zero where every solution is right, or every one wrong."""
    from eval import forward_pack
    trees = searched(model, tokenizer)[:2]
    for tree in trees:
        for item in tree.nodes:
            item.reward = item.q_value = -1.0
    packed = pack(trees)
    figures = svpo_loss(*forward_pack(model, packed), packed, trees, LossConfig())
    assert figures["policy"] == 0 and figures["sft"] == 0 and figures["margin"] == 0 and figures["mse"] > 0
    figures["loss"].backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_preference_step_moves_the_right_way(model, tokenizer):
    """Catches losses whose gradient lowers winners or raises losers: policy and value after a few steps."""
    from eval import forward_pack
    trees = searched(model, tokenizer)
    packed = pack(trees)
    config = LossConfig(policy_weight=1.0, sft_weight=0.0, min_gap=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        figures = svpo_loss(*forward_pack(model, packed), packed, trees, config)
        optimizer.zero_grad()
        figures["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in figures.items()})
    first, last = history[0], history[-1]
    assert first["policy"] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the policy itself
    assert last["policy"] < first["policy"] and last["mse"] < first["mse"] and last["margin"] < first["margin"]
    assert last["win_reward"] > last["lose_reward"] and last["value_accuracy"] > first["value_accuracy"]


def test_a_pack_without_steps(model):
    """Catches float index tensors and a mean over nothing where no tree has a sampled token."""
    from eval import forward_pack
    trees = [Tree("t", "?", "1", [node(-1, 0, 0, tokens=(1, 2))])]
    packed = pack(trees)
    logp_M, value_E = forward_pack(model, packed)
    figures = svpo_loss(logp_M, value_E, packed, trees, LossConfig())
    assert logp_M.shape == (0,) and value_E.shape == (1,) and figures["loss"] == 0


def test_pack_by_hand():
    """Catches a wrong predictor at a step's first token, wrong depth positions, and wrong subtree ends."""
    tree = Tree("t", "?", "1", [node(-1, 0, tokens=(1, 2)), node(0, 0, tokens=(3, 4)), node(0, 0, tokens=(5,)), node(1, 0, tokens=(6,))])
    packed = pack([tree])
    assert packed.token_BT.tolist() == [[1, 2, 3, 4, 6, 5]]
    assert packed.position_BT.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert packed.subtree_end_BT.tolist() == [[6, 6, 5, 5, 5, 6]]
    assert list(zip(packed.target_M.tolist(), packed.predictor_M.tolist(), packed.node_M.tolist())) == [
        (2, 1, 1), (3, 2, 1), (4, 3, 3), (5, 1, 2)]
    assert packed.last_E.tolist() == [1, 3, 5, 4]
    assert tree_mask(packed.subtree_end_BT)[0, 0, 5].tolist() == [True, True, False, False, False, True]
