"""Changes to SVPO, one at a time: what its parts are worth, and what would make it lead.

    python experiments/ladder.py [--rows NAME ...] [--seeds 0 1 2] [--task deduction]
    python experiments/ladder.py --answers --rows NAME ...      other ways to answer, of models
    python experiments/ladder.py --gradients                    how alike objectives' gradients are

The row `svpo` is the earlier default (`svpo-good-steps`, value losses 1 and 0.5, no fitted V), and
most others change it in one place. Every row trains one round from the same SFT model of a seed, on
the same trees, and answers the validation and the test questions. We choose by validation and
report test. A row that learns from fewer trees takes fewer steps; its line says how many. Rows
without targets of V (rft, dvo and the three kinds of GRPO) leave it untrained, so their beams
choose at random. A row appends a line to experiments/ladder.jsonl; run the same command again to
resume.

Dimension key: T tokens.
"""

import argparse
import dataclasses
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Tree, load_questions, read_trees, write_trees
from engine import Node
from eval import STRATEGIES, answer_questions, beam_strategy, best_value, sibling_accuracy
from experiments.run import COMMON, configure, judge_proofs, start
from mcts import search_trees
from model import Llama
from support.files import append, head_commit, publish
from support.flags import run_command
from support.progress import read_log
from svpo import (
    OBJECTIVES,
    LossConfig,
    Objective,
    correct_solutions,
    learn,
    outcomes_below,
    rescore,
    sibling_pairs,
    visited_q,
    visited_siblings,
)
from train import DROPOUT, Job, TrainConfig, backward, train_stage

REPORTED = ("greedy", "beam:1,5", "beam:3,5")  # on test questions
CHOOSING = ("greedy", "beam:1,5")  # on validation questions
QUESTIONS = 500  # of validation

# ------------------------------------------------------------------------------ edits of the labels


def edited(tree: Tree, q_values: list[float]) -> Tree:
    """The tree with other Q."""
    nodes = [dataclasses.replace(node, q_value=q) for node, q in zip(tree.nodes, q_values)]
    return dataclasses.replace(tree, nodes=nodes)


def outcome_labels(tree: Tree) -> Tree:
    """Q from the rewards below alone, without V; 0 where there are none."""
    correct, wrong = outcomes_below(tree)
    return edited(tree, [(c - w) / max(1, c + w) for c, w in zip(correct, wrong)])


def shrunk_labels(tree: Tree) -> Tree:
    """Q * n / (n + 1) with n = rewards below: few rewards pull Q towards 0."""
    correct, wrong = outcomes_below(tree)
    return edited(tree, [(c - w) / (c + w + 1) for c, w in zip(correct, wrong)])


def half_of_q(tree: Tree) -> list[float | None]:
    """Q / 2 as V's target: as far from certain as an untrained V makes it."""
    return [None if q is None else q / 2 for q in visited_q(tree)]


def q_of_outcomes(tree: Tree) -> list[float | None]:
    """Q from the rewards below alone as V's target."""
    return visited_q(outcome_labels(tree))


def prover_labels(tree: Tree, tries: int = 4) -> Tree:
    """The chance that one of `tries` solutions below is right, as Q: best-of-K as the prover.

    0 where no solution ends below.
    """
    q_values = []
    for correct, wrong in zip(*outcomes_below(tree)):
        failure = wrong / max(1, correct + wrong)
        q_values.append(1 - 2 * failure**tries if correct + wrong else 0.0)
    return edited(tree, q_values)


# -------------------------------------------------------------------------------- kinds of pairs

Pairs = list[tuple[int, int, float]]


def weighed(pairs: list[tuple[int, int]]) -> Pairs:
    """Each pair once; those of a tree weigh 1 together."""
    different = sorted(set(pairs))
    return [(win, lose, 1 / len(different)) for win, lose in different]


def progress_pairs(tree: Tree, _: str, min_gap: float) -> Pairs:
    """Winners gain on their parent's Q, losers lose; Q itself may have either sign."""
    correct, wrong = outcomes_below(tree)
    pairs = []
    for group in visited_siblings(tree):
        for win, lose in itertools.permutations(group, 2):
            q_win, q_lose = tree.nodes[win].q_value, tree.nodes[lose].q_value
            between = q_win > tree.nodes[tree.nodes[win].parent].q_value > q_lose
            if between and q_win - q_lose >= min_gap and correct[win] and wrong[lose]:
                pairs.append((win, lose))
    return weighed(pairs)


def prover_pairs(tree: Tree, pairs: str, min_gap: float) -> Pairs:
    """The usual pairs, by the prover's Q."""
    return sibling_pairs(prover_labels(tree), pairs, min_gap)


def confident_pairs(tree: Tree, pairs: str, min_gap: float) -> Pairs:
    """The usual pairs whose loser leads to the most confident wrong solution (arXiv 2509.25454)."""
    wrong = [index for index, node in enumerate(tree.nodes) if (node.reward or 0) < 0]

    def confidence(index):
        steps = [tree.nodes[step] for step in tree.path(index)]
        return sum(step.logp for step in steps) / max(1, sum(sum(step.sampled) for step in steps))

    found = sibling_pairs(tree, pairs, min_gap)
    for end in sorted(wrong, key=confidence, reverse=True):
        path = set(tree.path(end))
        chosen = [(win, lose) for win, lose, _ in found if lose in path]
        if chosen:
            return weighed(chosen)
    return []


def pairs_with_unvisited(tree: Tree, pairs: str, min_gap: float) -> Pairs:
    """The usual pairs, and siblings that the search passed over as losers to winners of Q > 0.5."""
    found = [(win, lose) for win, lose, _ in sibling_pairs(tree, pairs, min_gap)]
    correct, _ = outcomes_below(tree)
    for win, node in enumerate(tree.nodes[1:], 1):
        if node.visit_count and node.q_value > 0.5 and correct[win]:
            for lose, other in enumerate(tree.nodes[1:], 1):
                if other.parent == node.parent and not other.visit_count:
                    found.append((win, lose))
    return weighed(found)


def solved_sometimes(tree: Tree) -> bool:
    """Whether 20 to 80 % of the tree's solutions are right (arXiv 2502.01456 keeps such)."""
    correct, wrong = outcomes_below(tree)
    return 0.2 <= correct[0] / max(1, correct[0] + wrong[0]) <= 0.8


# ------------------------------------------------------------------------------------------- rows


GOOD_STEPS = OBJECTIVES["svpo-good-steps"]
ALL_CORRECT = OBJECTIVES["svpo"]
WHOLE_MARGIN = "--margin-weight 0.5"  # ten times today's, like a squared error of 1


@dataclass(frozen=True)
class Row:
    """A change to SVPO, of flags, labels, pairs or the search."""

    flags: str = f"--mse-weight 1 {WHOLE_MARGIN}"
    objective: Objective = GOOD_STEPS
    labels: Callable[[Tree], Tree] = lambda tree: tree
    kept: Callable[[Tree], bool] = lambda tree: True  # which trees are trained on
    outcomes_only: bool = False  # the search backs up no V
    detached: bool = False  # V learns, but its gradient stops at the head


def pairs(function: Callable) -> Row:
    return dataclasses.replace(BETTER, objective=Objective(function, correct_solutions, visited_q))


def with_targets(targets: Callable) -> Objective:
    return dataclasses.replace(GOOD_STEPS, value=targets)


TENTH = "--mse-weight 0.1 --margin-weight 0.05"  # of the value losses
BETTER = Row(TENTH, ALL_CORRECT)
ROWS = {
    "svpo": Row(),
    "rft": Row(objective=OBJECTIVES["rft"]),
    "alphamath": Row(objective=OBJECTIVES["alphamath"]),
    "grpo": Row("--tune-epochs 1", OBJECTIVES["grpo"]),  # as many sampled tokens as a search
    "lambda-grpo": Row("--tune-epochs 1", OBJECTIVES["lambda-grpo"]),
    "tree-grpo": Row("", OBJECTIVES["tree-grpo"]),
    "tree-grpo, lr 5e-5": Row("--tune-lr 5e-5", OBJECTIVES["tree-grpo"]),
    "dvo": Row("", OBJECTIVES["dvo"]),
    "dvo, lr 5e-5": Row("--tune-lr 5e-5", OBJECTIVES["dvo"]),
    # what the squared error does
    "squared error 0.3": Row(f"--mse-weight 0.3 {WHOLE_MARGIN}"),
    "squared error 0.1": Row(f"--mse-weight 0.1 {WHOLE_MARGIN}"),
    "squared error 0.03": Row(f"--mse-weight 0.03 {WHOLE_MARGIN}"),
    "value losses 0.1": Row(TENTH),
    "value detached": Row(detached=True),
    "alphamath, squared error 0.1": Row(
        f"--mse-weight 0.1 {WHOLE_MARGIN}", OBJECTIVES["alphamath"]
    ),
    # why an untrained V in Q helps
    "labels without V": Row(labels=outcome_labels),  # pairs, good steps and V's targets
    "targets without V": Row(objective=with_targets(q_of_outcomes)),  # V's targets alone
    "targets halved": Row(objective=with_targets(half_of_q)),
    "search without V": Row(outcomes_only=True),
    "search without V, labels shrunk": Row(outcomes_only=True, labels=shrunk_labels),
    "search without V, targets halved": Row(objective=with_targets(half_of_q), outcomes_only=True),
    "search without V, squared error 0.1": Row(
        f"--mse-weight 0.1 {WHOLE_MARGIN}", outcomes_only=True
    ),
    "search without V, value detached": Row(outcomes_only=True, detached=True),
    # what the likelihood is of
    "all correct": Row(objective=ALL_CORRECT),
    "all correct, squared error 0.1": Row(f"--mse-weight 0.1 {WHOLE_MARGIN}", ALL_CORRECT),
    "all correct, value losses 0.1": BETTER,
    "all correct, value losses 0.03": Row("--mse-weight 0.03 --margin-weight 0.015", ALL_CORRECT),
    "all correct, value detached": Row(objective=ALL_CORRECT, detached=True),
    # V starts where least squares puts it
    "fitted": Row(f"--mse-weight 1 {WHOLE_MARGIN} --fit-value"),
    "all correct, fitted": Row(f"--mse-weight 1 {WHOLE_MARGIN} --fit-value", ALL_CORRECT),
    "all correct, value losses 0.1, fitted": Row(f"{TENTH} --fit-value", ALL_CORRECT),
    "search without V, all correct, value losses 0.1, fitted": Row(
        f"{TENTH} --fit-value", ALL_CORRECT, outcomes_only=True
    ),
    # changes to "all correct, value losses 0.1"
    "no preference": dataclasses.replace(BETTER, flags=f"{TENTH} --policy-weight 0"),
    "preference 0.2": dataclasses.replace(BETTER, flags=f"{TENTH} --policy-weight 0.2"),
    "pairs by progress": pairs(progress_pairs),
    "pairs by a prover": pairs(prover_pairs),
    "the most confident wrong leaf": pairs(confident_pairs),
    "search without V, all correct, value losses 0.1": dataclasses.replace(
        BETTER, outcomes_only=True
    ),
    "unvisited losers": pairs(pairs_with_unvisited),  # arithmetic has hardly any
    "solved in 20 to 80 %": dataclasses.replace(BETTER, kept=solved_sometimes),
}


# ------------------------------------------------------------------------------------------- a cell


@contextmanager
def as_objective(row: Row):
    """`--objective row` within the block."""
    forward = Llama.value

    def detached(model, hidden, *dropout):
        return forward(model, hidden.detach(), *dropout)

    OBJECTIVES["row"] = row.objective
    if row.detached:
        Llama.value = detached
    try:
        yield
    finally:
        del OBJECTIVES["row"]
        Llama.value = forward


def trees_of(row: Row, job: Job, base: Path, questions: list) -> Path:
    """The file of the trees that a row learns from, before its labels are edited."""
    if not row.outcomes_only:
        return base / "trees.jsonl"
    file = base / "trees-outcomes-only.jsonl"
    if not file.exists():
        search = dataclasses.replace(job.search, leaf_value=False)
        model = job.load(base / "sft")
        found = list(search_trees(model, job.train_tokenizer, questions, search, job.run.seed + 1))
        publish(file, lambda partial: write_trees(partial, found, "w"))
    return file


def measure(row: Row, seed: int, base: Path, folder: Path, common: list[str]) -> dict:
    """Train a row's round from the seed's SFT model in `base`, and answer."""
    with as_objective(row):
        words = [*common, "--no-fit-value", *row.flags.split(), "--objective", "row"]
        job, splits = configure(seed, folder, words)
        stage = folder / "round1"
        stage.mkdir(parents=True)
        questions = splits["search"][0]
        if not row.objective.groups:
            trees = read_trees(trees_of(row, job, base, questions))
            trees = [row.labels(tree) for tree in trees if row.kept(tree)]
            write_trees(stage / "trees-0.jsonl", trees, "w")
            left = {tree.id for tree in trees}
            splits["search"][0] = [question for question in questions if question.id in left]
        begin = time.perf_counter()
        train_stage(job, base / "sft", stage, splits, 1)
        seconds = time.perf_counter() - begin
    policy = job.load(stage)
    valid = load_questions(f"{job.run.data}:valid", QUESTIONS)
    steps = [line for _, line in read_log(stage.parent / "log.jsonl")]
    found = {"training_seconds": seconds, "steps": len(steps), "flags": row.flags}
    for part, asked, strategies in (
        ("valid", valid, CHOOSING),
        ("test", splits["test"], REPORTED),
    ):
        for strategy in strategies:
            settings = (strategy, job.search, job.answering, seed)
            answered = answer_questions(policy, job.train_tokenizer, asked, *settings)
            found.setdefault(part, {})[strategy] = answered["accuracy"]
            if common and strategy == "greedy" and part == "test":  # deduction
                found |= judge_proofs(answered["answers"], asked)
    judged = rescore(policy, read_trees(base / "sft" / "valid-trees.jsonl"))
    found["siblings"] = sibling_accuracy(judged)["accuracy"]
    return found


# ----------------------------------------------------------------------- other ways to answer


def judged_by(search: Generator, score: Callable[[Node], float]) -> Generator:
    """A strategy's search of one question, in which `score` takes the place of V."""
    asked = next(search)
    while True:
        children = yield asked
        for child in children:
            child.value = score(child)
        try:
            asked = search.send(children)
        except StopIteration as end:
            return end.value


def beams_by(score: Callable[[Node], float]) -> Callable:
    """A maker of SBS(B1, B2) by a score."""

    def make(numbers, search, temperature):
        beam = beam_strategy(*numbers, search, temperature, best_value)
        return dataclasses.replace(beam, start=lambda *one: judged_by(beam.start(*one), score))

    return make


def with_likelihood(weight: float) -> Callable[[Node], float]:
    """V + weight * mean log-probability of the step's tokens."""
    return lambda node: node.value + weight * node.logp / max(1, len(node.tokens))


def value_of(model: Llama) -> Callable[[Node], float]:
    """V of another model."""

    @torch.inference_mode()
    def score(node):
        steps = node.path()
        tokens = [token for step in [steps[0].parent, *steps] for token in step.tokens]
        token_1T = torch.tensor([tokens], device=model.output_weight().device)
        return model(token_1T)[1][0, -1].item()

    return score


STRATEGIES |= {f"likely{weight}": beams_by(with_likelihood(weight)) for weight in (0.3, 1, 3)}
VALUE = Llama.value


def mean_of_dropout(model: Llama, hidden: Tensor, dropout: Tensor | None = None) -> Tensor:
    """V as the mean over eight draws of the dropout that the head was trained with."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(8):
        kept = torch.rand(hidden.shape[-1], generator=random).ge(DROPOUT) / (1 - DROPOUT)
        found.append(VALUE(model, hidden, kept.to(hidden.device)))
    return torch.stack(found).mean(0)


WAYS = {  # way -> strategy, and the function that V is
    "greedy": ("greedy", VALUE),
    "SBS(1,5)": ("beam:1,5", VALUE),
    "SBS(1,5), mean of dropout": ("beam:1,5", mean_of_dropout),
    "SBS(1,5), V + 0.3 log pi": ("likely0.3:1,5", VALUE),
    "SBS(1,5), V + log pi": ("likely1:1,5", VALUE),
    "SBS(1,5), V + 3 log pi": ("likely3:1,5", VALUE),
    "SBS(1,5), V of row svpo": ("judge:1,5", VALUE),  # two models
    "SBS(3,5)": ("beam:3,5", VALUE),
    "SBS(3,5), V of row svpo": ("judge:3,5", VALUE),
    "SBS(3,5), vote": ("vote:3,5", VALUE),
    "best of 15": ("best:15", VALUE),
    "vote of 15": ("weighted:15", VALUE),
    "majority of 15": ("majority:15", VALUE),
}


def answer_ways(job: Job, stage: Path, judge: Path, questions: dict[str, list]) -> Iterator[dict]:
    """Accuracy of every way to answer with the model in `stage`, on each part.

    The model in `judge` has the V of another model.
    """
    policy = job.load(stage)
    STRATEGIES["judge"] = beams_by(value_of(job.load(judge)))
    for way, (strategy, value) in WAYS.items():
        found = {"way": way}
        Llama.value = value
        for part, asked in questions.items():
            settings = (strategy, job.search, job.answering, job.run.seed)
            answered = answer_questions(policy, job.train_tokenizer, asked, *settings)
            found[part] = {key: answered[key] for key in ("accuracy", "sampled_tokens")}
        Llama.value = VALUE
        yield found


# -------------------------------------------------------------------------------------- gradients

COMPARED = {  # name -> the objective, with one term only
    "step-dpo": LossConfig("step-dpo"),
    "step-dpo, any gap": LossConfig("step-dpo", min_gap=0),
    "tree-grpo": LossConfig("tree-grpo"),
    "dvo": LossConfig("dvo"),
    "rft": LossConfig("rft"),
    "good steps": LossConfig("svpo-good-steps", policy_weight=0, mse_weight=0, margin_weight=0),
    "value": LossConfig(policy_weight=0, sft_weight=0, margin_weight=0),
    "margin": LossConfig(policy_weight=0, sft_weight=0, mse_weight=0),
}
TREES = 200  # that gradients are taken on


def gradient(model: Llama, trees: list[Tree], losses: LossConfig) -> Tensor:
    """The gradient of the trunk, flat."""
    model.zero_grad()
    lessons = [learn(tree, losses) for tree in trees]
    backward(model, list(enumerate(lessons)), losses, TrainConfig(pack_tokens=8192), seed=0, step=0)
    return torch.cat([one.grad.flatten() for one in model.model.parameters()])


def cosines(model: Llama, trees: list[Tree]) -> dict[str, float]:
    """The cosine of every two of COMPARED."""
    found = {name: gradient(model, trees, losses) for name, losses in COMPARED.items()}
    pairs = itertools.combinations(found, 2)
    return {f"{a} / {b}": F.cosine_similarity(found[a], found[b], 0).item() for a, b in pairs}


def gradients(seed: int, base: Path, trained: Path, job: Job) -> Iterator[dict]:
    """How alike the gradients are for the policy that grew the trees, and after a round of svpo."""
    trees = read_trees(base / "trees.jsonl")[:TREES]
    start = job.load(base / "sft")
    trees = rescore(start, trees)
    yield {"model": "sft", "cosines": cosines(start, trees)}
    yield {"model": "svpo", "cosines": cosines(job.load(trained), trees)}


# ------------------------------------------------------------------------------------ the command


def folder_of(out: Path, task: str, name: str, seed: int) -> Path:
    return out / f"ladder-{task}-{re.sub(r'[^a-z0-9.]+', '-', name)}-{seed}"


def lines_of(config, name: str, seed: int) -> Iterator[dict]:
    """What a row measures of a seed."""
    kind, common = ("transfer", COMMON["transfer"]) if config.task == "deduction" else ("", [])
    base, _ = start(seed, config.out, kind, common)
    folder = folder_of(config.out, config.task, name, seed)
    job, splits = configure(seed, folder, common)
    if config.answers:
        valid = load_questions(f"{job.run.data}:valid", QUESTIONS)
        judge = folder_of(config.out, config.task, "svpo", seed) / "round1"
        parts = {"valid": valid, "test": splits["test"]}
        yield from answer_ways(job, folder / "round1", judge, parts)
    elif config.gradients:
        yield from gradients(seed, base, folder / "round1", job)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        yield measure(ROWS[name], seed, base, folder, common)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="NAME", help="these rows only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", choices=("arithmetic", "deduction"), default="arithmetic")
    parser.add_argument("--answers", action="store_true", help="answer in all WAYS")
    parser.add_argument("--gradients", action="store_true", help="of SFT and of row svpo")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, default=HERE / "ladder.jsonl")
    config = parser.parse_args()
    kind = "answers" if config.answers else "gradients" if config.gradients else "row"
    mark = {"kind": kind, "task": config.task, "commit": head_commit()[:7]}
    lines = config.results.read_text().splitlines() if config.results.exists() else []
    lines = map(json.loads, lines)
    done = {(line["kind"], line["task"], line["row"], line["seed"]) for line in lines}
    names = ["svpo"] if config.gradients else config.rows or ROWS
    for seed in config.seeds:
        for name in names:
            if (kind, config.task, name, seed) in done:
                continue
            found = list(lines_of(config, name, seed))
            for line in found:
                line = {"row": name, "seed": seed, **mark, **line}
                append(config.results, json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
