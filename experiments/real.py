"""A pretrained model learns from its own search, on questions people ask: every table of it.

    python experiments/real.py --model DIR --data-dir FOLDER --out runs/real [--minutes 60]
                                            run it again and again, until it prints "done"
    python experiments/real.py --table      the tables, from experiments/real.jsonl

The model learns GSM8K's worked solutions (SFT). It then searches questions of MAWPS and SVAMP with
nothing but their answers, and each row of the table trains the same SFT model for about 100 steps:
on the same trees, on more worked solutions (sft-longer), or on samples of its own (grpo). V is not
trained when the first trees grow, so it has no part in them, except in those of one row.
Questions that differ in their numbers alone are in the same part: training, validation or test.
The learning rate of each row is the one whose model, after a short round on the first trees,
answers most questions of the validation part.

All work is done by train.py, mcts.py, eval.py and found.py, as `pieces` lists it; each piece is
resumed where it stopped. When its minutes are over, a piece is asked to stop. What each has
measured is written to OUT/real.jsonl. `--list` prints the commands. `--tiny` takes a few questions
and steps, to see that it runs.
"""

import argparse
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from data import load_questions
from support.files import head_commit, read_json, write_json, write_lines
from support.flags import InputError, run_command
from support.tables import Table

QUESTIONS = "mawps:singleop mawps:addsub mawps:multiarith svamp:test"
PARTS = ("test",) * 3 + ("valid",) + ("search",) * 6  # of ten questions
JUDGED = 200  # questions of the validation part whose trees V is measured on
SEARCHED = 800  # questions of the training part that are searched
SHORT = 300  # of these, in a round that is trained to choose a learning rate
SFT = "--no-recompute --save-every 50 --rounds 0"
FIRST = "--sft-batch 16 --sft-steps 500 --sft-lr 2e-4"  # SFT of the pretrained model
LIMITS = "--max-depth 12 --max-step-tokens 96 --max-tokens 1024 --tree-tokens 4096"
# no right answer of the SFT model has more tokens, and all wait for the longest one
ANSWERING = LIMITS.replace("--max-tokens 1024", "--max-tokens 448")
SEARCH = f"--simulations 12 --expand-width 4 {LIMITS}"
TEMPERATURES = ("0.6", "0.8", "1.0")  # of search, to choose from
HOT = "--search-temperature 0.8"  # chosen: most questions solved, and most pairs
FIRST_TREES = "--no-leaf-value"  # V is not trained yet
BATCH = 8  # trees of an optimizer step
TUNE = f"--tune-batch {BATCH} --tune-epochs 1 --no-recompute --save-every 20 --rounds 1"
FEW = "--test-limit 1"  # train.py's own table is not used
SQUARED = "--mse-weight 0.1"  # AlphaMath's; better than 1 on the built-in task (ladder.py)
MARGIN = "--margin-weight 0.05"
RATES = ("5e-6", "2e-5", "8e-5")  # peak learning rates to choose from
ROWS = {  # row -> flags of train.py; None: worked solutions again, as many steps as trees give
    "sft-longer": None,
    # one tree in three has right and wrong ends, so three passes are as many steps as the others'
    "rft": "--objective rft --tune-epochs 3",
    "dpo": "--objective dpo --tune-epochs 3",
    "alphamath": f"--objective alphamath {SQUARED}",
    "svpo": f"--objective svpo {SQUARED} {MARGIN}",
    "step-dpo": "--mse-weight 0 --margin-weight 0",  # with the SFT term
    "no-margin": f"{SQUARED} --margin-weight 0",
    "no-squared-error": f"--mse-weight 0 {MARGIN}",
    "more-value": "--mse-weight 1 --margin-weight 0.5",
    "good-steps": f"--objective svpo-good-steps {SQUARED} {MARGIN}",
    "no-fit": f"{SQUARED} {MARGIN} --no-fit-value",
    # on trees that an untrained V helped
    "alphamath-v-in-q": f"--objective alphamath {SQUARED} --no-fit-value",
    "grpo": "--objective grpo --max-tokens 320",  # few solutions are longer, and all wait for them
}
PARTS_OF_SVPO = ["step-dpo", "no-margin", "no-squared-error", "more-value", "good-steps", "no-fit"]
# rows with the rate of another one
RATE_OF = dict.fromkeys(PARTS_OF_SVPO, "svpo") | {"alphamath-v-in-q": "alphamath"}
V_IN_Q = ("alphamath-v-in-q",)
# The rates of these were chosen on the trees that an untrained V helped, before we knew better.
CHOSEN_ON_THOSE = ("rft", "dpo")
SEEDS = {"sft-longer": 3, "rft": 3, "alphamath": 3, "svpo": 3}  # how many of a row; others: 1
TWICE = ("rft", "svpo")  # rows with a second round
STRATEGIES = ("greedy", "beam:1,5", "majority:5", "best:5", "beam:3,5")
ON_GSM8K = ("sft", "sft-longer-0", "rft-0", "alphamath-0", "svpo-0")  # harder questions, greedily
ANSWERED_IN_FULL = ("alphamath-0", "svpo-0")  # with all STRATEGIES
BY_VOTE = ("rft-0",)  # V is not trained: greedily and by majority
VALUED = ("alphamath", "svpo", *PARTS_OF_SVPO[1:], *V_IN_Q)  # V is trained: SBS(1,5) too
TINY = {  # in place of these flags
    "--sft-steps": 2,
    "--sft-batch": 2,
    "--tune-batch": 2,
    "--simulations": 2,
    "--limit": 4,
    "--roll-outs": 2,
}


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
        write_lines(folder / f"{part}.jsonl", parts[part])
    print(", ".join(f"{part} {len(rows)}" for part, rows in parts.items()), "questions")


# ------------------------------------------------------------------------------------------ pieces

Pieces = Iterator[tuple[str, str]]  # name and command


def pieces(config) -> Pieces:
    """(name, command) of all that is to be done, in order."""
    out = config.out
    sft = out / "sft" / "sft"
    valid = out / "questions" / "valid.jsonl"
    yield "sft", f"train.py --model {config.model} {worked(config)} {FIRST} --out {out}/sft"
    grow = f"mcts.py --model {sft} --data {valid} {SEARCH} --no-leaf-value"
    for temperature in TEMPERATURES:
        trees = f"{out}/temperature-{temperature}.jsonl"
        words = f"--limit 100 --search-temperature {temperature} --out {trees}"
        yield f"temperature {temperature}", f"{grow} {words}"
        words = f"--model {sft} --trees {trees} --json {out}/found/temperature-{temperature}.json"
        yield f"found at {temperature}", f"found.py trees {words}"
    yield "judged trees", f"{grow} --limit {JUDGED} {HOT} --out {out}/judged.jsonl"
    for seed in range(max(SEEDS.values())):
        yield f"trees {seed}", search_command(config, seed)
        if seed == 0:
            yield "trees with V", search_command(config, seed, leaf_value=True)
            yield from answers(config, "sft", sft)
            for name in ("trees-0", "trees-0-with-v"):
                words = f"--model {sft} --trees {out}/{name}.jsonl --roll-outs 32"
                yield f"found {name}", f"found.py trees {words} --json {out}/found/{name}.json"
            yield from choices(config)
        for row in ROWS:
            if seed < SEEDS.get(row, 1):
                name = f"{row}-{seed}"
                settings = (config, row, seed, chosen(config, row), out / name)
                yield name, round_command(*settings, leaf_value=row in V_IN_Q)
                yield from answers(config, name, last_stage(out / name, row))
    for row in TWICE:
        name = f"{row}-twice-0"
        first = out / f"{row}-0" / "round1"
        rate = chosen(config, row)
        yield name, round_command(config, row, 10, rate, out / name, start=first)
        yield from answers(config, name, out / name / "round1")
    for name in ("pretrained", "sft", *(f"{row}-0" for row in TWICE)):
        folder = {"pretrained": config.model, "sft": sft}.get(name, out / name / "round1")
        words = f"--model {folder} --data-dir {config.data_dir} --json {out}/found/{name}.json"
        yield f"{name} perplexity", f"found.py perplexity {words}"


def worked(config) -> str:
    """Flags of train.py for GSM8K's worked solutions."""
    data = f"--data gsm8k:train --test-data gsm8k:test --data-dir {config.data_dir}"
    return f"{data} {FEW} {SFT} {LIMITS}"


def search_command(config, seed: int, leaf_value: bool = False) -> str:
    """mcts.py's search of the training part. With `leaf_value` the untrained V has a part in Q."""
    out = config.out
    words = f"--data {out}/questions/search.jsonl --limit {SEARCHED} --seed {seed} {SEARCH} {HOT}"
    words += "" if leaf_value else f" {FIRST_TREES}"
    return f"mcts.py --model {out}/sft/sft {words} --out {trees_file(config, seed, leaf_value)}"


def trees_file(config, seed: int, leaf_value: bool) -> str:
    return f"{config.out}/trees-{seed}{'-with-v' if leaf_value else ''}.jsonl"


def round_command(
    config,
    row: str,
    seed: int,
    rate: str,
    out: Path,
    limit: int = SEARCHED,
    start: Path | None = None,
    leaf_value: bool = False,
) -> str:
    """train.py's round of a row, on the first `limit` questions.

    It learns from the trees of the SFT model, or searches with the model in `start`, whose V is
    trained. With `leaf_value` these are the trees that an untrained V helped.
    """
    folder = config.out
    if ROWS[row] is None:
        words = f"{worked(config)} --sft-batch {BATCH} --sft-steps {limit // BATCH} --sft-lr {rate}"
    else:
        data = f"--data {folder}/questions/search.jsonl --test-data {folder}/questions/valid.jsonl"
        words = f"{data} {FEW} {SEARCH} {HOT} {TUNE} --tune-lr {rate} {ROWS[row]} --limit {limit}"
        if row != "grpo" and start is None:
            words += f" --trees {trees_file(config, seed, leaf_value)}"
            words += "" if leaf_value else f" {FIRST_TREES}"
    model = start or folder / "sft" / "sft"
    return f"train.py --model {model} {words} --seed {seed} --out {out}"


def last_stage(folder: Path, row: str) -> Path:
    """The model that a row's run ends with."""
    return folder / ("sft" if ROWS[row] is None else "round1")


def answers(config, name: str, model: Path) -> Pieces:
    """What is measured of a model: answers to the test part and GSM8K's, and V on trees."""
    common = f"eval.py --model {model} {ANSWERING} --data-dir {config.data_dir}"
    results = f"{config.out}/results/{name}"
    test = f"--data {config.out}/questions/test.jsonl"
    for strategy in strategies_of(name):
        words = f"{test} --strategy {strategy} --json {results}.{strategy.replace(':', '-')}.json"
        words += f" --trees {config.out}/judged.jsonl" if strategy == "greedy" else ""
        yield f"{name} {strategy}", f"{common} {words}"
    if name in ON_GSM8K:
        words = f"--data gsm8k:test --strategy greedy --json {results}.gsm8k.json"
        yield f"{name} on gsm8k", f"{common} {words}"


def strategies_of(name: str) -> tuple[str, ...]:
    """The strategies that a model answers with."""
    if name in ANSWERED_IN_FULL:
        return STRATEGIES
    if name == "sft":  # V is not trained: what it does to beams, at the lower cost
        return STRATEGIES[:-1]
    if name in BY_VOTE:
        return ("greedy", "majority:5")
    valued = name.rpartition("-")[0].removesuffix("-twice") in VALUED
    return ("greedy", "beam:1,5") if valued else ("greedy",)


# ---------------------------------------------------------------------------------- learning rates


def choices(config) -> Pieces:
    """A short round of each row at each rate, and its answers to the validation part."""
    for row in ROWS:
        if row in RATE_OF:
            continue
        for rate in RATES:
            name = f"{row}-{rate}"
            out = config.out / "choices" / name
            settings = (config, row, 0, rate, out, SHORT)
            on_those = row in CHOSEN_ON_THOSE
            yield f"choice {name}", round_command(*settings, leaf_value=on_those)
            model = last_stage(out, row)
            yield (
                f"choice {name} answers",
                f"eval.py --model {model} {ANSWERING} --data {config.out}/questions/valid.jsonl "
                f"--strategy greedy --json {config.out}/choices/{name}.json",
            )


def valid_accuracy(config, row: str) -> dict[str, float]:
    """Greedy accuracy on the validation part after a short round, for each rate measured."""
    found = {}
    for rate in RATES:
        file = config.out / "choices" / f"{row}-{rate}.json"
        if file.exists():
            found[rate] = read_json(file)["answers"][0]["accuracy"]
    return found


def chosen(config, row: str) -> str:
    """The rate of the best answers (the lowest of equals); the middle one if none is measured."""
    found = valid_accuracy(config, RATE_OF.get(row, row))
    return max(found, key=found.get) if found else RATES[1]


# --------------------------------------------------------------------------------------------- run


def run(config):
    """Go on with the pieces until the minutes are over."""
    end = time.monotonic() + 60 * config.minutes
    cut_questions(config.out / "questions", config.data_dir)
    for folder in ("results", "found", "choices"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    file = config.out / "done.json"  # piece -> its seconds, over all tries
    done = read_json(file) if file.exists() else {}
    for name, command in pieces(config):
        command = tiny(command) if config.tiny else command
        spent = done.get(name, {"seconds": 0, "done": False})
        if spent["done"] and spent["command"] != command:
            print(f"{name}: done before, with other flags: {spent['command']}")
        if spent["done"]:
            continue
        print(f"\n{name}: python {command}", flush=True)
        begin = time.monotonic()
        script, *words = shlex.split(command)
        folder = HERE if (HERE / script).exists() else HERE.parent
        ended = within([folder / script, *words], end, grace=120)
        seconds = spent["seconds"] + time.monotonic() - begin
        mark = {"command": command, "commit": head_commit()[:7]}
        done[name] = {"seconds": round(seconds), "done": ended, **mark}
        write_json(file, done)
        if not ended:
            print("not done; run the same command again")
            return
    print("done")


def within(words: list, end: float, grace: float) -> bool:
    """Run a Python script until it ends or the time is over; returns whether it ended.

    It is asked to stop at `end`, and killed if it has not stopped `grace` seconds later.
    InputError if it fails.
    """
    process = subprocess.Popen([sys.executable, *words])
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if process.returncode:
        status = process.returncode
        raise InputError(f"{words[0]} ended with status {status}; its message stands above")
    return True


def tiny(command: str) -> str:
    """A command with the flags of TINY."""
    words = command.split()
    for place, word in enumerate(words[:-1]):
        if word in TINY:
            words[place + 1] = str(TINY[word])
    if "--limit" not in words:
        words += ["--limit", str(TINY["--limit"])]
    return " ".join(words)


# ------------------------------------------------------------------------------ what was measured


def collect(config) -> list[dict]:
    """A line for all that was measured so far, written to OUT/real.jsonl."""
    done = read_json(config.out / "done.json")
    rows = [answer_line(file) for file in sorted((config.out / "results").glob("*.json"))]
    for row in ROWS:
        rates = valid_accuracy(config, row)
        if rates:
            rows.append({"kind": "choice", "row": row, "valid_greedy": rates})
    for file in sorted((config.out / "found").glob("*.json")):
        rows.append({"kind": "found", "name": file.stem, **read_json(file)})
    seconds = {name: piece["seconds"] for name, piece in done.items() if piece["done"]}
    rows.append({"kind": "seconds", "pieces": seconds})
    write_lines(config.out / "real.jsonl", rows)
    return rows


def answer_line(file: Path) -> dict:
    """What a model answers: of each question, in the order of their ids, 1 if it was right."""
    found = read_json(file)
    answer = found["answers"][0]
    model, _, kind = file.stem.partition(".")
    row, _, seed = model.rpartition("-")
    line = {"kind": "answers", "row": row or model, "seed": int(seed) if row else 0}
    line["strategy"] = "gsm8k greedy" if kind == "gsm8k" else answer["strategy"]
    line |= {key: answer[key] for key in ("sampled_tokens", "seconds", "stated")}
    line["right"] = "".join(str(int(one["correct"])) for one in answer["answers"])
    return line | {key: found[key] for key in ("siblings", "diagnosis") if key in found}


def points(rows: list[dict], row: str, strategy: str) -> dict[int, list[float]]:
    """Seed -> the points of each question under a strategy, 0 or 100."""
    found = {}
    for line in rows:
        if line["kind"] == "answers" and line["row"] == row and line["strategy"] == strategy:
            found[line["seed"]] = [100.0 * int(digit) for digit in line["right"]]
    return found


def ahead(mine: dict[int, list[float]], other: dict[int, list[float]]) -> dict[int, list[float]]:
    """Points ahead of another row, question by question, for the seeds that both have."""
    both = mine.keys() & other.keys()
    return {seed: [a - b for a, b in zip(mine[seed], other[seed])] for seed in sorted(both)}


def start_of(rows: list[dict], row: str, strategy: str) -> dict[int, list[float]]:
    """The points of the SFT model, which every seed of a row starts from."""
    sft = points(rows, "sft", strategy).get(0)
    return {seed: sft for seed in points(rows, row, strategy) if sft}


def estimate(found: dict[int, list[float]]) -> str:
    """The mean and its standard error: that over questions and that over seeds, added as squares.

    With one seed, the error is that over questions alone, and a star says so.
    """
    if not any(found.values()):
        return "-"
    seeds = list(map(statistics.fmean, found.values()))
    questions = list(map(statistics.fmean, zip(*found.values())))
    error = statistics.stdev(questions) / math.sqrt(len(questions))
    if len(seeds) > 1:
        error = math.hypot(error, statistics.stdev(seeds) / math.sqrt(len(seeds)))
    return f"{statistics.fmean(seeds):.1f} ± {error:.1f}" + "*" * (len(seeds) == 1)


def names_of(rows: list[dict]) -> list[str]:
    """The rows that have answers, in the order of the pieces."""
    measured = {line["row"] for line in rows if line["kind"] == "answers"}
    order = ["sft", *ROWS, *(f"{row}-twice" for row in TWICE)]
    return [name for name in order if name in measured]


COLUMNS = {  # heading -> strategy
    "greedy": "greedy",
    "SBS(1,5)": "beam:1,5",
    "majority@5": "majority:5",
    "best of 5": "best:5",
    "SBS(3,5)": "beam:3,5",
    "GSM8K, greedy": "gsm8k greedy",
}


def answers_table(rows: list[dict]) -> Table:
    """Accuracy in %, and the share of siblings that V ranks rightly."""
    lines = []
    for name in names_of(rows):
        mine = [line for line in rows if line["kind"] == "answers" and line["row"] == name]
        cells = [estimate(points(rows, name, strategy)) for strategy in COLUMNS.values()]
        ranked = [line["siblings"]["accuracy"] for line in mine if "siblings" in line]
        ranked = [share for share in ranked if share is not None]
        cells.append(f"{statistics.fmean(ranked):.3f}" if ranked else "-")
        lines.append([name, str(len({line["seed"] for line in mine})), *cells])
    return Table(["row", "seeds", *COLUMNS, "siblings, V"], lines)


def differences_table(rows: list[dict]) -> Table:
    """Points ahead of other rows and of greedy answers, question by question."""
    lines = []
    for name in names_of(rows):
        if name == "sft":
            continue
        greedy, beam = points(rows, name, "greedy"), points(rows, name, "beam:1,5")
        pairs = [
            (greedy, start_of(rows, name, "greedy")),
            (greedy, points(rows, "svpo", "greedy")),
            (beam, points(rows, "svpo", "beam:1,5")),
            (beam, greedy),
            (points(rows, name, "gsm8k greedy"), start_of(rows, name, "gsm8k greedy")),
        ]
        lines.append([name, *(estimate(ahead(*pair)) for pair in pairs)])
    headings = ["greedy - sft's", "greedy - svpo's", "SBS(1,5) - svpo's", "SBS(1,5) - greedy"]
    return Table(["row", *headings, "GSM8K - sft's"], lines)


def choices_table(rows: list[dict]) -> Table:
    """Greedy accuracy on the validation questions in %, for each learning rate."""
    found = {line["row"]: line["valid_greedy"] for line in rows if line["kind"] == "choice"}
    lines = []
    for name, rates in found.items():
        if name not in RATE_OF:
            cells = [f"{100 * rates[rate]:.1f}" if rate in rates else "-" for rate in RATES]
            lines.append([name, *cells])
    return Table(["row", *RATES], lines)


def hours_table(rows: list[dict]) -> Table:
    """Hours of each kind of work."""
    seconds = next(line["pieces"] for line in rows if line["kind"] == "seconds")
    kinds = {"SFT": 0, "search": 0, "choice of rates": 0, "rounds": 0, "answers": 0, "other": 0}
    for name, spent in seconds.items():
        kinds[kind_of(name)] += spent
    return Table(["work", "hours"], [[kind, f"{kinds[kind] / 3600:.1f}"] for kind in kinds])


def kind_of(piece: str) -> str:
    """The kind of work that a piece is."""
    first, _, rest = piece.partition(" ")
    if first in ("choice", "temperature"):
        return "choice of rates" if first == "choice" else "search"
    if first in ("trees", "judged"):
        return "search"
    if first == "found" or rest == "perplexity":
        return "other"
    return "answers" if rest else "SFT" if piece == "sft" else "rounds"


def blocks(rows: list[dict]) -> tuple[dict[str, str], dict[str, str]]:
    """The tables of RESULTS.md and of experiments/tables.md, by the names of their marks."""
    answered, ahead_of = answers_table(rows), differences_table(rows)
    full = {
        "real": answered.markdown(),
        "real-differences": ahead_of.markdown(),
        "real-choices": choices_table(rows).markdown(),
        "real-hours": hours_table(rows).markdown(),
    }
    headings = ["greedy", "greedy - sft's", "SBS(1,5)", "SBS(1,5) - greedy"]
    differences = {name: cells for name, *cells in ahead_of.lines}
    lines = []
    for name, _, greedy, beam, *_ in answered.lines:
        to_sft, *_, to_greedy, _ = differences.get(name, ["-"] * 5)  # sft itself has none
        lines.append([name, greedy, to_sft, beam, to_greedy])
    return {"real": Table(["row", *headings], lines).markdown()}, full


def show_tables(rows: list[dict]):
    for name, table in blocks(rows)[1].items():
        print(f"\n{name}\n\n{table}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--data-dir", help="folder with gsm8k, mawps, svamp and math")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--table", nargs="?", type=Path, const=HERE / "real.jsonl", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--tiny", action="store_true", help="a few questions and steps")
    config = parser.parse_args()
    if config.table:
        show_tables([json.loads(line) for line in config.table.read_text().splitlines()])
        return
    if not config.model or not config.data_dir:
        parser.error("--model and --data-dir are needed")
    if config.list:
        for _, command in pieces(config):
            print(f"python {command}")
        return
    run(config)
    show_tables(collect(config))


if __name__ == "__main__":
    run_command(main)
