"""minimal.py is the specification. With the same weights and random numbers the fast modules grow
the same trees, compute the same losses and gradients, and choose the same answers."""

import copy
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import LONG, ROOT

import minimal
from data import StepTokenizer, load_questions
from eval import AnswerConfig, answer_questions
from mcts import SearchConfig, search_trees
from model import Llama, LlamaConfig
from svpo import DIVISORS, Batch, LossConfig, learn, loss_sums, score, total_loss

TOKENIZER = StepTokenizer(minimal.TOKENIZER, [minimal.EOS])


def search_config() -> SearchConfig:
    return SearchConfig(
        simulations=minimal.SIMULATIONS,
        expand_width=minimal.EXPAND_WIDTH,
        c_puct=minimal.C_PUCT,
        max_depth=minimal.MAX_DEPTH,
        max_step_tokens=minimal.MAX_STEP_TOKENS,
        search_temperature=minimal.TEMPERATURE,
        search_rows=3,
    )


def fast_trees(model, questions, seed: int) -> list:
    """The trees of the questions, in their order."""
    trees = search_trees(model, TOKENIZER, questions, search_config(), seed)
    found = {tree.id: tree for tree in trees}
    return [found[question.id] for question in questions]


def fast_losses(model, trees: list) -> dict:
    """The terms of the loss of packed trees, and their weighted sum "total"."""
    config = LossConfig(
        "svpo",
        beta=minimal.BETA,
        policy_weight=minimal.POLICY_WEIGHT,
        sft_weight=minimal.SFT_WEIGHT,
        mse_weight=minimal.MSE_WEIGHT,
        margin_weight=minimal.MARGIN_WEIGHT,
        margin=minimal.MARGIN,
        pairs="all",
        min_gap=minimal.MIN_GAP,
    )
    batch = Batch([learn(tree, config) for tree in trees], config)
    sums = loss_sums(*score(model, batch.packed, batch.needed_E), batch, config)
    terms = {}
    for name in ("policy", "sft", "mse", "margin"):
        terms[name] = sums[name] / max(batch.counts[DIVISORS[name]], 1e-8)
    return {"total": total_loss(sums, batch.counts, config), **terms}


def fast_answers(model, questions, strategy: str, temperature: float, seed: int) -> dict:
    """The solution of each question, by its id; empty where there is none."""
    config = AnswerConfig(answer_temperature=temperature)
    found = answer_questions(model, TOKENIZER, questions, strategy, search_config(), config, seed)
    return {answer["id"]: answer["text"] for answer in found["answers"]}


@pytest.fixture(scope="module")
def model() -> Llama:
    """A small model after a little SFT: its steps look like steps, and some answers are right.

    The value head is drawn anew, so that values differ.
    """
    sizes = (TOKENIZER.tokenizer.get_vocab_size(), 32, 96, 2, 4, 2, 8)
    model = Llama(LlamaConfig(*sizes, initializer_range=0.1)).init_weights(0)
    questions = load_questions("arithmetic:sft", 640, 0)
    minimal.train(model, questions, minimal.sft_loss, epochs=20, batch=32, peak_lr=1e-2)
    with torch.no_grad():
        model.value_head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def questions() -> list:
    return load_questions("arithmetic:search", 20, 0)


def breadth_first(root) -> list[tuple]:
    """(node, index of its parent) in the order in which the fast modules store a tree."""
    found = [(root, -1)]
    for index, (node, _) in enumerate(found):  # the list grows
        found += [(child, index) for child in node.children]
    return found


def test_at_most_250_lines():
    """Catches a specification that is too long to be read first."""
    lines = (ROOT / "minimal.py").read_text().splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MAX_DEPTH": 2, "MAX_STEP_TOKENS": 12},  # many cut steps and deep ones
        {"SIMULATIONS": 40, "EXPAND_WIDTH": 2},  # exhausted trees
        {"C_PUCT": 0.0},  # ties: steps that were not visited have Q = 0
    ],
)
def test_the_fast_search_grows_the_same_trees(model, questions, monkeypatch, changes):
    """Catches a search that selects, closes, merges, ends, rewards or backs up in another way, and
    a cache that changes a probability or a value."""
    for name, value in changes.items():
        monkeypatch.setattr(minimal, name, value)
    count, endings = 0, set()
    for question, tree in zip(questions, fast_trees(model, questions, 3)):
        slow = breadth_first(minimal.mcts(model, question, 3))
        assert [parent for _, parent in slow] == [node.parent for node in tree.nodes]
        assert [node.tokens for node, _ in slow[1:]] == [node.tokens for node in tree.nodes[1:]]
        assert slow[0][0].state == tree.nodes[0].tokens
        assert [node.ending for node, _ in slow] == [node.ending for node in tree.nodes]
        assert [node.visit_count for node, _ in slow] == [node.visit_count for node in tree.nodes]
        for (node, _), fast in zip(slow, tree.nodes):
            assert node.q_value == pytest.approx(fast.q_value, abs=1e-5)
            assert node.logp == pytest.approx(fast.logp, abs=1e-4)
            assert node.value == pytest.approx(fast.value, abs=1e-4)
            assert fast.reward == (node.q_value if node.ending else None)
        count += len(slow)
        endings |= {node.ending for node, _ in slow}
    wanted = {"cut", "deep"} if "MAX_DEPTH" in changes else {None, "answer"}
    assert count > 100 and wanted <= endings


@pytest.mark.parametrize("wanted", ["pairs", "no pairs", "nothing right"])
def test_losses_and_gradients_are_the_same(model, questions, monkeypatch, wanted):
    """Catches a packed forest that computes another term than the equation says, or another
    gradient: other pairs or weights, other right solutions, another reference, another divisor;
    also where a divisor is zero."""
    monkeypatch.setattr(minimal, "MIN_GAP", {"no pairs": 3.0}.get(wanted, minimal.MIN_GAP))
    if wanted == "nothing right":
        questions = [SimpleNamespace(id=q.id, text=q.text, answer="none") for q in questions]
    slow = [minimal.mcts(model, question, 3) for question in questions]
    pairs = [pair for root in slow for pair in minimal.step_pairs(root)]
    assert bool(pairs) == (wanted == "pairs") and (len(pairs) > 10 or not pairs)
    assert any(not win.ending for win, _ in pairs) or not pairs
    found = minimal.svpo_losses(model, slow)
    expected = fast_losses(model, fast_trees(model, questions, 3))
    assert set(found) == set(expected)
    for name, term in expected.items():
        assert torch.as_tensor(found[name]).item() == pytest.approx(term.item(), abs=1e-5), name
    parameters = dict(model.named_parameters())
    slow_gradients, fast_gradients = (
        torch.autograd.grad(terms["total"], parameters.values()) for terms in (found, expected)
    )
    for name, ours, theirs in zip(parameters, slow_gradients, fast_gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "strategy, sizes",
    [
        ("greedy", (1, 1, 0.0)),
        ("beam:1,5", (1, 5, 0.3)),
        ("beam:3,4", (3, 4, 1.0)),
        ("beam:2,3", (2, 3, 2.0)),
    ],
)
def test_beam_search_chooses_the_same_solutions(model, questions, strategy, sizes):
    """Catches a beam that is ranked, narrowed, filtered or sampled in another way."""
    fast = fast_answers(model, questions, strategy, sizes[2], 3)
    for question in questions:
        text = minimal.sbs(model, question, *sizes, 3)
        assert text.removeprefix(question.text + "\n") == fast[question.id], question.text
    assert len(set(fast.values())) > 3


def test_every_line_runs(model, monkeypatch, capsys):
    """Catches a crash in what the other tests do not call: the loop, what it prints."""
    monkeypatch.setattr(minimal, "QUESTIONS", {"sft": 64, "search": 16, "test": 3})
    monkeypatch.setattr(minimal, "SIMULATIONS", 6)
    trained = SimpleNamespace(init_weights=lambda seed: copy.deepcopy(model))
    monkeypatch.setattr(minimal, "Llama", lambda config: trained)
    minimal.main(0)
    printed = capsys.readouterr().out
    for stage in ("SFT", "SVPO"):
        for name in ("greedy", "SBS(1,5)", "SBS(3,5)"):
            line = rf"{stage} +{re.escape(name)} +\d+\.\d \+- \d+\.\d\n"
            assert re.search(line, printed), (stage, name)
    assert printed.count("Q +") == printed.count("Q -") == 1


def test_the_seed_is_its_only_flag():
    """Catches a command that does not start, and flags that grow."""
    run = [sys.executable, "minimal.py", "--help"]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"--\w+", text)) == {"--help", "--seed"}


@pytest.mark.skipif(not LONG, reason="minutes: SVPO_LONG=1 runs it")
def test_it_learns():
    """Catches numbers of steps or questions with which a student sees nothing learned."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = [sys.executable, "minimal.py"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=environment)
    shares = {
        (stage, name): (float(share), float(error))
        for stage, name, share, error in re.findall(
            r"(SFT|SVPO) +(\S+) +(\S+) \+- (\S+)", done.stdout
        )
    }
    for name in ("greedy", "SBS(1,5)", "SBS(3,5)"):
        (before, error), (after, other) = shares["SFT", name], shares["SVPO", name]
        assert after - before > 2 * (error**2 + other**2) ** 0.5, name
