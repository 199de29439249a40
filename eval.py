"""Answering with every strategy at a known budget of tokens, and how good the value is at judging steps.

    python eval.py --model FOLDER --data SPEC --strategy greedy majority:5 best:5 beam:3,5 mcts:16 --json out.json
    python eval.py --model FOLDER --data SPEC --budget --json curve.json      accuracy against sampled tokens, with a figure

Every strategy is a generator for the driver of mcts.py: it yields nodes to extend and returns the node it answers with.

Dimension key: B rows, T tokens, D width, X tokens of a pack, M sampled tokens, E nodes of a pack.
"""
import dataclasses
import math
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from data import Question, SourceConfig, StepTokenizer, extract_answer, grade, is_correct, load_source, parse_args, \
    read_trees, run_command, to_tree
from mcts import Driver, Node, SearchConfig, backup, grader, mcts, search_trees
from model import Llama, block_mask, load_model, tree_mask
from support.diagnosis import diagnose
from support.figures import draw_run
from support.files import write_json
from support.packing import Pack
from support.page import show_trees
from support.ranks import gather, share
from support.reports import draw_budget, print_answers, print_audit, print_diagnosis
from support.tree_files import check_tokens
from svpo import InputError, Tree, flag, pack, sibling_pairs, step_logp, token_logp

BUDGET = ("greedy", "majority:1", *(f"{name}:{count}" for name in ("majority", "best") for count in (2, 4, 8, 16, 32)),
          "beam:1,2", "beam:1,3", "beam:1,5", "beam:1,10", "beam:2,5", "beam:3,5", "beam:5,5", "mcts:2", "mcts:4", "mcts:8", "mcts:16")


@dataclass(frozen=True)
class AnswerConfig:
    """Answering new questions."""
    answer_temperature: float = flag(0.6, "of all strategies but greedy (0) and sampled (1); AlphaMath: 0.6 in its config, "
                                          "1.0 in its table", built_in=0.3, least=0)
    answer_lanes: int = flag(32, "steps decoded at once, over all questions", built_in=512, least=1)


# --------------------------------------------------------------------------------------------- strategies

def samples(root: Node, count: int, choose: Callable):
    """`count` whole solutions, sampled independently; `choose` picks one of those that state an answer."""
    solutions = yield [root] * count
    answered = [node for node in solutions or [] if node.ending == "answer"]
    return choose(answered) if answered else None


def sample_group(root: Node, count: int, grade: Callable):
    """GRPO's group: `count` whole solutions as one tree, each backed up alone; steps that begin alike are one node."""
    for last in (yield [root] * count) or []:
        node = root
        for step in last.path():
            twin = next((child for child in node.children if child.tokens == step.tokens), None)
            if twin is None:
                node.children.append(step)
                step.parent = node
            node = twin or step
        node.ending = node.ending or "deep"
        node.reward = grade(node)
        backup(node, node.reward)


def majority(answered: list[Node]) -> Node:
    """A solution whose answer occurs most often; answers that grade as equal are one. The earliest wins a tie."""
    groups = []
    for node in answered:
        answer = extract_answer(node.text)
        group = next((group for group in groups if is_correct(answer, extract_answer(group[0].text))), None)
        group.append(node) if group else groups.append([node])
    return max(groups, key=len)[0]


def best_value(answered: list[Node]) -> Node:
    """The solution of highest V at its end (best-of-n)."""
    return max(answered, key=lambda node: node.value)


def beam_search(root: Node, beam_width: int, expand_width: int, max_depth: int):
    """Step-level beam search SBS(B1, B2) (AlphaMath algorithm 2), B1 = beam_width, B2 = expand_width.

    Keep the B1 partial solutions whose newest step has the highest V among B2 sampled steps from each (B1 * B2 from the
    root); finished ones leave the beam and shrink it; the answer is the finished solution of highest V. Steps that can
    never answer (cut, ended without an answer, at max_depth) are dropped first: our choice.
    """
    beam, finished = [root], []
    while beam and len(finished) < beam_width:
        open_width = beam_width - len(finished)
        children = yield [node for node in beam for _ in range(expand_width * (beam_width if node is root else 1))]
        useful = [child for child in children or [] if child.ending == "answer" or not child.ending and child.depth < max_depth]
        different = {(id(child.parent), tuple(child.tokens)): child for child in useful}.values()
        best = sorted(different, key=lambda child: -child.value)[:open_width]
        finished += [child for child in best if child.ending]
        beam = [child for child in best if not child.ending]
    return max(finished, key=lambda child: child.value) if finished else None


def tree_search(root: Node, config: SearchConfig, rng: random.Random):
    """MCTS with lambda = 0 (AlphaMath section 3): stated answers are scored by V, as the right one is not known; steps that
    can never answer by -1 (our choice). Then down by Q, towards solutions that state an answer."""
    yield from mcts(root, config, lambda node: node.value if node.ending == "answer" else -1.0, rng)

    def answers(node):
        return node.ending == "answer" or any(map(answers, node.children))
    node = root if answers(root) else None
    while node and node.children:
        node = max(filter(answers, node.children), key=lambda child: child.q_value)
    return node


@dataclass(frozen=True)
class Plan:
    """What the driver needs to know of a strategy."""
    lanes: int  # steps or solutions decoded at once for a question, at most
    paths: int  # partial solutions extended at once, at most
    expansions: int  # extensions that the cache has room for in any case; later ones may find none, and get None for children
    through: int  # steps that a lane runs through by itself; 1: the generator chooses after each
    temperature: float
    start: Callable  # (question, root) -> generator


SEARCHES = {}  # further ones: name -> function of (the numbers after its name, SearchConfig, temperature) that returns a Plan


def plan(strategy: str, search: SearchConfig = SearchConfig(), config: AnswerConfig = AnswerConfig(), seed: int = 0) -> Plan:
    """`greedy`, `sampled`, `majority:K`, `best:K`, `beam:B1,B2` or `mcts:SIMULATIONS`; other names raise InputError."""
    name, _, text = strategy.partition(":")
    numbers = [int(number) if number.isdecimal() else 0 for number in text.split(",")] if text else []
    temperature = {"greedy": 0.0, "sampled": 1.0}.get(name, config.answer_temperature)
    if name in SEARCHES:
        try:
            return SEARCHES[name](numbers, search, temperature)
        except (IndexError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"--strategy {strategy}: its numbers do not fit ({error})")
    if len(numbers) != {"greedy": 0, "sampled": 0, "beam": 2}.get(name, 1) or min(numbers, default=1) < 1 or name not in (
            "greedy", "sampled", "majority", "best", "beam", "mcts"):
        raise InputError(f"unknown strategy {strategy!r}; there are " + ", ".join(
            ["greedy", "sampled", "majority:K", "best:K", "beam:B1,B2", "mcts:N", *SEARCHES]))
    if name == "beam":
        return Plan(numbers[0] * numbers[1], numbers[0], search.max_depth, 1, temperature,
                    lambda question, root: beam_search(root, *numbers, search.max_depth))
    if name == "mcts":
        config = dataclasses.replace(search, simulations=numbers[0], leaf_value=True)
        return Plan(search.expand_width, 1, numbers[0], 1, temperature,
                    lambda question, root: tree_search(root, config, random.Random(f"{seed} {question.id}")))
    count, choose = numbers[0] if numbers else 1, best_value if name == "best" else majority
    return Plan(count, 1, 1, search.max_depth, temperature, lambda question, root: samples(root, count, choose))


def answer_questions(model: Llama, tokenizer: StepTokenizer, questions: list[Question], strategy: str,
                     search: SearchConfig, config: AnswerConfig, seed: int = 0) -> dict:
    """Answer every question once, each rank its share; accuracy with its standard error, and what a question cost."""
    chosen = plan(strategy, search, config, seed)
    driver = Driver(model, tokenizer, share(questions), max(1, config.answer_lanes // chosen.lanes), chosen.lanes, chosen.temperature,
                    search, chosen.expansions, seed, chosen.paths, chosen.through, fit=True)
    begin, answers = time.perf_counter(), []
    for question, root, node in driver.run(chosen.start, f"answer {strategy}"):
        text = "".join(step.text for step in node.path()) if node else ""
        stated = extract_answer(node.text) if node and node.ending == "answer" else None
        correct, stage = grade(stated, question.answer)
        answers.append({"id": question.id, "text": text, "answer": stated, "reference": question.answer, "correct": correct,
                        "graded_by": stage})
    answers, count = gather(answers), len(questions)
    costs = {name: sum(gather([getattr(driver, name)])) / count for name in ("sampled_tokens", "fed_tokens", "steps")}
    accuracy = sum(row["correct"] for row in answers) / count
    return {"strategy": strategy, "questions": count, "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
            "stated": sum(row["answer"] is not None for row in answers) / count,
            **costs, "seconds": (time.perf_counter() - begin) / count,
            "answers": sorted(answers, key=lambda row: row["id"])}


# --------------------------------------------------------------------------------------------- judging steps

def score(model, packed: Pack, needed_E: Tensor | None = None, dropout_ED: Tensor | None = None):
    """log pi of each sampled token (M,) and V of each node (E,) from one pass of `model` (model.Llama) over a pack; the
    tokens are those of the `needed_E` nodes where that is given. Also returns their nodes (M,)."""
    device = next(model.parameters()).device
    chosen = slice(None) if needed_E is None else needed_E[packed.node_M]
    token_M, predictor_M, node_M, last_E, token_BT, position_BT, end_BT = (part.to(device) for part in (
        packed.token_BT.flatten()[packed.target_M][chosen], packed.predictor_M[chosen], packed.node_M[chosen], packed.last_E,
        packed.token_BT, packed.position_BT, packed.subtree_end_BT))

    def read(hidden_BTD):
        hidden_XD = hidden_BTD.flatten(0, 1)
        return token_logp(hidden_XD[predictor_M], model.output_weight(), token_M), model.value(hidden_XD[last_E], dropout_ED)
    mask = block_mask(end_BT) if device.type == "cuda" else tree_mask(end_BT)
    return *model(token_BT, position_BT, mask, read=read), node_M


def passes(trees: list[Tree], tokens: int) -> list[list[int]]:
    """Indices of whole trees in turn, as many as have `tokens` tokens together; 0: all."""
    groups, left = [], 0
    for index, tree in enumerate(trees):
        size = sum(len(node.tokens) for node in tree.nodes)
        if not groups or left < size and tokens:
            groups.append([])
            left = tokens
        groups[-1].append(index)
        left -= size
    return groups


@torch.inference_mode()
def rescore(model: Llama, trees: list[Tree], row_tokens: int = 0, pack_tokens: int = 0) -> list[Tree]:
    """The same trees with the values and log-probabilities of this model."""
    judged = []
    for chunk in ([trees[index] for index in group] for group in passes(trees, pack_tokens or 8192)):
        packed = pack(chunk, row_tokens, next(model.parameters()).device)
        logp_M, value_E, node_M = score(model, packed)
        scores = zip(step_logp(logp_M, node_M, len(value_E)).tolist(), value_E.tolist())
        judged += [dataclasses.replace(tree, nodes=[dataclasses.replace(node, logp=logp, value=value) for node, (logp, value)
                                                    in zip(tree.nodes, scores)]) for tree in chunk]
    return judged


def grow_judged(model: Llama, tokenizer: StepTokenizer, questions: list[Question], search: SearchConfig, seed: int,
                label: str = "sibling accuracy") -> list[Tree]:
    """Trees to measure sibling accuracy on, grown from outcomes alone: the judged value has no part in their labels."""
    return list(search_trees(model, tokenizer, questions, dataclasses.replace(search, leaf_value=False), seed, label))


def grow_groups(model: Llama, tokenizer: StepTokenizer, questions: list[Question], search: SearchConfig, count: int,
                seed: int) -> list[Tree]:
    """A tree of `count` samples (temperature 1) for each question, in their order; their ids must differ."""
    driver = Driver(model, tokenizer, questions, search.search_rows, count, 1.0, search, 1, seed, through=search.max_depth, fit=True)
    ends = driver.ends(lambda question, root: sample_group(root, count, grader(question)))
    trees = {question.id: to_tree(question, root, 1, "samples") for question, root, _ in ends}
    return [trees[question.id] for question in questions]


def sibling_accuracy(trees: list[Tree]) -> dict:
    """How often V ranks the better of two siblings higher: the mean over trees of the share of their pairs.

    The pairs are those of `sibling_pairs` without a gap; 0.5 is chance. The standard error counts trees, not pairs; None
    where there are too few.
    """
    found = [(tree, sibling_pairs(tree)) for tree in trees]
    shares = [sum(tree.nodes[win].value > tree.nodes[lose].value for win, lose, _ in pairs) / len(pairs)
              for tree, pairs in found if pairs]
    return {"trees": len(shares), "accuracy": statistics.fmean(shares) if shares else None,
            "standard_error": statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None}


@dataclass(frozen=True)
class EvalConfig:
    """How to answer, and what else to measure."""
    strategy: tuple = flag(("greedy", "sampled", "beam:1,5", "beam:3,5"), "greedy, sampled, majority:K, best:K, beam:B1,B2, mcts:N")
    budget: bool = flag(False, "answer with every kind of strategy at several sizes instead")
    json: str = flag("", "write the tables and every answer to this file; the curve of --budget beside it, as .png")
    audit: int = flag(0, "print how answers were graded, and N of each strategy's to read", least=0)
    trees: str = flag("", "judge the steps of these trees, whose policy is the reference of the implicit reward; best of questions "
                          "not trained on, searched with --no-leaf-value")
    figures: str = flag("", "draw this run folder, RUN/figures.png, and end; needs matplotlib")
    show: str = flag("", "draw the trees of this file as a page, FILE.html, and end; needs no --data, and --model only where "
                         "it is not told")


def main():
    drawing = any(word.startswith(("--show", "--figures")) for word in sys.argv)
    stages = (SourceConfig, EvalConfig, SearchConfig, AnswerConfig)
    source, config, search, answering = parse_args(__doc__, stages, sys.argv[1:], () if drawing else ("model", "data"))
    if config.show:
        return print(show_trees(Path(config.show), source.model))
    if config.figures:
        def judge(folder, trees):
            return diagnose(trees, rescore(load_model(folder, source.device), trees))
        return print(draw_run(Path(config.figures), judge))
    strategies = BUDGET if config.budget else config.strategy
    for strategy in strategies:
        plan(strategy)
    if config.json and not os.access(Path(config.json).absolute().parent, os.W_OK):
        raise InputError(f"--json {config.json}: its folder does not exist or cannot be written to")
    trees = read_trees(config.trees) if config.trees else []
    model, tokenizer, questions = load_source(source)
    check_tokens(trees, model.config.vocab_size, config.trees)
    row = {"model": source.model, "answers": []}
    for strategy in strategies:
        row["answers"].append(answer_questions(model, tokenizer, questions, strategy, search, answering, source.seed))
        if config.json:
            write_json(Path(config.json), row)
    print(f"\n{source.model} on {len(questions)} questions of {source.data}")
    print_answers(row["answers"])
    if config.audit:
        print_audit(row["answers"], config.audit)
    if trees:
        judged = rescore(model, trees)
        row |= {"siblings": sibling_accuracy(judged), "diagnosis": diagnose(trees, judged)}
        print_diagnosis(row["diagnosis"])
    if config.json:
        write_json(Path(config.json), row)
        if config.budget:
            draw_budget(row["answers"], Path(config.json).with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
