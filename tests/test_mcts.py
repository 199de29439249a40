"""Selection, closing and backup on hand-built trees; the engine against full forward passes."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import redraw, tiny_config
from tokenizers import Tokenizer, decoders, models

from data import Question, StepTokenizer, Tree, outcome_of, read_trees, write_trees
from engine import Demand, Engine, Lane, Node
from eval import AnswerConfig, answer_questions, parse_strategy
from mcts import SearchConfig, backup, expand, fly, mcts, puct, search_trees, select, to_tree
from model import Llama
from svpo import pack, score, step_logp
from tasks.grading import extract_answer

CONFIG = SearchConfig(
    simulations=12,
    expand_width=4,
    max_depth=5,
    max_step_tokens=12,
    search_rows=3,
    cache_tokens=3000,
)


def child_of(parent, prior=0.5, ending=None, **state):
    node = Node(parent, [7], math.log(prior), ending=ending, **state)
    parent.children.append(node)
    return node


def test_puct_is_alphamath_eq_4():
    """Catches a prior that is normalised or not exponentiated, and a wrong count under the root or
    in the divisor."""
    root = Node(visit_count=9)
    seen = child_of(root, prior=0.25, visit_count=3, value_sum=1.5)
    fresh = child_of(root, prior=0.5)
    assert puct(seen, 2.0) == pytest.approx(0.5 + 2.0 * 0.25 * 3 / 4)
    assert puct(fresh, 2.0) == pytest.approx(0 + 2.0 * 0.5 * 3 / 1)
    two_tokens = Node(root, [1, 2], math.log(0.25))
    assert two_tokens.prior == pytest.approx(0.5)


def test_select_walks_to_the_best_open_leaf():
    """Catches selection of terminal children and a walk that stops at an inner node."""
    root = Node(visit_count=4)
    child_of(root, prior=0.99, ending="answer", visit_count=1, value_sum=1.0)
    good = child_of(root, prior=0.9, visit_count=1, value_sum=0.5)
    child_of(root, prior=0.1, visit_count=1, value_sum=-0.5)
    leaf = child_of(good)
    assert select(root, 1.25, random.Random(0)) is leaf


def test_exhausted_subtrees_close_and_selection_restarts():
    """Catches the official code's fault: a whole search that ends when one node has only terminal
    children."""
    root = Node(visit_count=4)
    tempting = child_of(root, prior=0.9, visit_count=2, value_sum=1.8)
    child_of(tempting, ending="answer")
    other = child_of(root, prior=0.1, visit_count=1, value_sum=-0.9)
    assert select(root, 1.25, random.Random(0)) is other
    assert tempting.closed and not root.closed
    child_of(other, ending="cut")
    assert select(root, 1.25, random.Random(0)) is None and root.closed


def test_leaves_in_flight_are_passed_by():
    """Catches a leaf that is expanded twice, a branch that closes while it is extended, and visits
    in flight that count in Q or are left behind."""
    root = Node(visit_count=3)
    good = child_of(root, prior=0.9, visit_count=1, value_sum=0.9)
    inner = child_of(good, prior=0.9)
    other = child_of(root, prior=0.8, visit_count=1, value_sum=0.5)
    assert select(root, 1.0, random.Random(0)) is inner
    fly(inner, 1)
    assert good.q_value == 0.9 and good.in_flight == root.in_flight == 1
    assert puct(good, 1.0) == pytest.approx(0.9 + 0.9 * 2 / 3)
    assert select(root, 1.0, random.Random(0)) is other  # though `good` scores higher
    fly(other, 1)
    assert select(root, 1.0, random.Random(0)) is None and not root.closed
    fly(inner, -1)
    assert good.in_flight == 0 and root.in_flight == 1
    assert select(root, 1.0, random.Random(0)) is inner


def test_a_search_asks_again_before_it_is_answered():
    """Catches children that are given to another leaf, simulations that are counted before they
    end, and a search that ends or asks too much while it waits."""
    root = Node(value=0.5)
    config = SearchConfig(simulations=3, expand_width=2, in_flight=3)
    search = mcts(root, config, lambda node: 1.0, random.Random(0))
    assert next(search) == [root] * 2
    assert search.send(None) == []  # there is nothing but the root, which is in flight
    first = search.send([Node(root, [1], -1.0), Node(root, [2], -1.0)])[0]
    second = search.send(None)[0]
    assert {first, second} == set(root.children) and root.in_flight == 2
    assert search.send(None) == []
    assert search.send([Node(second, [3], -1.0)]) == []  # the third simulation is in flight
    assert first.visit_count == 0 and len(second.children) == 1
    with pytest.raises(StopIteration) as end:
        search.send([Node(first, [4], -1.0)])
    assert end.value.value == (3, "simulations") and root.in_flight == 0


def test_a_search_without_room_waits_for_what_is_in_flight():
    """Catches expansions that are lost, or not asked for again once shorter steps than expected
    have left room."""
    root = Node(value=0.5)
    config = SearchConfig(simulations=9, expand_width=2, in_flight=2)
    search = mcts(root, config, lambda node: 1.0, random.Random(0))
    next(search)
    first = search.send([Node(root, [1], -1.0), Node(root, [2], -1.0)])[0]
    refused = search.send(None)[0]
    assert search.send([]) == [] and search.send(None) == []
    again = search.send([Node(first, [4], -1.0)])[0]
    assert again in (refused, *first.children) and root.in_flight == 1
    with pytest.raises(StopIteration) as end:
        search.send([])
    assert end.value.value == (2, "room") and root.in_flight == 0


def test_lanes_stay_busy(model, tokenizer, monkeypatch):
    """Catches lanes that wait for the last of their siblings although more is in flight, and more
    in flight than was asked for."""
    live = []
    decode = Engine.decode

    def count(engine):
        live.append(sum(lane.live for lane in engine.lanes) / len(engine.lanes))
        requests = [len(search.requests) for search in engine.searches if search]
        assert max(requests) <= engine.demand.in_flight
        decode(engine)

    monkeypatch.setattr(Engine, "decode", count)
    shares = []
    for in_flight in (1, 3):
        config = replace(CONFIG, in_flight=in_flight, cache_tokens=20000, simulations=20)
        list(search_trees(model, tokenizer, QUESTIONS, config))
        shares.append(sum(live) / len(live))
        live.clear()
    assert shares[1] > 1.15 * shares[0], shares


def test_ties_are_broken_at_random():
    """Catches a search that always prefers the first child."""
    chosen = set()
    for seed in range(20):
        root = Node(visit_count=1)
        children = [child_of(root), child_of(root)]
        chosen.add(children.index(select(root, 1.25, random.Random(seed))))
    assert chosen == {0, 1}


def test_backup_is_a_running_mean_without_sign_change():
    """Catches two-player backup and a mean over the wrong count."""
    root = Node()
    step = child_of(root)
    leaf = child_of(step)
    for value in (1.0, -1.0, 0.5):
        backup(leaf, value)
    backup(step, 1.0)
    assert (leaf.visit_count, step.visit_count, root.visit_count) == (3, 4, 4)
    assert leaf.q_value == pytest.approx(0.5 / 3) and root.q_value == pytest.approx(1.5 / 4)


def test_expand_merges_identical_children_and_ends_deep_ones():
    """Catches near-tie pairs between equal siblings, and unfinished steps at the depth limit."""
    leaf = child_of(Node())
    children = [
        Node(leaf, [1, 2], text="a"),
        Node(leaf, [3], ending="eos"),
        Node(leaf, [1, 2], text="b"),
    ]
    expand(leaf, children, max_depth=2)
    assert [child.tokens for child in leaf.children] == [[1, 2], [3]]
    assert [child.ending for child in leaf.children] == ["deep", "eos"]


def test_one_simulation_in_the_official_order():
    """Catches values backed up for children that were never selected, and terminals not backed up
    at once."""
    root = Node(value=0.5)
    search = mcts(
        root, SearchConfig(simulations=2, expand_width=3), lambda node: 1.0, random.Random(0)
    )
    assert next(search) == [root] * 3
    a, b, done = (
        Node(root, [1], -1.0, value=-0.25),
        Node(root, [2], -1.0),
        Node(root, [3], -1.0, ending="answer"),
    )
    wanted = search.send([a, b, done])
    assert (root.visit_count, root.value_sum) == (2, 1.5)
    assert (done.visit_count, done.reward) == (1, 1.0)
    assert a.visit_count == b.visit_count == 0 and wanted[0] in (a, b)
    with pytest.raises(StopIteration) as end:
        search.send([Node(wanted[0], [4], -1.0)])
    assert end.value.value == (2, "simulations") and wanted[0].q_value == wanted[0].value


def test_a_search_without_room_says_so():
    """Catches an empty list of children that is attached to a leaf, and counted as a simulation."""
    root = Node(value=0.5)
    search = mcts(root, SearchConfig(expand_width=2), lambda node: 1.0, random.Random(0))
    next(search)
    search.send([Node(root, [1], -1.0), Node(root, [2], -1.0)])
    with pytest.raises(StopIteration) as end:
        search.send([])
    assert end.value.value == (1, "room") and root.visit_count == 1


def test_outcomes():
    """Catches rewards for cut or unanswered solutions."""
    outcome = outcome_of(Question("q", "1+1", "2"))
    texts = [
        ("answer", "1+1=2 #### 2"),
        ("answer", "#### 3"),
        ("cut", "#### 2"),
        ("eos", "2"),
        ("deep", ""),
    ]
    outcomes = [outcome(Node(text=text, ending=ending)) for ending, text in texts]
    assert outcomes == [1, -1, -1, -1, -1]


QUESTIONS = [
    Question(f"q{index}", text, "3")
    for index, text in enumerate(["1+2", "5*5-3+1", "7", "2-2*3", "9+9+9+9", "1*1", "4-3*2*1"])
]


def path_tokens(tree: Tree, index: int) -> list[int]:
    """The prompt and all steps down to a node."""
    return [token for step in [0, *tree.path(index)] for token in tree.nodes[step].tokens]


def full_forward(model: Llama, tokens: list[int], last: int) -> tuple[float, float]:
    """log pi of the `last` tokens and V after all of them, from one plain forward pass."""
    with torch.no_grad():
        logits_1TV, value_1T = model(torch.tensor([tokens]))
    logp_TV = logits_1TV[0].log_softmax(-1)
    first = len(tokens) - last
    logp = sum(logp_TV[place - 1, tokens[place]].item() for place in range(first, len(tokens)))
    return logp, value_1T[0, -1].item()


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("few_shot", [False, True])
def test_recorded_logp_and_values_equal_full_forward(model, tokenizer, few_shot, in_flight):
    """Catches every cache fault: wrong slots, positions or masks, ragged prompts, shared ones,
    refilled rows, lanes of unequal length, slots that are freed while a lane reads them."""
    if few_shot:
        tokenizer = StepTokenizer(tokenizer.tokenizer, [0], "1+1\n1+1=2 #### 2\n{question}\n")
    config = replace(CONFIG, in_flight=in_flight, cache_tokens=3000 * in_flight)
    trees = list(search_trees(model, tokenizer, QUESTIONS, config))
    assert sorted(tree.id for tree in trees) == sorted(question.id for question in QUESTIONS)
    checked = 0
    depth = 0
    for tree in trees:
        for index, node in enumerate(tree.nodes[1:], 1):
            tokens = path_tokens(tree, index)
            logp, value = full_forward(model, tokens, len(node.tokens))
            assert node.logp == pytest.approx(logp, abs=1e-3)
            assert node.value == pytest.approx(value, abs=1e-3)
            checked += 1
            depth = max(depth, len(tree.path(index)))
        _, value = full_forward(model, tree.nodes[0].tokens, 0)
        assert tree.nodes[0].value == pytest.approx(value, abs=1e-3)
    assert checked > 60 and depth >= 3


def test_steps_end_where_they_should(model, tokenizer):
    """Catches steps that run over a line break or end-of-text, and cut ones that are not marked."""
    decode = tokenizer.tokenizer.decode
    line_break = tokenizer.tokenizer.token_to_id("\n")
    eos = 0
    for tree in search_trees(model, tokenizer, QUESTIONS, CONFIG):
        for node in tree.nodes[1:]:
            text = decode(node.tokens)
            assert eos not in node.tokens[:-1]
            for place, token in enumerate(node.tokens[:-1]):
                assert token != line_break or not decode(node.tokens[:place]).strip()
            finished = node.tokens[-1] in (eos, line_break)
            assert finished or len(node.tokens) == CONFIG.max_step_tokens
            if node.ending == "cut":
                assert not (text.strip() and finished)
            if node.ending == "answer":
                assert extract_answer(text) is not None and finished
            assert (node.reward is None) == (node.ending is None)


@pytest.mark.parametrize("steps_per_lane", [1, 3])
def test_greedy_is_argmax_decoding(model, tokenizer, steps_per_lane):
    """Catches a temperature of zero that samples, and an engine that changes tokens between
    steps."""
    config = SearchConfig(max_step_tokens=6, cache_tokens=400, max_depth=3)
    demand = Demand(1, 0.0, expansions=3, steps_per_lane=steps_per_lane)
    engine = Engine(model, tokenizer, QUESTIONS, demand, config, rows=2, fit=True)

    def one_path(question, root):
        node = root
        while not node.ending and node.depth < 3:
            (node,) = yield [node]
        return node

    found = list(engine.run(one_path, "greedy"))
    assert len(found) == len(QUESTIONS)
    for _, root, node in found:
        written = [token for step in node.path() for token in step.tokens]
        tokens = list(root.tokens)
        while len(tokens) < len(root.tokens) + len(written):
            with torch.no_grad():
                tokens.append(model(torch.tensor([tokens]))[0][0, -1].argmax().item())
        assert tokens == root.tokens + written
        assert node.ending or node.depth == 3


@pytest.mark.parametrize("strategy", ["majority:3", "beam:3,2", "mcts:4"])
def test_strategies_read_the_right_paths(model, tokenizer, strategy):
    """Catches lanes that run on through several steps, and several paths extended at once, that see
    each other's slots."""
    search = SearchConfig(max_step_tokens=8, max_depth=4, expand_width=3, cache_tokens=1500)
    chosen = parse_strategy(strategy, search, AnswerConfig())
    seen = []

    def spied(question, root):
        search = chosen.start(question, root)
        children = None
        while True:
            try:
                children = yield search.send(children)
            except StopIteration as end:
                return end.value
            seen.extend(children)

    demand = replace(chosen.demand, temperature=0.8)
    engine = Engine(model, tokenizer, QUESTIONS, demand, search, rows=3, fit=True)
    assert len(list(engine.run(spied, strategy))) == len(QUESTIONS)
    for node in seen:
        root = node
        while root.parent:
            root = root.parent
        tokens = sum((step.tokens for step in node.path()), root.tokens)
        logp, value = full_forward(model, tokens, len(node.tokens))
        assert node.logp == pytest.approx(logp, abs=1e-3)
        assert node.value == pytest.approx(value, abs=1e-3)
    assert max(node.depth for node in seen) >= 3


def test_bfloat16(tokenizer, model):
    """Catches states of another type than the weights'."""
    trees = list(search_trees(model.to(torch.bfloat16), tokenizer, QUESTIONS[:3], CONFIG))
    assert len(trees) == 3
    assert all(math.isfinite(node.logp) for tree in trees for node in tree.nodes)


def test_a_full_row_ends_its_search_alone(model, tokenizer):
    """Catches a row that writes over its neighbours' or its own slots when it has no room, and a
    silent stop."""
    small = SearchConfig(
        simulations=50,
        expand_width=3,
        max_depth=20,
        max_step_tokens=6,
        search_rows=2,
        tree_tokens=45,
    )
    trees = list(search_trees(model, tokenizer, QUESTIONS, small, 1))
    assert len(trees) == len(QUESTIONS) and any(tree.stopped == "room" for tree in trees)
    assert all(tree.simulations > 0 for tree in trees)
    alone = {}
    for question in QUESTIONS:
        (alone[question.id],) = search_trees(model, tokenizer, [question], small, 1)
    for tree in trees:
        wanted = alone[tree.id]
        assert (tree.simulations, tree.stopped) == (wanted.simulations, wanted.stopped)


def test_line_breaks_inside_tokens_end_steps():
    """Catches byte-pair tokens that swallow the line break, and steps made of blank lines only."""
    words = ["<eos>", "a", "b.\n", "\n", "\n\n", "\nc", " "]
    ids = {word: index for index, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(ids, unk_token="a"))
    plain.decoder = decoders.Fuse()
    tokenizer = StepTokenizer(plain, [0], "a{question}")
    model = redraw(Llama(tiny_config(vocab_size=7)), std=0.1).eval()
    questions = [Question(str(number), "a", "1") for number in range(12)]

    def ended(text):
        return "<eos>" in text or any(part.strip() for part in text.split("\n")[:-1])

    seen = set()
    for tree in search_trees(model, tokenizer, questions, CONFIG):
        for node in tree.nodes[1:]:
            texts = [plain.decode([token], skip_special_tokens=False) for token in node.tokens]
            for count in range(1, len(texts)):
                assert not ended("".join(texts[:count])), texts
            assert ended("".join(texts)) or node.ending == "cut"
            seen.add(texts[-1])
    assert {"<eos>", "b.\n", "\n", "\n\n", "\nc"} <= seen


def test_a_padded_vocabulary(tokenizer):
    """Catches sampled ids that the tokenizer does not have, and log-probabilities that disagree
    with training's."""
    known = tokenizer.tokenizer.get_vocab_size()
    model = redraw(Llama(tiny_config(vocab_size=known + 9)), std=0.1).eval()
    trees = list(search_trees(model, tokenizer, QUESTIONS, CONFIG))
    packed = pack(trees)
    with torch.no_grad():
        logp_M, _, node_M = score(model, packed)
        logp_E = step_logp(logp_M, node_M, len(packed.nodes))
    assert max(token for node in packed.nodes for token in node.tokens) < known
    recorded_E = torch.tensor([node.logp for node in packed.nodes])
    torch.testing.assert_close(logp_E, recorded_E, atol=1e-3, rtol=0)


def test_no_step_outgrows_the_context(tokenizer):
    """Catches positions beyond what the model was made for; a node without room for another step is
    too deep."""
    known = tokenizer.tokenizer.get_vocab_size()
    small = tiny_config(vocab_size=known, max_position_embeddings=28)
    model = redraw(Llama(small), std=0.1).eval()
    config = SearchConfig(
        simulations=30,
        expand_width=3,
        max_depth=50,
        max_step_tokens=8,
        search_rows=3,
        cache_tokens=6000,
    )
    trees = list(search_trees(model, tokenizer, QUESTIONS, config))
    lengths = []
    deep = 0
    for tree in trees:
        for index, node in enumerate(tree.nodes):
            lengths.append(len(path_tokens(tree, index)))
            deep += node.ending == "deep"
    assert max(lengths) <= 28 and deep


def unique_tokens(trees: list[Tree]) -> int:
    """Tokens of all trees, what all prompts begin with counted once."""
    prompts = [tree.nodes[0].tokens for tree in trees]
    shared = 0
    while all(
        len(prompt) > shared + 1 and prompt[shared] == prompts[0][shared] for prompt in prompts
    ):
        shared += 1
    return sum(tree.tokens() for tree in trees) - shared * (len(trees) - 1)


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """The engines that searches make, in turn."""
    made = []

    class Kept(Engine):
        def __init__(self, *words, **more):
            super().__init__(*words, **more)
            made.append(self)

    monkeypatch.setattr("mcts.Engine", Kept)
    monkeypatch.setattr("eval.Engine", Kept)
    return made


def test_nothing_is_fed_twice(model, tokenizer, engines):
    """Catches prefixes that are fed again, lanes that idle at the model's cost, and a few-shot
    prompt fed for each question."""
    few_shot = StepTokenizer(tokenizer.tokenizer, [0], "1+1\n1+1=2 #### 2\n{question}\n")
    for words in (tokenizer, few_shot):
        trees = list(search_trees(model, words, QUESTIONS, CONFIG))
        written = sum(tree.tokens() - len(tree.nodes[0].tokens) for tree in trees)
        merged = engines[-1].sampled_tokens - written
        assert merged >= 0 and engines[-1].fed_tokens == unique_tokens(trees) + merged
    assert len(engines) == 2


def test_a_prefix_in_no_row_is_the_prefix_of_every_row(model, tokenizer, engines, monkeypatch):
    """Catches a common prefix that other tokens than its own follow: wrong weights of its share,
    slots, positions or masks."""
    few_shot = StepTokenizer(tokenizer.tokenizer, [0], "1+1\n1+1=2 #### 2\n{question}\n")
    found = []
    for shortest in (1, 1000):
        monkeypatch.setattr("engine.SHORT_PREFIX", shortest)
        trees = search_trees(model, few_shot, QUESTIONS, CONFIG)
        found.append({tree.id: tree.nodes for tree in trees})
    assert engines[0].prefix_outside > 5 and engines[1].prefix_outside == 0
    for name, nodes in found[0].items():
        assert [node.tokens for node in nodes] == [node.tokens for node in found[1][name]]
        for figure in ("logp", "value"):
            wanted = [getattr(node, figure) for node in found[1][name]]
            assert [getattr(node, figure) for node in nodes] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_samples_do_not_depend_on_the_neighbours(model, tokenizer, in_flight):
    """Catches trees that change with the number of rows or with the questions searched beside
    them."""
    config = replace(CONFIG, in_flight=in_flight, cache_tokens=20000)
    alone = {tree.id: tree for tree in search_trees(model, tokenizer, QUESTIONS, config)}
    others = replace(config, search_rows=2, cache_tokens=10000)
    for tree in search_trees(model, tokenizer, QUESTIONS[::-2], others):
        wanted = [node.tokens for node in alone[tree.id].nodes]
        assert [node.tokens for node in tree.nodes] == wanted


@pytest.mark.parametrize("tokens", [3000, 20000])
def test_ticks_of_static_shapes(model, tokenizer, tokens, monkeypatch, engines):
    """Catches ticks whose shapes depend on what is live, which no CUDA graph can replay, dead lanes
    that touch live ones, and other trees: also of searches that moved to another row, because
    those that ended had left too many empty."""
    config = replace(CONFIG, cache_tokens=tokens)
    wanted = {tree.id: tree for tree in search_trees(model, tokenizer, QUESTIONS, config)}
    first = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda *words: first(*words, static=True))
    found = {tree.id: tree for tree in search_trees(model, tokenizer, QUESTIONS, config)}
    assert found.keys() == wanted.keys()
    for name, tree in found.items():
        others = wanted[name].nodes
        assert [node.tokens for node in tree.nodes] == [node.tokens for node in others]
        values = [node.value for node in others]
        assert [node.value for node in tree.nodes] == pytest.approx(values, abs=1e-4)
    assert [engine.static for engine in engines] == [False, True]
    kept, of_all = (engine.cache.slots_L2BSGK.shape[2] for engine in engines)
    assert 1 <= kept <= of_all / 2
    shapes = engines[1].device_tick.graphs
    assert len({tuple(shape[:3] for shape in key) for key in shapes}) == 1  # but for slots read
    slots = engines[1].room.slots
    assert {key[-1][3] for key in shapes} <= {*range(256, slots, 256), slots}


def test_sampling_follows_the_distribution(tokenizer):
    """Catches a wrong inverse of the cumulative distribution, and a temperature that also tempers
    what is recorded."""
    logits_V = torch.linspace(-1, 1, tokenizer.tables_4V.shape[1] + 2)
    uniform_X = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    token_X, logp_X = tokenizer.draw(logits_V.expand(4000, -1), uniform_X, 0.5)
    wanted_V = (logits_V[:-2] / 0.5).softmax(-1)
    counted_V = torch.bincount(token_X, minlength=len(wanted_V)) / 4000
    torch.testing.assert_close(counted_V, wanted_V, atol=1e-3, rtol=0)
    torch.testing.assert_close(logp_X, logits_V.log_softmax(-1)[token_X], atol=1e-5, rtol=0)


def test_a_cpu_samples_a_few_rows_at_a_time(tokenizer, monkeypatch):
    """Catches parts that are drawn with other parts' random numbers, or joined in another order."""
    logits_XV = torch.randn(50, tokenizer.tables_4V.shape[1] + 2)
    uniform_X = torch.rand(50)
    for temperature in (0, 0.7):
        wanted = tokenizer.draw(logits_XV, uniform_X, temperature)
        monkeypatch.setattr("data.IN_CACHE", 3 * logits_XV.shape[1])
        found = tokenizer.draw(logits_XV, uniform_X, temperature)
        monkeypatch.undo()
        assert all(map(torch.equal, found, wanted))


def test_trees_survive_their_file(tmp_path, model, tokenizer):
    """Catches fields lost or rounded between search and training."""
    trees = list(search_trees(model, tokenizer, QUESTIONS[:3], CONFIG))
    write_trees(tmp_path / "trees.jsonl", trees)
    assert read_trees(tmp_path / "trees.jsonl") == trees


def test_a_tree_keeps_parents_before_children():
    """Catches a stored order that readers and the packer cannot follow."""
    root = Node(tokens=[1])
    a = child_of(root)
    b = child_of(root)
    child_of(a)
    child_of(b)
    tree = to_tree(Question("q", "?", "1"), root, 2, "simulations")
    assert [node.parent for node in tree.nodes] == [-1, 0, 0, 1, 2]


def test_a_search_that_asks_for_more_than_it_said_ends_cleanly(model, tokenizer):
    """Catches steps written past the store's end: further expansions are refused like any others
    without room, with an empty list."""
    refused = []

    def endless(question, root):
        rounds = 0
        node = root
        while children := (yield [node] * 2):
            rounds += 1
            node = next((child for child in children if not child.ending), root)
        refused.append(children)
        return rounds

    config = SearchConfig(max_depth=20, max_step_tokens=4, cache_tokens=8000)
    demand = Demand(2, 1.0, expansions=4)
    engine = Engine(model, tokenizer, QUESTIONS[:3], demand, config, rows=3)
    rounds = [count for _, _, count in engine.run(endless, "endless")]
    assert len(rounds) == 3 and all(4 <= count < 100 for count in rounds)
    assert refused == [[], [], []]


@pytest.mark.parametrize("asked", ["nothing", "too many", "terminal"])
def test_a_search_that_breaks_its_demand_is_stopped(model, tokenizer, asked):
    """Catches a search that asks for nothing and is run for ever, one whose further nodes are
    dropped without a word, and one that extends a finished solution."""

    def search(question, root):
        children = yield [root] * 2
        ended = [child for child in children if child.ending]
        yield {"nothing": [], "too many": [root] * 3, "terminal": ended[:1]}[asked]

    config = SearchConfig(max_step_tokens=1, cache_tokens=8000)  # every step is cut
    engine = Engine(model, tokenizer, QUESTIONS[:2], Demand(2, 1.0, expansions=4), config, rows=2)
    with pytest.raises(ValueError, match="its Demand allows 2 lanes, 1 paths"):
        list(engine.run(search, "broken"))


def test_random_numbers_stay_below_one():
    """Catches a float64 just below 1 that becomes 1 in float32, which draws the last id."""
    lane = Lane(0, 0, 0)
    lane.start(Node(path_tokens=3), np.array([0.25, np.nextafter(1.0, 0.0)]))
    assert lane.uniform[0] == 0.25 and 0.999 < lane.uniform[1] < 1


@pytest.mark.parametrize("strategy", [None, "majority:3", "beam:2,3", "mcts:4"])
def test_the_cache_holds_no_more_than_is_allowed(model, tokenizer, strategy, engines):
    """Catches a cache of more than --cache-tokens where prompts differ in length."""
    questions = [Question(str(n), "+".join("1" * n), "1") for n in (1, 12)] * 4
    questions = [replace(one, id=str(place)) for place, one in enumerate(questions)]
    config = replace(CONFIG, cache_tokens=2500, tree_tokens=300)
    if strategy:
        answer_questions(model, tokenizer, questions, strategy, config, AnswerConfig())
    else:
        list(search_trees(model, tokenizer, questions, config))
    room = engines[0].room
    cache = engines[0].cache
    assert room.rows * (room.slots + room.store) <= 2500 and room.rows > 1
    parts = (cache.slots_L2BSGK, cache.store_L2BSGK)
    token_bytes = cache.slots_L2BSGK[:, :, 0, 0].nbytes
    stored = sum(part.untyped_storage().nbytes() for part in parts) / token_bytes
    assert stored == room.rows * (room.slots + room.store)
