"""Answering with every strategy at a known cost, and how good the value is at judging steps.

    python eval.py --model FOLDER --data SPEC --strategy greedy weighted:5 beam:3,5 mcts:16
    python eval.py --model FOLDER --data SPEC --budget --json curve.json
                                            accuracy against sampled tokens, with a figure
    python eval.py --model FOLDER --score FILE --json values.jsonl
                                            V after each step of the solutions in a file
    python eval.py --show TREES             the trees of a file as a page

A strategy is a generator for the engine (engine.py): it yields the nodes it wants extended,
receives their children, and returns the node that it answers with, or None.
"""

import dataclasses
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import (
    RECIPES,
    Question,
    SourceConfig,
    StepTokenizer,
    Tree,
    check_reward,
    check_token_ids,
    find_source,
    fitting,
    outcome_of,
    question_files,
    read_solutions,
    read_trees,
    solution_tree,
)
from engine import Demand, Engine, Node, context_of, load_source
from mcts import SearchConfig, demand_of, mcts, search_trees
from model import Llama, load_model
from support.figures import draw_budget, draw_run
from support.files import check_output, is_plain, read_json, write_json, write_lines
from support.flags import InputError, flag, parse_args, run_command
from support.hugging_face import model_files
from support.page import shorten, write_page
from support.progress import progress
from support.ranks import (
    gather,
    join_ranks,
    leave_ranks,
    on_rank_0,
    rank_share,
    use_device,
    world_size,
)
from support.tables import print_answers, print_audit, print_diagnosis, print_first_errors
from svpo import (
    PASS_TOKENS,
    group_by_tokens,
    outcomes_below,
    rescore,
    sibling_pairs,
    sums_below,
)
from tasks.grading import compare_answers, extract_answer, is_correct

BUDGET = (  # the strategies of --budget
    "greedy",
    *(f"majority:{count}" for count in (1, 2, 4, 8, 16, 32)),
    *(f"best:{count}" for count in (2, 4, 8, 16, 32)),
    *(f"weighted:{count}" for count in (4, 8, 16, 32)),
    *(f"beam:1,{count}" for count in (2, 3, 5, 10)),
    *(f"beam:{count},5" for count in (2, 3, 5)),
    *(f"vote:{count},5" for count in (3, 5)),
    *(f"mcts:{count}" for count in (2, 4, 8, 16)),
)


@dataclass(frozen=True)
class AnswerConfig:
    """Answering new questions."""

    answer_temperature: float = flag(
        0.6,
        "of all strategies but greedy (0) and sampled (1); AlphaMath: 0.6 in its config, 1.0 in "
        "its table",
        least=0,
    )
    answer_lanes: int = flag(32, "steps decoded at once, over all questions", least=1)


# ------------------------------------------------------------------------------------- strategies


STATED = ("answer",)  # endings of solutions that a strategy may answer with


def samples(
    root: Node, count: int, choose: Callable[[list[Node]], Node], ends: tuple = STATED
) -> Generator[list[Node], list[Node], Node | None]:
    """Sample `count` whole solutions independently; `choose` picks one with an ending of `ends`."""
    solutions = yield [root] * count
    answered = [node for node in solutions if node.ending in ends]
    return choose(answered) if answered else None


def majority(answered: list[Node], weight: Callable[[Node], float] = lambda node: 1) -> Node:
    """A solution whose answer occurs most often, or has the largest sum of weights.

    Answers that grade as equal are one. The earliest wins a tie.
    """
    groups = []
    for node in answered:
        answer = extract_answer(node.text)
        for group in groups:
            if is_correct(answer, extract_answer(group[0].text)):
                group.append(node)
                break
        else:
            groups.append([node])
    return max(groups, key=lambda group: sum(map(weight, group)))[0]


def weighted(answered: list[Node]) -> Node:
    """A vote in which each solution counts (V + 1) / 2, its chance to be right.

    Weights of a verifier: arXiv 2206.02336; that they are V's chance is our choice.
    """
    return majority(answered, lambda node: (node.value + 1) / 2)


def best_value(answered: list[Node]) -> Node:
    """The solution of highest V at its end (best-of-n)."""
    return max(answered, key=lambda node: node.value)


def ends_of(search: SearchConfig, choose: Callable = best_value) -> tuple:
    """The endings of solutions that a strategy may answer with.

    A --reward also judges solutions that end without an answer; a vote cannot take these.
    """
    return (*STATED, "eos") if search.reward and choose is best_value else STATED


def beam_search(
    root: Node,
    beam_width: int,
    expand_width: int,
    max_depth: int,
    choose: Callable[[list[Node]], Node] = best_value,
    ends: tuple = STATED,
) -> Generator[list[Node], list[Node], Node | None]:
    """Step-level beam search SBS(B1, B2) (AlphaMath algorithm 2).

    B1 = beam_width, B2 = expand_width. Keep the B1 partial solutions whose newest step has the
    highest V, among B2 sampled steps from each (B1 * B2 from the root). Finished ones leave the
    beam and shrink it. `choose` takes one of them for the answer: the one of highest V, as in the
    paper, or the winner of a vote. Steps that can never answer (cut, ended without an answer, at
    max_depth) are dropped first, as in the official code.
    """
    beam = [root]
    finished = []
    while beam and len(finished) < beam_width:
        open_width = beam_width - len(finished)
        copies = expand_width * (beam_width if beam == [root] else 1)
        children = yield [node for node in beam for _ in range(copies)]
        useful = [child for child in children if can_answer(child, max_depth, ends)]
        different = {(id(child.parent), tuple(child.tokens)): child for child in useful}
        best = sorted(different.values(), key=lambda child: -child.value)[:open_width]
        finished += [child for child in best if child.ending]
        beam = [child for child in best if not child.ending]
    return choose(finished) if finished else None


def can_answer(node: Node, max_depth: int, ends: tuple = STATED) -> bool:
    """Whether a node is an answer (an ending of `ends`), or can still be extended."""
    return node.ending in ends or (not node.ending and node.depth < max_depth)


def tree_search(
    root: Node, config: SearchConfig, rng: random.Random
) -> Generator[list[Node], list[Node], Node | None]:
    """MCTS with lambda = 0 (AlphaMath section 3), then down by Q.

    The right answer is not known, so stated answers are scored by V. Steps that can never answer
    are scored -1, and the walk goes only towards stated answers; both as in the official code.
    """
    ends = ends_of(config)
    yield from mcts(root, config, lambda node: node.value if node.ending in ends else -1.0, rng)

    def answers(node):
        return node.ending in ends or any(map(answers, node.children))

    if not answers(root):
        return None
    node = root
    while node.children:
        node = max(filter(answers, node.children), key=lambda child: child.q_value)
    return node


@dataclass(frozen=True)
class Strategy:
    """A way to answer a question: what it asks of the engine, and its generator."""

    demand: Demand
    start: Callable[[Question, Node], Generator]


# strategies of your own: name -> function of (the numbers after the name, SearchConfig,
# temperature) that returns a Strategy
STRATEGIES = {}
FORMS = (  # of those that there are
    "greedy",
    "sampled",
    "majority:K",
    "best:K",
    "weighted:K",
    "beam:B1,B2",
    "vote:B1,B2",
    "mcts:N",
)
NUMBERS = {form.partition(":")[0]: form.count(":") + form.count(",") for form in FORMS}


def parse_strategy(
    text: str,
    search: SearchConfig | None = None,
    config: AnswerConfig | None = None,
    seed: int = 0,
) -> Strategy:
    """The strategy that a text of one of the FORMS names, or an entry of STRATEGIES.

    InputError for any other name, or numbers that do not fit.
    """
    search = search or SearchConfig()
    config = config or AnswerConfig()
    name, _, rest = text.partition(":")
    parts = rest.split(",") if rest else []
    numbers = [int(part) if part.isdecimal() else 0 for part in parts]
    if name in STRATEGIES:
        try:
            return STRATEGIES[name](numbers, search, config.answer_temperature)
        except (IndexError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"--strategy {text}: its numbers do not fit ({error})")
    if len(numbers) != NUMBERS.get(name) or min(numbers, default=1) < 1:
        known = ", ".join([*FORMS, *STRATEGIES])
        raise InputError(f"unknown strategy {text!r}; there are {known}")
    if name in ("beam", "vote"):
        choose = weighted if name == "vote" else best_value
        return beam_strategy(*numbers, search, config.answer_temperature, choose)
    if name == "mcts":
        return mcts_strategy(*numbers, search, config.answer_temperature, seed)
    temperature = {"greedy": 0.0, "sampled": 1.0}.get(name, config.answer_temperature)
    count = numbers[0] if numbers else 1
    choose = {"majority": majority, "weighted": weighted}.get(name, best_value)
    ends = ends_of(search, choose)
    demand = Demand(count, temperature, expansions=1, steps_per_lane=search.max_depth)
    return Strategy(demand, lambda question, root: samples(root, count, choose, ends))


def beam_strategy(
    beam_width: int, expand_width: int, search: SearchConfig, temperature: float, choose: Callable
) -> Strategy:
    """Step-level beam search as a strategy; `choose` picks one of the finished solutions."""
    ends = ends_of(search, choose)
    lanes = beam_width * expand_width
    demand = Demand(lanes, temperature, search.max_depth, paths=beam_width, moves_on=True)

    def start(question, root):
        return beam_search(root, beam_width, expand_width, search.max_depth, choose, ends)

    return Strategy(demand, start)


def mcts_strategy(
    simulations: int, search: SearchConfig, temperature: float, seed: int
) -> Strategy:
    """MCTS with V in place of outcomes as a strategy."""
    config = dataclasses.replace(
        search, simulations=simulations, leaf_value=True, search_temperature=temperature
    )

    def start(question, root):
        return tree_search(root, config, random.Random(f"{seed} {question.id}"))

    return Strategy(demand_of(config), start)


def answer_questions(
    model: Llama,
    tokenizer: StepTokenizer,
    questions: list[Question],
    strategy: str,
    search: SearchConfig,
    config: AnswerConfig,
    seed: int = 0,
) -> dict:
    """Answer every question once, each rank its share.

    Returns accuracy with its standard error, the mean reward if there is a --reward, what a
    question cost (tokens, steps, seconds), and every answer.
    """
    chosen = parse_strategy(strategy, search, config, seed)
    rows = max(1, config.answer_lanes // chosen.demand.lanes)
    mine = rank_share(questions)
    engine = Engine(model, tokenizer, mine, chosen.demand, search, rows, seed, fit=True)
    begin = time.perf_counter()
    answers = []
    for question, _, node in engine.run(chosen.start, f"answer {strategy}"):
        answers.append(grade_solution(question, node, search.reward))
    answers = gather(answers)
    count = len(questions)
    accuracy = sum(answer["correct"] for answer in answers) / count
    costs = {}
    for name in ("sampled_tokens", "fed_tokens", "steps"):
        costs[name] = sum(gather([getattr(engine, name)])) / count
    return {
        "strategy": strategy,
        "questions": count,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "stated": sum(answer["answer"] is not None for answer in answers) / count,
        **mean_reward([answer["reward"] for answer in answers if "reward" in answer]),
        **costs,
        "seconds": (time.perf_counter() - begin) / count,
        "answers": sorted(answers, key=lambda answer: answer["id"]),
    }


def mean_reward(rewards: list[float]) -> dict:
    """The mean of the rewards with its standard error; nothing if there are none."""
    if not rewards:
        return {}
    error = statistics.pstdev(rewards) / math.sqrt(len(rewards))
    return {"reward": statistics.fmean(rewards), "reward_error": error}


def grade_solution(question: Question, node: Node | None, reward: str = "") -> dict:
    """An answer as it stands in JSON, with the stage of grading that decided.

    `reward` is the value of --reward; without an answer the reward is -1.
    """
    text = "".join(step.text for step in node.path()) if node else ""
    stated = extract_answer(node.text) if node and node.ending == "answer" else None
    correct, stage = compare_answers(stated, question.answer)
    rewarded = {}
    if reward:
        rewarded["reward"] = outcome_of(question, reward)(node) if node else -1.0
    return {
        "id": question.id,
        "text": text,
        "answer": stated,
        "reference": question.answer,
        "correct": correct,
        "graded_by": stage,
        **rewarded,
    }


# ---------------------------------------------------------------------------------- judging steps


def grow_judged(
    model: Llama,
    tokenizer: StepTokenizer,
    questions: list[Question],
    search: SearchConfig,
    seed: int,
    label: str = "sibling accuracy",
) -> list[Tree]:
    """Trees to measure sibling accuracy on.

    They are grown from outcomes alone: the value that is judged has no part in their labels.
    """
    outcomes_only = dataclasses.replace(search, leaf_value=False)
    return list(search_trees(model, tokenizer, questions, outcomes_only, seed, label))


def sibling_accuracy(trees: list[Tree]) -> dict:
    """How often V ranks the better of two siblings higher: the mean over trees of their share.

    The pairs are those of `sibling_pairs` without a gap; 0.5 is chance. The standard error counts
    trees, not pairs; None if there are too few.
    """
    shares = []
    for tree in trees:
        pairs = sibling_pairs(tree)
        gaps = [tree.nodes[win].value - tree.nodes[lose].value for win, lose, _ in pairs]
        right = sum(map(ranked, gaps))
        if pairs:
            shares.append(right / len(pairs))
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None
    return {
        "trees": len(shares),
        "accuracy": statistics.fmean(shares) if shares else None,
        "standard_error": error,
    }


def ranked(gap: float) -> float:
    """1 if a judge puts the better sibling higher, by `gap`; ties (under 0.001) count half."""
    return 0.5 if abs(gap) < 1e-3 else float(gap > 0)


def diagnose(trees: list[Tree], judged: list[Tree]) -> dict:
    """How well a model judges the steps of searched trees; `judged` are rescored with it.

    `by_depth` has pairs per tree and the share that is ranked right, by V, by the implicit reward
    and by mean log-probability (`pair_gaps`). Pooled over the steps of all trees: `calibration` of
    (V + 1) / 2 as the chance to end correctly, its expected error, and the AUC of V for last steps
    and the others, against the outcomes that search found. With a --reward the chance is the mean
    of (reward + 1) / 2 over the ends below a step.
    """
    depths = {}
    chance, value, last = [], [], []
    for tree, scored in zip(trees, judged):
        for win, lose, _ in sibling_pairs(tree):
            gaps = pair_gaps(tree, scored, win, lose)
            depths.setdefault(len(tree.path(win)), []).append([ranked(gap) for gap in gaps])
        is_end = [node.reward is not None for node in tree.nodes]
        shares = [(node.reward + 1) / 2 if end else 0 for node, end in zip(tree.nodes, is_end)]
        below = zip(sums_below(tree, shares), sums_below(tree, is_end))
        for index, (share, ends) in enumerate(below):
            if index and ends:
                chance.append(share / ends)
                value.append(scored.nodes[index].value)
                last.append(is_end[index])
    chance, value, last = np.array(chance), np.array(value), np.array(last, dtype=bool)
    by_depth = []
    for depth, rows in sorted(depths.items()):
        shares = zip(("value", "implicit_reward", "mean_logp"), np.mean(rows, axis=0).tolist())
        row = {"depth": depth, "pairs_a_tree": len(rows) / len(trees)}
        by_depth.append(row | dict(shares))
    calibration = calibrate(value, chance)
    gaps = [row["steps"] * abs(row["predicted"] - row["found"]) for row in calibration]
    return {
        "by_depth": by_depth,
        "calibration": calibration,
        "auc_steps": soft_auc(value[~last], chance[~last]),
        "auc_ends": soft_auc(value[last], chance[last]),
        "calibration_error": sum(gaps) / len(value) if len(value) else None,
    }


def pair_gaps(tree: Tree, judged: Tree, win: int, lose: int) -> tuple[float, float, float]:
    """By how much a judge puts one sibling above another, in three ways.

    By V; by the implicit reward (DPO section 4) without its factor beta, log pi - log ref, with the
    policy that grew the trees as the reference; and by the mean token log-probability.
    """

    def scores(index):
        node = judged.nodes[index]
        implicit = node.logp - tree.nodes[index].logp
        return node.value, implicit, node.logp / max(1, sum(node.sampled))

    value, reward, mean_logp = (w - l for w, l in zip(scores(win), scores(lose)))
    return value, reward, mean_logp


def calibrate(value: np.ndarray, chance: np.ndarray) -> list[dict]:
    """(V + 1) / 2 against the chance to end correctly, in ten bins of V without the empty ones."""
    bins = np.clip(((value + 1) * 5).astype(int), 0, 9)
    rows = []
    for number in range(10):
        inside = bins == number
        if inside.any():
            predicted = float((value[inside].mean() + 1) / 2)
            found = float(chance[inside].mean())
            rows.append({"steps": int(inside.sum()), "predicted": predicted, "found": found})
    return rows


def soft_auc(score: np.ndarray, chance: np.ndarray) -> float | None:
    """The probability that a right case scores above a wrong one; ties count half.

    Each case is right with weight `chance`. None if there are no right or no wrong cases.
    """
    _, place = np.unique(score, return_inverse=True)
    right = np.bincount(place, chance)
    wrong = np.bincount(place, 1 - chance)
    total = right.sum() * wrong.sum()
    return float((right * (wrong.cumsum() - wrong / 2)).sum() / total) if total > 0 else None


# ------------------------------------------------------------------------------ scoring solutions


def value_rows(
    model: Llama,
    tokenizer: StepTokenizer,
    solutions: list[tuple[Question, int | None]],
    threshold: float,
) -> list[dict]:
    """The values of solutions (`data.read_solutions`) as rows of JSON, each rank its share.

    A row has `id`, the `steps`, `values` (V after each step), `value` (the last one), `prediction`
    (`first_error`) and the solution's `label` if it has one. Solutions that are longer than the
    model's context have no values.
    """
    trees = [solution_tree(question, tokenizer) for question, _ in solutions]
    for tree in trees:
        tokens = [token for node in tree.nodes[1:] for token in node.tokens]
        if set(tokens[:-1]) & set(tokenizer.eos_ids):
            raise InputError(
                f"solution {tree.id}: end-of-text, or a word that the tokenizer lacks, stands in it"
            )
    context = model.config.max_position_embeddings
    mine = rank_share(n for n, tree in enumerate(trees) if tree.tokens() <= context)
    groups = group_by_tokens([trees[n] for n in mine], PASS_TOKENS)
    found = []
    with progress(groups, "score", len(groups), "pass") as bar:
        for group in bar:
            numbers = [mine[index] for index in group]
            for n, tree in zip(numbers, rescore(model, [trees[n] for n in numbers])):
                found.append((n, [round(node.value, 6) for node in tree.nodes[1:]]))
    values = dict(gather(found))
    rows = []
    for n, (question, label) in enumerate(solutions):
        steps = tokenizer.steps.steps(question.solution)
        row = {"id": question.id, "steps": ["".join(text for text, _ in step) for step in steps]}
        row |= {"values": values.get(n), "value": None, "prediction": None}
        if n in values:
            row |= {"value": values[n][-1], "prediction": first_error(values[n], threshold)}
        rows.append(row if label is None else row | {"label": label})
    return rows


def first_error(values: list[float], threshold: float) -> int:
    """The first step whose V is below the threshold; -1 if there is none."""
    return next((step for step, value in enumerate(values) if value < threshold), -1)


def first_errors(labelled: list[tuple[int, list[float]]], threshold: float) -> dict:
    """How often V finds the first wrong step of solutions, each (label, V after each step).

    ProcessBench's measure (arXiv 2412.06559): the accuracy on solutions with a wrong step, that on
    solutions without (label -1), and F1, their harmonic mean. None where there are no solutions.
    """
    found = {"threshold": threshold}
    for name, wrong in (("erroneous", True), ("correct", False)):
        hits = [
            first_error(values, threshold) == label
            for label, values in labelled
            if (label >= 0) == wrong
        ]
        share = statistics.fmean(hits) if hits else None
        error = math.sqrt(share * (1 - share) / len(hits)) if hits else None
        found[name] = {"solutions": len(hits), "accuracy": share, "standard_error": error}
    shares = [found[name]["accuracy"] for name in ("erroneous", "correct")]
    found["f1"] = None if None in shares else statistics.harmonic_mean(shares)
    return found


def best_threshold(labelled: list[tuple[int, list[float]]]) -> dict:
    """`first_errors` at the threshold of highest F1 on the same solutions.

    A wrong step is found by the thresholds above its V and not above the V of a step before it, and
    a correct solution by those not above its lowest V. F1 changes at these values only.
    """
    above, up_to, lowest = [], [], []
    for label, values in labelled:
        before = min(values[: max(label, 0)], default=math.inf)
        if label < 0:
            lowest.append(min(values))
        elif values[label] < before:
            above.append(values[label])
            up_to.append(before)
    places = np.unique([*above, *up_to, *lowest])
    places = places[np.isfinite(places)]
    wrong = sum(label >= 0 for label, _ in labelled)
    found = np.searchsorted(np.sort(above), places) - np.searchsorted(np.sort(up_to), places)
    found_share = found / max(1, wrong)
    kept_share = 1 - np.searchsorted(np.sort(lowest), places) / max(1, len(lowest))
    f1 = 2 * found_share * kept_share / np.maximum(found_share + kept_share, 1e-9)
    best = int(f1.argmax())
    # between two places all thresholds are equal
    return first_errors(labelled, float(places[max(0, best - 1) : best + 1].mean()))


# ---------------------------------------------------------------------------------- the tree page


def show_trees(file: Path, model: str) -> str:
    """Draw the trees of a file as a page beside it; returns a summary of one line."""
    out = file.with_suffix(".html")
    check_output(out, "the page of --show", [file])
    trees = read_trees(file)
    if not trees:
        raise InputError(f"{file}: there are no trees in it")
    tokenizer = find_tokenizer(file, model)
    count = write_page([page_row(tree, tokenizer) for tree in trees], out)
    return f"{out}: {count} of {len(trees)} trees"


def find_tokenizer(trees: Path, model: str) -> StepTokenizer:
    """The tokenizer of the model that grew the trees of a file.

    It is named, or stands beside the trees in a run folder, or in the configuration of a search.
    """
    folders = [model]
    if not model:
        kept = trees.with_name(trees.name + ".config")
        shape = {"SourceConfig": {"model": str}}
        source = read_json(kept, shape)["SourceConfig"] if is_plain(kept) else {}
        folders = [trees.parent, source.get("model")]
    for folder in filter(None, folders):
        if (Path(folder) / "tokenizer.json").exists():
            return StepTokenizer.load(folder)
    raise InputError(
        f"{trees}: the model that grew these trees is not beside them; name its folder with --model"
    )


def page_row(tree: Tree, tokenizer: StepTokenizer, min_gap: float = 0.0) -> dict:
    """What the page shows of a tree (support/page.py)."""
    nodes = []
    for node in tree.nodes:
        text = shorten(tokenizer.tokenizer.decode(node.tokens))
        q, v, prior = (round(number, 2) for number in (node.q_value, node.value, node.prior))
        nodes.append([node.parent, text, node.visit_count, q, v, prior, node.reward, node.ending])
    return {
        "question": shorten(tree.question),
        "answer": shorten(tree.answer),
        "simulations": tree.simulations,
        "stopped": tree.stopped,
        "nodes": nodes,
        "solved": outcomes_below(tree)[0][0] > 0,
        "pairs": [[win, lose] for win, lose, _ in sibling_pairs(tree, min_gap=min_gap)],
        "path": preferred_path(tree),
    }


def preferred_path(tree: Tree) -> list[int]:
    """The nodes that a beam of one takes in the tree as it is.

    From each the child with the highest V, of those that can still answer (`beam_search`).
    """
    children = {}
    for index, node in enumerate(tree.nodes):
        if node.ending in (None, "answer"):
            children.setdefault(node.parent, []).append(index)
    nodes = []
    node = 0
    while node in children:
        node = max(children[node], key=lambda index: tree.nodes[index].value)
        nodes.append(node)
    return nodes


def show_run(run: Path, device: str) -> Path:
    """Draw RUN/figures.png (support/figures.py)."""
    files = sorted(run.glob("*/valid-trees.jsonl"))
    trees = read_trees(files[0]) if files else []

    def calibration(folder):
        if not trees:
            return []
        return diagnose(trees, rescore(load_model(folder, device), trees))["calibration"]

    return draw_run(run, calibration)


# -------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class EvalConfig:
    """How to answer, and what else to measure."""

    strategy: tuple = flag(
        ("greedy", "sampled", "beam:1,5", "beam:3,5"),
        ", ".join(FORMS),
    )
    budget: bool = flag(False, "answer with every kind of strategy at several sizes instead")
    json: str = flag(
        "",
        "write the tables and every answer to this file; the curve of --budget beside it, as .png; "
        "with --score the values",
    )
    audit: int = flag(0, "print how answers were graded, and N of each strategy's to read", least=0)
    trees: str = flag(
        "",
        "judge the steps of these trees, whose policy is the reference of the implicit reward; "
        "preferably of questions not trained on, searched with --no-leaf-value",
    )
    score: str = flag(
        "",
        "write V after each step of the solutions in this file to --json, a JSON line for each "
        "solution, and end; needs no --data",
    )
    threshold: float = flag(
        0.0, "of --score: the first step whose V is below it is taken for the first wrong one"
    )
    figures: str = flag("", "draw this run folder, RUN/figures.png, and end; needs matplotlib")
    show: str = flag(
        "",
        "draw the trees of this file as a page, FILE.html, and end; needs no --data, and --model "
        "only if the model is not beside them",
    )


def check_outputs(out: Path, config: EvalConfig, source: SourceConfig):
    """Refuse --json where it would write over an input; the same for its chart."""
    inputs = [*question_files(source, "test"), *model_files(source.model)]
    inputs += [source.prompt, config.trees]
    check_output(out, "--json", inputs)
    if config.budget:
        check_output(out.with_suffix(".png"), "the chart of --json", [*inputs, out])


def score_file(source: SourceConfig, config: EvalConfig):
    """Write V after each step of the solutions of `--score`, and print F1 if they have labels."""
    if not config.json:
        raise InputError("--score needs --json, the file that the values are written to")
    file, out = Path(config.score), Path(config.json)
    check_output(out, "--json", [file, source.prompt, *model_files(source.model)])
    if world_size() > 1:
        join_ranks(source)
    folder, tokenizer = find_source(source)
    solutions = read_solutions(file, tokenizer.steps, source.limit or None)
    model = load_model(folder, use_device(source), getattr(torch, source.dtype), source.seed)
    rows = value_rows(model, tokenizer, solutions, config.threshold)
    on_rank_0(lambda: write_lines(out, rows))
    scored = [row for row in rows if row["values"]]
    print(f"{out}: V of {sum(len(row['values']) for row in scored)} steps, {len(scored)} solutions")
    if len(scored) < len(rows):
        missing = [row["id"] for row in rows if not row["values"]]
        print(
            f"{len(missing)} solutions have no values, because they are longer than the model's "
            f"context of {model.config.max_position_embeddings} tokens; the first is {missing[0]}"
        )
    labelled = [(row["label"], row["values"]) for row in scored if "label" in row]
    if labelled:
        print_first_errors(first_errors(labelled, config.threshold))
    if {label >= 0 for label, _ in labelled} == {True, False}:
        print_first_errors(best_threshold(labelled), "; the best threshold for these solutions")
    leave_ranks()


def required_flags(words: list[str]) -> tuple:
    """The flags that a command of these words cannot do without."""
    if any(word.startswith(("--show", "--figures")) for word in words):
        return ()
    return ("model",) if any(word.startswith("--score") for word in words) else ("model", "data")


def main():
    kinds = (SourceConfig, EvalConfig, SearchConfig, AnswerConfig)
    words = sys.argv[1:]
    configs = parse_args(__doc__, kinds, words, required_flags(words), RECIPES)
    source, config, search, answering = configs
    if config.show:
        return print(show_trees(Path(config.show), source.model))
    if config.figures:
        return print(show_run(Path(config.figures), use_device(source)))
    if config.score:
        return score_file(source, config)
    check_reward(search.reward)
    strategies = BUDGET if config.budget else config.strategy
    for strategy in strategies:
        parse_strategy(strategy)
    out = Path(config.json)
    if config.json:
        check_outputs(out, config, source)
    if world_size() > 1:
        join_ranks(source)
    trees = read_trees(config.trees) if config.trees else []
    model, tokenizer, questions = load_source(source, 0, "test")
    room = context_of(model.config, search) - search.max_step_tokens
    questions = fitting(questions, tokenizer, room)
    check_token_ids(trees, model.config.vocab_size, config.trees)
    answers = []
    row = {"model": source.model, "answers": answers}
    for strategy in strategies:
        found = answer_questions(
            model, tokenizer, questions, strategy, search, answering, source.seed
        )
        answers.append(found)
        if config.json:
            on_rank_0(lambda: write_json(out, row))
    print(f"\n{source.model} on {len(questions)} questions of {source.data}")
    print_answers(answers)
    if config.audit:
        print_audit(answers, config.audit)
    if trees:
        judged = rescore(model, trees)
        row |= {"siblings": sibling_accuracy(judged), "diagnosis": diagnose(trees, judged)}
        print_diagnosis(row["diagnosis"])
    if config.json:
        on_rank_0(lambda: write_json(out, row))
    if config.json and config.budget:
        on_rank_0(lambda: draw_budget(answers, out.with_suffix(".png")))
    leave_ranks()


if __name__ == "__main__":
    run_command(main)
