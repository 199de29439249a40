"""Tables of experiments on the built-in tasks, measured cell by cell.

    python experiments/run.py TABLE         objectives, ablation, scale, transfer or compute
    python experiments/run.py objectives --rows svpo --seeds 0 --results mine.jsonl --out runs/mine
                                            measure a cell again
    python experiments/results.py           make tables and figures of what was measured

Run the same command again to resume an interrupted table. All cells of a seed start from the same
SFT model. Those that do not change the search learn from the same trees, which are grown once. A
cell appends one line to experiments/results.jsonl: table, row, seed, commit, flags, figures, tokens
and seconds.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import model
import train
from data import RECIPES, Question, StepTokenizer, Tree, load_splits, read_trees, write_trees
from engine import Engine
from eval import AnswerConfig, answer_questions, grow_judged, sibling_accuracy
from mcts import SearchConfig, search_trees
from support.files import append, head_commit
from support.flags import parse_args, run_command
from support.ranks import use_device
from svpo import OBJECTIVES, LossConfig, rescore, sibling_pairs
from tasks.built_in import task_tokenizer
from tasks.deduction import sound
from train import Job, RunConfig, TrainConfig, grow_groups, make_job, train_stage

RESULTS = HERE / "results.jsonl"
STRATEGIES = ("greedy", "majority:5", "beam:1,5", "beam:3,5")
SAMPLES = 9  # solutions of a question that take as many tokens as its search with default flags
STEPS = 1125  # optimizer steps of a round with default flags: 2 passes over 4,500 trees, 8 a step
SEARCHED = ("--simulations", "--no-leaf-value")  # flags that need trees of their own
SIZES = {  # name -> what differs from train.TINY, which has 297 k parameters
    "28 k": {
        "hidden_size": 24,
        "intermediate_size": 72,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
    },
    "97 k": {
        "hidden_size": 40,
        "intermediate_size": 120,
        "num_hidden_layers": 5,
        "head_dim": 10,
    },
    "666 k": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
}
TINY = dict(train.TINY)


# --------------------------------------------------------------------------------------- the tables

# table -> row -> flags of train.py. None is the SFT model that all rows of a seed start from. A row
# with --rounds 0 goes on with worked solutions. ["samples"] learns from SAMPLES whole solutions of
# each question, without a search: Q is the mean outcome of those through a step.
Rows = dict[str, list[str] | None]


def objectives() -> Rows:
    rows = {"sft": None}
    rows["sft, as long"] = ["--rounds", "0", "--sft-steps", str(STEPS), "--sft-lr", "5e-4"]
    for name in ("rft", "dpo", "step-dpo", "alphamath", "svpo", "grpo"):
        rows[name] = ["--objective", name]
    for name in ("dpo", "step-dpo"):
        rows[f"{name}, lr 5e-5"] = ["--objective", name, "--tune-lr", "5e-5"]
    return rows


def ablation() -> Rows:
    return {
        "svpo": [],
        "no margin": ["--margin-weight", "0"],
        "no squared error": ["--mse-weight", "0"],
        "no SFT term": ["--sft-weight", "0"],
        "no preference term": ["--policy-weight", "0"],
        "values without search": ["samples"],
        "one pair a parent": ["--pairs", "best"],
        "any gap": ["--min-gap", "0"],
        "gap of 1": ["--min-gap", "1"],
        "4 simulations": ["--simulations", "4"],
        "64 simulations": ["--simulations", "64"],
        "3 rounds": ["--rounds", "3"],
        "outcomes only": ["--no-leaf-value"],  # V has no part in Q
        "ten times the learning rate": ["--tune-lr", "5e-3"],
    }


def scale() -> Rows:
    """Rows that begin with --size and a name of SIZES. 297 k stands in `objectives`."""
    rows = {}
    for size in SIZES:
        rows[f"{size}, sft"] = ["--size", size, "--rounds", "0", "--sft-steps", "0"]
        rows[f"{size}, svpo"] = ["--size", size]
    return rows


def transfer() -> Rows:
    return {"sft": None} | {name: ["--objective", name] for name in ("rft", "alphamath", "svpo")}


def compute() -> Rows:
    rows = {}
    for name, numbers in {"grpo": (1, 2), "rft": (2, 4), "svpo": (2, 4)}.items():
        for passes in numbers:
            unit = "pass" if passes == 1 else "passes"
            rows[f"{name}, {passes} {unit}"] = ["--objective", name, "--tune-epochs", str(passes)]
    return rows


TABLES = {
    "objectives": objectives(),
    "ablation": ablation(),
    "scale": scale(),
    "compute": compute(),
    "transfer": transfer(),
}
# The defaults that results.jsonl was measured with. They changed by what ladder.py found.
EARLIER = ["--objective", "svpo-good-steps", "--mse-weight", "1", "--margin-weight", "0.5"]
EARLIER += ["--no-fit-value"]
COMMON = {  # table -> flags of all its rows
    "transfer": [
        *("--data", "deduction", "--sft-questions", "30000"),
        *("--sft-batch", "128", "--sft-steps", "1000"),
    ]
}


def count_parameters(size: str) -> int:
    """The parameters of the model that a name of SIZES stands for; of the tiny one for others."""
    vocabulary = task_tokenizer("arithmetic").get_vocab_size()
    shape = model.LlamaConfig(vocabulary, **(TINY | SIZES.get(size, {})))
    return model.count_parameters(shape)[0]


# --------------------------------------------------------------------------------- what cells share


def configure(seed: int, folder: Path, flags: Sequence[str]) -> tuple[Job, dict[str, list]]:
    """The job of a cell, and its splits. It has one round if the flags do not say otherwise."""
    rounds = [] if "--rounds" in flags else ["--rounds", "1"]
    words = ["--seed", str(seed), "--out", str(folder), *rounds, *flags]
    configs = (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig)
    configs = parse_args("", configs, words, recipes=RECIPES)
    run, training, search, _, _ = configs
    splits = load_splits(run)
    return make_job(configs, use_device(run), splits), splits


@dataclass
class Counts:
    """What was sampled in a `counted` block."""

    sampled_tokens: int = 0  # of all engines, steps that were merged later included
    group_tokens: int = 0  # unique tokens of GRPO's groups, which are gone after their step


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what is sampled within the block."""
    counts = Counts()
    decode = Engine.decode
    grow = train.grow_groups

    def counted_decode(engine):
        before = engine.sampled_tokens
        decode(engine)
        counts.sampled_tokens += engine.sampled_tokens - before

    def counted_grow(*arguments):
        trees = grow(*arguments)
        counts.group_tokens += unique_tokens(trees)
        return trees

    Engine.decode = counted_decode
    train.grow_groups = counted_grow
    try:
        yield counts
    finally:
        Engine.decode = decode
        train.grow_groups = grow


def unique_tokens(trees: list[Tree]) -> int:
    """Sampled tokens in trees. A step that was sampled twice counts once."""
    return sum(sum(node.sampled) for tree in trees for node in tree.nodes)


def start(
    seed: int, out: Path, kind: str = "", common: Sequence[str] = ()
) -> tuple[Path, dict[str, float]]:
    """The folder of a seed's SFT model and first trees, and what the trees took.

    Both are made once. `kind` is the size or the task, if it is not the usual one.
    """
    folder = out / f"seed{seed}{kind.replace(' ', '')}"
    train.main(["--seed", str(seed), "--rounds", "0", "--out", str(folder), *common])
    note = folder / "trees.json"
    if not note.exists():
        job, splits = configure(seed, folder, common)
        questions = splits["search"][0]
        begin = time.perf_counter()
        sft_model = job.load(folder / "sft")
        with counted() as counts:
            found = search_trees(sft_model, job.train_tokenizer, questions, job.search, seed + 1)
            trees = list(found)
        write_trees(folder / "trees.jsonl", trees, "w")
        taken = {
            "seconds": time.perf_counter() - begin,
            "unique_tokens": unique_tokens(trees),
            "sampled_tokens": counts.sampled_tokens,
        }
        note.write_text(json.dumps(taken))
    return folder, json.loads(note.read_text())


# ------------------------------------------------------------------------------------------- a cell


def measure(
    seed: int,
    flags: list[str] | None,
    folder: Path,
    base: Path,
    taken: dict[str, float],
    common: Sequence[str] = (),
) -> dict:
    """Train one cell and answer the test questions.

    `base` and `taken` are what `start` returns.
    """
    samples = flags == ["samples"]
    own = [] if samples else flags or []
    job, splits = configure(seed, folder, [*EARLIER, *common, *own])
    trained = base / "sft"
    costs = {"searched_tokens": 0, "sampled_tokens": 0, "training_seconds": 0.0}
    if flags is not None and (job.run.rounds or job.train.sft_steps):
        shared = shares_trees(job, flags)
        trained, costs = train_cell(job, splits, folder, base, samples, taken if shared else None)
    policy = job.load(trained)
    tokenizer = job.train_tokenizer
    answers = []
    for name in STRATEGIES:
        settings = (name, job.search, job.answering, seed)
        answers.append(answer_questions(policy, tokenizer, splits["test"], *settings))
    own_trees = grow_judged(policy, tokenizer, splits["valid"], job.search, seed)
    fixed_trees = rescore(policy, read_trees(base / "sft" / "valid-trees.jsonl"))
    extra = {}
    if common:  # the task is deduction, whose steps can be judged
        extra = judge_proofs(answers[0]["answers"], splits["test"])
        extra["search"] = judge_steps(read_trees(base / "trees.jsonl"), tokenizer)
    kept = ("sampled_tokens", "seconds")
    return {
        **extra,
        "figures": {row["strategy"]: row["accuracy"] for row in answers},
        "questions": len(splits["test"]),
        "siblings_own": sibling_accuracy(own_trees)["accuracy"],
        "siblings_fixed": sibling_accuracy(fixed_trees)["accuracy"],
        **costs,
        "answers": {row["strategy"]: {key: row[key] for key in kept} for row in answers},
    }


def shares_trees(job: Job, flags: list[str]) -> bool:
    """Whether a cell learns from the trees that `start` has grown."""
    own_trees = flags == ["samples"] or any(flag in flags for flag in SEARCHED)
    return job.run.rounds == 1 and not OBJECTIVES[job.losses.objective].groups and not own_trees


def train_cell(
    job: Job,
    splits: dict[str, list],
    folder: Path,
    base: Path,
    samples: bool,
    taken: dict[str, float] | None,
) -> tuple[Path, dict[str, float]]:
    """Train the rounds of a cell; returns the folder of its model, and tokens and seconds.

    With `taken`, the trees of `base` are the first round's, and what they took counts. With
    `samples` the trees are whole solutions.
    """
    seed = job.run.seed
    previous = base / "sft"
    seconds = taken["seconds"] if taken else 0.0
    kept = 0  # unique tokens of the trees
    with counted() as counts:
        for number in range(1, job.run.rounds + 1) or [0]:  # 0: worked solutions
            stage = folder / f"round{number}"
            stage.mkdir(parents=True)
            file = stage / "trees-0.jsonl"
            if taken:
                shutil.copyfile(base / "trees.jsonl", file)
            begin = time.perf_counter()
            if samples:
                settings = (splits["search"][0], job.search, SAMPLES, seed + number)
                trees = grow_groups(job.load(previous), job.train_tokenizer, *settings)
                write_trees(file, trees, "w")
            train_stage(job, previous, stage, splits, number)
            seconds += time.perf_counter() - begin
            kept += unique_tokens(read_trees(file)) if file.exists() else 0
            previous = stage
    sampled = counts.sampled_tokens + (taken["sampled_tokens"] if taken else 0)
    return previous, {
        "searched_tokens": kept + counts.group_tokens,
        "sampled_tokens": sampled,
        "training_seconds": seconds,
    }


def judge_proofs(answers: list[dict], questions: list[Question]) -> dict[str, float]:
    """How many answers to questions of deduction are sound, and how often right ones are not."""
    texts = {question.id: question.text for question in questions}
    fine = []
    wrong_steps = []  # of right answers
    for answer in answers:
        fine.append(all(sound(texts[answer["id"]], answer["text"])))
        if answer["correct"]:
            wrong_steps.append(not fine[-1])
    shares = {"sound": fine, "right_with_wrong_steps": wrong_steps}
    return {name: statistics.fmean(found) for name, found in shares.items()}


def judge_steps(trees: list[Tree], tokenizer: StepTokenizer) -> dict[str, float]:
    """Whether searched deductions rest on wrong steps, and what that does to Q and to the pairs.

    Mixed pairs are those of siblings after sound steps, of which one is sound and one is not.
    """
    right = []  # of right answers: whether all steps are sound
    q_values = {True: [], False: []}  # of sound steps, of others
    mixed = []  # of mixed pairs: whether the winner is sound
    for tree in trees:
        fine = sound_nodes(tree, tokenizer)
        for index, node in enumerate(tree.nodes[1:], 1):
            if node.visit_count:
                q_values[fine[index]].append(node.q_value)
            if node.reward == 1:
                right.append(fine[index])
        for win, lose, _ in sibling_pairs(tree, min_gap=0.5):
            if fine[tree.nodes[win].parent] and fine[win] != fine[lose]:
                mixed.append(fine[win])
    return {
        "right_with_wrong_steps": 1 - statistics.fmean(right),
        "q_of_sound": statistics.fmean(q_values[True]),
        "q_of_unsound": statistics.fmean(q_values[False]),
        "unsound_with_positive_q": statistics.fmean(q > 0 for q in q_values[False]),
        "mixed_pairs": len(mixed),
        "sound_preferred": statistics.fmean(mixed),
    }


def sound_nodes(tree: Tree, tokenizer: StepTokenizer) -> list[bool]:
    """Of each node, whether all steps down to it are sound; the root is."""
    texts = [tokenizer.tokenizer.decode(node.tokens) for node in tree.nodes]
    found = [True]
    for index in range(1, len(tree.nodes)):
        text = "".join(texts[step] for step in tree.path(index))
        found.append(all(sound(tree.question, text)))
    return found


# -------------------------------------------------------------------------------------- the command


def measure_row(table: str, row: str, seed: int, out: Path) -> dict:
    """The line of a cell, without its commit."""
    flags = TABLES[table][row]
    size = ""
    if flags and flags[0] == "--size":
        size = flags[1]
        flags = flags[2:]
    train.TINY.update(TINY | SIZES.get(size, {}))
    common = COMMON.get(table, [])
    base, taken = start(seed, out, size or (table if common else ""), common)
    folder = out / f"{table}-{row.replace(' ', '-').replace(',', '')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # cells are short: an interrupted one begins anew
    found = measure(seed, flags, folder, base, taken, common)
    return {"flags": flags, **found}


def print_cell(title: str, found: dict):
    """Print the figures of a cell."""
    figures = [f"{name} {100 * value:.1f}" for name, value in found["figures"].items()]
    siblings = [f"{found[key] or 0:.3f}" for key in ("siblings_own", "siblings_fixed")]
    print(
        f"\n{title}: {', '.join(figures)}; siblings {' '.join(siblings)}; "
        f"{found['training_seconds']:.0f} s",
        flush=True,
    )


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs = Path("runs/experiments")
    parser.add_argument("--out", type=Path, default=runs, help="folder of the runs")
    results_help = "file of results; a cell that stands in it is not measured again"
    parser.add_argument("--results", type=Path, default=RESULTS, help=results_help)
    config = parser.parse_args()
    commit = head_commit()[:7]
    lines = config.results.read_text().splitlines() if config.results.exists() else []
    done = {(line["table"], line["row"], line["seed"]) for line in map(json.loads, lines)}
    for seed in config.seeds:
        for row in TABLES[config.table]:
            if config.rows and row not in config.rows:
                continue
            title = f"{config.table}, {row}, seed {seed}"
            if (config.table, row, seed) in done:
                print(f"{title}: stands in {config.results}")
                continue
            found = measure_row(config.table, row, seed, config.out)
            mark = {"table": config.table, "row": row, "seed": seed, "commit": commit}
            append(config.results, json.dumps({**mark, **found}) + "\n")
            print_cell(title, found)


if __name__ == "__main__":
    run_command(main)
