"""Tables of experiments on the built-in task, cell by cell; an interrupted table goes on where it was.

    python experiments/run.py objectives                 or ablation, scale, transfer, compute; --seeds 0 1 2, --rows NAME ... , --out FOLDER
    python experiments/run.py objectives --rows svpo --seeds 0 --results mine.jsonl --out runs/mine       measures a cell again
    python experiments/results.py                        makes the tables and figures of RESULTS.md from what was measured

All cells of a seed start from the same SFT model; those that do not change the search learn from the same trees, grown once. A cell
appends one line to experiments/results.jsonl: table, row, seed, commit, flags, figures, tokens and seconds.
"""
import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import train  # noqa: E402
from data import parse_args, read_trees, run_command, task_tokenizer, write_trees  # noqa: E402
from eval import AnswerConfig, answer_questions, grow_groups, grow_judged, rescore, sibling_accuracy  # noqa: E402
from mcts import Driver, SearchConfig, search_trees  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from support.files import head_commit  # noqa: E402
from svpo import LossConfig, Tree, path, sibling_pairs  # noqa: E402
from tasks.deduction import sound  # noqa: E402
from tasks.questions import load_splits  # noqa: E402
from train import Job, RunConfig, TrainConfig, train_stage  # noqa: E402

RESULTS = HERE / "results.jsonl"
STRATEGIES = ("greedy", "majority:5", "beam:1,5", "beam:3,5")
SAMPLES = 9  # whole solutions a question that take as many tokens as its search with the default flags
STEPS = 1125  # optimizer steps of a round with the default flags: 2 passes over 4,500 trees, 8 a step
TABLES = {  # table -> row -> flags of train.py. "sft" is the common start; a row with --rounds 0 goes on with worked solutions
    "objectives": {
        "sft": None,
        "sft, as long": ["--rounds", "0", "--sft-steps", str(STEPS), "--sft-lr", "5e-4"],
        **{name: ["--objective", name] for name in ("rft", "dpo", "step-dpo", "alphamath", "svpo", "grpo")},
        **{f"{name}, lr 5e-5": ["--objective", name, "--tune-lr", "5e-5"] for name in ("dpo", "step-dpo")},
    },
    "ablation": {
        "svpo": [],
        "no margin": ["--margin-weight", "0"],
        "no squared error": ["--mse-weight", "0"],
        "no SFT term": ["--sft-weight", "0"],
        "no preference term": ["--policy-weight", "0"],
        "values without search": ["samples"],  # Q: mean outcome of the solutions through a step, of SAMPLES a question
        "one pair a parent": ["--pairs", "best"],
        "any gap": ["--min-gap", "0"],
        "gap of 1": ["--min-gap", "1"],
        **{f"{count} simulations": ["--simulations", str(count)] for count in (4, 64)},
        "3 rounds": ["--rounds", "3"],
        "outcomes only": ["--no-leaf-value"],  # in the search: V has no part in Q
        "ten times the learning rate": ["--tune-lr", "5e-3"],
    },
    "scale": {f"{size}, {name}": ["--size", size, *flags] if flags is not None else ["--size", size, "--rounds", "0", "--sft-steps", "0"]
              for size in ("28 k", "97 k", "666 k") for name, flags in (("sft", None), ("svpo", []))},  # 297 k stands in "objectives"
    "compute": {f"{name}, {passes} pass{'es'[:2 * (passes > 1)]}": ["--objective", name, "--tune-epochs", str(passes)]
                for name, passes in (("grpo", 1), ("grpo", 2), ("rft", 2), ("rft", 4), ("svpo", 2), ("svpo", 4))},
}
TABLES["transfer"] = {"sft": None, **{name: ["--objective", name] for name in ("rft", "alphamath", "svpo")}}
COMMON = {"transfer": ["--data", "deduction", "--sft-questions", "30000", "--sft-batch", "128", "--sft-steps", "1000"]}  # table -> flags of all its rows
SIZES = {  # name -> what differs from train.TINY (297 k parameters)
    "28 k": dict(hidden_size=24, intermediate_size=72, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=12),
    "97 k": dict(hidden_size=40, intermediate_size=120, num_hidden_layers=5, head_dim=10),
    "666 k": dict(hidden_size=96, intermediate_size=288, num_attention_heads=6, num_key_value_heads=3),
}
TINY = dict(train.TINY)
drawn = [0]  # tokens that all drivers have sampled, steps that were merged later included


def count_sampled(self, tick=Driver.tick):
    before = self.sampled_tokens
    tick(self)
    drawn[0] += self.sampled_tokens - before


Driver.tick = count_sampled
SEARCHED = ("--simulations", "--no-leaf-value")  # flags that need trees of their own, as further rounds do


def configure(seed: int, folder: Path, flags: list[str]):
    """The job of a cell with one round where the flags do not say otherwise; its splits."""
    words = ["--seed", str(seed), "--out", str(folder), *([] if "--rounds" in flags else ["--rounds", "1"]), *flags]
    stages = parse_args("", (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig), words)
    splits = load_splits(stages[0])
    return Job(*stages, stages[0].device, *train.check_splits(stages[0], stages[1], stages[2], splits)), splits


def unique_tokens(trees: list[Tree]) -> int:
    """Sampled tokens in trees; a step that was sampled twice counts once."""
    return sum(sum(node.sampled) for tree in trees for node in tree.nodes)


def start(seed: int, out: Path, kind: str = "", common: list[str] = []) -> tuple[Path, dict]:
    """The seed's SFT model and the trees of its first round; made once. Returns their folder, and what the trees took."""
    folder = out / f"seed{seed}{kind.replace(' ', '')}"
    train.main(["--seed", str(seed), "--rounds", "0", "--out", str(folder), *common])
    note = folder / "trees.json"
    if not note.exists():
        job, splits = configure(seed, folder, common)
        drawn[0] = 0
        begin = time.perf_counter()
        trees = list(search_trees(job.load(folder / "sft"), job.tokenizer, splits["search"][0], job.search, seed + 1, "search"))
        write_trees(folder / "trees.jsonl", trees, "w")
        note.write_text(json.dumps({"seconds": time.perf_counter() - begin, "unique_tokens": unique_tokens(trees), "sampled_tokens": drawn[0]}))
    return folder, json.loads(note.read_text())


def count_parameters(size: str) -> int:
    """Of the model that a row's size names; the tiny one where it names none of SIZES."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(task_tokenizer("arithmetic").get_vocab_size(), **(TINY | SIZES.get(size, {}))))
    return sum(parameter.numel() for parameter in model.parameters())


def judge_steps(trees: list[Tree], tokenizer) -> dict:
    """Of searched deductions: how often right answers rest on wrong steps, and what that does to Q and to the pairs."""
    right, q, pairs = [], {True: [], False: []}, []
    for tree in trees:
        fine = [True]
        for index, node in enumerate(tree.nodes[1:], 1):
            text = "".join(tokenizer.tokenizer.decode(tree.nodes[place].tokens) for place in path(tree, index))
            fine.append(all(sound(tree.question, text)))
            if node.visit_count:
                q[fine[-1]].append(node.q_value)
            if node.reward == 1:
                right.append(fine[-1])
        pairs += [(fine[win], fine[lose]) for win, lose, _ in sibling_pairs(tree, min_gap=0.5) if fine[tree.nodes[win].parent]]
    mixed = [win for win, lose in pairs if win != lose]  # of siblings after sound steps only, one sound and one not
    return {"right_with_wrong_steps": 1 - statistics.fmean(right), "q_of_sound": statistics.fmean(q[True]), "q_of_unsound": statistics.fmean(q[False]),
            "unsound_with_positive_q": statistics.fmean(value > 0 for value in q[False]), "mixed_pairs": len(mixed), "sound_preferred": statistics.fmean(mixed)}


def measure(seed: int, flags: list[str] | None, folder: Path, base: Path, taken: dict, common: list[str] = []) -> dict:
    """Train one cell and answer the test questions."""
    samples = flags == ["samples"]
    job, splits = configure(seed, folder, common + ([] if samples else flags or []))
    drawn[0] = 0
    previous, seconds, sampled, tokens, groups = base / "sft", 0.0, 0, 0, []
    grow = train.grow_groups

    def counted(*arguments):
        trees = grow(*arguments)
        groups.append(unique_tokens(trees))
        return trees
    train.grow_groups = counted  # grpo's samples are gone after their step
    folder.mkdir(parents=True, exist_ok=True)
    if flags is not None and (job.run.rounds or job.train.sft_steps):
        numbers = range(1, job.run.rounds + 1) if job.run.rounds else [0]
        for number in numbers:
            stage = folder / f"round{number}"
            stage.mkdir(exist_ok=True)
            if (stage / "config.json").exists():
                raise FileExistsError(f"{stage} is left over from an interrupted cell; remove {folder}")
            shared = number == job.run.rounds == 1 and job.losses.objective != "grpo" and not samples and not any(flag in flags for flag in SEARCHED)
            if shared:
                shutil.copyfile(base / "trees.jsonl", stage / "trees-0.jsonl")
            begin = time.perf_counter()
            if samples:
                write_trees(stage / "trees-0.jsonl", grow_groups(job.load(previous), job.plain, splits["search"][0], job.search, SAMPLES, seed + number), "w")
            train_stage(job, previous, stage, splits, number)
            seconds += time.perf_counter() - begin + (taken["seconds"] if shared else 0)
            sampled += taken["sampled_tokens"] if shared else 0
            tokens += unique_tokens(read_trees(stage / "trees-0.jsonl")) if (stage / "trees-0.jsonl").exists() else 0
            previous = stage
    train.grow_groups = grow
    sampled += drawn[0]
    model = job.load(previous)
    answers = [answer_questions(model, job.tokenizer, splits["test"], name, job.search, job.answering, seed) for name in STRATEGIES]
    own = sibling_accuracy(grow_judged(model, job.tokenizer, splits["valid"], job.search, seed))
    fixed = sibling_accuracy(rescore(model, read_trees(base / "sft" / "valid-trees.jsonl")))
    extra = {}
    if common:
        texts = {question.id: question.text for question in splits["test"]}
        proofs = [(answer["correct"], all(sound(texts[answer["id"]], answer["text"]))) for answer in answers[0]["answers"]]
        extra = {"sound": statistics.fmean(fine for _, fine in proofs), "right_with_wrong_steps": statistics.fmean(not fine for right, fine in proofs if right),
                 "search": judge_steps(read_trees(base / "trees.jsonl"), job.tokenizer)}
    return {**extra, "figures": {row["strategy"]: row["accuracy"] for row in answers}, "questions": len(splits["test"]),
            "siblings_own": own["accuracy"], "siblings_fixed": fixed["accuracy"], "searched_tokens": tokens + sum(groups), "sampled_tokens": sampled,
            "training_seconds": seconds, "answers": {row["strategy"]: {key: row[key] for key in ("sampled_tokens", "seconds")} for row in answers}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results; a cell that stands in it is not measured again")
    config = parser.parse_args()
    commit = head_commit()[:7]
    done = [json.loads(line) for line in config.results.read_text().splitlines()] if config.results.exists() else []
    done = {(row["table"], row["row"], row["seed"]) for row in done}
    for seed in config.seeds:
        for row, flags in TABLES[config.table].items():
            if config.rows and row not in config.rows:
                continue
            if (config.table, row, seed) in done:
                print(f"{config.table}, {row}, seed {seed}: stands in {config.results}")
                continue
            size = flags[1] if flags and flags[0] == "--size" else ""
            flags = flags[2:] if size else flags
            train.TINY.update(TINY | SIZES.get(size, {}))
            common = COMMON.get(config.table, [])
            base, taken = start(seed, config.out, size or (config.table if common else ""), common)
            folder = config.out / f"{config.table}-{row.replace(' ', '-').replace(',', '')}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted cell: cells are short, and begin anew
            found = measure(seed, flags, folder, base, taken, common)
            with open(config.results, "a") as file:
                file.write(json.dumps({"table": config.table, "row": row, "seed": seed, "commit": commit, "flags": flags, **found}) + "\n")
            print(f"\n{config.table}, {row}, seed {seed}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in found["figures"].items())
                  + f"; siblings {found['siblings_own'] or 0:.3f} {found['siblings_fixed'] or 0:.3f}; {found['training_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
