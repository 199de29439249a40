"""A pretrained model learns from its own search, on questions people ask: every table of it.

    python experiments/real.py --model DIR --data-dir FOLDER --out runs/real [--minutes 60]
                                            run it again and again, until it prints "done"
    python experiments/real.py --out runs/real --table
                                            what has been measured so far

The model learns GSM8K's worked solutions (SFT). It then searches questions of MAWPS and SVAMP with
nothing but their answers, and each row of the table trains the same SFT model on the same trees.
Questions that differ in their numbers alone are in the same part: training, validation or test.

All work is done by train.py, mcts.py and eval.py, as `pieces` lists it; each piece is resumed where
it stopped. When its minutes are over, a piece is asked to stop. `--list` prints the commands.
`--tiny` takes a few questions and steps, to see that it runs.
"""

import argparse
import json
import math
import re
import shlex
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import load_questions
from experiments.gsm8k import within
from support.files import publish, read_json, write_json
from support.flags import run_command

QUESTIONS = "mawps:singleop mawps:addsub mawps:multiarith svamp:test"
PARTS = ("test",) * 3 + ("valid",) + ("search",) * 6  # of ten questions
JUDGED = 200  # questions of the validation part whose trees V is measured on
SFT = "--sft-batch 16 --no-recompute --save-every 50 --rounds 0"
FIRST = "--sft-steps 500 --sft-lr 2e-4"  # SFT of the pretrained model
LONGER = "--sft-steps 200 --sft-lr 1e-5"  # row sft-longer: as many steps as a round, or a few more
TUNE = "--tune-batch 16 --tune-epochs 2 --tune-lr 1e-5 --no-recompute --save-every 20 --rounds 1"
LIMITS = "--max-depth 12 --max-step-tokens 96 --max-tokens 1024 --tree-tokens 4096"
SEARCH = f"--simulations 12 --expand-width 4 {LIMITS}"
FEW = "--test-limit 8"  # train.py's own table is not used
STRATEGIES = ("greedy", "majority:5", "best:5", "beam:1,5", "beam:3,5")
TINY = {  # in place of these flags
    "--sft-steps": 2,
    "--sft-batch": 2,
    "--tune-batch": 2,
    "--tune-epochs": 1,
    "--simulations": 2,
    "--test-limit": 1,
    "--limit": 4,
}
ROWS = {  # row -> flags of train.py; None: worked solutions again
    "sft-longer": None,
    "rft": "--objective rft",
    "dpo": "--objective dpo",
    "step-dpo": "--objective step-dpo",
    "alphamath": "--objective alphamath",
    "svpo": "--objective svpo",
    "no-margin": "--margin-weight 0",
    "no-squared-error": "--mse-weight 0",
    "grpo": "--objective grpo",
}
SEEDS = {"rft": 3, "alphamath": 3, "svpo": 3}  # how many of each row; others: 1
TWICE = ("rft", "svpo")  # rows with a second round


# --------------------------------------------------------------------------------------- questions


def part_of(text: str) -> str:
    """The part that a question belongs to, by its words without the numbers."""
    words = re.sub(r"\d+(?:[.,]\d+)*", "0", " ".join(text.lower().split()))
    return PARTS[zlib.crc32(words.encode()) % len(PARTS)]


def cut_questions(folder: Path, data_dir: str):
    """Write the questions of each part, with answers only."""
    if (folder / "test.jsonl").exists():
        return
    parts = {part: [] for part in PARTS}
    for question in load_questions(QUESTIONS, data_dir=data_dir):
        row = {"id": question.id, "question": question.text, "answer": question.answer}
        parts[part_of(question.text)].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("search", "valid", "test"):  # a folder that has the last one is complete
        text = "".join(json.dumps(row) + "\n" for row in parts[part])
        publish(folder / f"{part}.jsonl", lambda partial, text=text: partial.write_text(text))
    print(", ".join(f"{part} {len(rows)}" for part, rows in parts.items()), "questions")


# ------------------------------------------------------------------------------------------ pieces


def pieces(config) -> Iterator[tuple[str, str]]:
    """(name, command) of all that is to be done, in order."""
    out = config.out
    gsm8k = f"--data gsm8k:train --test-data gsm8k:test --data-dir {config.data_dir} {FEW}"
    yield "sft", f"train.py --model {config.model} {gsm8k} {SFT} {FIRST} {LIMITS} --out {out}/sft"
    sft = out / "sft" / "sft"
    valid = out / "questions" / "valid.jsonl"
    judged = out / "judged.jsonl"
    yield (
        "judged trees",
        f"mcts.py --model {sft} --data {valid} --limit {JUDGED} {SEARCH} --no-leaf-value "
        f"--out {judged}",
    )
    yield from answers(config, "sft", sft)
    search = f"--data {out}/questions/search.jsonl {SEARCH}"
    round_ = f"{search} --test-data {valid} {FEW} {TUNE}"
    for seed in range(max(SEEDS.values())):
        trees = out / f"trees-{seed}.jsonl"
        yield f"trees {seed}", f"mcts.py --model {sft} {search} --seed {seed} --out {trees}"
        for row, flags in ROWS.items():
            if seed >= SEEDS.get(row, 1):
                continue
            name = f"{row}-{seed}"
            if flags is None:
                words = f"{gsm8k} {SFT} {LONGER} {LIMITS}"
            else:
                words = f"{round_} {flags} --seed {seed}"
                words += "" if row == "grpo" else f" --trees {trees}"
            yield name, f"train.py --model {sft} {words} --out {out}/{name}"
            yield from answers(config, name, out / name / ("sft" if flags is None else "round1"))
    for row in TWICE:
        name = f"{row}-twice-0"
        words = f"--model {out}/{row}-0/round1 {round_} {ROWS[row]} --seed 10"
        yield name, f"train.py {words} --out {out}/{name}"
        yield from answers(config, name, out / name / "round1")


def answers(config, name: str, model: Path) -> Iterator[tuple[str, str]]:
    """The pieces that measure a model: on the test questions, on GSM8K's, and on trees."""
    common = f"eval.py --model {model} {LIMITS} --data-dir {config.data_dir}"
    results = config.out / "results"
    yield (
        f"{name} answers",
        f"{common} --data {config.out}/questions/test.jsonl --strategy {' '.join(STRATEGIES)} "
        f"--trees {config.out}/judged.jsonl --json {results}/{name}.json",
    )
    yield (
        f"{name} on gsm8k",
        f"{common} --data gsm8k:test --strategy greedy --json {results}/{name}-gsm8k.json",
    )


def tiny(command: str) -> str:
    """A command with the flags of TINY."""
    words = command.split()
    for place, word in enumerate(words[:-1]):
        if word in TINY:
            words[place + 1] = str(TINY[word])
    if "--limit" not in words:
        words += ["--limit", str(TINY["--limit"])]
    return " ".join(words)


def run(config):
    """Go on with the pieces until the minutes are over."""
    end = time.monotonic() + 60 * config.minutes
    cut_questions(config.out / "questions", config.data_dir)
    (config.out / "results").mkdir(exist_ok=True)
    file = config.out / "done.json"  # piece -> its seconds, over all tries
    done = read_json(file) if file.exists() else {}
    for name, command in pieces(config):
        spent = done.get(name, {"seconds": 0, "done": False})
        if spent["done"]:
            continue
        command = tiny(command) if config.tiny else command
        print(f"\n{name}: python {command}", flush=True)
        begin = time.monotonic()
        script, *words = shlex.split(command)
        ended = within([ROOT / script, *words], end, grace=120)
        seconds = spent["seconds"] + time.monotonic() - begin
        done[name] = {"seconds": round(seconds), "done": ended, "command": command}
        write_json(file, done)
        if not ended:
            print("not done; run the same command again")
            return
    print("done")


# ------------------------------------------------------------------------------------------- table


def table(config):
    """Print what has been measured, as Markdown: means over seeds, and differences to sft."""
    results = config.out / "results"
    found = {}  # row -> its files
    for file in sorted(results.glob("*.json")):
        if not file.stem.endswith("-gsm8k"):
            row = re.sub(r"-\d+$", "", file.stem)
            found.setdefault(row, []).append(file)
    heads = [*STRATEGIES, "gsm8k greedy", "siblings"]
    print("| row | seeds | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 2) + "|")
    for row, files in found.items():
        cells = [figures(file) for file in files]
        texts = []
        for head in heads:
            values = [cell[head] for cell in cells if cell.get(head) is not None]
            texts.append(f"{statistics.fmean(values):.1f}" if values else "-")
        print(f"| {row} | {len(files)} | " + " | ".join(texts) + " |")
    print("\ngreedy answers against those of sft, question by question, in points:")
    base = greedy_answers(results / "sft.json")
    for row, files in found.items():
        if row == "sft":
            continue
        differences = [paired(base, greedy_answers(file)) for file in files]
        print(f"{row}: " + ", ".join(f"{mean:+.1f} +- {error:.1f}" for mean, error in differences))


def figures(file: Path) -> dict[str, float | None]:
    """The figures of a model, in %."""
    row = read_json(file)
    found = {answer["strategy"]: 100 * answer["accuracy"] for answer in row["answers"]}
    if "siblings" in row:
        accuracy = row["siblings"]["accuracy"]
        found["siblings"] = None if accuracy is None else 100 * accuracy
    harder = file.with_name(f"{file.stem}-gsm8k.json")
    if harder.exists():
        found["gsm8k greedy"] = 100 * read_json(harder)["answers"][0]["accuracy"]
    return found


def greedy_answers(file: Path) -> dict[str, bool]:
    """Whether each question was answered rightly, greedily."""
    answers = next(row for row in read_json(file)["answers"] if row["strategy"] == "greedy")
    return {answer["id"]: answer["correct"] for answer in answers["answers"]}


def paired(before: dict[str, bool], after: dict[str, bool]) -> tuple[float, float]:
    """The mean difference over the same questions, in points, and its standard error."""
    gaps = [100 * (after[identity] - right) for identity, right in before.items()]
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--data-dir", help="folder with gsm8k, mawps and svamp, NAME/SPLIT.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--tiny", action="store_true", help="a few questions and steps")
    config = parser.parse_args()
    if config.table:
        table(config)
        return
    if not config.model or not config.data_dir:
        parser.error("--model and --data-dir are needed")
    if config.list:
        for _, command in pieces(config):
            print(f"python {command}")
        return
    run(config)


if __name__ == "__main__":
    run_command(main)
