"""Pairs on hand-built trees, losses against closed forms, and packed trees against separate paths."""
import math
import random

import pytest
import torch
import torch.nn.functional as F

from data import Tree, TreeNode, pack
from eval import score
from model import block_mask, tree_mask
from mcts import SearchConfig, search_trees
from svpo import COUNTED, OBJECTIVES, Batch, LossConfig, all_steps, correct_solutions, good_steps, group_advantages, learn, \
    loss_sums, sibling_pairs, solution_pair, step_dpo, step_logp, token_logp, total_loss, value_margin, value_mse
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
    assert good_steps(TREE) == [(good, good) for good in (0, 1, 0, 0, 0, 1, 0, 0, 0)]
    lucky = Tree("t", "?", "1", [node(-1, 0, 4), node(0, -0.2, 3), node(1, 1.0, 1, 1.0)])
    assert good_steps(lucky) == [(0, 0)] * 3


def test_lessons_leave_out_what_no_loss_reads():
    """Catches children that point at the wrong parent after pruning, and pairs or labels of other nodes than before."""
    lesson = learn(TREE, LossConfig(min_gap=0.0))
    assert [item.parent for item in lesson.tree.nodes] == [-1, 0, 0, 0, 1, 1, 2, 3]  # without node 4, which has no visit
    assert lesson.pairs == [([1], [2], 0.5), ([4], [5], 0.5)] and lesson.value == [True] * 8
    assert [pair[1] for pair in lesson.likelihood] == [0, 1, 0, 0, 1, 0, 0, 0]
    assert lesson.pairwise_tokens == (2 + 2) + (3 + 3)
    only = learn(TREE, LossConfig("step-dpo", min_gap=0.0))
    assert [item.q_value for item in only.tree.nodes] == [0.1, 0.5, -0.5, 1.0, -1.0] and not any(only.value)
    nothing = learn(Tree("t", "?", "1", TREE.nodes[:5]), LossConfig("step-dpo"))
    assert len(nothing.tree.nodes) == 1 and nothing.pairs == []


def test_what_other_objectives_read():
    """Catches a solution pair that is not the best against the worst, RFT that counts a shared step once, and advantages
    that differ from those of the samples one by one."""
    assert solution_pair(TREE) == [(5, 7, 1.0)]  # wrong ones: mean Q of 6 is -0.25, of 7 -0.75, of 8 -0.375
    assert solution_pair(Tree("t", "?", "1", TREE.nodes[:5])) == []
    assert learn(TREE, LossConfig("dpo")).pairs == [([1, 3], [2, 4], 1.0)]
    twice = Tree("t", "?", "1", [node(-1, 0), node(0, 0), node(1, 1.0, 1, 1.0), node(1, 1.0, 1, 1.0), node(1, -1.0, 1, -1.0)])
    assert correct_solutions(twice) == [(2, 2), (2, 2), (1, 1), (1, 1), (0, 0)]
    assert all_steps(twice) == [(1, 1)] * 5
    rewards = torch.tensor([1.0, 1.0, 1.0, -1.0])  # three samples go through node 1, two of them end right
    group = Tree("t", "?", "1", [node(-1, 0.5, 4), node(0, 1 / 3, 3), node(0, 1.0, 1, 1.0), node(1, 1.0, 2, 1.0), node(1, -1.0, 1, -1.0)])
    advantage = (rewards - rewards.mean()) / rewards.std(correction=0)
    wanted = [0, advantage[1:].sum(), advantage[0], advantage[:2].sum(), advantage[3]]
    assert [weight for weight, _ in group_advantages(group)] == pytest.approx([float(value) for value in wanted], abs=1e-6)
    assert [count for _, count in group_advantages(group)] == [4, 3, 1, 2, 1]
    same = Tree("t", "?", "1", [node(-1, 1.0, 4), node(0, 1.0, 4, 1.0)])
    assert group_advantages(same) == [(0, 4), (0, 4)]


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
        for index, (good, _) in enumerate(good_steps(tree)):
            if good:
                sft, sft_tokens = sft - policy_E[base + index], sft_tokens + len(tree.nodes[index].tokens)
        base += len(tree.nodes)
    mse = sum((value_E[index] - item.q_value) ** 2 for index, item in enumerate(nodes) if item.visit_count)
    return (config.policy_weight * dpo / weights + config.sft_weight * sft / sft_tokens
            + config.mse_weight * mse / sum(item.visit_count > 0 for item in nodes) + config.margin_weight * margin / weights)


def measure(model, trees, config, row_tokens=0):
    """(loss, figures) of trees in one pack."""
    batch = Batch([learn(tree, config) for tree in trees], row_tokens)
    sums = loss_sums(*score(model, batch.packed, batch.needed_E), batch, config)
    return total_loss(sums, batch.counts, config), {name: (sums[name] / batch.counts[place]).item() for name, place in COUNTED.items()}


@pytest.mark.parametrize("row_tokens", [0, 300, 25])
def test_packed_trees_equal_separate_paths(model, tokenizer, row_tokens, monkeypatch):
    """Catches every fault of mask, positions, packing, cutting long trees, chunks of logits or gathering: log-probabilities,
    values, loss and gradients to 1e-5."""
    monkeypatch.setattr("svpo.LOGITS", 15 * 40)  # chunks of 40 tokens
    trees = searched(model, tokenizer)
    config = LossConfig(pairs="all", min_gap=0.2)
    assert sum(len(sibling_pairs(tree, "all", 0.2)) for tree in trees) > 10
    packed = pack(trees, row_tokens)
    sizes = [sum(len(item.tokens) for item in tree.nodes) for tree in trees]
    assert sum(sizes) <= packed.token_BT.numel()
    if row_tokens == 25:  # cut: shorter rows than the largest tree's
        assert max(sizes) > packed.token_BT.shape[1]
    logp_M, value_E, node_M = score(model, packed)
    path_logp_E, path_value_E = by_path(model, trees)
    torch.testing.assert_close(step_logp(logp_M, node_M, len(packed.node_E)), path_logp_E, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value_E, path_value_E, atol=1e-5, rtol=0)
    loss, _ = measure(model, trees, config, row_tokens)
    wanted = reference_loss(path_logp_E, path_value_E, trees, config)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_whole_solutions_against_separate_paths(model, tokenizer):
    """Catches solution-level DPO that reads one step instead of the path, and RFT weights on the wrong tokens."""
    trees = searched(model, tokenizer)
    logp_E, _ = by_path(model, trees)
    dpo, rft, tokens, base = [], 0, 0, 0

    def along(tree, index, of):
        return sum(of[step] for step in upwards(tree, index))
    for tree in trees:
        for win, lose, _ in solution_pair(tree):
            gap = [along(tree, index, logp_E[base:]) - along(tree, index, [item.logp for item in tree.nodes]) for index in (win, lose)]
            dpo.append(-F.logsigmoid(0.3 * (gap[0] - gap[1])))
        for index, item in enumerate(tree.nodes):
            if index and item.reward == 1.0:
                rft -= along(tree, index, logp_E[base:])
                tokens += along(tree, index, [len(step.tokens) for step in tree.nodes])
        base += len(tree.nodes)
    assert len(dpo) > 3
    torch.testing.assert_close(measure(model, trees, LossConfig("dpo", policy_weight=1.0))[0], torch.stack(dpo).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(measure(model, trees, LossConfig("rft", sft_weight=1.0))[0], rft / tokens, atol=1e-5, rtol=1e-5)


def upwards(tree, index):
    return upwards(tree, tree.nodes[index].parent) + [index] if index else []


def test_grpo_gradient_is_that_of_the_samples_one_by_one(model, tokenizer):
    """Catches a group tree whose merged prefixes weigh less, more, or with the wrong sign, against each sample alone."""
    from eval import grow_groups
    found = grow_groups(model, tokenizer, QUESTIONS, SearchConfig(max_depth=3, max_step_tokens=2, cache_tokens=40000), 400, 0)
    assert any(item.visit_count > 1 and not item.ending for tree in found for item in tree.nodes[1:])  # a shared prefix
    for tree in found:
        assert tree.nodes[0].visit_count == 400
        ends = [index for index, item in enumerate(tree.nodes) if item.ending]
        for number, index in enumerate(ends):  # rewards drawn by hand: nobody solves anything here
            reward, count = (1.0 if number % 2 else -1.0), tree.nodes[index].visit_count
            change = (reward - tree.nodes[index].reward) * count
            tree.nodes[index].reward = reward
            for step in [0, *upwards(tree, index)]:
                tree.nodes[step].q_value += change / tree.nodes[step].visit_count
    loss, tokens, base, path_logp_E = 0, 0, 0, by_path(model, found)[0]
    for tree in found:
        samples = [index for index, item in enumerate(tree.nodes) if item.ending for _ in range(item.visit_count)]
        rewards = torch.tensor([tree.nodes[index].reward for index in samples])
        for index, advantage in zip(samples, (rewards - rewards.mean()) / rewards.std(correction=0)):
            loss = loss - advantage * sum(path_logp_E[base + step] for step in upwards(tree, index))
            tokens += sum(len(tree.nodes[step].tokens) for step in upwards(tree, index))
        base += len(tree.nodes)
    torch.testing.assert_close(measure(model, found, LossConfig("grpo", sft_weight=1.0))[0], loss / tokens, atol=1e-5, rtol=1e-4)


def test_switched_off_terms_are_not_trained(model, tokenizer):
    """Catches ablation switches that leave a term in, and objectives that train the value though they say they do not."""
    trees = searched(model, tokenizer)
    for config, silent in ((LossConfig(mse_weight=0, margin_weight=0), True), (LossConfig("step-dpo"), True), (LossConfig("rft"), True),
                           (LossConfig("alphamath"), False), (LossConfig(mse_weight=0), False), (LossConfig(margin_weight=0), False)):
        loss, _ = measure(model, trees, config)
        gradient = torch.autograd.grad(loss, model.value_head.weight)[0]
        assert (gradient == 0).all() == silent, config
    parts = [measure(model, trees, LossConfig(**{name: 0.0 for name in WEIGHTS if name != kept}))[0] for kept in WEIGHTS]
    torch.testing.assert_close(measure(model, trees, LossConfig())[0], sum(parts))
    assert all(part > 0 for part in parts)


WEIGHTS = ("policy_weight", "sft_weight", "mse_weight", "margin_weight")


def test_block_mask_is_the_dense_mask(model, tokenizer):
    """Catches a block mask (flex_attention) that is not the dense mask, in itself and through the model."""
    packed = pack(searched(model, tokenizer), 100)
    end_BT, blocks = packed.subtree_end_BT, block_mask(packed.subtree_end_BT)
    index = torch.arange(end_BT.shape[1])
    rows = torch.arange(len(end_BT))
    assert (blocks.mask_mod(rows[:, None, None], 0, index[None, :, None], index[None, None, :]) == tree_mask(end_BT)[:, 0]).all()
    with torch.no_grad():
        dense, sparse = (model.hidden(packed.token_BT, packed.position_BT, mask) for mask in (tree_mask(end_BT), blocks))
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)


def test_masks_of_random_forests():
    """Catches forests, of 1,000 random ones in random packings, for which block mask, dense mask and "is it on my path" differ."""
    rng = random.Random(0)
    for number in range(1000):
        trees = [Tree("t", "", "", [node(rng.randrange(index) if index else -1, 0.0, tokens=[rng.randrange(9)] * rng.randint(1, 4))
                                    for index in range(rng.randint(1, 9))]) for _ in range(rng.randint(1, 4))]
        packed = pack(trees, rng.choice((0, 12, 40)))
        end_BT = packed.subtree_end_BT
        index, rows = torch.arange(end_BT.shape[1]), torch.arange(len(end_BT))
        dense_BTT = tree_mask(end_BT)[:, 0]
        assert (block_mask(end_BT).mask_mod(rows[:, None, None], 0, index[None, :, None], index[None, None, :]) == dense_BTT).all()
        seen = dense_BTT.sum(dim=-1).flatten()[packed.target_M]  # a sampled token sees as many as stand before it on its path, and itself
        assert (seen == packed.position_BT.flatten()[packed.target_M] + 1).all(), number
        path = {}
        for target, before in zip(packed.target_M.tolist(), packed.predictor_M.tolist()):
            row, column = divmod(target, end_BT.shape[1])
            path[target] = path.get(before, {before}) | {target}
            if before in path:  # what its predecessor sees, and itself
                assert set((dense_BTT[row, column].nonzero()[:, 0] + row * end_BT.shape[1]).tolist()) >= path[target]


def test_logits_in_chunks_are_the_same(monkeypatch):
    """Catches chunks that lose or reorder tokens, in values and gradients, and a matrix of all logits at once."""
    largest, real = [0], F.linear
    monkeypatch.setattr(F, "linear", lambda *inputs: largest.append((out := real(*inputs)).numel()) or out)
    hidden_MD, weight_VD = torch.randn(50, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    token_M = torch.randint(0, 20, (50,))
    wanted = (hidden_MD @ weight_VD.T).log_softmax(-1)[torch.arange(50), token_M]
    monkeypatch.setattr("svpo.LOGITS", 20 * 7)
    found = token_logp(hidden_MD, weight_VD, token_M)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(logp.square().sum(), (hidden_MD, weight_VD)) for logp in (found, wanted))):
        torch.testing.assert_close(ours, theirs)
    assert max(largest) == 20 * 7 and len(largest) > 2 * 8  # computed again in the backward pass


def test_a_forest_without_pairs_still_trains(model, tokenizer):
    """Catches a division by zero where every solution is right, or every one wrong."""
    trees = searched(model, tokenizer)[:2]
    for tree in trees:
        for item in tree.nodes:
            item.reward = item.q_value = -1.0
    batch = Batch([learn(tree, LossConfig()) for tree in trees])
    sums = loss_sums(*score(model, batch.packed, batch.needed_E), batch, LossConfig())
    assert sums["policy"] == 0 and sums["sft"] == 0 and sums["margin"] == 0 and sums["mse"] > 0
    total_loss(sums, batch.counts, LossConfig()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_preference_step_moves_the_right_way(model, tokenizer):
    """Catches losses whose gradient lowers winners or raises losers: policy and value after a few steps."""
    trees = searched(model, tokenizer)
    config = LossConfig(policy_weight=1.0, sft_weight=0.0, min_gap=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        loss, figures = measure(model, trees, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(figures)
    first, last = history[0], history[-1]
    assert first["policy"] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the policy itself
    assert last["policy"] < first["policy"] and last["mse"] < first["mse"] and last["margin"] < first["margin"]
    assert last["win_reward"] > last["lose_reward"] and last["value_accuracy"] > first["value_accuracy"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_pack_without_steps(model, objective):
    """Catches float index tensors and a mean over nothing where no tree has a sampled token."""
    loss, _ = measure(model, [Tree("t", "?", "1", [node(-1, 0, 0, tokens=(1, 2))])], LossConfig(objective))
    loss.backward()
    assert loss == 0


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
