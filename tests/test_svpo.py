"""Pairs on hand-built trees, losses against closed forms, packed trees against separate paths."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from test_mcts import QUESTIONS, path_tokens

from data import Tree, TreeNode
from mcts import SearchConfig, search_trees
from model import block_mask, path_mask, token_logp, tree_mask
from svpo import (
    DIVISORS,
    OBJECTIVES,
    PENALTY,
    Batch,
    LossConfig,
    all_steps,
    correct_solutions,
    fit_value,
    good_steps,
    group_advantages,
    implicit_mse,
    learn,
    loss_sums,
    pack,
    rescore,
    score,
    shared_advantages,
    sibling_advantages,
    sibling_pairs,
    solution_pair,
    step_dpo,
    step_logp,
    total_loss,
    value_margin,
    value_mse,
)
from train import grow_groups


def node(parent, q, n=1, reward=None, tokens=(5,), logp=-1.0) -> TreeNode:
    sampled = [parent >= 0] * len(tokens)
    ending = "answer" if reward else None
    return TreeNode(parent, list(tokens), sampled, logp, 0.5, n, q, 0.0, reward, ending)


def tree_of(*nodes: TreeNode) -> Tree:
    return Tree("t", "?", "1", list(nodes))


#             root 0
#    1 (+.5)    2 (-.5)    3 (+.25, only wrong leaves)    4 (not visited)
#   5+  6-      7-                8-
TREE = tree_of(
    node(-1, 0.1, 9),
    node(0, 0.5, 4),
    node(0, -0.5, 2),
    node(0, 0.25, 2),
    node(0, 0.0, 0),
    node(1, 1.0, 1, 1.0),
    node(1, -1.0, 1, -1.0),
    node(2, -1.0, 1, -1.0),
    node(3, -1.0, 1, -1.0),
)


def test_sibling_pairs_by_hand():
    """Catches pairs of unvisited nodes, across parents, without an outcome below, or under the
    gap."""
    assert sibling_pairs(TREE, "all", 0.0) == [(1, 2, 0.5), (5, 6, 0.5)]
    assert sibling_pairs(TREE, "all", 1.5) == [(5, 6, 1.0)]
    assert sibling_pairs(tree_of(*TREE.nodes[:5])) == []


def test_best_keeps_one_pair_a_parent():
    """Catches `best` that keeps all pairs, or the wrong extremes."""
    tree = tree_of(
        node(-1, 0, 4),
        node(0, 1.0, 1, 1.0),
        node(0, 0.9, 1, 1.0),
        node(0, -1.0, 1, -1.0),
        node(0, -0.8, 1, -1.0),
    )
    assert sibling_pairs(tree, "best") == [(1, 3, 1.0)]
    assert len(sibling_pairs(tree, "all")) == 4 and sibling_pairs(tree, "all")[0][2] == 0.25


def test_sft_takes_correct_paths_only():
    """Catches SFT on wrong steps, on the prompt, and on a right step below a step that search
    thinks wrong."""
    assert good_steps(TREE) == [(good, good) for good in (0, 1, 0, 0, 0, 1, 0, 0, 0)]
    lucky = tree_of(node(-1, 0, 4), node(0, -0.2, 3), node(1, 1.0, 1, 1.0))
    assert good_steps(lucky) == [(0, 0)] * 3


def test_lessons_leave_out_what_no_loss_reads():
    """Catches children that point at the wrong parent after pruning, and pairs or labels of other
    nodes than before."""
    lesson = learn(TREE, LossConfig(min_gap=0.0))
    parents = [item.parent for item in lesson.tree.nodes]
    assert parents == [-1, 0, 0, 0, 1, 1, 2, 3]  # without node 4, which has no visit
    assert lesson.pairs == [(1, 2, 0.5), (4, 5, 0.5)]
    assert lesson.value == [0.1, 0.5, -0.5, 0.25, 1.0, -1.0, -1.0, -1.0]
    assert lesson.implicit == [None] * 8
    assert [count for _, count in lesson.likelihood] == [1, 1, 0, 0, 1, 0, 0, 0]
    assert lesson.pairwise_tokens == (2 + 2) + (3 + 3)
    only = learn(TREE, LossConfig("step-dpo", min_gap=0.0))
    assert [item.q_value for item in only.tree.nodes] == [0.1, 0.5, -0.5, 1.0, -1.0]
    assert only.value == [None] * 5
    direct = learn(TREE, LossConfig("dvo"))
    wanted = [0.4, -0.6, 0.15, 0.5, -1.5, -0.5, -1.25]
    assert direct.implicit[0] is None and direct.implicit[1:] == pytest.approx(wanted)
    assert direct.value == [None] * 8
    nothing = learn(tree_of(*TREE.nodes[:5]), LossConfig("step-dpo"))
    assert len(nothing.tree.nodes) == 1 and nothing.pairs == []


def test_what_other_objectives_read():
    """Catches a solution pair that is not the best against the worst, RFT that counts a shared step
    once, and advantages that differ from those of the samples one by one."""
    # wrong ones: mean Q of 6 is -0.25, of 7 -0.75, of 8 -0.375
    assert solution_pair(TREE) == [(5, 7, 1.0)]
    assert solution_pair(tree_of(*TREE.nodes[:5])) == []
    lesson = learn(TREE, LossConfig("dpo"))
    assert lesson.pairs == [(3, 4, 1.0)]
    assert [lesson.tree.path(end) for end in (3, 4)] == [[1, 3], [2, 4]]
    twice = tree_of(
        node(-1, 0),
        node(0, 0),
        node(1, 1.0, 1, 1.0),
        node(1, 1.0, 1, 1.0),
        node(1, -1.0, 1, -1.0),
    )
    assert correct_solutions(twice) == [(2, 2), (2, 2), (1, 1), (1, 1), (0, 0)]
    assert all_steps(twice) == [(1, 1)] * 5
    # three samples go through node 1, two of them end right
    rewards = torch.tensor([1.0, 1.0, 1.0, -1.0])
    group = tree_of(
        node(-1, 0.5, 4),
        node(0, 1 / 3, 3),
        node(0, 1.0, 1, 1.0),
        node(1, 1.0, 2, 1.0),
        node(1, -1.0, 1, -1.0),
    )
    advantage = (rewards - rewards.mean()) / rewards.std(correction=0)
    wanted = [0, advantage[1:].sum(), advantage[0], advantage[:2].sum(), advantage[3]]
    weights, counts = zip(*group_advantages(group))
    assert weights == pytest.approx([float(value) for value in wanted], abs=1e-6)
    assert counts == (4, 3, 1, 2, 1)
    weights, _ = zip(*shared_advantages(group))  # each sample's share of a step, not their sum
    mean = advantage[1:].mean()
    wanted = [0, mean, advantage[0], advantage[0], advantage[3]]
    assert weights == pytest.approx([float(value) for value in wanted], abs=1e-6)
    same = tree_of(node(-1, 1.0, 4), node(0, 1.0, 4, 1.0))
    assert group_advantages(same) == [(0, 4), (0, 4)]


def test_advantages_among_siblings():
    """Catches groups over several parents, unvisited steps in the mean, and a division by the
    spread of equals."""
    assert sibling_advantages(TREE)[5:] == [(1, 1), (-1, 1), (0, 0), (0, 0)]  # 7 and 8 are alone
    q = torch.tensor([0.5, -0.5, 0.25])
    wanted = (q - q.mean()) / q.std(correction=0)
    weights, counts = zip(*sibling_advantages(TREE)[:5])
    assert weights == pytest.approx([0, *wanted.tolist(), 0], abs=1e-6)
    assert counts == (0, 1, 1, 1, 0)


def test_step_dpo_closed_form():
    """Catches a swapped sign, a lost reference or a lost beta."""
    one = torch.tensor([-2.0]), torch.tensor([-3.0]), torch.tensor([-2.5]), torch.tensor([-1.5])
    wanted = math.log(1 + math.exp(-0.3 * ((-2.0 + 2.5) - (-3.0 + 1.5))))
    assert step_dpo(*one, beta=0.3).item() == pytest.approx(wanted, rel=1e-6)
    same = torch.zeros(3)
    assert step_dpo(same, same, same, same, 0.1).tolist() == pytest.approx([math.log(2)] * 3)


def test_value_losses_closed_form():
    """Catches a margin with the wrong sign, a mean taken inside, and an implicit reward without its
    reference."""
    implicit = implicit_mse(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([1.0]), 0.25)
    assert implicit.tolist() == [0.25]
    squared = value_mse(torch.tensor([0.5, -1.0]), torch.tensor([1.0, -1.0]))
    assert squared.tolist() == [0.25, 0.0]
    margin = value_margin(torch.tensor([0.5, 0.0]), torch.tensor([-0.5, 0.25]), 0.5)
    assert margin.tolist() == [0.0, 0.75]


def test_step_logp_sums():
    """Catches a mean over tokens, and tokens booked on the wrong step."""
    logp_E = step_logp(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1, 1, 3]), 4)
    assert logp_E.tolist() == [0, -3, 0, -4]


def searched(model, tokenizer) -> list[Tree]:
    """Real search trees with ragged prompts; Q redrawn so that there are pairs, terminals and
    several depths."""
    config = SearchConfig(
        simulations=6,
        expand_width=3,
        max_depth=3,
        max_step_tokens=5,
        search_rows=3,
        cache_tokens=1500,
    )
    trees = list(search_trees(model, tokenizer, QUESTIONS, config))
    rng = torch.Generator().manual_seed(0)
    for tree in trees:
        for item in tree.nodes[1:]:
            item.visit_count = 1
            item.reward = None
            if item.ending:
                item.reward = 1.0 if torch.rand((), generator=rng) < 0.5 else -1.0
            item.q_value = item.reward or (torch.rand((), generator=rng).item() * 2 - 1)
    return trees


def by_path(model, trees):
    """log pi of each step and V of each node from one plain causal forward pass a node."""
    logp = []
    value = []
    for tree in trees:
        for index, item in enumerate(tree.nodes):
            tokens = path_tokens(tree, index)
            logits_1TV, value_1T = model(torch.tensor([tokens]))
            value.append(value_1T[0, -1])
            rows = logits_1TV[0].log_softmax(-1)
            first = len(tokens) - len(item.tokens) if index else len(tokens)  # no step: the prompt
            places = range(first, len(tokens))
            logp.append(sum((rows[at - 1, tokens[at]] for at in places), torch.zeros(())))
    return torch.stack(logp), torch.stack(value)


def reference_loss(policy_E, value_E, trees, config):
    """The objective written out pair by pair and node by node."""
    nodes = [item for tree in trees for item in tree.nodes]
    base = dpo = margin = weights = sft = sft_tokens = 0
    for tree in trees:
        for w, l, weight in sibling_pairs(tree, config.pairs, config.min_gap):
            win = base + w
            lose = base + l
            gap = (policy_E[win] - nodes[win].logp) - (policy_E[lose] - nodes[lose].logp)
            dpo = dpo - weight * F.logsigmoid(config.beta * gap)
            margin = margin + weight * (config.margin - (value_E[win] - value_E[lose])).clamp(min=0)
            weights += weight
        for index, (count, _) in enumerate(correct_solutions(tree)):
            if index:
                sft = sft - count * policy_E[base + index]
                sft_tokens += count * len(tree.nodes[index].tokens)
        base += len(tree.nodes)
    visited = [index for index, item in enumerate(nodes) if item.visit_count]
    mse = sum((value_E[index] - nodes[index].q_value) ** 2 for index in visited)
    return (
        config.policy_weight * dpo / weights
        + config.sft_weight * sft / sft_tokens
        + config.mse_weight * mse / len(visited)
        + config.margin_weight * margin / weights
    )


def measure(model, trees, config):
    """(loss, figures) of trees in one pack."""
    batch = Batch([learn(tree, config) for tree in trees], config)
    sums = loss_sums(*score(model, batch.packed, batch.needed_E), batch, config)
    figures = {}
    for name, count in DIVISORS.items():
        figures[name] = (sums[name] / batch.counts[count]).item() if batch.counts[count] else 0.0
    return total_loss(sums, batch.counts, config), figures


@pytest.mark.parametrize("queries", [128, 5])  # one block, and many
def test_packed_trees_equal_separate_paths(model, tokenizer, queries, monkeypatch):
    """Catches every fault of mask, positions, packing, blocks of queries, chunks of logits or
    gathering: log-probabilities, values, loss and gradients to 1e-5."""
    monkeypatch.setattr("model.QUERIES", queries)
    monkeypatch.setattr("model.LOGITS", 15 * 40)  # chunks of 40 tokens
    trees = searched(model, tokenizer)
    config = LossConfig(pairs="all", min_gap=0.2)
    assert sum(len(sibling_pairs(tree, "all", 0.2)) for tree in trees) > 10
    packed = pack(trees)
    assert len(packed.token_T) == sum(tree.tokens() for tree in trees) > 128
    logp_M, value_E, node_M = score(model, packed)
    path_logp_E, path_value_E = by_path(model, trees)
    logp_E = step_logp(logp_M, node_M, len(packed.nodes))
    torch.testing.assert_close(logp_E, path_logp_E, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value_E, path_value_E, atol=1e-5, rtol=0)
    loss, _ = measure(model, trees, config)
    wanted = reference_loss(path_logp_E, path_value_E, trees, config)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_bfloat16_takes_few_lengths(model, tokenizer, monkeypatch):
    """Catches a line, keys or predicted tokens of a new length for each pack, for which a CPU
    compiles kernels anew, and padding that is seen or scored."""
    trees = searched(model, tokenizer)
    half = copy.deepcopy(model).bfloat16()
    lengths = set()
    attention = F.scaled_dot_product_attention

    def attend(q_BHTK, k_BHSK, *words, **more):
        lengths.add(k_BHSK.shape[2])
        return attention(q_BHTK, k_BHSK, *words, **more)

    def logp(hidden_MD, *words):
        lengths.add(len(hidden_MD))
        return token_logp(hidden_MD, *words)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
    monkeypatch.setattr("svpo.token_logp", logp)
    for packed in (pack(trees[:1]), pack(trees[1:])):
        logp_M, value_E, node_M = score(half, packed)
        assert len(logp_M) == len(node_M) == len(packed.target_M)
        assert lengths and not any(length % 128 for length in lengths)
        seen = set(lengths)
        wanted_M, wanted_E, _ = score(model, packed)
        torch.testing.assert_close(logp_M, wanted_M, atol=0.1, rtol=0)
        torch.testing.assert_close(value_E.float(), wanted_E, atol=0.05, rtol=0)
        assert lengths > seen  # float32 is not padded
        lengths.clear()


def test_whole_solutions_against_separate_paths(model, tokenizer):
    """Catches solution-level DPO that reads one step instead of the path, of the policy or of the
    reference, and RFT weights on the wrong tokens: losses and gradients."""
    trees = searched(model, tokenizer)
    rng = random.Random(0)
    for item in [item for tree in trees for item in tree.nodes[1:]]:
        item.logp += rng.gauss(0, 2)  # the reference is another policy
    logp_E, _ = by_path(model, trees)
    dpo = []
    rft = tokens = base = 0

    def along(tree, index, of):
        return sum(of[step] for step in tree.path(index))

    for tree in trees:
        stored = [item.logp for item in tree.nodes]
        for win, lose, _ in solution_pair(tree):
            gained = [
                along(tree, end, logp_E[base:]) - along(tree, end, stored) for end in (win, lose)
            ]
            dpo.append(-F.logsigmoid(0.3 * (gained[0] - gained[1])))
        for index, item in enumerate(tree.nodes):
            if index and item.reward == 1.0:
                rft = rft - along(tree, index, logp_E[base:])
                tokens += along(tree, index, [len(step.tokens) for step in tree.nodes])
        base += len(tree.nodes)
    assert len(dpo) > 3
    wanted = {"dpo": torch.stack(dpo).mean(), "rft": rft / tokens}
    parameters = list(model.model.parameters())
    for name, loss in wanted.items():
        config = LossConfig(name, policy_weight=1.0, sft_weight=1.0)
        found, _ = measure(model, trees, config)
        torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
        gradients = torch.autograd.grad(found, parameters)
        others = torch.autograd.grad(loss, parameters, retain_graph=True)
        for ours, theirs in zip(gradients, others):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_grpo_gradient_is_that_of_the_samples_one_by_one(model, tokenizer):
    """Catches a group tree whose merged prefixes weigh less, more, or with the wrong sign, against
    each sample alone."""
    config = SearchConfig(max_depth=3, max_step_tokens=2, cache_tokens=40000)
    found = grow_groups(model, tokenizer, QUESTIONS, config, 400, 0)
    steps = [item for tree in found for item in tree.nodes[1:]]
    assert any(item.visit_count > 1 and not item.ending for item in steps)  # a shared prefix
    for tree in found:
        assert tree.nodes[0].visit_count == 400
        ends = [index for index, item in enumerate(tree.nodes) if item.ending]
        for number, index in enumerate(ends):  # rewards drawn by hand: nobody solves anything here
            reward = 1.0 if number % 2 else -1.0
            change = (reward - tree.nodes[index].reward) * tree.nodes[index].visit_count
            tree.nodes[index].reward = reward
            for step in [0, *tree.path(index)]:
                tree.nodes[step].q_value += change / tree.nodes[step].visit_count
    loss = tokens = base = 0
    path_logp_E, _ = by_path(model, found)
    for tree in found:
        samples = []
        for index, item in enumerate(tree.nodes):
            samples += [index] * item.visit_count if item.ending else []
        rewards = torch.tensor([tree.nodes[index].reward for index in samples])
        advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
        for index, advantage in zip(samples, advantages):
            path = tree.path(index)
            loss = loss - advantage * sum(path_logp_E[base + step] for step in path)
            tokens += sum(len(tree.nodes[step].tokens) for step in path)
        base += len(tree.nodes)
    ours, _ = measure(model, found, LossConfig("grpo", sft_weight=1.0))
    torch.testing.assert_close(ours, loss / tokens, atol=1e-5, rtol=1e-4)


def direction(model, trees, config) -> torch.Tensor:
    """The gradient of the policy, of length 1."""
    loss, _ = measure(model, trees, config)
    gradients = torch.autograd.grad(loss, list(model.model.parameters()))
    return F.normalize(torch.cat([gradient.flatten() for gradient in gradients]), dim=0)


def test_tree_grpo_is_step_dpo_while_nothing_is_learned(model):
    """Catches advantages with the wrong sign or reference.

    Where each step is right or wrong for good and the policy is the reference, the gradient of
    Tree-GRPO within a group of siblings is that of step-DPO over all their pairs (claimed in arXiv
    2509.21240). The preference loss then has the slope beta / 2 for every pair.
    """
    tree = tree_of(
        node(-1, -0.5, 4, tokens=(1, 2)),
        node(0, 1.0, 1, 1.0, tokens=(5, 6)),
        node(0, -1.0, 1, -1.0, tokens=(7,)),
        node(0, -1.0, 1, -1.0, tokens=(8, 9, 3)),
        node(0, -1.0, 1, -1.0, tokens=(4,)),
    )
    [tree] = rescore(model, [tree])
    ours = direction(model, [tree], LossConfig("tree-grpo"))
    torch.testing.assert_close(ours, direction(model, [tree], LossConfig("step-dpo")))
    tree.nodes[4].q_value = -0.6  # not for good: no longer the same
    assert ours @ direction(model, [tree], LossConfig("tree-grpo")) < 0.999


def test_dvo_against_separate_paths(model, tokenizer):
    """Catches targets on other steps, the root among them, and a mean over something else."""
    trees = searched(model, tokenizer)
    policy = iter(by_path(model, trees)[0])
    config = LossConfig("dvo", policy_weight=1.0, beta=0.1)
    terms = []
    for tree in trees:
        for item, logp in zip(tree.nodes, policy):
            if item.parent >= 0 and item.visit_count:
                gain = item.q_value - tree.nodes[item.parent].q_value
                terms.append((0.1 * (logp - item.logp) - gain) ** 2)
    loss, _ = measure(model, trees, config)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-4)


WEIGHTS = ("policy_weight", "sft_weight", "mse_weight", "margin_weight")


def test_switched_off_terms_are_not_trained(model, tokenizer):
    """Catches ablation switches that leave a term in, and objectives that train the value though
    they say they do not."""
    trees = searched(model, tokenizer)
    for config, silent in (
        (LossConfig(mse_weight=0, margin_weight=0), True),
        (LossConfig("step-dpo"), True),
        (LossConfig("rft"), True),
        (LossConfig("alphamath"), False),
        (LossConfig(mse_weight=0), False),
        (LossConfig(margin_weight=0), False),
    ):
        loss, _ = measure(model, trees, config)
        gradient = torch.autograd.grad(loss, model.value_head.weight)[0]
        assert (gradient == 0).all() == silent, config
    parts = []
    for kept in WEIGHTS:
        others = {name: 0.0 for name in WEIGHTS if name != kept}
        parts.append(measure(model, trees, LossConfig(**others))[0])
    torch.testing.assert_close(measure(model, trees, LossConfig())[0], sum(parts))
    assert all(part > 0 for part in parts)


def block_mask_BTT(end_BT):
    """The function of the block mask, asked for every pair of tokens."""
    row_B11 = torch.arange(len(end_BT))[:, None, None]
    index_T = torch.arange(end_BT.shape[1])
    return block_mask(end_BT).mask_mod(row_B11, 0, index_T[None, :, None], index_T[None, None, :])


def path_mask_TT(end_T):
    """The mask of a PathMask, written out for every pair of tokens."""
    seen_TT = torch.zeros(len(end_T), len(end_T), dtype=torch.bool)
    mask = path_mask(end_T)
    keys = mask.key_X.split([seen_QS.shape[1] for seen_QS in mask.seen])
    first = 0
    for key_S, seen_QS in zip(keys, mask.seen):
        seen_TT[first : first + len(seen_QS), key_S] = seen_QS
        first += len(seen_QS)
    assert first == len(end_T)
    return seen_TT


def test_masks_through_the_model_are_the_dense_mask(model, tokenizer, monkeypatch):
    """Catches attention by blocks (flex_attention, paths) that is not attention under the dense
    mask."""
    packed = pack(searched(model, tokenizer))
    end_1T = packed.subtree_end_T[None]
    line = packed.token_T[None], packed.position_T[None]
    with torch.no_grad():
        dense = model.hidden(*line, tree_mask(end_1T))
        flex = model.hidden(*line, block_mask(end_1T))
        torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)
        for queries in (128, 7):
            monkeypatch.setattr("model.QUERIES", queries)
            paths = model.hidden(*line, path_mask(end_1T[0]))
            torch.testing.assert_close(paths, dense, atol=1e-5, rtol=1e-5)


def random_tree(rng: random.Random) -> Tree:
    nodes = []
    for index in range(rng.randint(1, 9)):
        parent = rng.randrange(index) if index else -1
        nodes.append(node(parent, 0.0, tokens=[rng.randrange(9)] * rng.randint(1, 4)))
    return tree_of(*nodes)


def test_masks_of_random_forests(monkeypatch):
    """Catches forests, of 1,000 random ones, for which block mask, path mask, dense mask and "is it
    on my path" differ."""
    rng = random.Random(0)
    for number in range(1000):
        trees = [random_tree(rng) for _ in range(rng.randint(1, 4))]
        packed = pack(trees)
        end_T = packed.subtree_end_T
        dense_TT = tree_mask(end_T[None])[0, 0]
        assert (block_mask_BTT(end_T[None])[0] == dense_TT).all()
        monkeypatch.setattr("model.QUERIES", rng.choice((1, 3, 128)))
        assert (path_mask_TT(end_T) == dense_TT).all()
        # a sampled token sees as many as stand before it on its path, and itself
        seen = dense_TT.sum(dim=-1)[packed.target_M]
        assert (seen == packed.position_T[packed.target_M] + 1).all(), number
        path = {}
        for target, before in zip(packed.target_M.tolist(), packed.predictor_M.tolist()):
            path[target] = path.get(before, {before}) | {target}
            if before in path:  # what its predecessor sees, and itself
                found = dense_TT[target].nonzero()[:, 0]
                assert set(found.tolist()) >= path[target]


def test_logits_in_chunks_are_the_same(monkeypatch):
    """Catches chunks that lose or reorder tokens, in values and gradients, and a matrix of all
    logits at once."""
    sizes = []
    real = F.linear

    def counted(*inputs):
        out = real(*inputs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(F, "linear", counted)
    hidden_MD = torch.randn(50, 8, requires_grad=True)
    weight_VD = torch.randn(20, 8, requires_grad=True)
    token_M = torch.randint(0, 20, (50,))
    wanted = (hidden_MD @ weight_VD.T).log_softmax(-1)[torch.arange(50), token_M]
    monkeypatch.setattr("model.LOGITS", 20 * 7)
    found = token_logp(hidden_MD, weight_VD, token_M)
    torch.testing.assert_close(found, wanted)
    inputs = (hidden_MD, weight_VD)
    gradients = [torch.autograd.grad(logp.square().sum(), inputs) for logp in (found, wanted)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)
    # computed again in the backward pass
    assert max(sizes) == 20 * 7 and len(sizes) >= 2 * 8


def test_a_forest_without_pairs_still_trains(model, tokenizer):
    """Catches a division by zero where every solution is right, or every one wrong."""
    trees = searched(model, tokenizer)[:2]
    for tree in trees:
        for item in tree.nodes:
            item.reward = item.q_value = -1.0
    config = LossConfig()
    batch = Batch([learn(tree, config) for tree in trees], config)
    sums = loss_sums(*score(model, batch.packed, batch.needed_E), batch, config)
    assert sums["policy"] == 0 and sums["sft"] == 0 and sums["margin"] == 0 and sums["mse"] > 0
    total_loss(sums, batch.counts, config).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_a_preference_step_moves_the_right_way(model, tokenizer):
    """Catches losses whose gradient lowers winners or raises losers: policy and value after a few
    steps."""
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
    first = history[0]
    last = history[-1]
    # the reference is the policy itself
    assert first["policy"] == pytest.approx(math.log(2), abs=1e-4)
    assert all(last[name] < first[name] for name in ("policy", "mse", "margin"))
    assert last["win_reward"] > last["lose_reward"]
    assert last["value_accuracy"] > first["value_accuracy"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_pack_without_steps(model, objective):
    """Catches float index tensors and a mean over nothing where no tree has a sampled token."""
    prompt = tree_of(node(-1, 0, 0, tokens=(1, 2)))
    loss, _ = measure(model, [prompt], LossConfig(objective))
    loss.backward()
    assert loss == 0


def test_pack_by_hand():
    """Catches a wrong predictor at a step's first token, wrong depth positions, and wrong subtree
    ends."""
    tree = tree_of(
        node(-1, 0, tokens=(1, 2)),
        node(0, 0, tokens=(3, 4)),
        node(0, 0, tokens=(5,)),
        node(1, 0, tokens=(6,)),
    )
    packed = pack([tree])
    assert packed.token_T.tolist() == [1, 2, 3, 4, 6, 5]
    assert packed.position_T.tolist() == [0, 1, 2, 3, 4, 2]
    assert packed.subtree_end_T.tolist() == [6, 6, 5, 5, 5, 6]
    targets = torch.stack([packed.target_M, packed.predictor_M, packed.node_M], dim=1)
    assert targets.tolist() == [[2, 1, 1], [3, 2, 1], [4, 3, 3], [5, 1, 2]]
    assert packed.last_E.tolist() == [1, 3, 5, 4]
    seen = tree_mask(packed.subtree_end_T[None])[0, 0, 5]
    assert seen.tolist() == [True, True, False, False, False, True]


def test_a_fitted_value_is_least_squares(model, tokenizer):
    """Catches hidden states of other nodes than the targets', targets of nodes that have none, a
    penalty on the bias or on unscaled weights, and packs that change the result."""
    config = SearchConfig(simulations=6, expand_width=3, max_depth=4, max_step_tokens=8)
    trees = list(search_trees(model, tokenizer, QUESTIONS, config))
    lessons = [learn(tree, LossConfig()) for tree in trees]
    rows, targets = [], []
    with torch.no_grad():
        for lesson in lessons:
            for index, target in enumerate(lesson.value):
                if target is not None:
                    token_1T = torch.tensor([path_tokens(lesson.tree, index)])
                    rows.append(model(token_1T, read=lambda hidden_1TD: hidden_1TD[0, -1]).double())
                    targets.append(target)
    x_ED, y_E = torch.stack(rows), torch.tensor(targets).double()
    z_ED = (x_ED - x_ED.mean(0)) / x_ED.std(0, correction=0)
    # the penalty as further rows of an ordinary least squares
    extra_DD = (PENALTY * len(y_E)) ** 0.5 * torch.eye(z_ED.shape[1]).double()
    wanted_D = torch.linalg.lstsq(
        torch.cat([z_ED, extra_DD]), torch.cat([y_E - y_E.mean(), torch.zeros(len(extra_DD))])
    ).solution
    for pack_tokens in (0, 40):
        weight_1D, bias_1 = fit_value(model, lessons, pack_tokens)
        found_E = x_ED @ weight_1D[0] + bias_1
        torch.testing.assert_close(found_E, z_ED @ wanted_D + y_E.mean(), atol=1e-4, rtol=1e-4)
    assert len(y_E) > 50
    assert fit_value(model, [learn(tree, LossConfig("rft")) for tree in trees]) is None
